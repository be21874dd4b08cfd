"""loop.json: what our own decode loop reads of a bundle whose caches onnxruntime-genai does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from glmexport.foundation.definition import Definition, Size, TokenId, read_json
from glmexport.foundation.errors import BundleError
from glmexport.foundation.target import Provider, SessionOptions
from glmexport.foundation.untrusted import SMALL

LOOP_CONFIG = "loop.json"


class DraftConfig(Definition):
    """The graph that drafts tokens, and its names: what a loop needs to decode speculatively with it."""

    graph: Literal["draft.onnx"]
    #: Names of its token ids [B, S], mask [B, T], and hidden states [B, S, D], and of what it gives of the last
    #: position: logits [B, 1, V], and hidden states [B, 1, D] for the token after.
    input_ids: str
    attention_mask: str
    past_hidden: str
    logits: str
    hidden: str
    #: Output by input of every cache [B, C, width].
    caches: dict[str, str]


class OwnLoop(Definition):
    """What every loop of ours has to know."""

    #: The graph's file.
    graph: Literal["model.onnx"]
    provider: Provider
    session: SessionOptions = SessionOptions()
    context_length: Size
    eos_token_id: Annotated[tuple[TokenId, ...], Field(min_length=1)]
    #: Name of the graph's token ids [B, S].
    input_ids: str

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self.eos_token_id)


class LoopConfig(OwnLoop):
    """A graph for any number of sequences and positions: its names, and what a loop has to know beside it."""

    #: Names of its mask [B, T] and logits [B, R, V]: R is S in a short step, and otherwise 1.
    attention_mask: str
    logits: str
    #: Output by input of every cache [B, C, width].
    caches: dict[str, str]
    #: Most positions of a short step; 1 in bundles of before all of its logits left the graph.
    short_step: Size = 1
    #: Name of the hidden states [B, S, D] behind the final norm, and what drafts with them.
    hidden: str | None = None
    draft: DraftConfig | None = None


class FixedLoopConfig(OwnLoop):
    """Graphs of fixed shapes for one sequence: ``graph`` for ``chunk`` positions of a prompt, another for one token."""

    chunk: Size = Field(ge=2)
    step_graph: Literal["step.onnx"]
    #: Names of the positions [1, S] of the token ids, and of the index [1] of the one whose logits [1, 1, V] are
    #: computed, which the graph for one token does not have.
    position_ids: str
    asked_position: str
    logits: str
    #: Output by input of every cache [1, C, width], C the context's length.
    caches: dict[str, str]


_LOOPS: TypeAdapter[LoopConfig | FixedLoopConfig] = TypeAdapter(LoopConfig | FixedLoopConfig)


def read_loop(bundle: Path) -> LoopConfig | FixedLoopConfig | None:
    """The file of a bundle; None: it has none, and onnxruntime-genai runs it.

    Raises:
        BundleError: it cannot be read.
    """
    path = bundle / LOOP_CONFIG
    if not path.is_file():
        return None
    try:
        return read_json(_LOOPS, path, SMALL)
    except ValueError as error:
        raise BundleError(
            f"{path} is not what a loop reads: {error}.",
            next_step="Build the bundle again with this version of glmexport.",
        ) from error
