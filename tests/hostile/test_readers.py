"""Whatever a stranger's file holds: it is refused in a sentence, at once, and with little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")

#: What each pair may take: CPU seconds, and bytes above what the process had before.
SECONDS, BYTES = 4.0, 200 << 20
#: Readers that look at a few keys of a document, and leave others alone.
LENIENT = {"config", "hazards", "special_tokens", "tokenizer_config"}
READERS = (
    "manifest", "report", "loop", "genai_config", "config", "hazards", "quantization", "compressed", "awq", "index",
    "safetensors",
    "adapter_config", "tokenizer", "tokenizer_config", "special_tokens", "chat_template", "result", "archive", "job",
    "reference", "release", "layout", "image", "credentials", "signature", "tasks", "corpus", "site", "fleet",
    "target", "policy",
)  # fmt: skip


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[str, float, int]]]:
    """Outcome, seconds and bytes by reader and input."""
    program = Path(__file__).with_name("reading.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path_factory.mktemp("read"))],
        check=False, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, tuple[str, float, int]]] = {}
    for line in done.stdout.splitlines():
        reader, title, *rest = json.loads(line)
        found.setdefault(reader, {})[title] = tuple(rest)
    return found


@pytest.mark.parametrize("reader", READERS)
def test_what_strangers_wrote_is_refused_at_once(
    reader: str, taken: dict[str, dict[str, tuple[str, float, int]]]
) -> None:
    assert len(taken[reader]) >= 15
    for title, (outcome, seconds, size) in taken[reader].items():
        harmless = (
            (reader in LENIENT and (title.endswith("up to the limit") or title == "an infinite number"))
            # A template is any text of some length.
            or (reader == "chat_template" and not title.startswith(("a long", "a terabyte", "a pipe", "a dev", "no ")))
            # What is no file is no loop, and the bundle is refused by who verifies its files.
            or (reader == "loop" and title in ("a pipe", "a device", "a folder"))
        )
        assert outcome == "refused" or (harmless and outcome == "accepted"), f"{reader}, {title}: {outcome}"
        assert seconds < SECONDS, f"{reader}, {title}: {seconds:.1f} s"
        assert size < BYTES, f"{reader}, {title}: {size >> 20} MiB"


def test_every_reader_is_tried(taken: dict[str, dict[str, tuple[str, float, int]]]) -> None:
    assert sorted(taken) == sorted(READERS)
