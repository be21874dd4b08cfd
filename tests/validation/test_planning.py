"""How much text a verdict needs: by hand, by simulation, and as a command."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from builds import THREADS, Run, Sample
from scipy.stats import t as student

from glmexport.foundation.errors import EXIT_INPUT
from glmexport.foundation.target import Gates
from glmexport.report.document import read_report
from glmexport.results.fidelity import Estimate, LanguageFidelity
from glmexport.validation.planning import Rates, plan_validation
from glmexport.validation.statistics import bounds, clustered_mean, documents_needed, showable_limit

RATES = Rates(threads=1, per_position=0.5, bundle_per_position=0.1, fixed=10)
POLICY = Gates(kl_mean_nats=0.05, ln_perplexity_ratio=0.03, top1_agreement=0.9, minimum_positions=1)


def language(tag: str, kl: float, error: float, documents: int = 9) -> LanguageFidelity:
    def estimate(value: float, kind: str) -> Estimate:
        return Estimate.model_validate(
            {"value": value, "standard_error": error, "documents": documents, "positions": 900, "kind": kind}
        )

    return LanguageFidelity(
        language=tag, documents=documents, positions=900, perplexity_original=9, perplexity_bundle=9, kl_mean_nats=kl,
        kl_p50_nats=kl, kl_p99_nats=kl, kl_p999_nats=kl, kl_max_nats=kl, top1_agreement=0.99, rms_delta_p=0,
        kl=estimate(kl, "positive"), ln_perplexity_ratio=estimate(0.0, "signed"),
        top1_disagreement=estimate(0.01, "share"),
    )  # fmt: skip


def test_what_suffices_needs_no_more() -> None:
    plan = plan_validation([language("en", 0.01, 1e-4)], POLICY, RATES)
    assert (plan.documents, plan.needed_documents, plan.undecidable) == (9, 9, 0)
    assert plan.seconds == plan.needed_seconds == 10 + 900 * 0.5
    assert all(need.needed is not None and need.needed <= 9 for need in plan.needs)


def test_the_language_that_differs_most_needs_most() -> None:
    rows = [language("en", 0.01, 1e-4), language("sw", 0.045, 0.004)]
    plan = plan_validation(rows, POLICY, RATES)
    (short,) = [need for need in plan.needs if need.language == "sw" and need.gate == "Mean KL divergence"]
    assert short.needed == documents_needed(rows[1].kl, 0.05, 0.95) and short.needed > 9
    assert plan.needed_documents == 9 + short.needed
    assert plan.needed_positions == 900 + math.ceil(short.needed * 100)
    assert plan.needed_seconds == 10 + plan.needed_positions * 0.5
    loose = plan_validation(rows, POLICY.model_copy(update={"kl_mean_nats": 0.2}), RATES)
    assert loose.needed_documents == 18


def test_a_share_that_has_to_be_large_is_told_as_such() -> None:
    need = plan_validation([language("en", 0.01, 1e-4)], POLICY, RATES).needs[-1]
    assert (need.gate, need.value, need.limit) == ("Top-1 agreement", 0.99, pytest.approx(0.9))
    assert need.showable is not None and 0.98 < need.showable < 0.99


def test_nothing_is_known_of_a_single_document() -> None:
    plan = plan_validation([language("en", 0.01, math.inf, documents=1)], POLICY, RATES)
    assert plan.undecidable == 3 and {need.showable for need in plan.needs} == {None}


def test_showable_limit_by_hand() -> None:
    estimate = Estimate(value=2.0, standard_error=0.5, documents=10, positions=100, kind="signed")
    assert showable_limit(estimate, 0.95) == pytest.approx(2 + 0.5 * (student.ppf(0.95, 9) + student.ppf(0.8, 9)))
    nothing = Estimate(value=0.0, standard_error=0.0, documents=10, positions=100, kind="share")
    assert showable_limit(nothing, 0.95) == pytest.approx(1 - 0.05 ** (1 / 100))


@pytest.mark.parametrize("kind", ["signed", "positive"])
def test_the_showable_limit_is_shown_in_four_of_five_samples(kind: str) -> None:
    random = np.random.default_rng(0)
    shown, trials = 0, 1000
    # The truth, from which the limit is taken, and samples as large as the one that planned.
    truth = Estimate.model_validate(
        {"value": 1.0, "standard_error": 0.2 / math.sqrt(40), "documents": 40, "positions": 40, "kind": kind}
    )
    limit = showable_limit(truth, 0.95)
    assert limit is not None
    for _ in range(trials):
        sums = random.normal(1, 0.2, 40)
        shown += bounds(clustered_mean(sums, np.ones(40), kind), 0.95)[1] <= limit  # type: ignore[arg-type]
    assert 0.76 < shown / trials < 0.88


def test_command(sample: Sample, tmp_path: Path, run: Run) -> None:
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    before = (bundle / "report.json").read_bytes()
    arguments = ("validate", bundle, "--against", sample.checkpoint, "--plan", "--threads", THREADS)
    outcome = run(*arguments, "--json")
    assert outcome.code == 0, outcome.stderr
    plan = outcome.document
    report = read_report(bundle / "report.json")
    assert plan["documents"] == sum(row.documents for row in report.fidelity.languages)
    assert plan["seconds"] > 0 and 0 < plan["rates"]["bundle_per_position"] < plan["rates"]["per_position"]
    assert len(plan["needs"]) == 3 * len(report.fidelity.languages)
    assert "needed" in outcome.stderr and (bundle / "report.json").read_bytes() == before
    policy = tmp_path / "loose.toml"
    policy.write_text(
        "kl_mean_nats = 9.0\nln_perplexity_ratio = 9.0\ntop1_agreement = 0.001\nminimum_positions = 1\n", "utf-8"
    )
    assert run(*arguments, "--json", "--policy", policy).document["needed_documents"] <= plan["needed_documents"]
    (bundle / "report.json").unlink()
    missing = run(*arguments)
    assert missing.code == EXIT_INPUT and "report.json" in missing.stderr


def test_a_report_of_another_bundle_plans_nothing(sample: Sample, tmp_path: Path, run: Run) -> None:
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    report["subject"]["bundle_digest"] = "sha256:0"
    (bundle / "report.json").write_text(json.dumps(report), encoding="utf-8")
    outcome = run("validate", bundle, "--against", sample.checkpoint, "--plan")
    assert outcome.code == EXIT_INPUT and "another bundle" in outcome.stderr
