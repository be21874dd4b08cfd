"""Control tokens hold where a chat template writes them; the same characters are mere text in what people wrote.

``<|user|>`` in a message would otherwise end the message and begin another one, in anybody's name. Control tokens are
the special tokens of a vocabulary, and the added ones that are written as tags (``<think>``, ``<tool_call>``) or as a
switch that the template writes (``/nothink``). Added tokens that are words stay tokens wherever they stand.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from glmexport.foundation.errors import InputError

if TYPE_CHECKING:
    import tokenizers

Spans = tuple[tuple[int, int], ...]
"""Begin and end of places in a text, in order."""

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_SWITCH = re.compile(r"/\w+")
#: Characters without a meaning of their own: Unicode's private use area.
_PRIVATE = range(0xE000, 0xF900)
_ESCAPED = re.compile(r"\\u([ef][0-9a-f]{3})")
_THINK, THOUGHT = "<think>", "</think>"


class Rendered(str):
    """A text in which the control tokens at ``control`` hold.

    It can be put together with other text, of which none holds that is not held to hold; other operations on it give a
    plain text, in which nothing is a control token.
    """

    control: Spans

    def __new__(cls, text: str, control: Iterable[tuple[int, int]] = ()) -> Rendered:
        """The text with its spans."""
        made = super().__new__(cls, text)
        made.control = tuple(control)
        return made

    def __getnewargs__(self) -> tuple[str, Spans]:  # type: ignore[override]
        """Return the arguments for a copy."""
        return str(self), self.control

    def __add__(self, other: str) -> Rendered:
        """This and then the other."""
        behind = other.control if isinstance(other, Rendered) else ()
        moved = ((begin + len(self), end + len(self)) for begin, end in behind)
        return Rendered(str(self) + str(other), (*self.control, *moved))

    def __radd__(self, other: str) -> Rendered:
        """The other and then this."""
        return Rendered(other) + self

    def rstrip(self, characters: str | None = None, /) -> Rendered:
        """Return the text without white space at its end."""
        return self.until(len(str(self).rstrip(characters)))

    def until(self, end: SupportsIndex) -> Rendered:
        """Return the first characters of the text."""
        kept = str(self)[:end]
        return Rendered(kept, (span for span in self.control if span[1] <= len(kept)))


class ControlTokens:
    """The control tokens of a ``tokenizer`` whose chat templates are ``templates``.

    Attributes:
        ids: token ids by text.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, templates: Sequence[str]) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self.ids = {
            token.content: id_
            for id_, token in sorted(added.items())
            if token.content and (token.special or _is_control(token.content, templates))
        }
        self._tokenizer = tokenizer
        self._known = frozenset(self.ids.values())
        # Of two that begin at one place the longer one is meant, as in the library.
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._incomplete = frozenset(text[:size] for text in self.ids for size in range(1, len(text)))
        self._longest = max(map(len, self.ids), default=1) - 1
        self._marked: MarkedTokenizer | None = None

    def written(self, text: str) -> Rendered:
        """Return a text all of whose control tokens hold, such as one that a template writes."""
        return Rendered(text, (match.span() for match in self._any.finditer(text)))

    def named(self, value: object) -> bool:
        """Return whether the name of a control token is in a text of ``value``."""
        return any(self._any.search(text) for text in _texts(value))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, in which those control tokens hold that a ``Rendered`` says.

        Where there are no others in it, all of it is encoded at once, as transformers does.

        Raises:
            InputError: this vocabulary has no other way to write one of them.
        """
        written, held = self.written(text).control, text.control if isinstance(text, Rendered) else ()
        expected = [self.ids[text[begin:end]] for begin, end in held]
        if written == held:
            ids = _ids(self._tokenizer, str(text))
            if self._control(ids) == expected:
                return ids
        if self._marked is None:
            self._marked = MarkedTokenizer(self._tokenizer, self.ids)
        ids = self._marked.encode(text, held)
        if self._control(ids) != expected:
            raise InputError(
                "A text has the name of a control token in it, which this vocabulary cannot write as text.",
                next_step=f"Leave it out; the names are {', '.join(self.ids)}.",
            )
        return ids

    def render(
        self,
        write: Callable[[list[dict[str, object]], dict[str, object]], str],
        messages: Sequence[Mapping[str, object]],
        variables: Mapping[str, object],
        *,
        reads_reasoning: bool,
    ) -> Rendered:
        """Return what a template makes of ``messages`` and ``variables``; only its own control tokens hold.

        The template is given the texts with a character of no meaning in the place of the first one of each control
        token, which the result has again. Where it ``reads_reasoning`` out of the content of an assistant's message,
        the tags of one at its beginning are left to it.
        """
        first = self._stand_ins([*messages, variables])

        def disguised(value: object, kept: frozenset[int] = frozenset()) -> Any:
            return _changed(value, lambda text: self._disguised(text, first, kept))

        written = write(
            [
                {
                    key: disguised(value, _reasoning(message) if reads_reasoning and key == "content" else frozenset())
                    for key, value in message.items()
                }
                for message in messages
            ],
            disguised(variables),
        )
        back = {ord(stand_in): character for character, stand_in in first.items()}
        for stand_in in back:
            # As JSON in ASCII has it.
            written = written.replace(f"\\u{stand_in:04x}", chr(stand_in))
        control = self.written(written).control
        return Rendered(written.translate(back), control)

    def _stand_ins(self, given: object) -> dict[str, str]:
        """Return a character that ``given`` has nowhere, nor its JSON, for each first character of control tokens."""
        taken: set[str] = set()
        for text in _texts(given):
            taken.update(text)
            taken.update(chr(int(code, 16)) for code in _ESCAPED.findall(text))
        firsts = sorted({text[0] for text in self.ids})
        free = [chr(code) for code in _PRIVATE if chr(code) not in taken][: len(firsts)]
        if len(free) < len(firsts):
            raise InputError(
                "The conversation has every character of Unicode's private use area in it.",
                next_step="Leave some of them out.",
            )
        return dict(zip(firsts, free, strict=True))

    def _disguised(self, text: str, first: Mapping[str, str], kept: frozenset[int]) -> str:
        """``text`` with another first character of every control token, and of what may be the beginning of one."""
        end = text.rstrip()
        places = {
            len(end) - size for size in range(1, min(self._longest, len(end)) + 1) if end[-size:] in self._incomplete
        }
        found = self._any.search(text)
        while found:
            places.add(found.start())
            found = self._any.search(text, found.start() + 1)
        if not places - kept:
            return text
        characters = list(text)
        for place in places - kept:
            characters[place] = first[characters[place]]
        return "".join(characters)

    def _control(self, ids: Sequence[int]) -> list[int]:
        return [id_ for id_ in ids if id_ in self._known]


class MarkedTokenizer:
    """A tokenizer whose control tokens have a mark on either side, without which they are text.

    The mark is secret, so that nobody writes it.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, control: Mapping[str, int]) -> None:
        import tokenizers

        self._mark = "".join(chr(secrets.choice(_PRIVATE)) for _ in range(8))
        # Of the same parts, which are shared and not copied.
        self._tokenizer = tokenizers.Tokenizer(tokenizer.model)
        if tokenizer.normalizer is not None:
            self._tokenizer.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            self._tokenizer.pre_tokenizer = tokenizer.pre_tokenizer
        renamed, tokens = {}, []
        for id_, token in sorted(tokenizer.get_added_tokens_decoder().items()):
            own = token.content in control
            text = self._around(token.content) if own else token.content
            renamed[text] = id_
            kept = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
            tokens.append(tokenizers.AddedToken(text, normalized=token.normalized and not own, **kept))
        self._tokenizer.add_tokens(tokens)
        #: Ids are given out anew, so they have to be mapped back.
        self._given = {self._tokenizer.token_to_id(text): id_ for text, id_ in renamed.items()}

    def encode(self, text: str, held: Spans) -> list[int]:
        """Ids of ``text``, in which the control tokens at ``held`` hold."""
        parts, last = [], 0
        for begin, end in held:
            parts += [text[last:begin], self._around(text[begin:end])]
            last = end
        ids = _ids(self._tokenizer, "".join([*parts, text[last:]]))
        return [self._given.get(id_, id_) for id_ in ids]

    def _around(self, text: str) -> str:
        return f"{self._mark}{text}{self._mark}"


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    # The library's encode() gives the same ids, holds the interpreter's lock throughout, and takes longer.
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return list(encoding.ids)


def _is_control(text: str, templates: Sequence[str]) -> bool:
    """Whether an added token that is not special is one for what it looks like."""
    if _SWITCH.fullmatch(text):
        # By itself, and not as the end of a tag.
        return any(re.search(rf"(?<![<\w]){re.escape(text)}\b", template) for template in templates)
    return bool(_TAG.fullmatch(text))


def _texts(value: object) -> Iterator[str]:
    """Every text in lists and tables, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _changed(value: object, change: Callable[[str], str]) -> Any:
    """``value`` with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(item, change) for item in value]
    return value


def _reasoning(message: Mapping[str, object]) -> frozenset[int]:
    """Return where the tags of the reasoning are in the content of an assistant's message that begins with one."""
    content = message.get("content")
    if message.get("role") != "assistant" or message.get("reasoning_content") or not isinstance(content, str):
        return frozenset()
    begin, end = len(content) - len(content.lstrip()), content.find(THOUGHT)
    opened = {begin} if content.startswith(_THINK, begin) else set()
    return frozenset(opened | ({end} if end >= 0 else set()))
