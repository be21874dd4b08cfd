"""Mixtures of experts: a router sends every token through a few of many gated MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from glmexport.architecture.description import GatedMlp, Linear, Norm, Writer

#: ``Linear.part`` of the matrices of routed experts.
EXPERT_INPUT, EXPERT_OUTPUT = "expert_gate_up", "expert_down"


@dataclass(frozen=True)
class Router:
    """The choice of experts for a token, and their weights (auxiliary-loss-free balancing, arXiv 2412.19437, 2.1.2).

    With scores s = sigmoid(W x), all in fp32: of ``groups`` equal groups of experts the ``kept_groups`` whose two
    highest s + b sum highest are kept; of their experts the ``chosen`` with the highest s + b are taken. What they
    count is s without b, divided by its sum over the chosen where ``normalized``, times ``scale``.
    """

    #: Checkpoint key of W [experts, in_features].
    weight: str
    #: Checkpoint key of b [experts] fp32. It lies in a band so narrow that bf16 makes other choices of most of it.
    bias: str
    in_features: int
    experts: int
    chosen: int
    groups: int
    kept_groups: int
    normalized: bool
    scale: float


@dataclass(frozen=True)
class MixtureOfExperts:
    """The sum of what the router's chosen experts give, each times its weight, and of what the shared expert gives."""

    #: Key prefix of everything in it.
    module: str
    router: Router
    experts: tuple[GatedMlp, ...]
    #: The expert that every token passes; None where there is none.
    shared: GatedMlp | None

    @property
    def output(self) -> None:
        """None, as no single linear ends the mixture."""
        return None

    @property
    def mlps(self) -> tuple[GatedMlp, ...]:
        """The shared expert and the routed ones."""
        return (*((self.shared,) if self.shared else ()), *self.experts)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears, expert after expert, the shared one first; in each in the order in which data passes them."""
        return tuple(linear for mlp in self.mlps for linear in mlp.linears)

    @property
    def routed(self) -> frozenset[str]:
        """The checkpoint keys of the matrices that only some tokens pass."""
        return frozenset(linear.weight for mlp in self.experts for linear in mlp.linears)

    @property
    def routed_share(self) -> float:
        """The share of ``routed`` that one token passes."""
        return self.router.chosen / self.router.experts

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """The key and shape of the tensors that are neither linears nor norms: they are never quantized."""
        router = self.router
        return {router.weight: (router.experts, router.in_features), router.bias: (router.experts,)}

    @property
    def stacks(self) -> dict[str, tuple[str, str]]:
        """The stacked matrices, as ``GatedMlp.stacks`` gives them."""
        return {key: halves for mlp in self.mlps for key, halves in mlp.stacks.items()}

    @property
    def pages(self) -> dict[str, tuple[str, int]]:
        """The checkpoint key of each expert's matrix, and its place in checkpoints that hold those of all as one."""
        return dict(self._pages())

    def _pages(self) -> Iterator[tuple[str, tuple[str, int]]]:
        for index, expert in enumerate(self.experts):
            yield expert.gate_up.weight, (f"{self.module}.experts.gate_up_proj", index)
            yield expert.down.weight, (f"{self.module}.experts.down_proj", index)

    def writers(self, norm: Norm) -> dict[str, Writer]:
        """Return nothing: the router reads the norm's output too, and folds save too little in one expert."""
        return {}
