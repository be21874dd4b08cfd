"""What programs of others can ask: arguments that are refused, and a bundle and a checkpoint behind one face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builds import build, small_checkpoint

import glmexport.lm_eval.subject
import glmexport.workflows.build
from glmexport.foundation.errors import BundleError, InputError
from glmexport.foundation.progress import Silent
from glmexport.lm_eval.answering import Ending, Prompt
from glmexport.lm_eval.likelihood import Request
from glmexport.lm_eval.subject import BundleSubject, CheckpointSubject, Settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "One model is needed"),
        ({"bundle": "b", "checkpoint": "c"}, "One model is needed"),
        ({"bundle": "b", "adapter": "a"}, "are for a checkpoint"),
        ({"bundle": "b", "drafts": "d"}, "are for a checkpoint"),
        ({"bundle": "b", "temperature": 1, "dtype": "x"}, "have dtype, temperature, which is unknown"),
        ({"bundle": "b", "batch_size": 8}, "--batch_size 8"),
        ({"bundle": "b", "batch_size": "auto"}, "--batch_size auto"),
        ({"bundle": "b", "threads": 0}, "threads is 0"),
        ({"bundle": "b", "threads": "two"}, "threads is 'two'"),
        ({"bundle": "b", "max_gen_toks": 1.5}, "max_gen_toks is 1.5"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Settings.of(arguments)
    assert caught.value.next_step


def test_what_lm_eval_gives_by_itself_is_taken() -> None:
    settings = Settings.of({"bundle": "b", "batch_size": 1, "max_batch_size": 4, "device": "cuda:0"})
    assert (settings.bundle, settings.max_gen_toks) == ("b", 256)


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        Settings.of({"bundle": str(tmp_path)}).open(Silent())


def test_a_bundle_and_its_checkpoint_are_asked_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    small_checkpoint(checkpoint)
    monkeypatch.setattr(glmexport.workflows.build, "measure_and_report", lambda *_: None)
    build(checkpoint, bundle, "fp32")
    progress = Silent()
    arguments: list[dict[str, Any]] = [
        {"bundle": str(bundle)},
        {"checkpoint": str(checkpoint)},
        {"checkpoint": str(checkpoint), "drafts": str(bundle)},
    ]
    subjects = [Settings.of({**each, "threads": 1}).open(progress) for each in arguments]
    # The same again, on a machine that is too small for it.
    subjects.append(Settings.of({"checkpoint": str(checkpoint), "threads": 1}).open(progress))
    assert isinstance(subjects[0], BundleSubject)
    assert all(isinstance(subject, CheckpointSubject) for subject in subjects[1:])
    assert {subject.context_length for subject in subjects} == {256}
    assert len({subject.digest for subject in subjects}) == 2
    prompts = [Prompt((262, 263, 40 + count), Ending((), 8)) for count in range(3)]
    requests = [Request((262, 263, 40), (41, 42)), Request((262,), (263,))]
    expected, likely = subjects[0].answers(prompts), subjects[0].likelihoods(requests)
    assert all(expected)
    for subject in subjects[1:]:
        assert not progress.remarks
        if subject is subjects[-1]:
            monkeypatch.setattr(glmexport.lm_eval.subject, "fits_in_memory", lambda _: False)
        assert subject.answers(prompts) == expected
        found = subject.likelihoods(requests)
        assert [each.greedy for each in found] == [each.greedy for each in likely]
        assert [each.log_p for each in found] == pytest.approx([each.log_p for each in likely], abs=1e-3)
    assert any("block by block" in remark for remark in progress.remarks)
