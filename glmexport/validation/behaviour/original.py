"""Answers of the original, in as few passes through it as another model's answers differ from them.

A draft is what the bundle answers. One pass of the original over a draft says at every position what it would have said
itself; up to the first difference, the draft is its greedy answer. From there the bundle drafts again. That is
speculative decoding (Leviathan et al., arXiv 2211.17192) with blocks that are read once a pass for all answers
together: no machine is too small for it, and the answers do not depend on the drafts. A pass computes the tokens that
no pass before it has: what the attention of every block keeps of the others is in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmexport.foundation.disk import free_bytes
from glmexport.foundation.progress import Progress
from glmexport.reference.reference import Reference
from glmexport.validation.behaviour.drafting import DraftLengths, pass_tokens
from glmexport.validation.behaviour.suffixes import PastFile, Suffix, kept_bytes, likeliest_next

#: The function ``draft(index, answer so far, most)`` returns what the bundle would go on with, up to ``most`` tokens or
#: longer.
Draft = Callable[[int, list[int], int], list[int]]

#: The function ``finished(index, answer so far)`` tells whether what follows is of no interest.
Finished = Callable[[int, list[int]], bool]

#: Share of the free space of a disk that may be filled with what is kept of the texts.
_SHARE = 0.5


@dataclass(frozen=True)
class VerifiedAnswers:
    """The original's greedy answers, each with its end token, if it comes, and what they took; 0 if nobody knows."""

    tokens: list[list[int]]
    #: Number of times that the checkpoint was read.
    passes: int = 0
    #: Number of tokens that were computed in all passes together.
    computed: int = 0
    #: Number of tokens of all prompts and answers.
    needed: int = 0
    #: Number of answers of which nothing was kept from pass to pass, as the disk had no space for it.
    unkept: int = 0


def verified_answers(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    draft: Draft,
    *,
    limits: Sequence[int],
    ends: Collection[int],
    scratch: Path,
    progress: Progress,
    finished: Finished = lambda *_: False,
) -> VerifiedAnswers:
    """Return the original's greedy answer to each of ``prompts``, each cut at the number of tokens in ``limits``.

    An answer that is ``finished`` is gone on with no further, and may be some tokens longer.
    """
    architecture = reference.architecture
    texts = [_GrowingText(list(prompt), limit, ends) for prompt, limit in zip(prompts, limits, strict=True)]
    lengths = _kept_lengths([len(text.prompt) + text.limit for text in texts], kept_bytes(architecture), scratch)
    unkept = lengths.count(0)
    if unkept:
        progress.remark(
            f"{scratch} has no space for what attention keeps of {unkept} of {len(texts)} answers; "
            "their whole text is computed in every pass."
        )
    past = PastFile(architecture, lengths, scratch)
    drafts = DraftLengths(len(texts), pass_tokens(architecture))
    unfinished, passes, computed = list(range(len(texts))), 0, 0
    while unfinished:
        passes += 1
        suffixes = []
        for index in unfinished:
            text = texts[index]
            # Where every pass computes the whole text, as few of them as possible are best.
            checked = drafted = text.room
            if past.keeps(index):
                checked = min(checked, drafts.checked(index, len(unfinished)))
                drafted = min(drafted, drafts.drafted(index, len(unfinished)))
            if not text.draft and checked > 1:
                text.draft = draft(index, text.answer, drafted)
            suffixes.append(text.suffix(index, checked))
        computed += sum(len(suffix.tokens) for suffix in suffixes)
        wanted = likeliest_next(
            reference,
            suffixes,
            [texts[index].checked + 1 for index in unfinished],
            past,
            scratch,
            progress,
            f"Original's answers, pass {passes}",
        )
        for index, tokens in zip(unfinished, wanted, strict=True):
            drafts.see(index, *texts[index].take(tokens, past.keeps(index)))
        unfinished = [
            index
            for index in unfinished
            if texts[index].room and not texts[index].ended and not finished(index, texts[index].answer)
        ]
    return VerifiedAnswers(
        [text.answer for text in texts],
        passes,
        computed,
        sum(len(text.prompt) + len(text.answer) for text in texts),
        unkept,
    )


class _GrowingText:
    """A prompt, the original's answer so far, and what a draft expects behind it."""

    def __init__(self, prompt: list[int], limit: int, ends: Collection[int]) -> None:
        self.prompt, self.limit, self._ends = prompt, limit, ends
        self.answer: list[int] = []
        self.draft: list[int] = []
        #: Number of the draft's tokens that the pass under way checks.
        self.checked = 0
        #: Number of the text's tokens that need not be computed again.
        self._kept = 0

    @property
    def room(self) -> int:
        """The number of tokens up to the limit."""
        return self.limit - len(self.answer)

    @property
    def ended(self) -> bool:
        """Whether the answer came to an end by itself."""
        return bool(self.answer) and self.answer[-1] in self._ends

    def suffix(self, index: int, computed: int) -> Suffix:
        """Return the tokens to compute: those that are not kept, and as much of the draft as ``computed`` has room for.

        The text's last token is one of ``computed``. What follows an end token, or the last token of an answer, is not
        asked, so that neither is computed.
        """
        end = next((place for place, token in enumerate(self.draft) if token in self._ends), len(self.draft))
        self.checked = min(max(computed, 1) - 1, end)
        text = [*self.prompt, *self.answer]
        return Suffix(index, self._kept, [*text[self._kept :], *self.draft[: self.checked]])

    def take(self, wanted: Sequence[int], kept: bool) -> tuple[int, bool]:
        """Go on with what the original ``wanted`` behind the text and each token that was checked.

        Returns how many tokens of the draft it has agreed with, and whether it has refused one.
        """
        found = accepted(self.draft[: self.checked], wanted, self._ends, self.room)
        agreed = next((i for i, (a, b) in enumerate(zip(found, self.draft, strict=False)) if a != b), len(found))
        agreed = min(agreed, len(self.draft))
        refused = agreed < min(len(found), len(self.draft))
        # The last token is what the original wanted itself; nothing was computed of it.
        self._kept = len(self.prompt) + len(self.answer) + len(found) - 1 if kept else 0
        self.answer += found
        self.draft = self.draft[agreed:] if agreed == len(found) else []
        return agreed, refused


def _kept_lengths(lengths: Sequence[int], token_bytes: int, directory: Path) -> list[int]:
    """Return ``lengths`` of texts in tokens with 0 for those that find no space in ``directory``."""
    room = int(free_bytes(directory) * _SHARE) // token_bytes
    kept = []
    for length in lengths:
        kept.append(length if length <= room else 0)
        room -= kept[-1]
    return kept


def accepted(draft: Sequence[int], wanted: Sequence[int], ends: Collection[int], room: int) -> list[int]:
    """Return the draft as far as it is what the original ``wanted``, and the token that it wanted next.

    At most ``room`` tokens, and nothing behind one of ``ends``.
    """
    tokens: list[int] = []
    for place, token in enumerate(wanted):
        if len(tokens) == room:
            break
        tokens.append(token)
        if token in ends or place == len(draft) or draft[place] != token:
            break
    return tokens
