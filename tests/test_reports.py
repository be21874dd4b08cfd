"""The page of public reports names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"\| `[^`]+#\d+` \| .+ \| (.+) \|")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_report_is_answered_by_a_test() -> None:
    page = (ROOT / "benchmarks" / "reports.md").read_text(encoding="utf-8")
    rows = [match[1] for match in map(ROW.fullmatch, page.splitlines()) if match]
    assert len(rows) > 75
    for row in rows:
        named = TEST.findall(row)
        assert named, row
        for path, name in named:
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\b", source, re.MULTILINE), f"{path}::{name}"
