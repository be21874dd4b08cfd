"""The two tables of a model, embedding and lm_head, and whether they are one, which transformers decides on loading."""

from __future__ import annotations

from dataclasses import dataclass

from glmexport.architecture.description import Architecture, Linear, UnusedTensors
from glmexport.checkpoint.checkpoint import Checkpoint

EMBEDDING, LM_HEAD = "model.embed_tokens", "lm_head"

#: Rows of two tables that are compared at a time.
_SLAB_ROWS = 16384


@dataclass(frozen=True)
class Tables:
    """The tensors that are the embedding and the lm_head.

    Where config.json has ``tie_word_embeddings``, transformers (``tie_weights``) makes them one if the checkpoint
    has only one of them, whichever it is, or both with the same numbers. Two different tables stay two.
    """

    #: Key prefixes.
    embedding: str
    lm_head: str
    unused: tuple[UnusedTensors, ...] = ()

    @property
    def tied(self) -> bool:
        """Whether one tensor is both."""
        return self.embedding == self.lm_head

    @classmethod
    def find(cls, checkpoint: Checkpoint) -> Tables:
        """Find both tables as they are without an adapter; they are read, a slab at a time, where only that decides.

        Raises:
            CheckpointError: the flag is neither true nor false, or a table cannot be read.
        """
        apart = cls(EMBEDDING, LM_HEAD)
        if not checkpoint.config.flag("tie_word_embeddings", default=False):
            return apart
        # An adapter is trained on a model that was loaded before, and so tied before.
        base = checkpoint.without_adapter()
        embedding, lm_head = f"{EMBEDDING}.weight", f"{LM_HEAD}.weight"
        if lm_head not in base.tensors:
            return cls(EMBEDDING, EMBEDDING)
        if embedding not in base.tensors:
            return cls(LM_HEAD, LM_HEAD)
        if not same_numbers(base, embedding, lm_head):
            return apart
        return cls(EMBEDDING, EMBEDDING, (UnusedTensors(r"lm_head\.weight", "tied to the embedding"),))

    def head(self, hidden: int, vocabulary: int) -> Linear:
        """Return the lm_head as a linear."""
        return Linear(self.lm_head, hidden, vocabulary, bias=False, tap="final", part="lm_head")


def remark_on(architecture: Architecture, checkpoint: Checkpoint) -> str | None:
    """Return what a user has to know of a flag that does not describe the checkpoint; None where it does."""
    if architecture.tied or not checkpoint.config.flag("tie_word_embeddings", default=False):
        return None
    return (
        "config.json has tie_word_embeddings, but the lm_head of the checkpoint differs from its embedding: both are "
        "used, as transformers does"
    )


def same_numbers(checkpoint: Checkpoint, key: str, other: str) -> bool:
    """Return whether two tensors of the checkpoint are the same numbers; both are read, a slab at a time.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    shape = checkpoint.shape(key)
    if shape != checkpoint.shape(other):
        return False
    return all(
        bool((checkpoint.rows(key, start, stop) == checkpoint.rows(other, start, stop)).all())
        for start, stop in ((start, min(start + _SLAB_ROWS, shape[0])) for start in range(0, shape[0], _SLAB_ROWS))
    )
