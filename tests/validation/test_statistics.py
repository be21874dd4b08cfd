"""Means with errors over documents: against the textbook, and against what they promise, by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from glmexport.foundation.target import Gates
from glmexport.results.fidelity import Estimate, Fidelity, LanguageFidelity
from glmexport.results.record import Verdict
from glmexport.results.statistics import difference, holm, log_ratio
from glmexport.validation.gates import apply_gates, verdict_of
from glmexport.validation.statistics import Kind, bounds, clustered_mean, documents_needed, p_value

EXPERIMENTS = 1000
POLICY = Gates(kl_mean_nats=0.05, ln_perplexity_ratio=0.03, top1_agreement=0.9, minimum_positions=1)


def test_documents_of_one_size_are_plain_observations() -> None:
    means = np.random.default_rng(0).normal(2, 1, 30)
    estimate = clustered_mean(means * 7, np.full(30, 7), "signed")
    assert estimate.value == pytest.approx(means.mean())
    assert estimate.standard_error == pytest.approx(stats.sem(means))
    lower, upper = bounds(estimate, 0.95)
    assert (lower, upper) == pytest.approx(stats.t.interval(0.9, 29, means.mean(), stats.sem(means)))
    test = stats.ttest_1samp(means, 1.8, alternative="greater")
    assert p_value(estimate, 1.8) == pytest.approx(test.pvalue)


def test_the_error_of_a_ratio() -> None:
    """By hand: sums 1 and 5 of 1 and 3 positions; mean 1.5, residuals -0.5 and 0.5."""
    estimate = clustered_mean([1, 5], [1, 3], "signed")
    assert estimate.value == 1.5 and estimate.positions == 4 and estimate.documents == 2
    assert estimate.standard_error == pytest.approx(math.sqrt(2 * (0.25 + 0.25)) / 4)


def test_positions_that_hang_together_count_as_one_document() -> None:
    """Each document's positions all alike: ten times as many of them make nothing surer."""
    levels = np.random.default_rng(1).exponential(1, 25)
    few, many = (clustered_mean(levels * count, np.full(25, count), "positive") for count in (10, 100))
    assert few.standard_error == pytest.approx(many.standard_error)


def test_bounds_of_what_is_never_negative_stay_so() -> None:
    estimate = clustered_mean([0.001, 0.0, 0.9], [10, 10, 10], "positive")
    lower, upper = bounds(estimate, 0.95)
    assert 0 < lower < estimate.value < upper
    # Farther above than below, as the rare large values may be missing.
    assert upper / estimate.value > estimate.value / lower


def test_a_share_of_which_nothing_was_seen() -> None:
    estimate = clustered_mean(np.zeros(5), np.full(5, 60), "share")
    lower, upper = bounds(estimate, 0.95)
    assert lower == 0 and upper == pytest.approx(1 - 0.05 ** (1 / 300))
    assert p_value(estimate, 0.1) == 1
    # A divergence of exactly zero is that of the same numbers.
    assert bounds(clustered_mean(np.zeros(5), np.full(5, 60), "positive"), 0.95) == (0, 0)


def test_the_error_of_a_share_is_no_less_than_that_of_coin_flips() -> None:
    estimate = clustered_mean(np.full(5, 6), np.full(5, 60), "share")
    assert estimate.standard_error == pytest.approx(math.sqrt(0.1 * 0.9 / 300))


def test_one_document_has_no_error() -> None:
    for kind in ("signed", "positive", "share"):
        estimate = clustered_mean([3.0], [60], kind)
        assert math.isinf(estimate.standard_error)
        assert bounds(estimate, 0.95)[1] == math.inf and p_value(estimate, 1e-9) == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_cannot_be_measured_is_above_every_limit(broken: float) -> None:
    estimate = clustered_mean([broken, 1.0, 1.0], [60, 60, 60], "positive")
    assert p_value(estimate, 1e9) == 0
    assert not bounds(estimate, 0.95)[1] <= 1e9


def test_holm() -> None:
    """Textbook: sorted, the k-th smallest of m against alpha / (m - k + 1), up to the first that stands."""
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm([0.0125, 0.0167, 0.025, 0.05], 0.05) == [True, False, False, False]
    assert holm([0.01, 0.01], 0.05) == [True, True]
    assert holm([0.06], 0.05) == [False] and holm([], 0.05) == []


def test_documents_needed_by_hand() -> None:
    """Error 1 of 100 documents, 2 below the limit: 100 * (1.66 + 0.84)^2 / 4 is about 157."""
    estimate = Estimate(value=3, standard_error=1, documents=100, positions=100, kind="signed")
    below, above = (documents_needed(estimate, limit, 0.95) for limit in (5, 1))
    assert below == above == pytest.approx(157, abs=3)
    # Quantiles of five documents are wide.
    few = Estimate(value=0.00129, standard_error=0.00005, documents=5, positions=2048, kind="positive")
    assert not holm([p_value(few, 0.001)] * 63, 0.05)[0]
    needed = documents_needed(few, 0.001, 0.95, tests=63)
    assert needed is not None and 5 < needed < 12
    strict = documents_needed(estimate, 1, 0.95, tests=60)
    assert strict is not None and strict > 157 and documents_needed(estimate, 5, 0.95, tests=60) == below
    for hopeless in (estimate.model_copy(update={"value": 5}), clustered_mean([1.0], [3], "signed")):
        assert documents_needed(hopeless, 5, 0.95) is None


# Of two estimates


def test_the_difference_of_documents_of_one_size_is_the_test_of_welch() -> None:
    random = np.random.default_rng(5)
    first, second = random.normal(2, 1, 30), random.normal(2.4, 3, 17)
    old, new = (clustered_mean(means * 7, np.full(len(means), 7), "signed") for means in (first, second))
    found = difference(old, new, 0.95)
    test = stats.ttest_ind(second, first, equal_var=False)
    interval = test.confidence_interval(0.95)
    assert (found.value, found.p_value) == pytest.approx((second.mean() - first.mean(), test.pvalue))
    assert (found.lower, found.upper) == pytest.approx((interval.low, interval.high))
    turned = difference(new, old, 0.95)
    assert (turned.lower, turned.upper, turned.p_value) == pytest.approx((-found.upper, -found.lower, found.p_value))


def test_a_difference_without_errors_is_as_it_is() -> None:
    def exact(value: float) -> Estimate:
        return Estimate(value=value, standard_error=0, documents=3, positions=90, kind="positive")

    assert difference(exact(0.1), exact(0.1), 0.95).p_value == 1
    assert difference(exact(0.1), exact(0.2), 0.95).p_value == 0
    # Squares of errors like these are 0 or too large.
    for error in (1e-200, 1e200):
        far = exact(0.1).model_copy(update={"standard_error": error})
        found = difference(far, far, 0.95)
        assert found.p_value == 1
        assert found.upper == pytest.approx(stats.t.ppf(0.975, 4) * math.sqrt(2) * error)


def test_a_single_document_differs_from_nothing() -> None:
    one, many = clustered_mean([3.0], [60], "positive"), clustered_mean([9.0, 9.1], [60, 60], "positive")
    for old, new in ((one, many), (many, one), (one, one)):
        found = difference(old, new, 0.95)
        assert (found.lower, found.upper, found.p_value) == (-math.inf, math.inf, 1)


def test_a_share_of_which_nothing_was_seen_is_not_without_error() -> None:
    """By hand: in 300 positions as if one more had it, 1 / 301; in the other sqrt(p (1 - p) / 300) with p = 1 / 100."""
    nothing = clustered_mean(np.zeros(5), np.full(5, 60), "share")
    little = clustered_mean(np.full(5, 0.6), np.full(5, 60), "share")
    found = difference(nothing, little, 0.95)
    assert found.value == pytest.approx(0.01) and found.p_value > 0.05
    error = math.hypot(1 / 301, math.sqrt(0.01 * 0.99 / 300))
    freedom = error**4 / ((1 / 301) ** 4 / 4 + (0.01 * 0.99 / 300) ** 2 / 4)
    assert found.upper == pytest.approx(0.01 + stats.t.ppf(0.975, freedom) * error)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_differs_from_what_is(broken: float) -> None:
    bad, good = clustered_mean([broken, 1.0], [60, 60], "positive"), clustered_mean([1.0, 2.0], [60, 60], "positive")
    assert difference(good, bad, 0.95).p_value == 0 and difference(bad, good, 0.95).p_value == 0
    assert difference(bad, bad, 0.95).p_value == 1


def test_the_ratio_of_medians_by_hand() -> None:
    """Bounds of 95 % are 1.645 errors away; ln 1.1 and ln 1.2 over that, in quadrature."""
    found = log_ratio((10, 10 / 1.1, 11), (20, 20 / 1.2, 24), 0.95, 0.95)
    error = math.hypot(math.log(1.1), math.log(1.2)) / stats.norm.ppf(0.95)
    assert found.value == pytest.approx(math.log(2))
    assert (found.lower, found.upper) == pytest.approx(stats.norm.interval(0.95, math.log(2), error))
    assert found.p_value == pytest.approx(2 * stats.norm.sf(math.log(2) / error))
    for bounds_ in ((0, 12), (9, math.inf)):
        assert log_ratio((10, *bounds_), (20, 19, 21), 0.95, 0.95).p_value == 1
    assert log_ratio((10, 10, 10), (10, 10, 10), 0.95, 0.95).p_value == 1
    assert log_ratio((10, 10, 10), (11, 11, 11), 0.95, 0.95).p_value == 0


@pytest.mark.parametrize("reached", [-1.0, 0.0, 0.5, 1.0, 2.0, math.nan])
def test_bounds_that_say_nothing_show_no_difference_of_speed(reached: float) -> None:
    assert log_ratio((10, 9, 11), (20, 19, 21), reached, 0.95).p_value == 1


# By simulation


class Language:
    """Documents of uneven length; their divergences differ by a factor, and those of positions by another."""

    def __init__(self, random: np.random.Generator, documents: int = 24) -> None:
        self.random = random
        self.sizes = random.integers(20, 140, documents)

    def positive(self, mean: float) -> Estimate:
        levels = self.random.lognormal(-0.5 * 0.5**2, 0.5, len(self.sizes)) * mean
        # Squares of a normal variable: as heavy a tail as divergences of single positions have.
        return clustered_mean(levels * self.random.chisquare(self.sizes), self.sizes, "positive")

    def signed(self, mean: float) -> Estimate:
        levels = self.random.normal(mean, 0.01, len(self.sizes))
        noise = self.random.normal(0, 0.1 * np.sqrt(self.sizes))
        return clustered_mean(levels * self.sizes + noise, self.sizes, "signed")

    def share(self, mean: float) -> Estimate:
        levels = self.random.beta(60 * mean, 60 * (1 - mean), len(self.sizes))
        return clustered_mean(self.random.binomial(self.sizes, levels), self.sizes, "share")

    def row(self, tag: str, kl: float = 0.012, ratio: float = 0.004, disagreement: float = 0.04) -> LanguageFidelity:
        divergence, changed = self.positive(kl), self.share(disagreement)
        return LanguageFidelity(
            language=tag,
            documents=divergence.documents,
            positions=divergence.positions,
            perplexity_original=10,
            perplexity_bundle=10,
            kl_mean_nats=divergence.value,
            kl_p50_nats=0,
            kl_p99_nats=0,
            kl_p999_nats=0,
            kl_max_nats=0,
            top1_agreement=1 - changed.value,
            rms_delta_p=0,
            kl=divergence,
            ln_perplexity_ratio=self.signed(ratio),
            top1_disagreement=changed,
        )


def verdicts(languages: int, **damage: float) -> dict[Verdict, float]:
    """Shares of a thousand validations; the first of so many languages has the damage."""
    random = np.random.default_rng(7)
    found: list[Verdict] = []
    for _ in range(EXPERIMENTS):
        rows = tuple(Language(random).row(f"x{index}", **(damage if index == 0 else {})) for index in range(languages))
        fidelity = Fidelity.model_construct(languages=rows)
        found.append(verdict_of(apply_gates(fidelity, POLICY)))
    return {verdict: found.count(verdict) / EXPERIMENTS for verdict in Verdict}


@pytest.mark.parametrize("kind,limit", [("positive", 0.05), ("signed", 0.03), ("share", 0.1)])
def test_bounds_are_passed_as_rarely_as_they_promise(kind: Kind, limit: float) -> None:
    random = np.random.default_rng(3)
    low = high = rejected = 0
    for _ in range(2 * EXPERIMENTS):
        estimate = getattr(Language(random), kind)(limit)
        lower, upper = bounds(estimate, 0.95)
        low, high = low + (lower > limit), high + (upper < limit)
        rejected += p_value(estimate, limit) < 0.05
    # 5 % are promised; three standard errors of 2,000 experiments are 1.5 %.
    assert low / (2 * EXPERIMENTS) < 0.065 and high / (2 * EXPERIMENTS) < 0.065
    assert rejected == low


@pytest.mark.parametrize("kind,mean", [("positive", 0.012), ("signed", 0.004), ("share", 0.04)])
def test_the_same_bundle_on_other_text_is_rarely_another(kind: Kind, mean: float) -> None:
    random = np.random.default_rng(13)
    found = [
        difference(getattr(Language(random, 24), kind)(mean), getattr(Language(random, 15), kind)(mean), 0.95)
        for _ in range(EXPERIMENTS)
    ]
    # 5 % are promised; three standard errors of 1,000 experiments are 2 %.
    assert sum(each.p_value < 0.05 for each in found) / EXPERIMENTS < 0.07
    for each in found:
        assert (each.lower > 0 or each.upper < 0) == (each.p_value < 0.05)


@pytest.mark.parametrize(
    "damage",
    [
        {"kl": 0.05},
        pytest.param({"ratio": 0.03}, marks=pytest.mark.release),
        pytest.param({"disagreement": 0.1}, marks=pytest.mark.release),
    ],
)
def test_a_bundle_at_a_limit_rarely_passes_and_rarely_blocks(damage: dict[str, float]) -> None:
    """False PASS and false BLOCK, at the very border of what is allowed."""
    found = verdicts(1, **damage)
    assert found[Verdict.PASS] + found[Verdict.WARN] < 0.065
    assert found[Verdict.BLOCK] < 0.065


@pytest.mark.parametrize("kind,mean,limit", [("positive", 0.04, 0.05), ("signed", 0.025, 0.03), ("share", 0.08, 0.1)])
def test_as_many_documents_as_it_says_decide_in_four_of_five_cases(kind: Kind, mean: float, limit: float) -> None:
    random = np.random.default_rng(11)
    needed = documents_needed(getattr(Language(random, 5000), kind)(mean), limit, 0.95)
    assert needed is not None and 20 < needed < 1000
    kept = sum(bounds(getattr(Language(random, needed), kind)(mean), 0.95)[1] <= limit for _ in range(EXPERIMENTS))
    assert 0.75 < kept / EXPERIMENTS < 0.87


def test_a_good_bundle_passes_in_21_languages() -> None:
    found = verdicts(21)
    assert found[Verdict.PASS] > 0.95
    assert found[Verdict.BLOCK] < 0.01


@pytest.mark.parametrize("damage", [{"kl": 0.12}, {"ratio": 0.055}, {"disagreement": 0.2}])
def test_one_damaged_language_among_21_never_passes_and_mostly_blocks(damage: dict[str, float]) -> None:
    found = verdicts(21, **damage)
    assert found[Verdict.PASS] + found[Verdict.WARN] == 0
    assert found[Verdict.BLOCK] > 0.8
