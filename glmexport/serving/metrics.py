"""The counters of a server, in the form that Prometheus reads."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from glmexport.serving.answer import PendingAnswer, Reason

# When a counter began tells nothing that the process's start does not.
disable_created_metrics()  # type: ignore[no-untyped-call]

_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        given: dict[str, Any] = {"namespace": "glmexport", "registry": self._registry}
        self.requests = Counter("requests", "Requests that were begun, by how they ended.", ["end"], **given)
        self.refused = Counter("refused", "Requests that were refused, by HTTP status.", ["status"], **given)
        self.waiting = Gauge("waiting", "Requests that wait for the model.", **given)
        self.running = Gauge("running", "Answers that take turns.", **given)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **given)
        self.reused_tokens = Counter("reused_tokens", "Tokens of prompts that earlier requests computed.", **given)
        self.tokens = Counter("tokens", "Tokens of answers.", **given)
        self.drafted = Counter("drafted_tokens", "Tokens that were guessed.", **given)
        self.accepted = Counter("accepted_tokens", "Guessed tokens that were right.", **given)
        self.faults = Counter("tool_call_faults", "Tool calls that do not follow the grammar.", **given)
        self.repairs = Counter("tool_call_repairs", "Tool calls that were repaired.", **given)
        self.queued = Histogram("queue_seconds", "From arrival to the first work.", buckets=_TTFT, **given)
        self.ttft = Histogram("ttft_seconds", "From arrival to the first token.", buckets=_TTFT, **given)
        self.gap = Histogram("inter_token_seconds", "Between two tokens of an answer.", buckets=_GAP, **given)
        for end in ("stop", "length", "cancelled", "failed"):
            self.requests.labels(end)

    def answered(self, answer: PendingAnswer, reason: Reason) -> None:
        """Count an answer that ended."""
        self.requests.labels(reason).inc()
        self.prompt_tokens.inc(len(answer.order.prompt))
        self.tokens.inc(len(answer.tokens))
        self.queued.observe(answer.timing.queue_s)
        if answer.timing.ttft_s is not None:
            self.ttft.observe(answer.timing.ttft_s)

    def guessed(self, drafted: int, accepted: int) -> None:
        """Count guessed tokens, and those of them that were right."""
        self.drafted.inc(drafted)
        self.accepted.inc(accepted)

    def text(self) -> bytes:
        """Return all counters in Prometheus' text format."""
        return generate_latest(self._registry)
