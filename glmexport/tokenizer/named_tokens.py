"""Special tokens that a tokenizer's configuration names beside tokenizer.json, as transformers reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_LISTS = ("additional_special_tokens", "extra_special_tokens")
_TABLES = ("extra_special_tokens", "model_specific_special_tokens")


def named_tokens(*tables: Mapping[str, object]) -> dict[str, str]:
    """Return ``bos_token`` and its like by their keys; of several tables the later one prevails."""
    named = {}
    for table in tables:
        for key, value in table.items():
            content = _content(value)
            if key.endswith("_token") and content is not None:
                named[key] = content
    return named


def every_token(*tables: Mapping[str, object]) -> Iterator[str]:
    """Yield every token that ``tables`` name, in lists and by keys: transformers gives an id to each that has none."""
    for table in tables:
        yield from named_tokens(table).values()
        for key in _LISTS:
            listed = table.get(key)
            yield from filter(None, map(_content, listed if isinstance(listed, list) else ()))
        for key in _TABLES:
            by_name = table.get(key)
            yield from filter(None, map(_content, by_name.values() if isinstance(by_name, dict) else ()))


def _content(value: object) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None
