"""The tokens that begin, end and fill sequences, as the checkpoint's configurations name them."""

from __future__ import annotations

from dataclasses import dataclass

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.config import ConfigReader
from glmexport.foundation.errors import CheckpointError

_BEGIN, _END, _FILL = "bos_token_id", "eos_token_id", "pad_token_id"


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids of a model, each of them a row of its embedding."""

    begin: int | None
    #: The end tokens, at least one: without any, every answer would go on until the context is full.
    ends: tuple[int, ...]
    fill: int

    @classmethod
    def read(cls, checkpoint: Checkpoint, vocabulary: int) -> SpecialTokens:
        """Read the ids, and check those of both files, also where only one of the two counts.

        As in transformers, what ends a generation is generation_config.json's to say, if it does. A pad token that no
        file names is the first end token.

        Args:
            checkpoint: whose files name them.
            vocabulary: rows of its embedding.

        Raises:
            CheckpointError: an id is none of the ``vocabulary``, or no end token is named; names file and key.
        """
        config, generation = checkpoint.config, checkpoint.generation_config
        last = vocabulary - 1
        for file in filter(None, (config, generation)):
            for key in (_BEGIN, _FILL):
                file.optional_integer(key, minimum=0, maximum=last)
            if file.has(_END):
                file.integers(_END, minimum=0, maximum=last)
        deciding = ending(checkpoint)
        ends = deciding.integers(_END, minimum=0, maximum=last) if deciding.has(_END) else ()
        if not ends:
            raise _endless(deciding)
        fill = config.optional_integer(_FILL)
        return cls(config.optional_integer(_BEGIN), ends, ends[0] if fill is None else fill)


def ending(checkpoint: Checkpoint) -> ConfigReader:
    """Return the file that names the end tokens: as in transformers generation_config.json, if it does."""
    generation = checkpoint.generation_config
    return generation if generation is not None and generation.has(_END) else checkpoint.config


def _endless(config: ConfigReader) -> CheckpointError:
    return CheckpointError(
        f"{config.where}: {_END} names no token, and without one no answer ends before the context is full.",
        next_step=f"Write the ids of the tokens that end an answer into {_END}, as the model's card or the original "
        "of this checkpoint has them.",
    )
