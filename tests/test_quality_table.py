"""What the quality benchmark asks of its tools, and how it prints and plots what it found."""

import pytest

pytest.importorskip("benchmarks", reason="a source distribution has no benchmarks")
from benchmarks.peers import ADDED_UP, AS_BUILT, ONE_AT_A_TIME, PEERS
from benchmarks.plot import COLOURS, front, plot, series, spread
from benchmarks.quality import FORMATS, TOOLS, Run, ablations, grouped, lacking, runs, uniform
from benchmarks.table import ablation, format_key, headline, overview, table


def row(tool, setting, name, kl, **more):
    return {
        "tool": tool,
        "setting": setting,
        "format": name,
        "bits_per_weight": 4.25,
        "kl_mean_nats": kl,
        "kl_p99_nats": 5 * kl,
        "kl_p999_nats": 10 * kl,
        "top1_agreement": 0.95,
        "perplexity_ratio": 1.001,
        "worst_language": "tr",
        "kl_worst_language_nats": 2 * kl,
        "seconds": 3.0,
        "peak_rss_bytes": 2**30,
        **more,
    }


CHARTED = (
    ("w4g128", 0.007, 4.25),
    ("w4g32", 0.004, 5.0),
    ("w4g32-sym", 0.005, 4.5),
    ("mixed 4.6", 0.001, 4.6),
)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_keeps_its_name(name):
    form = uniform(name)
    assert Run("hqq", "default", form.bits, form.group_size, form.symmetric).format == name == form.label


@pytest.mark.parametrize("name", ["4.6", "w4", "w4g33", "w3g128", "w4g128-asym"])
def test_what_is_no_format_is_refused(name):
    with pytest.raises(ValueError):
        uniform(name)


def test_formats_are_sorted_by_kind_then_size():
    names = ["mixed 5", "w4g128-sym", "w4g128", "mixed 4.25", "w4g32-sym", "w4g32", "w4g64"]
    assert sorted(names, key=format_key) == [
        "w4g32",
        "w4g64",
        "w4g128",
        "w4g32-sym",
        "w4g128-sym",
        "mixed 4.25",
        "mixed 5",
    ]


def test_runs_are_those_that_a_tool_can_do():
    found = list(runs([uniform("w4g64-sym")], [4.6], ["hqq", "onnxruntime", "gptqmodel:mse", "glmexport"]))
    assert {(run.tool, run.setting, run.format) for run in found} == {
        ("onnxruntime", "default", "w4g64-sym"),
        ("onnxruntime", "rtn", "w4g64-sym"),
        ("onnxruntime", "gptq", "w4g64-sym"),
        ("gptqmodel", "mse", "w4g64-sym"),
        *(("glmexport", setting, "w4g64-sym") for setting in TOOLS["glmexport"]),
        ("glmexport", "default", "mixed 4.6"),
    }


def test_what_a_tool_lacks_is_said_with_its_formats():
    every = [uniform(name) for name in ("w4g32", "w4g64-sym", "w4g128-sym")]
    assert grouped(lacking(every, ["hqq", "gptqmodel", "llama-cpp:default"])) == {
        "hqq, default (w4g64-sym, w4g128-sym)": "it has no symmetric format",
        "llama-cpp, default (w4g64-sym, w4g128-sym)": "it has groups of 32 only",
    }
    assert [run.tool for run in runs(every, [], ["hqq", "llama-cpp:default"])] == ["hqq", "llama-cpp"]


def test_every_compared_setting_exists():
    assert all(setting in PEERS[tool].settings for tool, settings in TOOLS.items() for setting in settings)


def test_runs_have_files_of_their_own():
    every = [uniform(name) for name in FORMATS]
    found = {*runs(every, [3.2, 4.25], list(TOOLS)), *(run for form in every for run in ablations(form))}
    assert len({run.slug for run in found}) == len(found) > 100


def test_headline_is_each_tool_as_it_comes_and_at_its_best():
    rows = [
        row("gptqmodel", "default", "w4g32", 0.003),
        row("gptqmodel", "mse", "w4g32", 0.004),
        row("gptqmodel", "act-order-mse", "w4g32", 0.002),
        row("glmexport", "default", "w4g32", 0.001),
        row("glmexport", "nearest", "w4g32", 0.005),
        row("glmexport", "without polish", "w4g32", 0.0005),
        row("gptqmodel", "mse", "w4g64", 0.006),
    ]
    assert [(found["setting"], found["format"]) for found in headline(rows, TOOLS)] == [
        ("default", "w4g32"),
        ("act-order-mse", "w4g32"),
        ("default", "w4g32"),
        ("nearest", "w4g32"),
        ("mse", "w4g64"),
    ]


def test_table_compares_ours_within_a_format():
    rows = [
        row("glmexport", "default", "w4g128", 0.001, cpu_seconds=7.0),
        row("hqq", "default", "w4g32", 0.004),
        row("hqq", "default", "w4g128", 0.004),
    ]
    lines = [cells(line) for line in table(rows).splitlines()[2:]]
    assert [(line[0], line[1], line[4], line[11]) for line in lines] == [
        ("w4g32", "hqq, default", "–", "–"),
        ("w4g128", "hqq, default", "0.25", "–"),
        ("w4g128", "glmexport, default", "–", "7"),
    ]


def test_overview_has_the_best_of_each_tool_but_our_default():
    rows = [
        row("gptqmodel", "default", "w4g128", 0.003),
        row("gptqmodel", "mse", "w4g128", 0.002),
        row("glmexport", "4 rounds of polish", "w4g32", 0.0005),
        row("glmexport", "default", "w4g32", 0.001),
        row("glmexport", "default", "mixed 4.6", 0.0001),
    ]
    assert [cells(line) for line in overview(rows).splitlines() if "---" not in line] == [
        ["tool", "w4g32", "w4g128"],
        ["glmexport", "1.00", "–"],
        ["gptqmodel", "–", "2.00"],
    ]


def test_ablation_divides_by_the_default_and_by_the_line_above():
    kl = {"default": 1.0, "without polish": 1.5, "nearest": 8.0, "GPTQ alone": 4.0, "without asymmetric target": 2.0}
    rows = [row("glmexport", setting, "w4g128", value) for setting, value in kl.items()]
    changed, added = ablation([*rows, row("glmexport", "in stored order", "w4g32", 9.0)], "w4g128").split("\n\n")
    assert [cells(line)[:3:2] for line in changed.splitlines()[2:]] == [
        ["default", "1.000"],
        ["without asymmetric target", "2.000"],
        ["without polish", "1.500"],
    ]
    assert [cells(line)[:3:2] for line in added.splitlines()[2:]] == [
        ["nearest", "–"],
        ["GPTQ alone", "0.500"],
        ["without asymmetric target", "0.500"],
        ["default", "0.500"],
    ]


def test_ablation_runs_every_setting_once():
    settings = [run.setting for run in ablations(uniform("w4g64"))]
    assert len(settings) == len(set(settings))
    # One setting is the default in other arithmetic.
    assert set(settings) == {*ONE_AT_A_TIME, *ADDED_UP} == set(PEERS["glmexport"].settings) - {AS_BUILT}


def test_front_drops_what_costs_more_and_loses_more():
    assert front([(4.6, 3.0), (4.2, 4.0), (4.7, 3.5), (4.2, 5.0), (6.0, 1.0)]) == [(4.2, 4.0), (4.6, 3.0), (6.0, 1.0)]


def test_series_are_tools_and_kinds_of_format_and_of_ours_the_default_alone():
    rows = [
        row("hqq", "default", "w4g32", 0.004, bits_per_weight=5.0),
        row("hqq", "default", "w4g128", 0.005, bits_per_weight=4.25),
        row("glmexport", "nearest", "w4g128", 0.0001),
        row("glmexport", "default", "w4g128", 0.001),
        row("glmexport", "default", "w4g32-sym", 0.002),
        row("glmexport", "default", "mixed 5", 0.0005, bits_per_weight=4.99),
    ]
    assert series(rows) == {
        ("glmexport", 0): [(4.25, 0.001)],
        ("glmexport", 1): [(4.25, 0.002)],
        ("glmexport", 2): [(4.99, 0.0005)],
        ("hqq", 0): [(4.25, 0.005), (5.0, 0.004)],
    }


def test_labels_are_moved_apart_and_keep_their_order():
    assert spread([10.0, 0.0, 3.0, 11.0], 5.0) == [10.0, 0.0, 5.0, 15.0]


def test_every_tool_has_a_colour_of_its_own():
    assert set(COLOURS) == set(PEERS)
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_the_chart_is_the_same_again(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra peers")
    rows = [row("hqq", "default", name, kl, bits_per_weight=bits) for name, kl, bits in CHARTED]
    for name in ("first.svg", "second.svg"):
        plot(rows, tmp_path / name)
    drawn = (tmp_path / "first.svg").read_text(encoding="utf-8")
    assert drawn == (tmp_path / "second.svg").read_text(encoding="utf-8")
    assert all(f">{words}</text>" in drawn for words in ("hqq", "hqq, symmetric", "hqq, mixed"))
    assert "date" not in drawn
