"""Text of an answer as it becomes certain: whole characters, and nothing of what may yet be a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from glmexport.engine.sampling import Likely
from glmexport.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """A token of an answer, and how likely it was if that was asked for."""

    id: int
    likely: Likely | None = None


@dataclass(frozen=True)
class TextPart:
    """Text that is certain, and the tokens that began in it."""

    text: str
    tokens: tuple[Token, ...]


class Decoder:
    """A decoder of token ids, a token at a time; a character split over tokens comes with the last of them.

    Special tokens are left out, but for ``shown``, which are tags of a grammar.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden = {token for text, token in tokenizer.special_tokens.items() if text not in shown}
        #: The tokens of the last text that was given out, and those behind them.
        self._context: list[int] = []
        self._new: list[int] = []

    @property
    def within_character(self) -> bool:
        """Whether the last tokens are the first part of a character."""
        return bool(self._new)

    def add(self, token: int) -> str:
        """Add ``token``, and return the text that became certain."""
        if token in self._hidden:
            return ""
        self._new.append(token)
        before = self._tokenizer.decode(self._context, skip_special=False)
        text = self._tokenizer.decode([*self._context, *self._new], skip_special=False)
        # A replacement character at the end is the first part of a character still to come.
        if text.endswith("\ufffd"):
            return ""
        self._context, self._new = self._new, []
        return text[len(before) :]


class AnswerText:
    """The text of an answer that a client may see: never a stop string, nor the beginning of one that is completed."""

    def __init__(self, decoder: Decoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        #: Text that may be the beginning of a stop string, and tokens by where in it they begin.
        self._held = ""
        self._waiting: list[tuple[int, Token]] = []
        self.stopped = False

    def add(self, token: Token) -> TextPart:
        """Add ``token``, and return the part that became certain; behind a stop string, nothing."""
        if self.stopped:
            return TextPart("", ())
        self._waiting.append((len(self._held), token))
        self._held += self._decoder.add(token.id)
        end = self._stop()
        if end is not None:
            self.stopped = True
            part = self._release(end)
            self._held, self._waiting = "", []
            return part
        return self._release(len(self._held) - self._possible())

    def finish(self) -> TextPart:
        """Return the rest, which no stop string follows."""
        part = self._release(len(self._held))
        late = tuple(token for _, token in self._waiting)
        self._waiting = []
        return TextPart(part.text, part.tokens + late)

    def _stop(self) -> int | None:
        """Return where the stop string begins that is complete first, however the text came in parts."""
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _possible(self) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _release(self, count: int) -> TextPart:
        text, self._held = self._held[:count], self._held[count:]
        # Where no text is held, a token without text of its own is not held either, unless it begins a character.
        held = self._held or self._decoder.within_character
        ready = [token for at, token in self._waiting if at < count or not held]
        self._waiting = [(at - count, token) for at, token in self._waiting[len(ready) :]]
        return TextPart(text, tuple(ready))
