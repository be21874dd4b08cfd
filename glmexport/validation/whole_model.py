"""The original computed block by block against transformers' own whole model: nothing of ours decides what is loaded.

Which tensors a block-by-block original reads follows from the same declaration as the bundle, so that a mistake there
is in both and their comparison does not show it. transformers' loading of the very checkpoint does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from torch import Tensor

from glmexport.checkpoint.layouts import FP8
from glmexport.foundation.progress import Progress
from glmexport.reference.reference import CPU, Reference
from glmexport.results.reference import ReferenceCheck
from glmexport.validation.reference import ReferenceStates, reference_states
from glmexport.validation.texts import EvaluationText

#: Share of the free memory that the whole model may take.
_SHARE = 0.8
#: Factor of the weights in fp32 that loading takes: experts are read one by one and then stacked.
_LOADING = 1.25
#: Tolerance as a share of the largest logit. fp32 arithmetic in another order gives some 1e-6, another tensor more than
#: 0.1.
_NOISE = 1e-3
#: A text is long enough to pass through every kind of layer, and short enough to cost little.
_LEAST_TOKENS = 48


def check_reference(
    reference: Reference,
    texts: Sequence[EvaluationText],
    scratch: Path,
    limit_bytes: int | None,
    progress: Progress,
    states: ReferenceStates | None = None,
) -> ReferenceCheck:
    """Compare the logits of one of ``texts`` with those of transformers' whole model, where that fits into memory.

    Args:
        reference: the original as it is computed here.
        texts: evaluation text, of which a short one is taken.
        scratch: where hidden states are kept meanwhile.
        limit_bytes: what this process may take at most; None: most of the memory that is free.
        progress: who watches.
        states: those of all ``texts``, if they were computed already.
    """
    long_enough = [text for text in texts if len(text.ids) >= _LEAST_TOKENS]
    text = min(long_enough or texts, key=lambda text: len(text.ids) if long_enough else -len(text.ids))
    absent = _absent(reference, len(text.ids), limit_bytes)
    if absent:
        return ReferenceCheck(positions=0, absent_because=absent)
    with TemporaryDirectory(dir=scratch) as folder:
        if states is None:
            states = reference_states(reference, [text], Path(folder), progress, label="Original, checked")
        place = next(place for place, each in enumerate(states.texts) if each is text)
        ours = reference.logits(states.load(place)[0].to(reference.device)).to(CPU)
    theirs = _whole(reference.checkpoint.path, text.ids)
    if isinstance(theirs, str):
        return ReferenceCheck(positions=0, absent_because=theirs)
    difference = float((ours - theirs).abs().max()) if theirs.shape == ours.shape else math.inf
    return ReferenceCheck(
        positions=len(text.ids), max_difference=difference, limit=_NOISE * float(theirs.abs().max())
    )


def _absent(reference: Reference, tokens: int, limit_bytes: int | None) -> str | None:
    """Return why transformers' whole model cannot be asked; None if it can."""
    checkpoint, architecture = reference.checkpoint, reference.architecture
    if checkpoint.adapter:
        return "an adapter is merged while weights are read, and transformers would load the checkpoint without it"
    if checkpoint.stored.layout == FP8:
        return "transformers has kernels for fp8 checkpoints on accelerators only"
    if checkpoint.stored.layout:
        return f"transformers loads checkpoints quantized by {checkpoint.stored.layout} with other packages only"
    weights = 4 * sum(math.prod(shape) for shape in architecture.shapes().values())
    needed = int(weights * _LOADING) + 3 * 4 * tokens * architecture.vocabulary_size
    free = int(psutil.virtual_memory().available * _SHARE)
    if limit_bytes is not None:
        free = min(free, limit_bytes - int(psutil.Process().memory_info().rss))
    if needed > free:
        return (
            f"the whole model needs about {needed / 2**30:.1f} GiB in fp32, and {max(free, 0) / 2**30:.1f} GiB may be "
            "taken"
        )
    return None


def _whole(directory: Path, ids: Tensor) -> Tensor | str:
    """Logits [tokens, vocabulary] fp32 of transformers' own loading of ``directory``, or why it does not load it."""
    from transformers import AutoModelForCausalLM

    with _silent():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                # One expert after another, as in the blocks: what is compared is which numbers are loaded.
                experts_implementation="eager",
            )
        except MemoryError:
            # This says nothing of the checkpoint, and hours of work are not to be lost to it.
            return "the machine's memory did not suffice for the whole model"
        # transformers has no class of its own for what it cannot load; the reason is told, not passed over.
        except Exception as error:
            lines = str(error).strip().splitlines()
            return f"transformers does not load the checkpoint ({lines[0] if lines else type(error).__name__})"
    with torch.inference_mode():
        logits: Tensor = model.eval()(ids[None], use_cache=False).logits[0].float()
    return logits


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers' bars and remarks on unused weights off the terminal; what is unused is told elsewhere."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
