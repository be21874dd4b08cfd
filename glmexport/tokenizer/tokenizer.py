"""The checkpoint's tokenizer and chat template: text to token ids exactly as transformers does it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from glmexport.foundation.errors import CheckpointError, InputError
from glmexport.foundation.files import listed, optional, read_json, read_text, unreadable
from glmexport.foundation.untrusted import DocumentLimits, read_regular, scan
from glmexport.tokenizer.control import THOUGHT, ControlTokens, Rendered
from glmexport.tokenizer.library import usable
from glmexport.tokenizer.named_tokens import every_token, named_tokens
from glmexport.tokenizer.templates import TEMPLATE_LIMIT_BYTES, render_template

if TYPE_CHECKING:
    import tokenizers

VOCABULARY = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"

#: GLM's vocabularies have 150,000 tokens and 320,000 merges in 20 MB.
_VOCABULARY_LIMITS = DocumentLimits(values=8_000_000, items=4_000_000, keys=2_000_000)
_CONFIG = "tokenizer_config.json"
_LEGACY_SPECIAL_TOKENS = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_FILES = (
    VOCABULARY,
    _CONFIG,
    _LEGACY_SPECIAL_TOKENS,
    _ADDED,
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    CHAT_TEMPLATE,
)
_MORE_TEMPLATES = "additional_chat_templates"
#: A text that is encoded and decoded when a tokenizer is opened: steps that fail at every text are told then.
_TRIED = "A text, 1 2 3.\nÄ 文本 текст"

#: Steps before the vocabulary that cut a text; they leave nothing out unless they say so.
_LOSSLESS = frozenset({"ByteLevel", "Split", "Digits", "Punctuation"})

GLM_PREFIX = ("[gMASK]", "<sop>")
"""The tokens that every sequence of a GLM model begins with."""


def tokenizer_files(directory: Path) -> list[Path]:
    """Return the tokenizer's files and chat templates that are present in ``directory``.

    Raises:
        CheckpointError: one of them is a link that leaves the directory.
        MachineError: the machine does not let us look.
    """
    more = sorted(path.name for path in (directory / _MORE_TEMPLATES).glob("*.jinja"))
    names = [*_FILES, *(f"{_MORE_TEMPLATES}/{name}" for name in more)]
    return [path for name in names if (path := optional(directory, name, "the tokenizer")) is not None]


class Tokenizer:
    """An encoder of text and conversations that adds no token that is not asked for.

    The name of a control token in a text is text, other than in transformers; what a template writes holds
    (``checkpoint.control``). Of text without such names the ids are those of transformers.

    Attributes:
        files: What a bundle must carry to tokenize the same way.
        prefix: Ids that begin every sequence: ``[gMASK]`` and ``<sop>`` where the vocabulary has both, else
            the bos token where one is named, else none.
        special_tokens: Special tokens and their ids.
        control_tokens: Those, and tags such as ``<think>``, and their ids: what no text can write.
        unlisted: Tokens that the configuration names and tokenizer.json does not have. They are plain text here.
    """

    unlisted: tuple[str, ...] = ()

    def __init__(
        self,
        directory: Path,
        tokenizer: tokenizers.Tokenizer,
        named_tokens: Mapping[str, str],
        templates: Mapping[str, tuple[str, str]],
    ) -> None:
        self._directory = directory
        self._tokenizer = tokenizer
        self._named_tokens = dict(named_tokens)
        self._templates = dict(templates)
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: id_ for id_, token in sorted(added.items()) if token.special}
        self.files = tokenizer_files(directory)
        self.prefix = self._prefix()
        self._control = ControlTokens(tokenizer, [source for _, source in self._templates.values()])
        self.control_tokens = self._control.ids
        #: The prefix written out, which is a prefix in front of a text.
        self._written_prefix = self.written("".join(tokenizer.id_to_token(id_) or "" for id_ in self.prefix))

    @classmethod
    def open(cls, directory: Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint or bundle.

        Raises:
            CheckpointError: no ``tokenizer.json``, one without a vocabulary, or a file that is not usable.
            MachineError: the machine does not let us read a file.
        """
        import tokenizers

        path = optional(directory, VOCABULARY, "every tokenizer")
        if path is None:
            raise CheckpointError(
                f"{directory} has a tokenizer without vocabulary: {VOCABULARY} is not in it.",
                next_step="Download the checkpoint again; if its tokenizer is of an older kind, save it once "
                "with AutoTokenizer.save_pretrained.",
            )
        try:
            with usable(f"{path} is not a tokenizer"):
                data = read_regular(path, _VOCABULARY_LIMITS.size)
                scan(data, _VOCABULARY_LIMITS)
                tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except OSError as error:
            raise unreadable(path, error) from error
        if tokenizer.get_vocab_size(with_added_tokens=False) == 0:
            raise CheckpointError(
                f"{path} is a tokenizer without vocabulary.", next_step="Download the checkpoint again."
            )
        # Both can be stored in the file, and both would change ids silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _optional_json(directory, _CONFIG)
        _check_added_tokens(directory / _CONFIG, config, tokenizer)
        # Where both files are, the older one prevails.
        older = {} if "added_tokens_decoder" in config else _optional_json(directory, _LEGACY_SPECIAL_TOKENS)
        opened = cls(directory, tokenizer, named_tokens(config, older), _templates(directory, config))
        opened.decode(opened.encode(_TRIED))
        opened.unlisted = _unlisted(config, older, directory, tokenizer)
        return opened

    @property
    def remark(self) -> str | None:
        """A remark for somebody who compares with transformers; None where both give the same ids."""
        if not self.unlisted:
            return None
        return (
            f"{self._directory}: the configuration of the tokenizer names {listed(list(self.unlisted))}, which "
            f"{VOCABULARY} does not have. transformers gives them new ids from {self.vocabulary_size} on, which the "
            f"model was not trained with; here they are plain text. Add them to {VOCABULARY} if they are tokens."
        )

    @cached_property
    def vocabulary_size(self) -> int:
        """The highest token id plus one, which is the least length of a row of logits."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def tokens(self) -> int:
        """The number of tokens, which is less than ``vocabulary_size`` where ids are left out."""
        return self._tokenizer.get_vocab_size()

    def has(self, token: int) -> bool:
        """Return whether ``token`` is the id of one of its tokens."""
        return self._tokenizer.id_to_token(token) is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return "default" in self._templates

    @property
    def chat_template(self) -> str | None:
        """The source of the template for conversations without tools; None where there is none."""
        return self._templates["default"][1] if self.has_chat_template else None

    def template_mentions(self, text: str) -> bool:
        """Return whether a chat template has ``text`` in it, such as the tag of a grammar that it writes."""
        return any(text in source for _, source in self._templates.values())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text`` alone, without a prefix; control tokens are where a ``Rendered`` has them.

        Other threads of Python's run meanwhile.

        Raises:
            InputError: the name of a control token cannot be written as text in this vocabulary.
            CheckpointError: the file's steps fail at this text.
        """
        with usable(f"{self._directory / VOCABULARY} cannot encode a text"):
            return self._control.encode(text)

    def sequence(self, text: str, *, judged: bool = False) -> list[int]:
        """Return the token ids of ``text`` behind the prefix, which is not put in twice where the text has it.

        Args:
            text: as ``encode`` takes it.
            judged: whether every token of the text is predicted: where there is no prefix, token 0 then begins.

        Raises:
            InputError: as ``encode`` does.
        """
        prefix = self._written_prefix
        if prefix and not isinstance(text, Rendered) and text.startswith(prefix):
            text = prefix + text[len(prefix) :]
        ids = self.encode(text)
        begun = ids[: len(self.prefix)] == self.prefix
        return [*([] if begun else self.prefix), *ids] if self.prefix else [*([0] * judged), *ids]

    def names_control(self, value: object) -> bool:
        """Return whether the name of a control token is in a text of ``value``, such as messages with tables."""
        return self._control.named(value)

    def written(self, text: str) -> Rendered:
        """Return ``text`` with all of its control tokens: what a program such as a template writes, and no person."""
        return self._control.written(text)

    def fewest_tokens(self, size: int) -> int:
        """Return how many tokens a text of ``size`` bytes has at least; 0 where that is not certain."""
        return -(-size // self._longest) if self._longest else 0

    @cached_property
    def _longest(self) -> int:
        """Bytes of text that a token stands for at most; 0 where one may stand for any number, or none does."""
        from tokenizers.pre_tokenizers import ByteLevel

        steps, first = [], self._tokenizer.pre_tokenizer
        if first is not None:
            described = json.loads(first.__getstate__())
            steps = described.get("pretokenizers", [described])
        added = self._tokenizer.get_added_tokens_decoder().values()
        whole = (
            self._tokenizer.normalizer is None
            and any(step["type"] == "ByteLevel" for step in steps)
            and all(step["type"] in _LOSSLESS and step.get("behavior") != "Removed" for step in steps)
            and all(self._tokenizer.token_to_id(byte) is not None for byte in ByteLevel.alphabet())
            and not any(token.lstrip or token.rstrip for token in added)
        )
        # As texts they are no shorter than the bytes that they stand for.
        return max(len(token.encode()) for token in self._tokenizer.get_vocab()) if whole else 0

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of ``ids``; special tokens are left out unless ``skip_special`` is false."""
        with usable(f"{self._directory / VOCABULARY} cannot decode tokens"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = False,
        **kwargs: object,
    ) -> Rendered:
        """Return the conversation as text, rendered by the checkpoint's chat template in jinja2's sandbox.

        Args:
            messages: Tables with at least ``role`` and ``content``; a value of None counts as absent.
            add_generation_prompt: Whether to open the assistant's next turn.
            kwargs: Variables of the template, such as ``tools``, ``documents`` or ``enable_thinking``.

        Only what the template itself writes is a control token in it: the name of one in a message, tool or document is
        text. An assistant's message may begin with one ``<think>`` reasoning ``</think>``, as templates read it.

        Raises:
            CheckpointError: there is no chat template, or it fails or takes too much; carries the template's own
                message.
            InputError: the conversation is empty, or leaves no character that stands for nothing.
        """
        if not messages:
            raise InputError("The conversation is empty.", next_step="Give at least one message.")
        where, template = self._template(with_tools=kwargs.get("tools") is not None)
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        given = {**kwargs, "add_generation_prompt": add_generation_prompt}

        def write(conversation: list[dict[str, object]], variables: dict[str, object]) -> str:
            return render_template(where, template, conversation, {**self._named_tokens, **variables})

        return self._control.render(write, present, given, reads_reasoning=THOUGHT in template)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = False,
        **kwargs: object,
    ) -> list[int]:
        """Return the token ids of the rendered conversation; takes and raises what ``render`` does.

        The template writes the prefix itself, so none is added.
        """
        return self.encode(self.render(messages, add_generation_prompt=add_generation_prompt, **kwargs))

    def _template(self, *, with_tools: bool) -> tuple[str, str]:
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise CheckpointError(
                f"{self._directory} has no chat template.",
                next_step=f"Use a chat model's checkpoint, or put its {CHAT_TEMPLATE} into the directory.",
            )
        return self._templates["default"]

    def _prefix(self) -> list[int]:
        ids = [self._tokenizer.token_to_id(token) for token in GLM_PREFIX]
        if None not in ids:
            return cast(list[int], ids)
        bos = self._named_tokens.get("bos_token")
        if bos is None:
            return []
        bos_id = self._tokenizer.token_to_id(bos)
        if bos_id is None:
            raise CheckpointError(
                f"{self._directory / _CONFIG}: bos_token is {bos!r}, which {VOCABULARY} does not have.",
                next_step="Download the tokenizer's files again, all from one revision.",
            )
        return [bos_id]


def _optional_json(directory: Path, name: str) -> dict[str, object]:
    path = optional(directory, name, "the tokenizer")
    return {} if path is None else read_json(path)


def _check_added_tokens(path: Path, config: Mapping[str, object], tokenizer: tokenizers.Tokenizer) -> None:
    """Tokens that only the configuration has would get ids from transformers and none from us."""
    added = config.get("added_tokens_decoder", {})
    for id_, fields in added.items() if isinstance(added, dict) else ():
        content = fields.get("content") if isinstance(fields, dict) else None
        if not isinstance(content, str) or str(tokenizer.token_to_id(content)) != id_:
            raise CheckpointError(
                f"{path}: added_tokens_decoder gives {content!r} the id {id_}, and {VOCABULARY} does not.",
                next_step="Download the tokenizer's files again, all from one revision.",
            )


def _unlisted(
    config: Mapping[str, object], older: Mapping[str, object], directory: Path, tokenizer: tokenizers.Tokenizer
) -> tuple[str, ...]:
    """Tokens that only the configuration has: transformers appends them to the vocabulary, and here they are text."""
    added = {} if "added_tokens_decoder" in config else _optional_json(directory, _ADDED)
    named = dict.fromkeys((*every_token(config, older), *added))
    return tuple(token for token in named if tokenizer.token_to_id(token) is None)


def _templates(directory: Path, config: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Return the source and the text of each template by name; files replace all that the configuration has."""
    templates = {}
    for path in tokenizer_files(directory):
        if path.suffix != ".jinja":
            continue
        name = path.stem if path.parent.name == _MORE_TEMPLATES else "default"
        templates[name] = (str(path), read_text(path, TEMPLATE_LIMIT_BYTES))
    return templates or _configured_templates(str(directory / _CONFIG), config.get("chat_template"))


def _configured_templates(where: str, value: object) -> dict[str, tuple[str, str]]:
    """``value`` is one template, a list of tables with name and template, or a table of templates by name."""
    if value is None:
        return {}
    named = {"default": value} if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value}
    if not isinstance(named, dict) or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise CheckpointError(
            f"{where}: chat_template is neither a text nor texts by name.",
            next_step="Download the file again.",
        )
    return {name: (where, template) for name, template in named.items()}
