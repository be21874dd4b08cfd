"""A machine chooses its arithmetic once: what is kept is taken, and what is damaged, foreign or wrong is not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from glmexport.foundation.progress import Silent
from glmexport.reference import arithmetic_choice
from glmexport.reference.arithmetic import ROUTES, Route
from glmexport.reference.arithmetic_choice import Choice, choose_arithmetic, here
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic

MEASURED = OriginalArithmetic(route="fp32", relative_error=2.5e-7)
KEPT = OriginalArithmetic(route="fp32", relative_error=3.5e-7)


@pytest.fixture(autouse=True)
def measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times at which something was measured, in place of measuring; nothing is kept yet."""
    times: list[float] = []

    def measure() -> OriginalArithmetic:
        times.append(time.monotonic())
        time.sleep(0.2)
        return MEASURED

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(arithmetic_choice, "measure", measure)
    return times


def file(tmp_path: Path) -> Path:
    return tmp_path / "glmexport/arithmetic" / here().file


def keep(tmp_path: Path, arithmetic: OriginalArithmetic) -> Path:
    path = file(tmp_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Choice(conditions=here(), arithmetic=arithmetic).model_dump_json(), encoding="utf-8")
    return path


def test_it_is_measured_once(tmp_path: Path, measurements: list[float]) -> None:
    assert [choose_arithmetic("auto", 1, Silent()) for _ in range(3)] == [MEASURED] * 3
    assert len(measurements) == 1
    file(tmp_path).unlink()
    choose_arithmetic("auto", 1, Silent())
    assert len(measurements) == 2


def test_what_is_kept_is_taken(tmp_path: Path, measurements: list[float]) -> None:
    keep(tmp_path, KEPT)
    assert choose_arithmetic("auto", 1, Silent()) == KEPT
    assert measurements == []


def test_each_number_of_threads_has_its_own(measurements: list[float]) -> None:
    for _ in range(2):
        choose_arithmetic("auto", 2, Silent())
        assert torch.get_num_threads() == 2
        choose_arithmetic("auto", 1, Silent())
        assert torch.get_num_threads() == 1
    assert len(measurements) == 2


def test_nothing_is_measured_for_torch_s_default(tmp_path: Path, measurements: list[float]) -> None:
    assert choose_arithmetic("fp32", 1, Silent()) == UNCHECKED
    assert measurements == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"{", b"[1, 2]", b"\x00" * 64, b'{"route": "fp32"}'])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, damage: bytes, measurements: list[float]) -> None:
    keep(tmp_path, KEPT).write_bytes(damage)
    assert choose_arithmetic("auto", 1, Silent()) == MEASURED
    assert len(measurements) == 1
    assert choose_arithmetic("auto", 1, Silent()) == MEASURED
    assert len(measurements) == 1


@pytest.mark.parametrize("field", ["processor", "torch", "capability"])
def test_a_file_of_another_machine_is_measured_anew(tmp_path: Path, field: str, measurements: list[float]) -> None:
    path = keep(tmp_path, KEPT)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["conditions"][field] = "another"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert choose_arithmetic("auto", 1, Silent()) == MEASURED
    assert len(measurements) == 1


def test_a_route_that_is_not_known_is_measured_anew(tmp_path: Path, measurements: list[float]) -> None:
    keep(tmp_path, OriginalArithmetic(route="abacus", relative_error=0, speed_ratio=9))
    assert choose_arithmetic("auto", 1, Silent()) == MEASURED
    assert len(measurements) == 1


class Wrong(Route):
    """A route by which nothing is a number."""

    @contextmanager
    def computing(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("glmexport.reference.arithmetic_check.Product.error", lambda product: float("inf"))
            yield


def test_a_route_that_computes_otherwise_now_is_measured_anew(
    tmp_path: Path, measurements: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROUTES, "wrong", Wrong("wrong"))
    keep(tmp_path, OriginalArithmetic(route="wrong", relative_error=1e-7, speed_ratio=2))
    assert choose_arithmetic("auto", 1, Silent()) == MEASURED
    assert len(measurements) == 1


def test_two_that_ask_at_once_choose_the_same(measurements: list[float]) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: choose_arithmetic("auto", 1, Silent()), range(2)))
    assert found == [MEASURED] * 2
    assert len(measurements) == 1


def test_what_cannot_be_kept_is_told(
    tmp_path: Path, measurements: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    progress = Silent()
    assert choose_arithmetic("auto", 1, progress) == MEASURED
    assert len(measurements) == 1
    (remark,) = progress.remarks
    assert "cannot be kept" in remark and "--arithmetic fp32" in remark
