"""A device's answers, judged against the captured original by the same gates as those of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glmexport.bundle.bundle import Bundle
from glmexport.devices.answers import DeviceAnswers
from glmexport.devices.job import DeviceJob, PromptQuestion, SpeedRequest, TextQuestion, write_job
from glmexport.foundation.target import Gates
from glmexport.results.behaviour import Behaviour
from glmexport.results.device import DeviceResult
from glmexport.results.performance import Performance
from glmexport.results.record import Verdict
from glmexport.validation.behaviour.measure import Answers, judge
from glmexport.validation.capture import CapturedReference
from glmexport.validation.conditions import ValidationPlan
from glmexport.validation.fidelity import summarize
from glmexport.validation.performance import device_performance
from glmexport.validation.prompts import prompt_parity
from glmexport.validation.run import Measurements, Validation, arithmetic, judged
from glmexport.validation.runtimes import Memory, Round
from glmexport.validation.speed import LEAST_ROUNDS, MeasurementTurns

_NO_ENERGY = "Devices do not tell the energy they take."


@dataclass(frozen=True)
class DeviceJudge:
    """A judge of the devices' answers about ``bundle``, by the answers of its original in ``captured``."""

    bundle: Bundle
    captured: CapturedReference
    plan: ValidationPlan
    policy: Gates

    def write_job(self, folder: Path, threads: int | None) -> DeviceJob:
        """Write the job that asks everything that was captured, and for speed, into the new ``folder``."""
        texts = self.captured.texts
        asked = [
            TextQuestion(text.ids, text.prefix, self.captured.kept(index).tokens, self.captured.audited(index))
            for index, text in enumerate(texts)
        ]
        answers = (self.captured.capture.answers or ()) if self.plan.behaviour else ()
        ids = [token for text in texts for token in text.ids.tolist()]
        return write_job(
            folder,
            self.bundle,
            asked,
            [PromptQuestion(answer.question.ids, answer.question.max_tokens) for answer in answers],
            vocabulary_size=self.captured.capture.vocabulary_size,
            speed=SpeedRequest(
                prompt=tuple(ids[: self.plan.prompt_tokens]),
                generated_tokens=self.plan.generated_tokens,
                rounds=LEAST_ROUNDS if self.plan.speed_seconds else 2,
                seconds=self.plan.speed_seconds,
            ),
            threads=threads,
        )

    def validation(self, answers: DeviceAnswers) -> Validation:
        """Return everything that a device's answers show, and the verdict."""
        capture, tokenizer = self.captured.capture, self.bundle.tokenizer
        divergences = [
            answers.divergence(index, self.captured.kept(index)) for index in range(len(self.captured.texts))
        ]
        fidelity = summarize(
            self.captured.texts,
            divergences,
            tokenizer,
            arithmetic(self.bundle.manifest),
            capture.noise,
            self.captured.audit_at(lambda index, _: answers.audit(index)),
        )
        performance, absent = self._performance(answers)
        measured = Measurements(
            fidelity=fidelity,
            prompts=prompt_parity(capture.prompts, tokenizer),
            behaviour=self._behaviour(answers),
            performance=performance,
            performance_absent_because=absent,
            reference=capture.reference_check,
            arithmetic=capture.arithmetic,
        )
        return judged(measured, self.bundle.manifest, self.policy)

    def _behaviour(self, answers: DeviceAnswers) -> Behaviour | None:
        captured = self.captured.capture.answers
        if not answers.job.prompts or not captured:
            return None
        # Each prompt is asked alone: a job has no batches.
        given = Answers(
            [list(answer.tokens) for answer in captured],
            [answers.tokens(index) for index in range(len(captured))],
            frozenset(answers.job.end_tokens),
            passes=0,
        )
        return judge([answer.question for answer in captured], given, self.bundle.tokenizer)

    def _performance(self, answers: DeviceAnswers) -> tuple[Performance | None, str | None]:
        """Return what the device timed, or why that says nothing."""
        result, asked = answers.result, answers.job.speed
        speed = result.speed
        if result.device.emulated or speed is None or asked is None:
            return None, result.device.emulated or result.speed_absent_because or "Speed was not asked for."
        turns = MeasurementTurns(
            runtime=result.device.runtime,
            threads=speed.threads,
            load_s=speed.load_s,
            rounds=tuple(Round(ttft_s=each.ttft_s, steps_s=each.steps_s, decode_j=None) for each in speed.rounds),
            memory=Memory(
                bytes=speed.peak_memory_bytes, source=speed.peak_memory_source, energy_absent_because=_NO_ENERGY
            ),
            nodes=result.nodes or (),
        )
        performance = device_performance(
            turns,
            self.bundle.manifest,
            len(asked.prompt),
            asked.generated_tokens,
            speed.memory_bandwidth_bytes_per_s,
            self.policy.confidence,
        )
        return performance, None


def measured(name: str, device_class: str, answers: DeviceAnswers, validation: Validation) -> DeviceResult:
    """Return the section of a device that answered."""
    return DeviceResult(
        name=name,
        device_class=device_class,
        verdict=validation.verdict,
        failure=None,
        facts=answers.result.device,
        fidelity=validation.fidelity,
        behaviour=validation.behaviour,
        performance=validation.performance,
        performance_absent_because=validation.performance_absent_because,
        gates=validation.gates,
    )


def failed(name: str, device_class: str, why: str) -> DeviceResult:
    """Return the section of a device that did not answer: nobody can tell, which is never a pass."""
    return DeviceResult(
        name=name,
        device_class=device_class,
        verdict=Verdict.INCONCLUSIVE,
        failure=why,
        facts=None,
        fidelity=None,
        behaviour=None,
        performance=None,
        performance_absent_because=None,
        gates=(),
    )
