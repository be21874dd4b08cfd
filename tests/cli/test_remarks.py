"""What is no error and has to be known is said when a checkpoint is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from builds import Run, Sample

from glmexport.foundation.errors import EXIT_PASS


def test_inspect_tells_of_tokens_without_ids_and_of_a_context_that_stayed(
    sample: Sample, tmp_path: Path, run: Run
) -> None:
    checkpoint = Path(shutil.copytree(sample.checkpoint, tmp_path / "checkpoint"))
    changes = {
        "config.json": {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5}
        },
        "tokenizer_config.json": {"extra_special_tokens": ["<|new|>"]},
    }
    for name, change in changes.items():
        path = checkpoint / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    done = run("inspect", checkpoint, "--json")
    assert done.code == EXIT_PASS and done.document["context_length"] == 256
    assert "<|new|>" in done.stderr and "YaRN by 4 reaches 1,024 tokens" in done.stderr
    assert "<|new|>" not in (told := run("inspect", sample.checkpoint, "--json").stderr) and "YaRN" not in told
