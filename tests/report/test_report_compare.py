"""What compare calls a change: by hand, against naive arithmetic, and with the reports of other builds."""

import math

import pytest
from sample_report import LANGUAGES, estimate, figure, gates, language
from scipy import stats

from glmexport.foundation.errors import InputError
from glmexport.report.compare import compare
from glmexport.report.document import Report
from glmexport.results.fidelity import CaptureBound
from glmexport.results.gate import Gate
from glmexport.results.record import Verdict
from glmexport.results.statistics import holm

METRICS = ("Mean KL divergence", "ln perplexity ratio", "Top-1 agreement")


def with_languages(report, **factors):
    """The divergence of single languages times a factor; nothing else follows from it."""
    rows = tuple(
        row.model_copy(
            update={
                "kl_mean_nats": row.kl_mean_nats * factors.get(row.language, 1),
                "kl": estimate(row.kl_mean_nats * factors.get(row.language, 1), "positive", row.positions),
            }
        )
        for row in report.fidelity.languages
    )
    return report.model_copy(update={"fidelity": report.fidelity.model_copy(update={"languages": rows})})


def with_rows(report, change):
    rows = tuple(change(row) for row in report.fidelity.languages)
    return report.model_copy(update={"fidelity": report.fidelity.model_copy(update={"languages": rows})})


def with_bundle(report, **speeds):
    bundle = report.performance.bundle.model_copy(update=speeds)
    return report.model_copy(update={"performance": report.performance.model_copy(update={"bundle": bundle})})


def with_verdicts(report, *verdicts):
    """Gates of one name, one a verdict, each in a language of its own."""
    found = tuple(
        Gate(
            name="Mean KL divergence", language=tag, value=0.01, limit=0.05, unit="nats/token", direction="at most",
            sample="", verdict=verdict,
        )
        for verdict, (tag, _, _) in zip(verdicts, LANGUAGES, strict=False)
    )  # fmt: skip
    worst = max(verdicts, key=lambda verdict: verdict.severity)
    return report.model_copy(update={"gates": found, "verdict": worst})


def fidelity(comparison, name="Mean KL divergence"):
    return {change.language: change for change in comparison.changes if change.name == name}


def told(comparison):
    return " ".join(comparison.remarks)


def test_a_report_with_itself(report):
    comparison = compare(report, report)
    assert comparison.outcome == "no worse" and comparison.reasons == ()
    assert comparison.differing == () and comparison.gates == ()
    # Of speed, those three whose rounds give bounds.
    assert comparison.tests == len(METRICS) * (len(LANGUAGES) + 1) + 3
    assert not any(change.significant or change.worse or change.undecided for change in comparison.changes)
    assert "nothing could be paired" in told(comparison)


def test_figures_by_hand(report):
    """Errors of the sample report are a twelfth of the value, of 24 documents each."""
    change = fidelity(compare(report, with_languages(report, tr=1.5)))["tr"]
    old, new = 0.0228, 0.0342
    error = math.hypot(old, new) / 12
    freedom = error**4 / ((old / 12) ** 4 / 23 + (new / 12) ** 4 / 23)
    assert (change.old, change.new, change.change) == pytest.approx((old, new, new - old))
    assert (change.lower, change.upper) == pytest.approx(stats.t.interval(0.95, freedom, new - old, error))
    assert change.p_value == pytest.approx(2 * stats.t.sf((new - old) / error, freedom))
    assert change.worse and change.scale == "difference" and change.unit == "nats/token"


def test_agreement_falls_where_disagreement_grows(report):
    def damage(row):
        changed = estimate(row.top1_disagreement.value * 3, "share", row.positions)
        return row.model_copy(update={"top1_disagreement": changed})

    rows = fidelity(compare(report, with_rows(report, damage)), "Top-1 agreement")
    for row in report.fidelity.languages:
        change = rows[row.language]
        assert change.new == pytest.approx(1 - 3 * row.top1_disagreement.value)
        assert change.change == pytest.approx(change.new - change.old) and change.change < 0
        assert change.lower < change.change < change.upper < 0
        assert change.worse and change.significant
    assert not rows["all"].worse


def test_only_what_survives_holm_is_significant(report):
    worse = with_languages(report, tr=1.4, hi=1.4, ar=2.5)
    comparison = compare(report, worse)
    tested = [change for change in comparison.changes if change.p_value is not None]
    expected = holm([change.p_value for change in tested], 0.05)
    assert [change.significant for change in tested] == expected
    found = {tag for tag, change in fidelity(comparison).items() if change.significant}
    assert found == {"ar"}
    # Alone each would have been.
    assert all(fidelity(comparison)[tag].p_value < 0.05 for tag in ("tr", "hi"))
    assert comparison.outcome == "worse"
    assert comparison.reasons == ("Mean KL divergence is significantly worse: ar.",)
    # The same change, read the other way round, is for the better.
    turned = compare(worse, report)
    assert turned.outcome == "no worse"
    assert {tag for tag, change in fidelity(turned).items() if change.significant} == {"ar"}


def test_confidence_decides_what_is_found(report):
    worse = with_languages(report, tr=2.0)
    assert compare(report, worse, confidence=0.95).outcome == "worse"
    strict = compare(report, worse, confidence=0.999999)
    assert strict.outcome == "no worse" and not fidelity(strict)["tr"].significant
    widths = [fidelity(each)["tr"].upper - fidelity(each)["tr"].lower for each in (compare(report, worse), strict)]
    assert widths[0] < widths[1]


def test_what_the_original_differs_from_itself_is_no_change(report, changed):
    """Errors of a divergence this small are smaller still, and mean nothing."""

    def exact(value):
        def change(row):
            kl = row.kl.model_copy(update={"value": value, "standard_error": 1e-20})
            return row.model_copy(update={"kl": kl, "kl_mean_nats": value})

        return with_rows(report, change)

    old, new = exact(1e-13), exact(3e-13)
    comparison = compare(old, new)
    assert comparison.outcome == "no worse"
    assert fidelity(comparison)["en"].p_value == 1
    silent = [
        each.model_copy(update={"fidelity": each.fidelity.model_copy(update={"noise_floor": None})})
        for each in (old, new)
    ]
    assert compare(*silent).outcome == "worse"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_bundle_that_broke_is_worse_and_one_that_was_broken_is_not(report, broken):
    def damage(row):
        if row.language != "zh":
            return row
        return row.model_copy(update={"kl_mean_nats": broken, "kl": row.kl.model_copy(update={"value": broken})})

    bad = with_rows(report, damage)
    comparison = compare(report, bad)
    assert comparison.outcome == "worse"
    assert [tag for tag, change in fidelity(comparison).items() if change.significant] == ["zh"]
    assert compare(bad, report).outcome == "no worse"
    again = compare(bad, bad)
    assert again.outcome == "undecided" and not fidelity(again)["zh"].significant


def test_too_little_text_decides_nothing(report):
    def one_document(row):
        if row.language != "sw":
            return row
        kl = row.kl.model_copy(update={"value": 0.0349, "documents": 1, "standard_error": math.inf})
        return row.model_copy(update={"documents": 1, "kl": kl})

    new = with_rows(report, one_document)
    new = new.model_copy(update={"fidelity": new.fidelity.model_copy(update={"text_digest": "sha256:1"})})
    comparison = compare(report, new)
    assert comparison.outcome == "undecided"
    assert comparison.reasons == ("Mean KL divergence may be worse by as much as the policy allows in all: sw.",)
    assert "not the same" in told(comparison)


def test_a_worsening_as_large_as_the_limit_has_to_be_excluded(report):
    """The upper end of Arabic's interval is about 0.01; the policy decides whether that is much. Where nothing at all
    changed, nothing has to be excluded."""
    slightly = with_languages(report, ar=1.01)

    def judged(limit, old, new):
        limits = report.policy.gates.model_copy(update={"kl_mean_nats": limit})
        policy = report.policy.model_copy(update={"gates": limits})
        return compare(*(each.model_copy(update={"policy": policy}) for each in (old, new)))

    end = fidelity(compare(report, slightly))["ar"].upper
    assert 0.005 < end < 0.02
    assert judged(end * 1.001, report, slightly).outcome == "no worse"
    undecided = judged(end * 0.999, report, slightly)
    assert undecided.outcome == "undecided"
    assert {tag for tag, change in fidelity(undecided).items() if change.undecided} == {"ar"}
    assert judged(end * 0.999, report, report).outcome == "no worse"


def test_a_language_below_the_minimum_of_positions_is_undecided(report):
    limits = report.policy.gates.model_copy(update={"minimum_positions": 6145})
    short = report.model_copy(update={"policy": report.policy.model_copy(update={"gates": limits})})
    comparison = compare(short, with_languages(short, tr=1.01, all=1.01))
    assert comparison.outcome == "undecided"
    assert {change.language for change in comparison.changes if change.undecided} == {"tr"}


def test_languages_of_one_report_only(report):
    few = report.fidelity.model_copy(update={"languages": (*report.fidelity.languages[:7], language("ja", 9, 0.02))})
    comparison = compare(report, report.model_copy(update={"fidelity": few}))
    assert list(fidelity(comparison)) == [tag for tag, _, _ in LANGUAGES[:7]]
    assert "In one report only, and so not compared: ar, ja, sw, and the mean of all." in told(comparison)
    other = report.fidelity.model_copy(update={"languages": (language("ja", 9, 0.02),)})
    with pytest.raises(InputError, match="no language in common"):
        compare(report, report.model_copy(update={"fidelity": other}))


def test_lower_bounds_are_not_compared_with_divergences(report):
    bound = CaptureBound(top_k=64, tail_mass=0.1, audit_positions=9, kl_mean_nats=0.02, kl_mean_partition_nats=0.019)
    captured = report.model_copy(update={"fidelity": report.fidelity.model_copy(update={"capture": bound})})
    comparison = compare(report, captured)
    assert not fidelity(comparison) and fidelity(comparison, "Top-1 agreement")
    assert "Divergences are not compared" in told(comparison)
    assert fidelity(compare(captured, captured))
    (fact,) = comparison.differing
    assert (fact.name, fact.old, fact.new) == ("original's answers", "all", "captured, top 64")


def test_sizes_are_counted_and_decide_nothing(report, changed):
    larger = changed(size=report.size.model_copy(update={"bundle_bytes": report.size.bundle_bytes * 2}))
    comparison = compare(report, larger)
    size = next(change for change in comparison.changes if change.name == "Size")
    assert (size.change, size.p_value, size.lower, size.significant, size.worse) == (2, None, None, False, True)
    assert comparison.outcome == "no worse"


def test_speed_without_bounds_is_shown_and_never_significant(report):
    comparison = compare(report, with_bundle(report, decode_tokens_per_s=figure(1.14, 1), ttft_s=figure(9.65, 1)))
    speeds = {change.name: change for change in comparison.changes if change.kind == "speed"}
    assert (speeds["Decode"].change, speeds["Decode"].worse) == (pytest.approx(0.1), True)
    assert (speeds["Time to first token"].change, speeds["Time to first token"].worse) == (pytest.approx(5), True)
    assert not any(change.significant for change in speeds.values())
    assert comparison.outcome == "no worse"
    broken = compare(report, with_bundle(report, decode_tokens_per_s=figure(math.nan)))
    assert math.isnan(next(change.change for change in broken.changes if change.name == "Decode"))


def test_speed_with_bounds_decides_on_the_same_machine(report):
    def decoding(value):
        found = figure(value).model_copy(update={"lower": value / 1.05, "upper": value * 1.05})
        return with_bundle(report, decode_tokens_per_s=found)

    report, slow = decoding(12.0), decoding(6.0)
    comparison = compare(report, slow)
    decode = next(change for change in comparison.changes if change.name == "Decode")
    assert decode.significant and decode.worse
    error = math.hypot(math.log(1.05), math.log(1.05)) / stats.norm.ppf(0.95)
    ends = [math.exp(end) for end in stats.norm.interval(0.95, math.log(0.5), error)]
    assert (decode.lower, decode.upper) == pytest.approx(ends)
    assert comparison.reasons == ("Decode is significantly worse: the bundle.",)
    elsewhere = slow.model_copy(update={"machine": slow.machine.model_copy(update={"cores": 2})})
    moved = compare(report, elsewhere)
    assert next(change for change in moved.changes if change.name == "Decode").significant
    assert moved.outcome == "no worse" and "none of them decides" in told(moved)


def test_speeds_of_other_work_are_not_compared(report):
    longer = report.model_copy(update={"performance": report.performance.model_copy(update={"prompt_tokens": 2048})})
    comparison = compare(report, longer)
    assert not [change for change in comparison.changes if change.kind == "speed"]
    assert "Speeds are not compared" in told(comparison)


@pytest.mark.parametrize(
    ("old", "new", "outcome"),
    [
        ((Verdict.PASS,), (Verdict.WARN,), "worse"),
        ((Verdict.WARN,), (Verdict.BLOCK,), "worse"),
        ((Verdict.INCONCLUSIVE,), (Verdict.BLOCK,), "worse"),
        ((Verdict.PASS,), (Verdict.INCONCLUSIVE,), "undecided"),
        ((Verdict.BLOCK,), (Verdict.INCONCLUSIVE,), "no worse"),
        ((Verdict.BLOCK,), (Verdict.PASS, Verdict.WARN), "no worse"),
        ((Verdict.PASS, Verdict.PASS), (Verdict.PASS,), "no worse"),
    ],
)
def test_a_verdict_that_got_worse(report, old, new, outcome):
    before, after = with_verdicts(report, *old), with_verdicts(report, *new)
    comparison = compare(before, after)
    assert comparison.outcome == outcome
    changed = before.verdict is not after.verdict
    assert [(gate.old, gate.new) for gate in comparison.gates] == [(before.verdict, after.verdict)] * changed
    if changed:
        assert comparison.gates[0].languages == tuple(
            gate.language for gate in after.gates if gate.verdict is after.verdict
        )
    assert (comparison.reasons == ()) == (outcome == "no worse")


def test_a_gate_of_one_report_only_is_told_if_it_does_not_pass(report):
    extra = gates(report.fidelity.languages)[-1]
    passing = report.model_copy(update={"gates": (*report.gates, extra.model_copy(update={"name": "New"}))})
    assert compare(report, passing).gates == ()
    warned = extra.model_copy(update={"name": "New", "verdict": Verdict.WARN})
    (gate,) = compare(report, report.model_copy(update={"gates": (*report.gates, warned)})).gates
    assert (gate.old, gate.new, gate.languages) == (None, Verdict.WARN, ())


def test_what_else_is_not_the_same_is_told(report):
    subject = report.subject.model_copy(
        update={"recipe": "w4g128", "checkpoint_digest": "sha256:0", "family": "glm", "adapter": "legal"}
    )
    limits = report.policy.gates.model_copy(update={"kl_mean_nats": 0.06})
    other = report.model_copy(
        update={
            "subject": subject,
            "policy": report.policy.model_copy(update={"gates": limits}),
            "machine": report.machine.model_copy(update={"processor": "AMD EPYC"}),
            "versions": {**report.versions, "onnxruntime": "1.33.0", "numpy": "2.4.6"},
        }
    )
    comparison = compare(report, other)
    found = {each.name: (each.old, each.new) for each in comparison.differing}
    assert set(found) == {
        "original digest", "family", "adapter", "recipe", "limits", "machine", "onnxruntime", "numpy"
    }  # fmt: skip
    assert found["adapter"] == ("none", "legal") and found["numpy"] == ("none", "2.4.6")
    for words in ("The originals are not the same, even of different families", "The limits are not the same"):
        assert words in told(comparison)


def test_the_comparison_survives_json(report):
    comparison = compare(report, with_bundle(report, decode_tokens_per_s=math.nan))
    again = type(comparison).model_validate_json(comparison.model_dump_json())
    assert again.model_dump_json() == comparison.model_dump_json()
    assert Report.model_validate_json(report.model_dump_json()) == report
