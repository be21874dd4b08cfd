"""Text in looks: their plan by hand, who goes on, what is reported, and how often a verdict is wrong, by simulation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builds import QUICK, THREADS, Run, Sample

from glmexport.foundation.progress import Silent
from glmexport.foundation.target import Gates
from glmexport.report.compare import compare
from glmexport.report.document import Report, read_report
from glmexport.report.markdown import render_markdown
from glmexport.results.fidelity import Fidelity, LanguageFidelity
from glmexport.results.looks import LanguageLooks, Look
from glmexport.results.record import Verdict
from glmexport.validation.divergence import Divergence
from glmexport.validation.gates import apply_gates, is_decided, most_tests, verdict_of
from glmexport.validation.looks import judge_by_looks, plan_looks
from glmexport.validation.sequential import Stage, levels
from glmexport.validation.statistics import bounds, clustered_mean
from glmexport.validation.texts import EvaluationText
from glmexport.workflows.capture import CaptureOptions, capture_reference
from glmexport.workflows.original import Original

POLICY = Gates(kl_mean_nats=0.05, ln_perplexity_ratio=0.03, top1_agreement=0.9, minimum_positions=1)


def text(language: str, number: int, positions: int) -> EvaluationText:
    ids = torch.arange(positions + 1) + 1000 * number
    return EvaluationText(f"{language}-{number}", language, ids, 1)


def texts(**sizes: Sequence[int]) -> list[EvaluationText]:
    return [text(tag, number, size) for tag, each in sizes.items() for number, size in enumerate(each)]


# The plan


@pytest.mark.parametrize(
    "documents,ends",
    [
        (1, (1,)), (3, (3,)), (4, (3, 4)), (5, (3, 5)), (8, (4, 8)), (9, (3, 5, 9)), (16, (4, 8, 16)),
        (24, (3, 6, 12, 24)), (100, (13, 25, 50, 100)),
    ],
)  # fmt: skip
def test_looks_are_at_halves_of_halves(documents: int, ends: tuple[int, ...]) -> None:
    (plan,) = plan_looks(texts(en=[60] * documents), 1)
    assert plan.ends == ends
    assert plan_looks(texts(en=[60] * documents), 1, full_text=True)[0].ends == (documents,)


def test_a_look_has_enough_positions() -> None:
    """Of 16 documents of 60 positions, 9 are the first to have 500, which is more than half of them."""
    (plan,) = plan_looks(texts(en=[60] * 16), 500)
    assert plan.ends == (9, 16)
    (plan,) = plan_looks(texts(en=[60] * 16), 480)
    assert plan.ends == (8, 16)
    assert plan_looks(texts(en=[60] * 16), 961)[0].ends == (16,)


def test_a_stub_is_no_document() -> None:
    """By hand: 510, 510 and 8 positions are as good as 2.03 documents, with another 510 as 3.03."""
    found = {plan_looks(texts(en=[510, 510, 510, 510 + other, 8]), 1)[0].ends for other in range(12)}
    assert found == {(3, 5), (4, 5)}
    for other in range(12):
        given = texts(en=[510, 510, 510, 510 + other, 8])
        (plan,) = plan_looks(given, 1)
        stub_is_early = any(given[index].positions == 8 for index in plan.order[:3])
        assert plan.ends == ((4, 5) if stub_is_early else (3, 5))


def test_the_order_follows_from_the_text_alone() -> None:
    given = texts(en=[60] * 20, zh=[70] * 20)
    english, chinese = plan_looks(given, 1)
    assert plan_looks(given, 1) == (english, chinese)
    assert sorted(english.order) == [*range(20)] and sorted(chinese.order) == [*range(20, 40)]
    assert english.order != (*range(20),) and [index - 20 for index in chinese.order] != [*english.order]
    assert sorted(index for look in range(4) for index in english.part(look)) == [*range(20)]
    # Another text, another order.
    assert plan_looks([*given[:-1], text("zh", 99, 70)], 1)[0].order != english.order


def divergence_of(positions: int, kl: float) -> Divergence:
    zeros, tokens = torch.zeros(positions), torch.zeros(positions, dtype=torch.long)
    return Divergence(torch.full((positions,), kl), zeros, zeros, tokens, tokens, zeros, zeros)


def test_a_language_goes_on_until_it_is_decided() -> None:
    given = texts(en=[60] * 16, zh=[60] * 16, sw=[60] * 3)
    plans = plan_looks(given, 1)
    asked: list[list[int]] = []

    def measure(indices: Sequence[int], words: str) -> list[Divergence]:
        assert words == f", look {len(asked) + 1} of 3"
        asked.append(list(indices))
        return [divergence_of(60, float(index)) for index in indices]

    def decided(language: str, divergences: Sequence[Divergence], stage: Stage) -> bool:
        (plan,) = (each for each in plans if each.language == language)
        assert [float(each.kl[0]) for each in divergences] == list(plan.order[: plan.ends[stage.look]])
        return language == "zh" and stage.look == 1

    progress = Silent()
    found = judge_by_looks(given, plans, measure, decided, 0.95, progress)
    assert [len(each) for each in asked] == [4 + 4 + 3, 4 + 4, 8]
    assert {looks.language: (looks.taken, looks.ended_early) for looks in found.looks} == {
        "en": (3, False), "zh": (2, True), "sw": (1, False),
    }  # fmt: skip
    assert [each.documents for each in found.looks[1].planned] == [4, 8, 16]
    assert [each.level for each in found.looks[1].planned] == list(levels((0.25, 0.5, 1.0), 1 - 0.95))
    # In the order of the text, each with its own.
    assert [float(each.kl[0]) for each in found.divergences] == [given.index(each) for each in found.texts]
    assert sum(each.language == "zh" for each in found.texts) == 8 and len(found.texts) == 16 + 8 + 3
    assert progress.remarks[-1] == "Look 3 of at most 3: 27 of 35 documents compared, 3 of 3 languages done."


def test_nothing_is_told_of_a_single_look() -> None:
    progress, given = Silent(), texts(en=[60] * 16)
    plans = plan_looks(given, 1, full_text=True)

    def measure(indices: Sequence[int], words: str) -> list[Divergence]:
        assert (list(indices), words) == ([*range(16)], "")
        return [divergence_of(60, 0.0) for _ in indices]

    found = judge_by_looks(given, plans, measure, lambda *_: False, 0.95, progress)
    assert found.looks == () and progress.remarks == [] and found.texts == given


# What a look decides


class Documents:
    """Documents of uneven length of one language, as heavy-tailed as those of test_statistics."""

    def __init__(self, random: np.random.Generator, kl: float, ratio: float, disagreement: float, count: int) -> None:
        self.sizes = random.integers(20, 140, count)
        levels = random.lognormal(-0.5 * 0.5**2, 0.5, count) * kl
        self.kl = levels * random.chisquare(self.sizes)
        self.ratio = random.normal(ratio, 0.01, count) * self.sizes + random.normal(0, 0.1 * np.sqrt(self.sizes))
        shares = random.beta(60 * disagreement, 60 * (1 - disagreement), count)
        self.changed = random.binomial(self.sizes, shares)

    def row(self, tag: str, count: int) -> LanguageFidelity:
        sizes = self.sizes[:count]
        kl, ratio, changed = (
            clustered_mean(sums[:count], sizes, kind)
            for sums, kind in ((self.kl, "positive"), (self.ratio, "signed"), (self.changed, "share"))
        )
        return LanguageFidelity(
            language=tag, documents=count, positions=int(sizes.sum()), perplexity_original=10, perplexity_bundle=10,
            kl_mean_nats=kl.value, kl_p50_nats=0, kl_p99_nats=0, kl_p999_nats=0, kl_max_nats=0, rms_delta_p=0,
            top1_agreement=1 - changed.value, kl=kl, ln_perplexity_ratio=ratio, top1_disagreement=changed,
        )  # fmt: skip


#: Of 24 documents.
ENDS = (3, 6, 12, 24)


def looks_of(documents: Documents, tag: str, taken: int) -> LanguageLooks:
    """What is drawn is exchangeable already, so that the order of the text is of no matter."""
    risks = levels(tuple(end / 24 for end in ENDS), 1 - 0.95)
    planned = tuple(
        Look(documents=end, positions=int(documents.sizes[:end].sum()), level=level)
        for end, level in zip(ENDS, risks, strict=True)
    )
    return LanguageLooks(language=tag, planned=planned, taken=taken)


def validated(random: np.random.Generator, languages: int, **damage: float) -> tuple[Verdict, float]:
    """The verdict of one validation in looks, and the share of the text that it took."""
    rows, looks, used, there = [], [], 0, 0
    for index in range(languages):
        usual = {"kl": 0.012, "ratio": 0.004, "disagreement": 0.04}
        documents = Documents(random, **(usual | (damage if index == 0 else {})), count=24)
        planned = looks_of(documents, f"x{index}", 1).planned
        for taken, look in enumerate(planned, 1):
            row = documents.row(f"x{index}", look.documents)
            stage = Stage(tuple(end / 24 for end in ENDS), taken - 1)
            if is_decided(row, stage, POLICY, most_tests(languages, 0)):
                break
        rows.append(row)
        looks.append(LanguageLooks(language=f"x{index}", planned=planned, taken=taken))
        used, there = used + row.positions, there + planned[-1].positions
    fidelity = Fidelity.model_construct(languages=tuple(rows), looks=tuple(looks))
    return verdict_of(apply_gates(fidelity, POLICY)), used / there


@pytest.mark.parametrize(
    "damage",
    [
        {"kl": 0.05},
        pytest.param({"ratio": 0.03}, marks=pytest.mark.release),
        pytest.param({"disagreement": 0.1}, marks=pytest.mark.release),
    ],
)
def test_looks_rarely_pass_and_rarely_block_a_bundle_at_a_limit(damage: dict[str, float]) -> None:
    """False PASS and false BLOCK, at the very border of what is allowed, however early the text ended."""
    random, number = np.random.default_rng(7), 1000
    found = [validated(random, 1, **damage)[0] for _ in range(number)]
    # 5 % are promised; three standard errors of 1,000 experiments are 2 %.
    assert sum(verdict in (Verdict.PASS, Verdict.WARN) for verdict in found) / number < 0.065
    assert found.count(Verdict.BLOCK) / number < 0.065


@pytest.mark.parametrize("kind,limit", [("kl", 0.05), ("ratio", 0.03), ("changed", 0.1)])
def test_bounds_of_all_looks_together_are_passed_as_rarely_as_they_promise(kind: str, limit: float) -> None:
    """Each gate alone, and without the correction for their number: passed at any look."""
    random, number, fractions = np.random.default_rng(3), 2000, (1 / 8, 1 / 4, 1 / 2, 1.0)
    kinds = {"kl": "positive", "ratio": "signed", "changed": "share"}
    low = high = 0
    for _ in range(number):
        documents = Documents(random, 0.05, 0.03, 0.1, 24)
        ends = []
        for look, fraction in enumerate(fractions):
            count = round(24 * fraction)
            estimate = clustered_mean(getattr(documents, kind)[:count], documents.sizes[:count], kinds[kind])
            ends.append(bounds(estimate, Stage(fractions, look).confidence(0.95)))
        low, high = low + any(each[0] > limit for each in ends), high + any(each[1] < limit for each in ends)
    # 5 % are promised; three standard errors of 2,000 experiments are 1.5 %.
    assert low / number < 0.065 and high / number < 0.065


def test_a_good_bundle_passes_in_21_languages_on_half_of_the_text() -> None:
    random = np.random.default_rng(7)
    found = [validated(random, 21) for _ in range(60)]
    assert sum(verdict is Verdict.PASS for verdict, _ in found) >= 55
    assert 0.1 < np.mean([share for _, share in found]) < 0.5


@pytest.mark.parametrize("damage", [{"kl": 0.12}, {"ratio": 0.06}, {"disagreement": 0.2}])
def test_one_damaged_language_never_passes_and_mostly_blocks(damage: dict[str, float]) -> None:
    random = np.random.default_rng(9)
    found = [validated(random, 21, **damage)[0] for _ in range(60)]
    assert not {Verdict.PASS, Verdict.WARN} & {*found}
    assert found.count(Verdict.BLOCK) > 0.75 * 60


def test_an_early_block_stands_whatever_else_is_found() -> None:
    """At the level of the strictest of Holm's, so that the tests of answers, which come later, cannot undo it."""
    documents = Documents(np.random.default_rng(1), 0.5, 0.3, 0.5, 24)
    row, looks = documents.row("en", 6), looks_of(documents, "en", 2)
    stage = Stage((1 / 8, 1 / 4, 1 / 2, 1.0), 1)
    assert is_decided(row, stage, POLICY, most_tests(1, 0))
    (kl, *_) = apply_gates(Fidelity.model_construct(languages=(row,), looks=(looks,)), POLICY)
    assert kl.verdict is Verdict.BLOCK
    # The bound is farther away than that of text which is all there is.
    (alone, *_) = apply_gates(Fidelity.model_construct(languages=(row,), looks=()), POLICY)
    assert kl.lower is not None and alone.lower is not None and kl.upper is not None and alone.upper is not None
    assert kl.lower < alone.lower < alone.upper < kl.upper and kl.value == alone.value


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_cannot_be_measured_is_decided_at_once(broken: float) -> None:
    documents = Documents(np.random.default_rng(1), 0.01, 0.001, 0.03, 24)
    documents.kl[0] = broken
    row, stage = documents.row("en", 3), Stage((1 / 8, 1 / 4, 1 / 2, 1.0), 0)
    kl = row.kl
    assert not np.isfinite(kl.value) and stage.p_value(0.0) == 0
    documents.changed[:] = 0
    documents.sizes[:] = 4000
    assert is_decided(documents.row("en", 3), stage, POLICY, 3)


# The whole way


LOOSE = "kl_mean_nats = 9.0\nln_perplexity_ratio = 9.0\ntop1_agreement = 0.001\nminimum_positions = 1\n"


def test_looks_of_a_bundle(sample: Sample, tmp_path: Path, run: Run) -> None:
    policy = tmp_path / "loose.toml"
    policy.write_text(LOOSE, "utf-8")

    def report(name: str, *options: str | Path) -> Report:
        bundle = shutil.copytree(sample.bundle, tmp_path / name)
        outcome = run("validate", bundle, "--policy", policy, "--positions", "150", "--threads", THREADS, *options)
        assert outcome.code == 0, outcome.stderr
        found = read_report(bundle / "report.json")
        told = "positions were judged" in outcome.stderr and "look 1 of 2" in outcome.stderr
        assert told == any(each.ended_early for each in found.fidelity.looks)
        return found

    against = ("--against", sample.checkpoint)
    early, whole = report("early", *against), report("whole", *against, "--full-text")
    ended = {each.language for each in early.fidelity.looks if each.ended_early}
    assert len(ended) > 10 and {(each.taken, len(each.planned)) for each in early.fidelity.looks} <= {(1, 2), (2, 2)}
    assert whole.fidelity.looks == () and early.verdict is whole.verdict
    assert early.fidelity.text_digest == whole.fidelity.text_digest
    for row, all_of_it in zip(early.fidelity.languages, whole.fidelity.languages, strict=True):
        assert row.language == all_of_it.language and (row == all_of_it) == (row.language not in ended)
        assert (row.documents < all_of_it.documents) == (row.language in ended)
    assert "ended early" in render_markdown(early) and "look" not in render_markdown(whole)
    assert any("ended once their gates were decided" in limit for limit in early.limits)
    assert not any("ended once their gates were decided" in limit for limit in whole.limits)
    # A captured original was asked about all of it; the bundle is not.
    original = Original.open(str(sample.checkpoint), Silent())
    options = CaptureOptions(THREADS, replace(QUICK, positions_per_language=150))
    capture_reference(original, tmp_path / "ref", options, Silent())
    captured = report("captured", "--reference", tmp_path / "ref").fidelity
    assert captured.looks == early.fidelity.looks and captured.text_digest == early.fidelity.text_digest
    comparison = compare(early, whole)
    assert any("judged less than the other" in remark for remark in comparison.remarks)
    assert not any("judged less" in remark for remark in compare(early, early).remarks)
    assert any(change.kind == "fidelity" for change in comparison.changes)
    bundle = tmp_path / "early"
    plan = run("validate", bundle, "--policy", policy, "--positions", "150", *against, "--plan", "--json")
    assert 0 < plan.document["expected_positions"] < plan.document["positions"]
    assert plan.document["positions"] == whole.fidelity.overall.positions
    assert "--full-text takes all" in plan.stderr
    assert json.loads((bundle / "report.json").read_text("utf-8"))["fidelity"]["looks"]


def test_a_record_of_looks_fits_what_was_judged() -> None:
    look = Look(documents=3, positions=90, level=0.03)
    with pytest.raises(ValueError, match="2 looks were taken of 1"):
        LanguageLooks(language="en", planned=(look,), taken=2)
    with pytest.raises(ValueError, match="no more documents"):
        LanguageLooks(language="en", planned=(look, look), taken=1)
