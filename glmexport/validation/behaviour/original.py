"""Answers of the original, in as few passes through it as another model's answers differ from them.

A draft is what the bundle answers. One pass of the original over a draft says at every position what it would have said
itself; up to the first difference, the draft is its greedy answer. From there the bundle drafts again. That is
speculative decoding (Leviathan et al., arXiv 2211.17192) with blocks that are read once a pass for all answers
together: no machine is too small for it, and the answers do not depend on the drafts. A pass computes the tokens that
no pass before it has: what the attention of every block keeps of the others is in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from glmexport.foundation.disk import free_bytes
from glmexport.foundation.progress import Progress
from glmexport.quantization.ranks import Parcel
from glmexport.reference.reference import Reference
from glmexport.validation.behaviour.drafting import FREE, DraftCost, DraftLengths, pass_tokens
from glmexport.validation.behaviour.suffixes import PastFile, Suffix, SuffixStream, kept_bytes, likeliest_next
from glmexport.validation.pieces import UNKEPT, Pieces

#: The function ``draft(index, answer so far, most)`` returns what the bundle would go on with, up to ``most`` tokens or
#: longer.
Draft = Callable[[int, list[int], int], list[int]]


@dataclass(frozen=True)
class Begun:
    """An answer to go on with: the index of its prompt, the tokens so far, and how many more are asked for."""

    index: int
    answer: list[int]
    most: int


#: The function that drafts for several answers at a time, each as a ``Draft`` does.
Drafts = Callable[[Sequence[Begun]], Sequence[list[int]]]

#: The function ``finished(index, answer so far)`` tells whether what follows is of no interest.
Finished = Callable[[int, list[int]], bool]

#: Share of the free space of a disk that may be filled with what is kept of the texts.
_SHARE = 0.5
_STEP = "original-pass"


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
    drafts: Drafts,
    *,
    limits: Sequence[int],
    ends: Collection[int],
    scratch: Path,
    progress: Progress,
    finished: Finished = lambda *_: False,
    together: int | None = None,
    cost: DraftCost = FREE,
    pieces: Pieces = UNKEPT,
) -> VerifiedAnswers:
    """Return the original's greedy answer to each of ``prompts``, each cut at the number of tokens in ``limits``.

    An answer that is ``finished`` is gone on with no further, and may be some tokens longer. Answers are computed in
    groups of so many ``together``, None for all, which the ranks of ``pieces`` share; a rank takes all its groups
    through each block while it is in memory. Of answers that are not finished, what each pass has found is kept. Behind
    a token that the original refuses, new ``drafts`` are asked for where that is worth their ``cost``.
    """
    texts = [_GrowingText(list(prompt), limit, ends) for prompt, limit in zip(prompts, limits, strict=True)]
    size = together or max(1, len(texts))
    spans = [range(start, min(start + size, len(texts))) for start in range(0, len(texts), size)]
    names = [[[texts[index].prompt, texts[index].limit] for index in span] for span in spans]
    dialogue = _Dialogue(reference, drafts, cost, finished, scratch, progress, pieces)

    def compute(absent: Sequence[int]) -> Iterator[tuple[int, Parcel]]:
        # What is kept of every pass takes as much again.
        room = int(free_bytes(scratch) * _SHARE) // (len(spans) * (1 if pieces.directory is None else 2))
        groups = []
        for number in absent:
            own = [texts[index] for index in spans[number]]
            groups.append(dialogue.group(number, names[number], spans[number], own, room, len(spans)))
        unkept = sum(group.unkept for group in groups)
        if unkept:
            progress.remark(
                f"{scratch} has no space for what attention keeps of {unkept} of {len(texts)} answers; "
                "their whole text is computed in every pass."
            )
        for group in dialogue.finish(groups):
            yield group.number, Parcel(facts=vars(group.answers()))

    found = [VerifiedAnswers(**parcel.facts) for parcel in pieces.each("original-answers", names, compute)]
    return VerifiedAnswers(
        [answer for each in found for answer in each.tokens],
        max([0, *(each.passes for each in found)]),
        sum(each.computed for each in found),
        sum(each.needed for each in found),
        sum(each.unkept for each in found),
    )


@dataclass(frozen=True)
class _Dialogue:
    """The passes through the original in which groups of answers grow."""

    reference: Reference
    drafts: Drafts
    cost: DraftCost
    finished: Finished
    scratch: Path
    progress: Progress
    pieces: Pieces

    def group(
        self, number: int, name: Any, span: range, texts: Sequence[_GrowingText], room: int, groups: int
    ) -> _Group:
        """Return the group ``number`` of so many, for whose pasts there is ``room`` in bytes."""
        begun = self.pieces.load(_STEP, [name, 1])
        architecture = self.reference.architecture
        lengths = [len(text.prompt) + text.limit for text in texts]
        lengths = begun.facts["lengths"] if begun else _kept_lengths(lengths, kept_bytes(architecture), room)
        past = PastFile(architecture, lengths, self.scratch)
        drafts = DraftLengths(len(texts), pass_tokens(architecture), self.cost)
        return _Group(number, name, span, texts, lengths, past, drafts, groups, list(range(len(texts))))

    def finish(self, groups: Sequence[_Group]) -> Iterator[_Group]:
        """Go on until all answers are finished, and yield each group as its own are."""
        going = [group for group in groups if group.unfinished]
        yield from (group for group in groups if not group.unfinished)
        while going:
            live = [group for group in going if not self._replay(group)]
            if live:
                self._pass(live)
            for group in going:
                group.leave(self.finished)
                if not group.unfinished:
                    for number in range(group.passes):
                        self.pieces.drop(_STEP, [group.name, number + 1])
                    yield group
            going = [group for group in going if group.unfinished]

    def _replay(self, group: _Group) -> bool:
        """Take the next pass of a group from what is kept of it, if it is there."""
        kept = self.pieces.load(_STEP, [group.name, group.passes + 1])
        if kept is not None:
            group.replay(kept)
        return kept is not None

    def _pass(self, groups: Sequence[_Group]) -> None:
        undrafted = [(group, place) for group in groups for place in group.undrafted()]
        begun = [group.begun(place) for group, place in undrafted]
        for (group, place), draft in zip(undrafted, self.drafts(begun) if begun else (), strict=True):
            group.texts[place].draft = draft
        suffixes = [group.suffixes() for group in groups]
        streams = [
            SuffixStream(self.reference, each, group.past, self.scratch)
            for group, each in zip(groups, suffixes, strict=True)
        ]
        asked = [[group.texts[place].checked + 1 for place in group.unfinished] for group in groups]
        number = groups[0].passes + 1
        wanted = likeliest_next(self.reference, streams, asked, self.progress, f"Original's answers, pass {number}")
        for group, each, tokens in zip(groups, suffixes, wanted, strict=True):
            parcel = group.take(each, tokens)
            self.pieces.save(_STEP, [group.name, group.passes], parcel)


@dataclass
class _Group:
    """Texts that grow together: no number of theirs depends on those of others."""

    number: int
    #: The prompts and limits, on which its answers depend.
    name: Any
    #: The indices of its texts among all.
    span: range
    texts: Sequence[_GrowingText]
    #: The tokens of each text of which something is kept.
    lengths: Sequence[int]
    past: PastFile
    drafts: DraftLengths
    #: The number of groups, which share what a pass costs.
    groups: int
    unfinished: list[int]
    passes: int = 0
    computed: int = 0

    @property
    def unkept(self) -> int:
        """The number of answers of which nothing is kept from pass to pass."""
        return list(self.lengths).count(0)

    def answers(self) -> VerifiedAnswers:
        """Return the answers, and what they took."""
        needed = sum(len(text.prompt) + len(text.answer) for text in self.texts)
        return VerifiedAnswers([text.answer for text in self.texts], self.passes, self.computed, needed, self.unkept)

    def undrafted(self) -> list[int]:
        """Return the unfinished texts of whose drafts nothing is left, and for which new ones are worth their cost."""
        return [place for place in self.unfinished if not self.texts[place].draft and self._worthwhile(place)]

    def begun(self, place: int) -> Begun:
        """Return what to draft for a text."""
        text = self.texts[place]
        most = text.room
        if self.past.keeps(place):
            most = min(most, self.drafts.drafted(place, self._sharing))
        return Begun(self.span[place], text.answer, most)

    def suffixes(self) -> list[Suffix]:
        """Return the tokens of every unfinished text that the next pass computes."""
        return [self.texts[place].suffix(place, self._checked(place)) for place in self.unfinished]

    def _checked(self, place: int) -> int:
        # Where every pass computes the whole text, as few of them as possible are best.
        room = self.texts[place].room
        return min(room, self.drafts.checked(place, self._sharing)) if self.past.keeps(place) else room

    def _worthwhile(self, place: int) -> bool:
        text = self.texts[place]
        if self._checked(place) < 2:
            return False
        # The first draft is there already, and a pass that computes the whole text is dear.
        if not text.answer or not self.past.keeps(place):
            return True
        return self.drafts.worthwhile(place, self._sharing, len(text.prompt) + len(text.answer), text.room)

    @property
    def _sharing(self) -> int:
        """The number of unfinished answers, about, that share what a pass costs."""
        return len(self.unfinished) * self.groups

    def take(self, suffixes: Sequence[Suffix], wanted: Sequence[list[int]]) -> Parcel:
        """Go on with what the original ``wanted``, and return what ``replay`` needs to do the same."""
        rows: list[Tensor | None] = []
        noted = []
        for suffix, tokens in zip(suffixes, wanted, strict=True):
            text = self.texts[suffix.index]
            noted.append([suffix.index, text.draft, text.checked, len(suffix.tokens), tokens])
            self._take(suffix.index, len(suffix.tokens), tokens)
            kept = text.room and not text.ended and self.past.keeps(suffix.index)
            rows.append(self.past.rows(suffix.index, suffix.start, text.kept) if kept else None)
        self.passes += 1
        return Parcel(tuple(rows), {"lengths": list(self.lengths), "texts": noted, "shapes": self.past.shapes})

    def replay(self, kept: Parcel) -> None:
        """Go on as ``take`` did."""
        self.past.shapes = {
            int(layer): [(heads, width) for heads, width in shapes] for layer, shapes in kept.facts["shapes"].items()
        }
        for (place, draft, checked, count, tokens), rows in zip(kept.facts["texts"], kept.tensors, strict=True):
            text = self.texts[place]
            text.draft, text.checked, start = draft, checked, text.kept
            self._take(place, count, tokens)
            if rows is not None:
                self.past.restore(place, start, text.kept, rows)
        self.passes += 1

    def leave(self, finished: Finished) -> None:
        """Leave alone the texts that are finished."""
        self.unfinished = [
            place
            for place in self.unfinished
            if self.texts[place].room
            and not self.texts[place].ended
            and not finished(self.span[place], self.texts[place].answer)
        ]

    def _take(self, place: int, computed: int, tokens: Sequence[int]) -> None:
        self.computed += computed
        self.drafts.see(place, *self.texts[place].take(tokens, self.past.keeps(place)))


class _GrowingText:
    """A prompt, the original's answer so far, and what a draft expects behind it."""

    def __init__(self, prompt: list[int], limit: int, ends: Collection[int]) -> None:
        self.prompt, self.limit, self._ends = prompt, limit, ends
        self.answer: list[int] = []
        self.draft: list[int] = []
        #: Number of the draft's tokens that the pass under way checks.
        self.checked = 0
        #: Number of the text's tokens that need not be computed again.
        self.kept = 0

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
        return Suffix(index, self.kept, [*text[self.kept :], *self.draft[: self.checked]])

    def take(self, wanted: Sequence[int], kept: bool) -> tuple[int, bool]:
        """Go on with what the original ``wanted`` behind the text and each token that was checked.

        Returns how many tokens of the draft it has agreed with, and whether it has refused one.
        """
        found = accepted(self.draft[: self.checked], wanted, self._ends, self.room)
        agreed = next((i for i, (a, b) in enumerate(zip(found, self.draft, strict=False)) if a != b), len(found))
        agreed = min(agreed, len(self.draft))
        refused = agreed < min(len(found), len(self.draft))
        # The last token is what the original wanted itself; nothing was computed of it.
        self.kept = len(self.prompt) + len(self.answer) + len(found) - 1 if kept else 0
        self.answer += found
        self.draft = self.draft[agreed:] if agreed == len(found) else []
        return agreed, refused


def _kept_lengths(lengths: Sequence[int], token_bytes: int, room_bytes: int) -> list[int]:
    """Return ``lengths`` of texts in tokens with 0 for those that find no space in ``room_bytes``."""
    room = room_bytes // token_bytes
    kept = []
    for length in lengths:
        kept.append(length if length <= room else 0)
        room -= kept[-1]
    return kept


def one_at_a_time(draft: Draft) -> Drafts:
    """Return a function that drafts for several answers, one after the other."""
    return lambda begun: [draft(each.index, each.answer, each.most) for each in begun]


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
