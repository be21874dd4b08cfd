"""Definitions that extend another: what is merged, what is never inherited, and what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from glmexport.foundation.errors import DefinitionError
from glmexport.foundation.recipe import Budget, Recipe, open_recipe
from glmexport.foundation.target import Target, open_target, target_source
from glmexport.tuning.write import write_target

MINE = """
extends = "w4g32"
summary = "mine"

[linears]
group_size = 128
"""
TARGET = """
extends = "x86-avx2"
summary = "mine"

[probe]
cpu_flags = ["avx2"]

[provenance]
measured_on = "another machine"
date = "2026-01-01"
"""


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(path: str) -> DefinitionError:
    with pytest.raises(DefinitionError) as refused:
        open_recipe(path)
    return refused.value


def test_tables_merge_and_the_rest_is_the_base_s(tmp_path: Path) -> None:
    mine, base = open_recipe(write(tmp_path / "mine.toml", MINE)), open_recipe("w4g32")
    assert mine.linears is not None and base.linears is not None
    assert mine == base.model_copy(
        update={"name": "mine", "summary": "mine", "linears": base.linears.model_copy(update={"group_size": 128})}
    )
    # Digests and manifests write the languages in this order.
    assert mine.calibration is not None and base.calibration is not None
    assert [*mine.calibration.quota] == [*base.calibration.quota]


def test_a_table_that_only_the_file_has_is_added(tmp_path: Path) -> None:
    mine = open_recipe(write(tmp_path / "mine.toml", f"{MINE}\n[budget]\nbits_per_weight = 4\n"))
    assert mine.budget == Budget(bits_per_weight=4)


def test_an_array_replaces(tmp_path: Path) -> None:
    mine, base = open_target(write(tmp_path / "mine.toml", TARGET)), open_target("x86-avx2")
    assert mine.probe.cpu_flags == ("avx2",) and len(base.probe.cpu_flags) > 1
    assert (mine.probe.machine, mine.graph, mine.weights) == (base.probe.machine, base.graph, base.weights)


def test_a_file_beside_it_is_extended(tmp_path: Path) -> None:
    write(tmp_path / "bases" / "ours.toml", (Path(str(target_source("x86-avx2").path))).read_text(encoding="utf-8"))
    mine = open_target(write(tmp_path / "mine.toml", TARGET.replace("x86-avx2", "bases/ours.toml")))
    assert mine.graph == open_target("x86-avx2").graph


def test_what_was_inherited_is_known(tmp_path: Path) -> None:
    source = target_source(write(tmp_path / "mine.toml", TARGET))
    assert source.base == "x86-avx2" and source.base_path == target_source("x86-avx2").path
    assert "graph.opset" in source.inherited and "probe.machine" in source.inherited
    assert not {"summary", "extends", "probe.cpu_flags", "provenance.date"} & {*source.inherited}
    assert target_source("x86-avx2").inherited == ()


def test_summary_and_provenance_are_never_inherited(tmp_path: Path) -> None:
    assert open_target(write(tmp_path / "mine.toml", TARGET)).provenance.claims == {}
    message = refusal(write(tmp_path / "mine.toml", MINE.replace('summary = "mine"', ""))).message
    assert "summary" in message and "w4g32.toml" in message and "mine.toml" in message
    with pytest.raises(DefinitionError, match=r"mine.toml.*x86-avx2.toml.*provenance"):
        open_target(write(tmp_path / "mine.toml", TARGET[: TARGET.index("[provenance]")]))


def test_the_evidence_of_a_tuned_target_is_never_inherited(tmp_path: Path) -> None:
    base = tomllib.loads(Path(target_source("x86-avx2").path).read_text(encoding="utf-8"))
    write(tmp_path / "tuned.toml", "")
    write_target(Target.model_validate({**base, "name": "tuned"}), tmp_path / "tuned.toml")
    with (tmp_path / "tuned.toml").open("a", encoding="utf-8") as file:
        file.write("\n[evidence]\nnonsense = 1\n")
    with pytest.raises(DefinitionError, match="evidence"):
        open_target(str(tmp_path / "tuned.toml"))
    assert open_target(write(tmp_path / "mine.toml", TARGET.replace("x86-avx2", "tuned.toml"))).evidence is None


def test_a_claim_is_inherited_by_name(tmp_path: Path) -> None:
    text = TARGET + '[provenance.claims]\n"graph.norm" = "inherited"\n'
    mine = open_target(write(tmp_path / "mine.toml", text))
    base = open_target("x86-avx2").provenance.claims
    assert mine.provenance.claims == {"graph.norm": base["graph.norm"]}


@pytest.mark.parametrize(
    ("key", "more", "reason"),
    [
        ("weights.bits", "", "measured on other hardware"),
        ("graph.opset", "[graph]\nopset = 22", "another value"),
        ("graph.capacity", "", "no such claim"),
    ],
)
def test_a_claim_that_does_not_hold_here(tmp_path: Path, key: str, more: str, reason: str) -> None:
    text = f'{TARGET}[provenance.claims]\n"{key}" = "inherited"\n{more}\n'
    with pytest.raises(DefinitionError, match=rf"mine.toml.*x86-avx2.toml.*{key}.*{reason}"):
        open_target(write(tmp_path / "mine.toml", text))


def test_a_claim_of_nobody(tmp_path: Path) -> None:
    text = Path(target_source("x86-avx2").path).read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith('"graph.norm"'))
    with pytest.raises(DefinitionError, match=r"graph.norm: no target is extended"):
        open_target(write(tmp_path / "mine.toml", text.replace(line, '"graph.norm" = "inherited"')))


def test_a_tuned_target_states_everything(tmp_path: Path) -> None:
    mine = open_target(write(tmp_path / "mine.toml", TARGET))
    write_target(mine, tmp_path / "elsewhere" / "mine.toml")
    assert open_target(str(tmp_path / "elsewhere" / "mine.toml")) == mine
    assert target_source(str(tmp_path / "elsewhere" / "mine.toml")).base is None


def test_one_level_only(tmp_path: Path) -> None:
    write(tmp_path / "middle.toml", MINE)
    error = refusal(write(tmp_path / "mine.toml", MINE.replace("w4g32", "middle.toml")))
    assert "mine.toml" in error.message and "middle.toml" in error.message and "w4g32" in error.message


def test_a_file_does_not_extend_itself(tmp_path: Path) -> None:
    assert "itself extends" in refusal(write(tmp_path / "mine.toml", MINE.replace("w4g32", "mine.toml"))).message


@pytest.mark.parametrize("base", ["../outside.toml", "folder/../../outside.toml", "link.toml"])
def test_no_way_out_of_the_folder(tmp_path: Path, base: str) -> None:
    outside = write(tmp_path / "outside.toml", MINE.replace('extends = "w4g32"', ""))
    (tmp_path / "inside" / "folder").mkdir(parents=True)
    (tmp_path / "inside" / "link.toml").symlink_to(outside)
    message = refusal(write(tmp_path / "inside" / "mine.toml", MINE.replace("w4g32", base))).message
    assert "not in the folder" in message and base in message and "mine.toml" in message


def test_no_absolute_path(tmp_path: Path) -> None:
    base = write(tmp_path / "base.toml", MINE.replace('extends = "w4g32"', ""))
    assert "not in the folder" in refusal(write(tmp_path / "mine.toml", MINE.replace("w4g32", base))).message


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ('"w4g3"', "no recipe named 'w4g3'"),
        ('"absent.toml"', "no recipe file"),
        ('"../w4g32"', "no recipe named"),
        ("3", "extends: Input should be a valid string"),
        ('["w4g32"]', "extends: Input should be a valid string"),
    ],
)
def test_what_is_not_there_is_named_with_the_file(tmp_path: Path, base: str, said: str) -> None:
    error = refusal(write(tmp_path / "mine.toml", MINE.replace('"w4g32"', base)))
    assert said in error.message and "mine.toml" in error.message
    if "w4g3'" in said:
        assert "Did you mean 'w4g32'?" in error.next_step


def test_a_wrong_base_is_named(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", "not [ toml")
    message = refusal(write(tmp_path / "mine.toml", MINE.replace("w4g32", "base.toml"))).message
    assert "base.toml is not TOML" in message and "mine.toml extends" in message
    write(tmp_path / "base.toml", "unheard = 1\n[linears]\nbits = 4\n")
    message = refusal(write(tmp_path / "mine.toml", MINE.replace("w4g32", "base.toml"))).message
    assert "unheard" in message and "base.toml" in message and "mine.toml" in message


def test_nothing_else_extends() -> None:
    with pytest.raises(ValueError, match="extends"):
        Recipe.model_validate({"name": "mine", "summary": "mine", "extends": "w4g32"})
