"""The account of a validation: what each of its stages computes and reads, derived from shapes and the plan alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from glmexport.architecture.description import Architecture, Linear
from glmexport.formats.codecs import stored_bits
from glmexport.formats.plan import FormatPlan
from glmexport.foundation.work import Account, Range, Work, added
from glmexport.quantization.account import forward_work
from glmexport.validation.behaviour.drafting import DraftCost, DraftLengths, pass_tokens
from glmexport.validation.behaviour.plane import TOGETHER
from glmexport.validation.conditions import BehaviourPlan, ValidationPlan
from glmexport.validation.noise import batch_tokens

#: Positions whose logits are held at a time: so often the lm_head is read.
_POSITIONS = 128
#: Tokens of a question of each kind: a text to go on with, a chat and a call together, a sentence to translate.
_CONTINUED, _CHAT, _TRANSLATED = 32, 260, 60
#: Seconds of loading two runtimes for the speed, in processes of their own, beside the seconds of its rounds.
_LOADING_SECONDS = 10.0
#: Times that the bundle drafts an answer anew where it does, each from about its middle on, and the passes in which the
#: original then checks all drafts. Each reads the checkpoint, whatever is kept of what came before.
_DRAFTS, _DRAFTED_PASSES = 2, 16
#: Time of a pass for each group of answers beside the products of its few tokens, where reading the checkpoint takes 1:
#: all weights, which are read for the groups together, go from memory to the cores for each.
_GROUP_READS = 0.2
#: The stages that ranks share; the others are left to the first.
SHARED_STAGES = frozenset({"fidelity", "noise floor", "shares", "answers", "weights"})
#: Tokens of the text on which the whole model is compared.
_CHECKED_TOKENS = 64


@dataclass(frozen=True)
class ValidationSize:
    """The extent of a validation within what its plan allows."""

    #: The languages of the evaluation text.
    languages: int
    #: The share of the text that is judged: all of it, or less where every gate is decided before its end.
    fidelity: Range
    #: The tokens that the original computes for each token of the questions and their answers.
    answer_passes: Range
    #: Whether the bundle computes several answers in one step.
    batches: bool = True
    #: The ranks that share it, whose work is counted together: what each does whole is there so often.
    ranks: int = 1


@dataclass(frozen=True)
class _Asked:
    """The questions of a behaviour plan: how many, and the tokens of their prompts and their answers."""

    count: int
    prompts: int
    answers: int
    #: The share of them that are asked alone too where answers are computed together.
    alone: float

    @classmethod
    def planned(cls, plan: BehaviourPlan, languages: int) -> _Asked:
        own = plan.each * _CONTINUED + (_CHAT if plan.each else 0) + plan.translations * _TRANSLATED
        calls = languages * bool(plan.each)
        count = languages * (plan.each + plan.translations) + 2 * calls
        alone = (calls + (count - calls) / plan.alone_every) / max(1, count)
        prompts = languages * own
        if plan.most is not None and plan.most * languages < count:
            prompts, count = prompts * plan.most * languages // count, plan.most * languages
        return cls(count, prompts, count * plan.max_tokens, alone)


def validation_accounts(
    architecture: Architecture, formats: FormatPlan, plan: ValidationPlan, size: ValidationSize, *, whole: bool
) -> tuple[Account, Account]:
    """Return the least and the most work of every stage of a validation.

    Args:
        architecture: the original and the bundle.
        formats: the format of every matrix of the bundle.
        plan: what is measured.
        size: how much of it.
        whole: whether transformers' whole model fits into memory, with which a text is computed once more.
    """
    validated = _Validation(architecture, formats, plan, size)
    least = validated.account(size.fidelity.low, size.answer_passes.low, whole=whole)
    return least, validated.account(size.fidelity.high, size.answer_passes.high, whole=whole)


@dataclass(frozen=True)
class _Validation:
    architecture: Architecture
    formats: FormatPlan
    plan: ValidationPlan
    size: ValidationSize

    def account(self, fidelity: float, passes: float, *, whole: bool) -> Account:
        account: Account = {}
        plan = self.plan
        length = min(plan.longest_text, self.architecture.context_length)
        judged = self.size.languages * plan.positions_per_language * fidelity
        if whole:
            once = self.original(_CHECKED_TOKENS, _CHECKED_TOKENS) + self.reading()
            added(account, "whole model", once + self.compared(_CHECKED_TOKENS, 2))
        # The original block by block, the bundle on the same text, and the logits of both compared. The text of the
        # noise floor passes each block a second time while it is there.
        sample = self.size.languages * min(plan.positions_per_language, length) * max(1, plan.share_texts)
        passed = self.by_few(self.original(judged + sample, length), (judged + sample) / self.batch)
        passed += self.by_each(self.reading())
        added(account, "fidelity", passed + self.bundle(judged) + self.compared(judged, 1))
        added(account, "noise floor", self.compared(sample, 2))
        if plan.share_texts and any(self.formats.form(linear.weight) for _, linear in self.architecture.linears):
            # With the bundle's linears, and with all of its weights, beside each other; each beside the original.
            sides = 2 if self.formats.form(self.architecture.embedding) else 1
            shares = self.by_few(self.original(sides * sample, length), sample / self.batch)
            shares += self.compared(sample, 2 * sides) + self.by_each(self.dequantized())
            added(account, "shares", shares)
        if plan.behaviour:
            added(account, "answers", self.answers(plan.behaviour, passes))
        weights = sum(float(math.prod(shape)) for shape in self.architecture.shapes().values())
        # Every tensor is read of both sides and compared row by row, and its codes are hashed.
        checked = Work(read_values=weights, rounded_weights=3 * weights, hashed_bytes=weights)
        added(account, "weights", checked)
        added(account, "performance", Work(fixed_seconds=plan.speed_seconds + _LOADING_SECONDS))
        return account

    def original(self, positions: float, length: int) -> Work:
        """Return the work of the original's blocks over ``positions``, in texts of that ``length``."""
        work = Work()
        for layer in self.architecture.layers:
            work += forward_work(layer, positions, length)
        return work

    def reading(self) -> Work:
        """Return the work of reading every block once."""
        linears = (linear for layer in self.architecture.layers for linear in layer.linears)
        return Work(read_values=sum(linear.in_features * linear.out_features for linear in linears))

    def compared(self, positions: float, sides: int) -> Work:
        """Return the work of comparing logits, of which the lm_head in fp32 gives those of so many ``sides``."""
        head = self.architecture.lm_head
        size = head.in_features * head.out_features
        reads = sides * positions / min(_POSITIONS, positions) if positions else 0.0
        # Two sides are one comparison, and so is one beside the bundle's.
        comparisons = math.ceil(sides / 2)
        return Work(
            products=2.0 * sides * positions * size,
            read_values=reads * size,
            compared_logits=comparisons * positions * head.out_features,
        )

    def bundle(self, positions: float) -> Work:
        """Return the work of the bundle over texts, many tokens at a time."""
        return Work(bundle_products=2.0 * positions * self.passed)

    def dequantized(self) -> Work:
        return Work(rounded_weights=sum(each.in_features * each.out_features for each, _ in self.shares()))

    def answers(self, plan: BehaviourPlan, passes: float) -> Work:
        """Return the work of answers: the bundle's token by token, and some of them alone; the original's in passes."""
        asked = _Asked.planned(plan, self.size.languages)
        tokens = asked.prompts + asked.answers
        batch = max(1, plan.batch) if self.size.batches else 1
        work = self.answered(asked.prompts, asked.answers, batch)
        if batch > 1:
            work += self.answered(asked.alone * asked.prompts, asked.alone * asked.answers, 1)
        length = tokens // max(1, asked.count)
        rounds = float(plan.max_tokens)
        if self.drafts_again(asked, length, plan.max_tokens, batch):
            work += self.answered(asked.prompts + asked.answers / 2, asked.answers / 2, batch).times(_DRAFTS)
            rounds = min(rounds, _DRAFTED_PASSES)
        theirs = Work(products=2.0 * asked.answers * passes * self.head)
        for layer in self.architecture.layers:
            theirs += forward_work(layer, passes * tokens, length)
        read = (self.reading() + Work(read_values=self.head)).times(rounds)
        groups = 1.0 if self.architecture.routed else math.ceil(asked.count / TOGETHER)
        return work + self.by_few(theirs + read.times(_GROUP_READS * groups), groups) + self.by_each(read)

    def drafts_again(self, asked: _Asked, length: int, most: int, batch: int) -> bool:
        """Return whether the bundle drafts an answer of ``most`` tokens anew behind a token that is refused at first.

        ``length`` is that of a text with its answer; so many answers as ``batch`` says are computed together.
        """
        if not asked.count:
            return False
        drafts = DraftLengths(asked.count, pass_tokens(self.architecture), DraftCost.by_bundle(batch))
        return drafts.worthwhile(0, asked.count, length - most // 2, most // 2)

    def answered(self, prompts: float, answers: float, batch: int) -> Work:
        """Return the work of the bundle for so many tokens of ``prompts`` and ``answers``, ``batch`` answers a step."""
        work = self.bundle(prompts) + Work(bundle_bytes=answers / batch * self.bytes_per_step(batch))
        # The weights that a step has read are multiplied by the tokens of all.
        return work + self.bundle(answers) if batch > 1 else work

    def by_each(self, work: Work) -> Work:
        """Return work that every rank does."""
        return work.times(self.size.ranks)

    def by_few(self, work: Work, pieces: float) -> Work:
        """Return work in so many ``pieces``, which more ranks than those do no faster."""
        return work.times(self.size.ranks / min(self.size.ranks, max(1, math.ceil(pieces))))

    @property
    def batch(self) -> int:
        """The tokens of a batch of texts."""
        return batch_tokens(routed=bool(self.architecture.routed))

    @property
    def head(self) -> int:
        """The number of weights of the lm_head."""
        return self.architecture.lm_head.in_features * self.architecture.lm_head.out_features

    @property
    def passed(self) -> float:
        """The weights that one token is multiplied by."""
        return sum(share * each.in_features * each.out_features for each, share in self.shares())

    def bytes_per_step(self, tokens: int) -> float:
        """Return the bytes of the weights that so many ``tokens`` are multiplied by, as the bundle stores them."""
        read = 0.0
        for each, share in self.shares():
            bits = stored_bits((each.out_features, each.in_features), self.formats.form(each.weight))
            read += (1 - (1 - share) ** tokens) * bits / 8
        return read

    def shares(self) -> Iterator[tuple[Linear, float]]:
        """Yield every linear with the share of the tokens that pass it."""
        for layer in self.architecture.layers:
            for each in layer.linears:
                yield each, layer.mlp.routed_share if each.weight in layer.mlp.routed else 1.0
        yield self.architecture.lm_head, 1.0
