"""What a build costs: units that are measured and kept, and the account of a validation against what torch counts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from builds import QUICK, THREADS, Run, Sample, run, sample

from benchmarks.stages import VALIDATION, Stages
from glmexport.bundle.bundle import Bundle
from glmexport.calibration.corpus import evaluation_documents
from glmexport.engine.options import computes_together
from glmexport.foundation import machine
from glmexport.foundation.progress import Silent
from glmexport.foundation.work import MEASURED_KINDS, Range, Work
from glmexport.graph.caches import answers_together
from glmexport.reference.reference import Reference
from glmexport.results.arithmetic import OriginalArithmetic
from glmexport.validation.account import ValidationSize, validation_accounts
from glmexport.validation.conditions import BehaviourPlan, Conditions, ValidationPlan
from glmexport.validation.run import validate
from glmexport.validation.texts import EvaluationSet
from glmexport.workflows import unit_costs as unit_costs_module
from glmexport.workflows.cost import build_seconds, stage_seconds, total
from glmexport.workflows.original import Original
from glmexport.workflows.unit_costs import UnitCosts, unit_costs

__all__ = ["run", "sample"]

WHOLE = Range(1.0, 1.0)
#: The function itself, in whose place the fixture puts another.
SHARE = unit_costs_module._Others.share


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("glmexport.workflows.unit_costs.psutil.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr("glmexport.workflows.unit_costs._MEASURED", {})
    monkeypatch.setattr("glmexport.workflows.unit_costs._Others.share", lambda _: 0.0)
    return tmp_path / "cache" / "glmexport"


TRIALS = (
    "products", "moments", "triangular", "attention", "compared_logits", "swept, few rows", "swept, many rows",
    "polished, few rows", "polished, many rows", "searched_weights", "rounded_weights", "read_values", "hashed_bytes",
    "written_bytes", "bundle_products", "bundle_bytes", "coarse_products", "coarse_moments",
)  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that were measured, in the place of seconds of measuring."""
    devices: list[str] = []

    def measure(device: torch.device, arithmetic: OriginalArithmetic) -> dict[str, list[float]]:
        devices.append(str(device))
        many = {name: [2.0, 2.2, 2.1] for name in TRIALS if "many" in name}
        return {name: [1.0, 1.1, 1.05] for name in TRIALS} | many

    monkeypatch.setattr("glmexport.workflows.unit_costs._measure", measure)
    return devices


def test_costs_are_measured_once_for_a_machine(measured: list[str], cache: Path, monkeypatch: Any) -> None:
    first = unit_costs()
    assert set(first.seconds) == set(MEASURED_KINDS)
    assert not first.busy
    assert unit_costs() == first
    assert len(measured) == 1
    # Asked for, another route of large products, other threads, other libraries: each has costs of its own.
    unit_costs(anew=True)
    unit_costs(OriginalArithmetic(route="onednn"))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    unit_costs()
    monkeypatch.setattr(torch, "__version__", "0.0")
    unit_costs()
    unit_costs()
    assert len(measured) == 5
    # Another process finds what this one kept, unless it is damaged.
    monkeypatch.setattr("glmexport.workflows.unit_costs._MEASURED", {})
    unit_costs()
    assert len(measured) == 5
    (document,) = cache.glob("costs*.json")
    document.write_text("{", encoding="utf-8")
    unit_costs()
    unit_costs()
    assert len(measured) == 6


def test_units_are_seconds_over_amounts(measured: list[str]) -> None:
    seconds = unit_costs().seconds
    assert seconds["products"] == Range(1.0 / (2 * 512 * 4096**2), 1.05 / (2 * 512 * 4096**2))
    # 64 columns, of 64 rows and of 4,096.
    assert seconds["swept_columns"].low == 1.0 / 64
    assert seconds["swept_weights"].low == 1.0 / (64 * (4096 - 64))
    assert all(0 < cost.low <= cost.high for cost in seconds.values())


@pytest.mark.parametrize(("load", "meanwhile"), [(0.0, 0.0), (100.0, 0.0), (0.0, 0.5)])
def test_what_is_measured_on_a_busy_machine_is_not_kept(
    measured: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch, load: float, meanwhile: float
) -> None:
    monkeypatch.setattr("glmexport.workflows.unit_costs.psutil.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("glmexport.workflows.unit_costs._Others.share", lambda _: meanwhile)
    if not load and not meanwhile:
        disturbed = {name: [1.0, 3.0, 3.0] for name in TRIALS}
        monkeypatch.setattr("glmexport.workflows.unit_costs._measure", lambda *_: disturbed)
    costs = unit_costs()
    assert costs.busy
    assert not cache.exists()


def test_others_are_all_that_the_processor_did_and_this_process_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Times(NamedTuple):
        user: float
        system: float
        idle: float
        steal: float

    taken = iter([Times(10.0, 1.0, 100.0, 0.0), Times(13.0, 1.5, 150.0, 0.5)])
    own, clock = iter([5.0, 6.0]), iter([0.0, 2.0])
    monkeypatch.setattr("glmexport.workflows.unit_costs.psutil.cpu_times", lambda: next(taken))
    monkeypatch.setattr("glmexport.workflows.unit_costs.time.process_time", lambda: next(own))
    monkeypatch.setattr("glmexport.workflows.unit_costs.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("glmexport.workflows.unit_costs.os.cpu_count", lambda: 4)
    share = SHARE(unit_costs_module._Others())
    # Of 8 seconds of four cores all took 4, of which one is this process's own.
    assert share == pytest.approx(3 / 8)


def test_costs_that_are_kept_are_told_to_be_disturbed(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = unit_costs()
    monkeypatch.setattr("glmexport.workflows.unit_costs.psutil.getloadavg", lambda: (100.0, 0.0, 0.0))
    assert unit_costs() == UnitCosts(quiet.seconds, busy=True)
    assert len(measured) == 1


def test_every_kind_is_measured_by_what_a_build_runs() -> None:
    seconds = unit_costs().seconds
    assert set(seconds) == set(MEASURED_KINDS)
    assert all(math.isfinite(cost.high) and 0 < cost.low <= cost.high for cost in seconds.values())
    # No processor multiplies in less than a femtosecond, or reads a number in more than a millisecond.
    assert all(1e-15 < cost.low < 1e-3 for kind, cost in seconds.items() if not kind.endswith("_columns"))


def test_work_adds_up() -> None:
    work = Work(products=2.0, fixed_seconds=1.0) + Work(products=1.0, hashed_bytes=4.0)
    assert work.times(2) == Work(products=6.0, hashed_bytes=8.0, fixed_seconds=2.0)
    assert work.seconds({"products": Range(1.0, 2.0), "hashed_bytes": Range(0.5, 0.5)}) == Range(6.0, 9.0)


def test_a_range_is_from_the_least_work_to_the_most() -> None:
    one, two = {kind: Range(1.0, 1.0) for kind in MEASURED_KINDS}, {kind: Range(2.0, 2.0) for kind in MEASURED_KINDS}
    accounts = ({"sweep": Work(products=1), "answers": Work(products=1)},
                {"sweep": Work(products=1), "answers": Work(products=3)})  # fmt: skip
    found = stage_seconds(accounts, one, two)
    assert found["sweep"].high / found["sweep"].low == pytest.approx(1.15**2)
    assert found["answers"].low == pytest.approx(2 / 1.15)
    assert found["answers"].high == pytest.approx(6 * 1.15)
    assert total(found).low == pytest.approx(3 / 1.15)


def test_operations_are_those_of_a_validation(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's: what the bundle computes, no torch counts."""
    from builds import TURNS, no_turns

    monkeypatch.setattr(TURNS, no_turns)
    original = Original.open(str(sample.checkpoint), Silent())
    bundle = Bundle.open(sample.bundle)
    documents = evaluation_documents((), original.tokenizer)
    evaluation = EvaluationSet(documents, original.tokenizer)
    reference = Reference(original.checkpoint, original.architecture)
    conditions = Conditions(QUICK, bundle.target.gates, THREADS, THREADS, Silent())
    found = Stages()
    with found.watching(VALIDATION, count=True):
        validate(bundle, reference, evaluation, conditions, scratch=tmp_path)
    planned = original.planned(bundle.manifest.recipe, bundle.target)
    size = ValidationSize(len({document.language for document in documents}), WHOLE, WHOLE)
    account, same = validation_accounts(original.architecture, planned.plan, QUICK, size, whole=True)
    assert account == same
    for stage in ("fidelity", "noise floor", "shares"):
        derived = account[stage].products + account[stage].attention
        # Texts are a few tokens longer than what is judged of them.
        assert derived == pytest.approx(found.operations[stage], rel=0.15), stage


def test_more_of_a_plan_is_more_work(sample: Sample) -> None:
    original = Original.open(str(sample.checkpoint), Silent())
    bundle = Bundle.open(sample.bundle)
    planned = original.planned(bundle.manifest.recipe, bundle.target)
    size = ValidationSize(21, Range(0.25, 1.0), Range(1.0, 1.3))
    low, high = validation_accounts(original.architecture, planned.plan, ValidationPlan(), size, whole=False)
    assert list(low) == ["fidelity", "noise floor", "shares", "answers", "weights", "performance"]
    assert low["fidelity"].bundle_products == pytest.approx(high["fidelity"].bundle_products / 4)
    assert low["answers"].products < high["answers"].products < 1.4 * low["answers"].products
    assert low["noise floor"] == high["noise floor"]
    without = ValidationPlan(behaviour=None, share_texts=0)
    assert not {"answers", "shares"} & set(
        validation_accounts(original.architecture, planned.plan, without, size, whole=False)[0]
    )


def test_answers_together_read_the_weights_once_for_several(sample: Sample) -> None:
    """Eight at a time, one in about eight of which is asked alone too."""
    original = Original.open(str(sample.checkpoint), Silent())
    bundle = Bundle.open(sample.bundle)
    planned = original.planned(bundle.manifest.recipe, bundle.target)
    assert answers_together(original.architecture, bundle.target) is computes_together(bundle) is True

    def answers(batches: bool) -> Work:
        size = ValidationSize(21, WHOLE, WHOLE, batches)
        plan = ValidationPlan()
        return validation_accounts(original.architecture, planned.plan, plan, size, whole=False)[0]["answers"]

    together, alone = answers(True), answers(False)
    # Those asked alone are tool calls, and each sixteenth of the others.
    asked_alone = (21 + 252 / 16) / 273
    assert together.bundle_bytes / alone.bundle_bytes == pytest.approx(1 / 8 + asked_alone)
    assert together.bundle_products > alone.bundle_products
    assert together.products == alone.products


def test_few_answers_are_drafted_anew_and_many_go_on_by_themselves(sample: Sample) -> None:
    original = Original.open(str(sample.checkpoint), Silent())
    planned = original.planned(Bundle.open(sample.bundle).manifest.recipe, Bundle.open(sample.bundle).target)

    def answers(languages: int) -> Work:
        plan = ValidationPlan(behaviour=BehaviourPlan(most=1))
        size = ValidationSize(languages, WHOLE, WHOLE)
        return validation_accounts(original.architecture, planned.plan, plan, size, whole=False)[0]["answers"]

    few, many = answers(4), answers(40)
    # Half of each answer twice, by eight at a time; without drafts, a pass for each of 64 tokens instead of 16.
    asked_alone = (1 + 12 / 16) / 13
    once, drafted = 1 / 8 + asked_alone, 2 / 8 + asked_alone
    assert few.bundle_bytes / many.bundle_bytes == pytest.approx(drafted / once * 4 / 40)
    assert few.read_values / many.read_values == pytest.approx(16 / 64)


def test_fewer_questions_are_less_work(sample: Sample) -> None:
    original = Original.open(str(sample.checkpoint), Silent())
    bundle = Bundle.open(sample.bundle)
    planned = original.planned(bundle.manifest.recipe, bundle.target)
    size = ValidationSize(21, WHOLE, WHOLE)

    def answers(most: int | None) -> Work:
        plan = ValidationPlan(behaviour=BehaviourPlan(most=most))
        return validation_accounts(original.architecture, planned.plan, plan, size, whole=False)[0]["answers"]

    whole = answers(None)
    assert answers(13) == answers(99) == whole
    assert answers(2).bundle_bytes == pytest.approx(2 * whole.bundle_bytes / 13)
    assert answers(0).products == answers(0).bundle_bytes == 0


def test_ranks_share_what_they_do_not_all_do(sample: Sample) -> None:
    original = Original.open(str(sample.checkpoint), Silent())
    bundle = Bundle.open(sample.bundle)
    planned = original.planned(bundle.manifest.recipe, bundle.target)
    sizes = [ValidationSize(21, WHOLE, WHOLE, ranks=ranks) for ranks in (1, 4, 10_000)]
    one, four, many = (
        validation_accounts(original.architecture, planned.plan, ValidationPlan(), size, whole=False)[0]
        for size in sizes
    )
    assert one.keys() == four.keys() and one["weights"] == four["weights"] and one["performance"] == four["performance"]
    # Each reads all blocks for its own texts, and so often for its own answers.
    read = four["fidelity"].read_values - one["fidelity"].read_values
    # Five groups take a fifth of that each, in a pass.
    assert read > 0
    assert four["answers"].read_values / one["answers"].read_values == pytest.approx((4 + 5 / 5) / (1 + 5 / 5))
    assert four["fidelity"] == replace(one["fidelity"], read_values=one["fidelity"].read_values + read)
    # There are so many batches and groups of questions, and no more.
    assert four["answers"].products == one["answers"].products < many["answers"].products
    unit = {kind: Range(1.0, 1.0) for kind in MEASURED_KINDS}
    shared, alone = stage_seconds((four, four), unit, unit, 4), stage_seconds((one, one), unit, unit)
    for stage in one:
        factor = 1 if stage == "performance" else 4
        least = alone[stage].low / factor
        assert least <= shared[stage].low * (1 + 1e-9) and shared[stage].low < alone[stage].low * (1 + 1e-9), stage


def test_inspect_says_a_range_of_every_stage(run: Run, sample: Sample, measured: list[str]) -> None:
    outcome = run("inspect", sample.checkpoint, "--json")
    (row,) = [row for row in outcome.document["estimates"] if row["target"] == "x86-avx2"]
    stages = {
        "hash", "folding", "reading", "streams", "Hessians", "factorization", "goal", "sweep", "polish", "comparison",
        "write", "whole model", "fidelity", "noise floor", "shares", "answers", "weights", "performance",
    }  # fmt: skip
    assert set(row["stages"]) == stages
    assert 0 < row["seconds"]["low"] < row["seconds"]["high"]
    for end in ("low", "high"):
        assert row["seconds"][end] == pytest.approx(sum(stage[end] for stage in row["stages"].values()))
    shown = run("inspect", sample.checkpoint)
    assert " to " in shown.stdout + shown.stderr
    assert len(measured) == 1
    run("inspect", sample.checkpoint, "--measure")
    assert len(measured) == 2


def test_inspect_shares_the_work_among_workers(
    run: Run, sample: Sample, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a build by as many: each has its share of the cores, or the threads that are given."""
    had = torch.get_num_threads()
    counted: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counted.append)

    def rows(*options: object) -> tuple[dict[str, Any], str]:
        outcome = run("inspect", sample.checkpoint, "--json", *options)
        (row,) = [row for row in outcome.document["estimates"] if row["target"] == "x86-avx2"]
        return row, outcome.stderr

    (alone, _), (four, said) = rows("--threads", 1), rows("--threads", 1, "--workers", 4)
    assert four["stages"]["sweep"]["low"] == pytest.approx(alone["stages"]["sweep"]["low"] / 4)
    assert four["stages"]["performance"] == alone["stages"]["performance"]
    many = 4 * machine.cores()
    assert counted[-1] == 1 and ("4 ranks" in said) is (machine.cores() < 4)
    _, quiet = rows("--workers", many)
    assert counted[-1] == 1 and f"{many} ranks of 1 threads share {machine.cores()} cores" in " ".join(quiet.split())
    assert torch.get_num_threads() == had


def test_a_build_of_more_text_takes_longer(sample: Sample, measured: list[str]) -> None:
    original = Original.open(str(sample.checkpoint), Silent())
    manifest = Bundle.open(sample.bundle).manifest
    assert manifest.recipe.calibration is not None
    more = manifest.recipe.calibration.model_copy(update={"tokens": 4 * manifest.recipe.calibration.tokens})
    costs = unit_costs()
    few, many = (
        build_seconds(original, recipe, manifest.target, QUICK, costs, costs, None)
        for recipe in (manifest.recipe, manifest.recipe.model_copy(update={"calibration": more}))
    )
    for stage in ("streams", "Hessians"):
        assert many[stage].low > 3 * few[stage].low
    assert many["fidelity"] == few["fidelity"]
    assert json.dumps({stage: vars(each) for stage, each in few.items()})
