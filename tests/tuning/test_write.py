"""A tuned target is read back from its file as what was written, whatever was measured."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

from glmexport.foundation.evidence import (
    CandidateSettings,
    Deviation,
    Divergences,
    Evidence,
    Gain,
    Gains,
    TriedCandidate,
)
from glmexport.foundation.target import open_target
from glmexport.tuning.assemble import tried, tuned_target, verdict_of
from glmexport.tuning.candidates import Numerics, identity
from glmexport.tuning.pareto import Timed
from glmexport.tuning.plan import Measured
from glmexport.tuning.search import Fate
from glmexport.tuning.write import target_toml, write_target

START = CandidateSettings(recipe="w4g32", accuracy_level=4, packed_qkv=True, threads=2)
ENTRIES = {"session.dynamic_block_base": "4"}
CHOSEN = CandidateSettings(recipe="w4g128", accuracy_level=4, packed_qkv=False, threads=1, session=ENTRIES)
GAIN = Gain(ratio=1.5, lower=1.25, upper=1.75)
GAINS = Gains(decode=GAIN, decode_long=Gain(ratio=1.0), prefill=GAIN, preferred=GAIN, rounds=6)
KNOWN = Deviation(mean=0.01, upper=0.02, worst=0.03, language="zh")
BROKEN = Deviation(mean=math.nan, worst=math.inf, language="en")
DIVERGENCES = {
    Numerics("w4g32", 4): Divergences(original=KNOWN, arithmetic=BROKEN, positions=10),
    Numerics("w4g128", 4): Divergences(original=KNOWN, arithmetic=KNOWN, positions=10),
}


def evidence(*candidates: TriedCandidate, verdict: str = "Faster.") -> Evidence:
    return Evidence(
        verdict=verdict,
        confirmed=GAINS,
        start="x86-avx2",
        checkpoint="demo",
        checkpoint_digest="sha256:0",
        prefer="decode",
        allowance_nats=0.0125,
        weights="gptq",
        text_digest="sha256:1",
        timed="all 6 blocks",
        prompt_tokens=(32, 512),
        generated_tokens=16,
        processor='Someone\'s "Processor"',
        cores=2,
        system="Linux",
        libraries={"onnxruntime": "1.32.0"},
        date="2026-11-28",
        candidates=candidates,
    )


def test_there_and_back(tmp_path: Path) -> None:
    measured = Measured(DIVERGENCES, {Numerics("w4g32", 4): "it moves too far"})
    fates = {identity(CHOSEN): Fate("chosen", "the fastest", GAINS)}
    rows = [tried(each, START, measured, fates) for each in (START, CHOSEN)]
    tuned = tuned_target(open_target("x86-avx2"), CHOSEN, evidence(*rows), "edge")
    write_target(tuned, tmp_path / "new" / "edge.toml")
    read = open_target(str(tmp_path / "new" / "edge.toml"))
    assert read.name == "edge" and (read.session.threads, read.session.config) == (1, ENTRIES)
    assert target_toml(read) == target_toml(tuned)
    assert read.model_copy(update={"evidence": None}) == tuned.model_copy(update={"evidence": None})
    first, second = read.evidence.candidates if read.evidence else ()
    assert (first.outcome, first.reason) == ("start", "it moves too far")
    assert first.divergence is not None and math.isnan(first.divergence.arithmetic.mean)
    assert second == rows[1] and second.gains == GAINS
    # What was not measured is not in the file.
    table = tomllib.loads((tmp_path / "new" / "edge.toml").read_text(encoding="utf-8"))
    assert "gains" not in table["evidence"]["candidates"][0] and "name" not in table


def test_no_number_is_no_json_either() -> None:
    row = TriedCandidate(settings=START, outcome="start", reason="", divergence=DIVERGENCES[Numerics("w4g32", 4)])
    text = evidence(row).model_dump_json()
    assert '"NaN"' in text and '"Infinity"' in text
    assert Evidence.model_validate_json(text).model_dump_json() == text


def test_the_start_stays_as_it_is() -> None:
    start = open_target("x86-avx2")
    tuned = tuned_target(start, None, evidence(verdict="Nothing."), "edge")
    assert (tuned.graph, tuned.weights, tuned.session, tuned.gates) == (
        start.graph, start.weights, start.session, start.gates,
    )  # fmt: skip
    assert "Nothing." in tuned.provenance.notes and start.provenance.notes in tuned.provenance.notes


def test_verdicts() -> None:
    chosen = Timed(CHOSEN, GAINS, DIVERGENCES[Numerics("w4g128", 4)])
    assert "Nothing legal was surely faster than the start in prefill" in verdict_of(None, None, "", "prefill")
    faster = verdict_of(chosen, GAINS, "", "decode")
    assert faster.startswith("w4g128, int8, split QKV, 1 thread") and "1.50 times" in faster
    assert "(1.25 to 1.75)" in faster
    illegal = verdict_of(chosen, GAINS, "it moves too far", "decode")
    assert illegal.startswith("The start is not legal: it moves too far.")
