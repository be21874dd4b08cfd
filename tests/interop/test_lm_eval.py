"""Against the real lm-eval: a bundle and a checkpoint score as its own transformers model does, on local tasks.

Needs an interpreter that has lm-eval and glmexport's dependencies, in an environment of its own:

    python3 -m venv /tmp/lm-eval && /tmp/lm-eval/bin/pip install torch==2.13.0 -e ".[lm-eval]" "lm-eval[hf]"
    GLMEXPORT_LM_EVAL_PYTHON=/tmp/lm-eval/bin/python pytest tests/interop
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from interop_jobs import build_unvalidated

import glmexport
from glmexport.demo import demo_checkpoint
from glmexport.foundation.errors import EXIT_INPUT

VARIABLE = "GLMEXPORT_LM_EVAL_PYTHON"
ROWS = [
    {
        "question": question,
        "choices": [" freedom of thought", " the of of", " education  and work"],
        "answer": index % 3,
    }
    for index, question in enumerate(["Everyone has the right to life,", "No one shall be ", "All are equal", "El"])
]
TEXTS = ["Everyone has the right to education. " * 3, "Toute personne est libre, et chacun le sait. " * 150]
#: Of each task: kind of request, what is asked, and settings.
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "[gMASK]<sop>{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "plain": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "[gMASK]<sop>{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", " of"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    # With the template: the beginning of the assistant's turn.
    "begun": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "gen_prefix": "Everyone has",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "long": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "sampled": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 0.7},
        "metric_list": [{"metric": "exact_match"}],
    },
}
MINE = "glmexport.lm_eval", "--model", "glmexport"
THEIRS = "lm_eval", "--model", "hf", "--device", "cpu"


class Harness:
    """lm-eval in an interpreter of its own, with the tasks in a folder."""

    def __init__(self, python: str, place: Path) -> None:
        self.python, self.place = python, place
        self.bundle = build_unvalidated(demo_checkpoint(), place / "bundle", "fp32")
        # lm-eval's own model takes the checkpoint's limit of tokens in place of the task's.
        self.unlimited = shutil.copytree(demo_checkpoint(), place / "unlimited")
        settings = json.loads((self.unlimited / "generation_config.json").read_text(encoding="utf-8"))
        del settings["max_new_tokens"]
        (self.unlimited / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
        for name, rows in (("rows", ROWS), ("texts", [{"text": text} for text in TEXTS])):
            (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        for name, fields in TASKS.items():
            data = {"test": str(place / ("texts.jsonl" if name == "long" else "rows.jsonl"))}
            task = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": data}}
            # JSON is YAML.
            text = json.dumps({**task, "test_split": "test", **fields})
            (place / f"{name}.yaml").write_text(text, encoding="utf-8")

    def run(self, program: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.place / "cache"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(glmexport.__file__).parents[1]),
        }  # fmt: skip
        command = [self.python, "-m", *program, *arguments, "--include_path", str(self.place)]
        return subprocess.run(
            command, cwd=self.place, env={**os.environ, **settings}, capture_output=True, text=True, check=False
        )

    def samples(
        self, name: str, program: tuple[str, ...], model: str, tasks: tuple[str, ...], *more: str
    ) -> dict[str, list[Any]]:
        """Raw answers to every request, by task."""
        output = self.place / "results" / name
        listed = ",".join(f"local_{task}" for task in tasks)
        process = self.run(
            program, "--model_args", model, "--tasks", listed, "--log_samples", "--output_path", str(output), *more
        )
        assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
        found = {}
        for task in tasks:
            (path,) = output.rglob(f"samples_local_{task}_*.jsonl")
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[task] = [line["resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
        return found


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    path = os.environ.get(VARIABLE)
    if not path:
        pytest.skip(f"set {VARIABLE} to a Python interpreter that has lm-eval and glmexport's dependencies")
    return Harness(path, tmp_path_factory.mktemp("lm-eval"))


@pytest.fixture(scope="module")
def theirs(harness: Harness) -> dict[str, list[Any]]:
    """Of transformers' model by lm-eval's own hand."""
    model = f"pretrained={harness.unlimited},dtype=float32,add_bos_token=False"
    return harness.samples("theirs", THEIRS, model, ("choice", "answer"))


def likelihoods(samples: list[Any]) -> list[tuple[float, bool]]:
    """Of every choice of every row; they are logged as texts."""
    return [(float(pair[0]), str(pair[1]) == "True") for row in samples for ((pair),) in row]


@pytest.fixture(scope="module")
def mine(harness: Harness) -> dict[str, dict[str, list[Any]]]:
    """Of the bundle, of the checkpoint, and of the checkpoint with the bundle's drafts."""
    models = {
        "bundle": f"bundle={harness.bundle}",
        "checkpoint": "checkpoint=demo",
        "drafts": f"checkpoint=demo,drafts={harness.bundle}",
    }
    tasks = "choice", "plain", "answer", "long"
    return {name: harness.samples(name, MINE, model, tasks) for name, model in models.items()}


@pytest.mark.parametrize("which", ["bundle", "checkpoint", "drafts"])
def test_scores_are_those_of_transformers(
    mine: dict[str, dict[str, list[Any]]], theirs: dict[str, list[Any]], which: str
) -> None:
    found = mine[which]
    pairs = zip(likelihoods(found["choice"]), likelihoods(theirs["choice"]), strict=True)
    for (log_p, greedy), (expected, flag) in pairs:
        assert log_p == pytest.approx(expected, abs=2e-3) and greedy == flag
    assert found["answer"] == theirs["answer"]
    # Whether a task writes the beginning of every text or not.
    assert likelihoods(found["plain"]) == likelihoods(found["choice"])
    for long, original in zip(found["long"], mine["checkpoint"]["long"], strict=True):
        assert float(long[0][0]) == pytest.approx(float(original[0][0]), rel=1e-4)


def test_conversations_are_written_by_the_template(harness: Harness, theirs: dict[str, list[Any]]) -> None:
    model = f"pretrained={harness.unlimited},dtype=float32,add_bos_token=False"
    tasks, chat = ("choice", "answer", "begun"), ("--apply_chat_template", "--num_fewshot", "1")
    expected = harness.samples("their-chat", THEIRS, model, tasks, *chat)
    found = harness.samples("chat", MINE, f"bundle={harness.bundle}", tasks, *chat)
    assert found["answer"] == expected["answer"] != theirs["answer"]
    assert found["begun"] == expected["begun"]
    for mine, original in zip(likelihoods(found["choice"]), likelihoods(expected["choice"]), strict=True):
        assert mine == (pytest.approx(original[0], abs=2e-3), original[1])


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("bundle={bundle}", "sampled", "Answers cannot be generated with sampling"),
        ("bundle={bundle},temperature=1", "choice", "The arguments of the model have temperature"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_sentence(harness: Harness, model: str, task: str, message: str) -> None:
    process = harness.run(
        MINE, "--model_args", model.format(bundle=harness.bundle), "--tasks", f"local_{task}", "--limit", "1"
    )
    assert process.returncode == EXIT_INPUT, process.stderr[-4000:]
    assert f"ERROR {message}" in process.stderr
    assert "Traceback" not in process.stderr
