"""The ledger: whatever is changed in it is noticed, and what a crash leaves half written is not lost track of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmexport.wire.server.ledger import BACK, BEGINNING, CONFIRMED, SWITCHING, Ledger
from glmexport.wire.standalone import Failure


def written(path: Path, *events: str) -> Ledger:
    ledger = Ledger(path)
    for number, event in enumerate(events, 1):
        ledger.append(event, release=f"r{number}", counter=number, former=None)
    return ledger


def test_entries_are_chained(tmp_path: Path) -> None:
    head = written(tmp_path / "ledger", "a", "b", "c").head
    again = Ledger(tmp_path / "ledger")
    assert again.head == head != BEGINNING
    assert [entry["number"] for entry in again.entries] == [1, 2, 3]
    assert again.entries[0]["previous"] == BEGINNING


@given(place=st.integers(min_value=0), value=st.integers(min_value=0, max_value=255))
def test_no_byte_of_it_can_be_changed_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger"
    head = written(path, "a", "b", "c").head
    content = bytearray(path.read_bytes())
    place %= len(content)
    changed = content[place] != value
    content[place] = value
    path.write_bytes(content)
    try:
        found = Ledger(path).head
    except Failure:
        assert changed
    else:
        # The last line can be another one, but then the head that was told is another, too.
        assert (found == head) != changed


@pytest.mark.parametrize("remove", [0, 1])
def test_a_line_that_is_missing(tmp_path: Path, remove: int) -> None:
    path = tmp_path / "ledger"
    written(path, "a", "b", "c")
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[remove]
    path.write_bytes(b"".join(lines))
    with pytest.raises(Failure, match=f"Line {remove + 1} of .* does not follow"):
        Ledger(path)


def test_a_torn_line_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    written(path, "a", "b")
    whole = path.read_bytes()
    for cut in range(1, 40, 7):
        path.write_bytes(whole + whole.splitlines()[1][:cut])
        ledger = Ledger(path)
        assert len(ledger.entries) == 2
        ledger.append("c")
        events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
        assert events == ["a", "b", "torn", "c"]
        assert Ledger(path).entries[2]["bytes"] == cut


def test_what_it_says_of_releases(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    assert (ledger.counter, ledger.unfinished, ledger.confirmed()) == (0, None, [])
    for name, counter, end in (("a", 5, CONFIRMED), ("b", 7, BACK), ("c", 6, CONFIRMED), ("a", 5, CONFIRMED)):
        ledger.append(SWITCHING, release=name, counter=counter, former=None)
        assert ledger.unfinished is not None and ledger.unfinished["release"] == name
        ledger.append(end, release=name, counter=counter)
        assert ledger.unfinished is None
    # What was taken back never served.
    assert ledger.counter == 6
    assert ledger.confirmed() == ["c", "a"]
