"""Statistics of divergences, the gates on them, and what a badly broken bundle comes to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builds import Sample

from glmexport.foundation.target import Gates, Limits
from glmexport.results.fidelity import Estimate, Fidelity, LanguageFidelity
from glmexport.results.gate import Gate
from glmexport.results.record import Verdict
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.divergence import Divergence, divergence
from glmexport.validation.fidelity import summarize
from glmexport.validation.gates import apply_gates, build_gates, verdict_of
from glmexport.validation.statistics import Kind
from glmexport.validation.texts import EvaluationText

GATES = Gates(kl_mean_nats=0.1, ln_perplexity_ratio=0.05, top1_agreement=0.85, minimum_positions=100)


@pytest.fixture
def tokenizer(sample: Sample) -> Tokenizer:
    return Tokenizer.open(sample.checkpoint)


def text(tokenizer: Tokenizer, language: str, content: str) -> EvaluationText:
    ids = tokenizer.encode(content)
    return EvaluationText(f"{language}-1", language, torch.tensor([*tokenizer.prefix, *ids]), len(tokenizer.prefix))


def made(kl: list[float], original: float, bundle: float, changed: set[int] = frozenset()) -> Divergence:
    """Positions with those divergences; every token has the same loss; the top token changes at ``changed``."""
    count = len(kl)
    top = torch.full((count,), 65)
    other = top.clone()
    other[list(changed)] = 66
    return Divergence(
        kl=torch.tensor(kl),
        nll_original=torch.full((count,), original),
        nll_bundle=torch.full((count,), bundle),
        top_original=top,
        top_bundle=other,
        p_original=torch.full((count,), 0.9),
        p_bundle=torch.full((count,), 0.4),
    )


def test_statistics(tokenizer: Tokenizer) -> None:
    texts = [text(tokenizer, "en", "abcd"), text(tokenizer, "zh", "efgh"), text(tokenizer, "en", "ij")]
    parts = [made([0.1, 0.2, 0.3, 0.4], 1.0, 1.1, {1, 2}), made([1.0, 0, 0, 0], 2.0, 2.0, {0}), made([0.5, 0.6], 4, 4)]
    fidelity = summarize(texts, parts, tokenizer, "fp32")
    english, chinese = fidelity.languages
    assert (english.language, english.documents, english.positions) == ("en", 2, 6)
    assert (chinese.language, chinese.documents, chinese.positions) == ("zh", 1, 4)
    assert english.perplexity_original == pytest.approx(math.exp((4 * 1.0 + 2 * 4.0) / 6))
    assert english.perplexity_bundle == pytest.approx(math.exp((4 * 1.1 + 2 * 4.0) / 6))
    assert english.kl_mean_nats == pytest.approx(0.35)
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert english.kl_p50_nats == pytest.approx(np.quantile(values, 0.5))
    assert english.kl_p99_nats == pytest.approx(np.quantile(values, 0.99))
    assert english.kl_max_nats == pytest.approx(0.6)
    assert english.top1_agreement == pytest.approx(4 / 6)
    assert chinese.kl_mean_nats == pytest.approx(0.25) and chinese.top1_agreement == 0.75
    assert fidelity.worst_language == "en"
    # Over all positions, not over languages.
    assert fidelity.overall.positions == 10 and fidelity.overall.documents == 3
    assert fidelity.overall.kl_mean_nats == pytest.approx(3.1 / 10)
    assert fidelity.arithmetic == "fp32"
    assert sum(fidelity.kl_histogram_counts) == 10
    edges, counts = fidelity.kl_histogram_edges_nats, fidelity.kl_histogram_counts
    first = next(index for index, edge in enumerate(edges) if edge > 0.1) - 1
    assert counts[0] == 3 and sum(counts[first:]) == 7


def test_bands_of_positions(tokenizer: Tokenizer) -> None:
    texts = [text(tokenizer, "en", "x" * count) for count in (10, 20, 70)]
    parts = [made([0.1] * 10, 1, 1), made([0.2] * 20, 1, 1, {19}), made([0.1] * 16 + [0.4] * 54, 1, 1)]
    first, second, third = summarize(texts, parts, tokenizer, "fp32").bands
    assert [(band.first, band.last) for band in (first, second, third)] == [(0, 15), (16, 63), (64, 69)]
    assert first.kl.value == pytest.approx((10 * 0.1 + 16 * 0.2 + 16 * 0.1) / 42) and first.kl.documents == 3
    assert second.kl.value == pytest.approx((4 * 0.2 + 48 * 0.4) / 52) and second.kl.documents == 2
    assert second.top1_agreement == pytest.approx(51 / 52) and first.top1_agreement == 1
    assert third.kl.value == pytest.approx(0.4) and math.isinf(third.kl.standard_error)


def test_worst_tokens(tokenizer: Tokenizer) -> None:
    texts = [text(tokenizer, "en", "abcd"), text(tokenizer, "zh", "efgh"), text(tokenizer, "en", "ij")]
    parts = [made([0.9, 0.2, 0.3, 0.4], 1, 1, {1, 2}), made([1.0, 0, 0, 0], 2, 2, {0}), made([0.5, 0.6], 4, 4)]
    worst, second = summarize(texts, parts, tokenizer, "fp32").worst_tokens
    assert (worst.language, worst.position, worst.context) == ("zh", 0, "")
    # The first token of this text diverges more, and stays the same.
    assert (second.language, second.position, second.context) == ("en", 2, "ab")
    assert second.kl_nats == pytest.approx(0.3)
    assert second.expected == tokenizer.decode([65]) and second.given == tokenizer.decode([66])
    assert second.expected != second.given
    assert (second.probability_original, second.probability_bundle) == (pytest.approx(0.9), pytest.approx(0.4))


def test_divergence_beyond_the_last_edge_is_counted(tokenizer: Tokenizer) -> None:
    fidelity = summarize([text(tokenizer, "en", "ab")], [made([1e9, math.inf], 1, 1)], tokenizer, "fp32")
    assert sum(fidelity.kl_histogram_counts) == 2


# Gates


def row(
    language: str,
    positions: int = 1000,
    kl: float = 0.01,
    ratio: float = 0.0,
    top1: float = 0.99,
    error: float = 0.0,
    documents: int = 20,
) -> LanguageFidelity:
    """Measured with a relative standard error of ``error``, for the signed ratio an absolute one."""

    def estimate(value: float, kind: Kind) -> Estimate:
        spread = error * value if kind != "signed" else error
        return Estimate(value=value, standard_error=spread, documents=documents, positions=positions, kind=kind)

    return LanguageFidelity(
        language=language,
        documents=documents,
        positions=positions,
        perplexity_original=10,
        perplexity_bundle=10 * math.exp(ratio),
        kl_mean_nats=kl,
        kl_p50_nats=kl,
        kl_p99_nats=kl,
        kl_p999_nats=kl,
        kl_max_nats=kl,
        top1_agreement=top1,
        rms_delta_p=0.01,
        kl=estimate(kl, "positive"),
        ln_perplexity_ratio=estimate(ratio, "signed"),
        top1_disagreement=estimate(1 - top1, "share"),
    )


def judged(*rows: LanguageFidelity, policy: Gates = GATES) -> dict[str, Gate]:
    fidelity = Fidelity(
        languages=rows,
        overall=row("all"),
        worst_language=rows[0].language,
        kl_histogram_edges_nats=(),
        kl_histogram_counts=(),
        worst_tokens=(),
        arithmetic="fp32",
    )
    return {f"{gate.name} {gate.language}": gate for gate in apply_gates(fidelity, policy)}


def test_all_is_well() -> None:
    gates = judged(row("en"), row("zh", kl=0.02))
    assert len(gates) == 3
    assert {gate.verdict for gate in gates.values()} == {Verdict.PASS}
    assert gates["Mean KL divergence zh"].value == 0.02
    assert verdict_of(gates.values()) is Verdict.PASS


def test_each_gate_takes_its_own_worst_language() -> None:
    gates = judged(row("en", kl=0.2), row("zh", ratio=0.06), row("fr", top1=0.5), row("de"))
    assert {name: gate.verdict for name, gate in gates.items()} == {
        "Mean KL divergence en": Verdict.BLOCK,
        "ln perplexity ratio zh": Verdict.BLOCK,
        "Top-1 agreement fr": Verdict.BLOCK,
    }
    assert gates["ln perplexity ratio zh"].value == pytest.approx(0.06)
    assert verdict_of(gates.values()) is Verdict.BLOCK


def test_one_bad_language_among_many_blocks() -> None:
    gates = judged(*(row(name) for name in "abcdefgh"), row("sw", kl=0.1001))
    assert gates["Mean KL divergence sw"].verdict is Verdict.BLOCK
    assert verdict_of(gates.values()) is Verdict.BLOCK


def test_a_limit_is_allowed() -> None:
    # As near to it as this, a bundle that surely keeps it gets a warning.
    gates = judged(row("en", kl=0.1, top1=0.85))
    assert gates["Mean KL divergence en"].verdict is Verdict.WARN
    assert judged(row("en", kl=0.07))["Mean KL divergence en"].verdict is Verdict.PASS


def test_what_is_not_sure_is_inconclusive() -> None:
    for changes in ({"kl": 0.09}, {"kl": 0.11}, {"ratio": 0.045}, {"ratio": 0.06}, {"top1": 0.86}, {"top1": 0.84}):
        unsure = judged(row("en", error=0.2, **changes))
        assert verdict_of(unsure.values()) is Verdict.INCONCLUSIVE
        # The same figures of more text.
        sure = judged(row("en", error=0.003, documents=200, **changes))
        beyond = changes in ({"kl": 0.11}, {"ratio": 0.06}, {"top1": 0.84})
        assert verdict_of(sure.values()) is (Verdict.BLOCK if beyond else Verdict.WARN)


def test_one_document_proves_nothing() -> None:
    one = row("en", error=math.inf, documents=1)
    assert {gate.verdict for gate in judged(one).values()} == {Verdict.INCONCLUSIVE}


def test_many_languages_do_not_block_by_chance() -> None:
    """A p-value of 0.009 blocks one language with three gates, and none of 21."""
    unlucky = row("en", kl=0.1 * math.exp(0.13), error=0.05)
    assert judged(unlucky)["Mean KL divergence en"].verdict is Verdict.BLOCK
    many = judged(unlucky, *(row(f"x{index}") for index in range(20)))
    assert many["Mean KL divergence en"].verdict is Verdict.INCONCLUSIVE


def test_every_language_that_does_not_pass_is_named() -> None:
    gates = judged(row("en", kl=0.09), row("zh", kl=0.2), row("fr"), row("sw", kl=0.09, error=0.3))
    assert list(gates)[:3] == ["Mean KL divergence zh", "Mean KL divergence sw", "Mean KL divergence en"]
    assert [gate.verdict for gate in gates.values()][:3] == [Verdict.BLOCK, Verdict.INCONCLUSIVE, Verdict.WARN]
    gate = gates["Mean KL divergence sw"]
    assert gate.lower is not None and gate.upper is not None
    assert gate.lower < gate.value < 0.1 < gate.upper and gate.confidence == 0.95


def test_a_language_may_have_limits_of_its_own() -> None:
    policy = GATES.model_copy(update={"languages": {"sw": Limits(kl_mean_nats=0.3)}})
    assert policy.limits("sw") == Limits(kl_mean_nats=0.3, ln_perplexity_ratio=0.05, top1_agreement=0.85)
    gates = judged(row("en"), row("sw", kl=0.2), policy=policy)
    assert verdict_of(gates.values()) is Verdict.PASS
    assert verdict_of(judged(row("en", kl=0.2), row("sw"), policy=policy).values()) is Verdict.BLOCK


def test_a_lower_perplexity_passes() -> None:
    assert judged(row("en", ratio=-0.5))["ln perplexity ratio en"].verdict is Verdict.PASS


def test_too_little_text_is_inconclusive() -> None:
    gates = judged(row("en"), row("zu", positions=99, kl=5.0))
    assert gates["Enough text to judge zu"].verdict is Verdict.INCONCLUSIVE
    assert gates["Enough text to judge zu"].value == 99
    # What was not judged neither passes nor blocks.
    assert gates["Mean KL divergence en"].verdict is Verdict.PASS
    assert verdict_of(gates.values()) is Verdict.INCONCLUSIVE
    only = judged(row("zu", positions=5))
    assert verdict_of(only.values()) is Verdict.INCONCLUSIVE and len(only) == 1
    assert "Enough text to judge en" not in judged(row("en", positions=100))


def test_a_block_outweighs_what_is_inconclusive() -> None:
    assert verdict_of(judged(row("en", kl=1), row("zu", positions=5)).values()) is Verdict.BLOCK


@pytest.mark.parametrize("broken", [{"kl": math.nan}, {"ratio": math.nan}, {"kl": math.inf}, {"ratio": math.inf}])
@pytest.mark.parametrize("first", [True, False])
def test_a_language_that_cannot_be_measured_is_the_worst(broken: dict[str, float], first: bool) -> None:
    rows = [row("zh", **broken), row("en", kl=0.05, ratio=0.04)]
    gates = judged(*(rows if first else rows[::-1]))
    name = "Mean KL divergence zh" if "kl" in broken else "ln perplexity ratio zh"
    assert gates[name].verdict is Verdict.BLOCK


def test_nothing_judged_is_no_pass() -> None:
    assert verdict_of([]) is Verdict.INCONCLUSIVE


def test_fallbacks_warn() -> None:
    (passed,) = build_gates(0, None, 40)
    assert passed.verdict is Verdict.PASS
    (warned,) = build_gates(2, None, 40)
    assert (warned.verdict, warned.value) == (Verdict.WARN, 2)
    assert verdict_of([warned]) is Verdict.WARN


@pytest.mark.parametrize("tokens,verdict", [(2.0, Verdict.PASS), (1.9, Verdict.WARN), (0.0, Verdict.WARN)])
def test_too_little_text_behind_a_hessian_warns(tokens: float, verdict: Verdict) -> None:
    gate = build_gates(0, tokens, 40)[1]
    assert (gate.name, gate.value, gate.limit) == ("Effective tokens per column", tokens, 2.0)
    assert gate.verdict is verdict


@pytest.mark.parametrize("logits", [math.nan, math.inf, "opposite"])
def test_a_broken_bundle_is_measured_and_blocked(logits: float | str, tokenizer: Tokenizer) -> None:
    texts = [text(tokenizer, language, "x" * 120) for language in ("en", "en", "zh", "zh")]
    original = torch.randn(120, 300, generator=torch.Generator().manual_seed(4))
    answers = -original * 5000 if logits == "opposite" else torch.full((120, 300), float(logits))
    given = (original, original, answers, answers)
    parts = [divergence(original, each, one.targets) for one, each in zip(texts, given, strict=True)]
    fidelity = summarize(texts, parts, tokenizer, "fp32")
    assert fidelity.worst_language == "zh"
    gates = {gate.name: gate for gate in apply_gates(fidelity, GATES)}
    assert gates["Mean KL divergence"].verdict is Verdict.BLOCK
    assert gates["Mean KL divergence"].language == "zh"
    assert gates["ln perplexity ratio"].verdict is Verdict.BLOCK
    assert verdict_of(gates.values()) is Verdict.BLOCK
    assert Fidelity.model_validate_json(fidelity.model_dump_json()).worst_language == "zh"
