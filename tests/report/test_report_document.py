import json
import math
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError
from sample_report import groups

from glmexport.foundation.errors import BundleError, MachineError
from glmexport.report import document
from glmexport.report.document import SCHEMA_NAME, json_schema, read_report, schema_text
from glmexport.report.write import write_report
from glmexport.results.fidelity import Fidelity
from glmexport.results.gate import Gate
from glmexport.results.record import Verdict, worst


def stored(report, path, **changes):
    table = json.loads(report.model_dump_json())
    table.update(changes)
    file = path / "report.json"
    file.write_text(json.dumps(table), encoding="utf-8")
    return file


def test_round_trip(report, tmp_path):
    write_report(report, tmp_path / "new")
    assert read_report(tmp_path / "new" / "report.json") == report
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
        "report.xml",
    ]


def test_the_json_is_readable_stable_and_ends_with_a_newline(report, tmp_path):
    write_report(report, tmp_path)
    first = (tmp_path / "report.json").read_bytes()
    write_report(read_report(tmp_path / "report.json"), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == first
    assert first.startswith(b'{\n  "schema_version": 1,\n')
    assert first.endswith(b"}\n")
    assert "المستشفى".encode() in first


def test_unknown_key(report, tmp_path):
    path = stored(report, tmp_path, signature="none")
    with pytest.raises(BundleError, match=r"report\.json: signature: Extra inputs are not permitted"):
        read_report(path)


def test_the_message_names_a_nested_key(report, tmp_path):
    subject = {**json.loads(report.subject.model_dump_json()), "target": 7}
    with pytest.raises(BundleError, match=r"report\.json: subject\.target: .*valid string"):
        read_report(stored(report, tmp_path, subject=subject))


def test_another_schema_version(report, tmp_path):
    with pytest.raises(BundleError, match="schema_version"):
        read_report(stored(report, tmp_path, schema_version=2))


def test_what_is_not_json_or_not_there(tmp_path):
    (tmp_path / "report.json").write_bytes(b"{\xff")
    with pytest.raises(BundleError, match=r"report\.json: byte 1 is not UTF-8"):
        read_report(tmp_path / "report.json")
    with pytest.raises(BundleError, match="There is no readable report"):
        read_report(tmp_path / "other.json")


def test_a_verdict_cannot_be_better_than_its_gates(report, tmp_path):
    with pytest.raises(BundleError, match="verdict PASS is better than its gates allow"):
        read_report(stored(report, tmp_path, verdict="PASS"))


def test_nothing_checked_is_not_a_pass(report, tmp_path):
    with pytest.raises(BundleError, match="better than its gates allow"):
        read_report(stored(report, tmp_path, verdict="PASS", gates=[]))
    assert read_report(stored(report, tmp_path, verdict="INCONCLUSIVE", gates=[])).gates == ()


def test_measurements_that_are_no_numbers_survive(report, changed, tmp_path):
    overall = report.fidelity.overall.model_copy(
        update={"kl_max_nats": math.inf, "perplexity_bundle": math.nan}
    )
    fidelity = report.fidelity.model_copy(update={"overall": overall})
    write_report(changed(fidelity=fidelity), tmp_path)
    table = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert table["fidelity"]["overall"]["kl_max_nats"] == "Infinity"
    again = read_report(tmp_path / "report.json")
    assert again.fidelity.overall.kl_max_nats == math.inf
    assert math.isnan(again.fidelity.overall.perplexity_bundle)


def test_a_failed_write_leaves_the_previous_report(report, tmp_path, monkeypatch):
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glmexport.report.write.os.fsync", full)
    with pytest.raises(MachineError, match="No space left on device"):
        write_report(report.model_copy(update={"limits": ()}), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_schema_is_closed_and_carries_units():
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["additionalProperties"] is False
    for definition in schema["$defs"].values():
        assert definition["type"] == "string" or definition["additionalProperties"] is False
    described = schema["$defs"]["LinearResult"]["properties"]["relative_error"]["description"]
    assert "calibration inputs" in described


def shipped_schema():
    return json.loads(Path(document.__file__).with_name(SCHEMA_NAME).read_text(encoding="utf-8"))


def test_the_shipped_schema_is_that_of_the_report():
    """If not: ``glmexport report schema > glmexport/report/report.schema.json``."""
    assert Path(document.__file__).with_name(SCHEMA_NAME).read_text(encoding="utf-8") == schema_text()
    jsonschema.Draft202012Validator.check_schema(shipped_schema())


def test_a_report_keeps_the_shipped_schema(report, changed):
    overall = report.fidelity.overall.model_copy(update={"kl_max_nats": math.inf, "perplexity_bundle": math.nan})
    fidelity = report.fidelity.model_copy(update={"overall": overall})
    linears = report.quantization.linears
    quantization = report.quantization.model_copy(update={"groups": groups(linears)})
    judge = jsonschema.Draft202012Validator(shipped_schema())
    for each in (report, changed(fidelity=fidelity, quantization=quantization), changed(calibration=None)):
        judge.validate(json.loads(each.model_dump_json()))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "FAIL"),
        (("signature",), "none"),
        (("subject", "target"), 7),
        (("size", "bundle_bytes"), -1),
        (("fidelity", "overall", "kl_mean_nats"), "large"),
        (("machine", "processor"), None),
    ],
)
def test_the_shipped_schema_refuses_what_reading_refuses(report, tmp_path, path, value):
    table = json.loads(report.model_dump_json())
    place = table
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(shipped_schema()).validate(table)
    with pytest.raises(BundleError, match=r"\.".join(path)):
        read_report(stored(report, tmp_path, **table))


def gate(**changes):
    keys = {
        "name": "g", "language": None, "value": 1.0, "limit": 2.0, "unit": "", "direction": "at most",
        "sample": "1", "verdict": Verdict.PASS,
    }  # fmt: skip
    return Gate(**{**keys, **changes})


@pytest.mark.parametrize("changes", [{"value": 2.1}, {"value": math.nan}, {"direction": "at least"}])
def test_a_gate_cannot_pass_beyond_its_limit(changes):
    with pytest.raises(ValidationError, match="verdict PASS, but"):
        gate(**changes)
    assert gate(**changes, verdict=Verdict.BLOCK).holds is False


def test_bounds_are_two():
    with pytest.raises(ValidationError, match="lower and upper"):
        gate(lower=0.5)
    assert gate(lower=0.5, upper=1.5).upper == 1.5


def test_an_adapter_has_a_digest(report, tmp_path):
    subject = {**json.loads(report.subject.model_dump_json()), "adapter": "legal"}
    with pytest.raises(BundleError, match=r"subject: .*belong together"):
        read_report(stored(report, tmp_path, subject=subject))


def test_the_limit_itself_is_allowed():
    assert gate(value=2.0).holds
    assert gate(value=2.0, direction="at least").holds


def test_worst_verdict():
    assert worst([Verdict.PASS, Verdict.WARN]) is Verdict.WARN
    assert worst([Verdict.WARN, Verdict.INCONCLUSIVE]) is Verdict.INCONCLUSIVE
    assert worst(Verdict) is Verdict.BLOCK
    assert worst([]) is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kl_histogram_edges_nats": (0.1, 1.0), "kl_histogram_counts": (1, 2)},
            "2 histogram counts need 3 edges",
        ),
        ({"kl_histogram_edges_nats": (1.0, 1.0), "kl_histogram_counts": (1,)}, "do not increase"),
        ({"worst_language": "xx"}, "'xx' is not among the languages"),
    ],
)
def test_fidelity_that_contradicts_itself(report, changes, message):
    with pytest.raises(ValidationError, match=message):
        Fidelity.model_validate({**dict(report.fidelity), **changes})


def test_an_absent_original_needs_a_reason_and_a_present_one_none(report):
    performance = type(report.performance)
    for changes in ({"original": None}, {"original_absent_because": "no memory"}):
        with pytest.raises(ValidationError, match="original_absent_because"):
            performance.model_validate({**dict(report.performance), **changes})
