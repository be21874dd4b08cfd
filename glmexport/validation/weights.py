"""The content of the exported graph, matrix by matrix, against what the quantizer decided and against the original.

Text that happens not to touch a row of the lm_head, or a layer that is off by one percent, hardly moves a divergence.
Here every number of the graph is read back, so that a fault of the export cannot hide behind the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glmexport.assembly.read import BundleWeights, bundle_folds
from glmexport.bundle.bundle import Bundle
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.progress import Progress, Track
from glmexport.quantization.ranks import Parcel
from glmexport.reference.reference import Reference
from glmexport.results.weights import WeightCheck, WeightFault
from glmexport.validation.pieces import UNKEPT, Pieces

#: Distance from the original's row, relative to its length, at which a row has lost it: a row of zeros is 1.
FAR = 0.9
#: Largest mean difference of a matrix in steps of its grids. Rows are shifted by GPTQ, but not all to one side;
#: zero points that are off by one leave 1.
OFFSET = 0.5
#: Share of the usual length below which a row is that of a token that nobody trained.
_NEGLIGIBLE = 1e-3
#: Tolerance of rotary tables, which are computed once more by perhaps another version of the library's kernels.
_ROTARY_TOLERANCE = 1e-5
_SLAB_WEIGHTS = 1 << 24
#: Most weights of the tensors that one rank checks at a time.
_PART_WEIGHTS = 1 << 28


@dataclass(frozen=True)
class RowDistances:
    """Rows [N] of a matrix against the original's.

    ``distance``: ||q - w|| / ||w||, where a row of next to nothing counts as longer than it is. ``offset``: mean of
    (q - w) / step. ``gain``: sum of q w over sum of w w, over the whole matrix.
    """

    distance: Tensor
    offset: Tensor
    gain: float

    @property
    def lost(self) -> Tensor:
        """The indices of rows that have lost the original's; a row that is not a number has."""
        return (~(self.distance < FAR)).nonzero()[:, 0]

    @property
    def shifted(self) -> bool:
        """Whether the matrix as a whole is off its grid."""
        return not abs(float(self.offset.mean())) < OFFSET


def row_distances(linear: QuantizedLinear, original: Iterator[Tensor]) -> RowDistances:
    """Return how far the rows of ``linear`` are from ``original``: the same matrix in fp32, a few rows at a time."""
    errors, lengths, offsets = [], [], []
    products, start = 0.0, 0
    for rows in original:
        stop = start + len(rows)
        given = linear.rows(start, stop)
        steps = linear.steps(start, stop)
        difference = given - rows
        errors.append(difference.norm(dim=1))
        lengths.append(rows.norm(dim=1))
        # A group of zeros has a scale of zero, and no step.
        offsets.append(torch.where(steps == 0, 0.0, difference / steps).mean(1))
        products += float((given * rows).double().sum())
        start = stop
    error, length = torch.cat(errors), torch.cat(lengths)
    squares = float(length.double().square().sum())
    least = _NEGLIGIBLE * (squares / len(length)) ** 0.5
    return RowDistances(
        distance=torch.where(error == 0, 0.0, error / length.clamp(min=least)),
        offset=torch.cat(offsets),
        gain=products / squares if squares else 1.0,
    )


def check_weights(
    bundle: Bundle, reference: Reference, progress: Progress, pieces: Pieces = UNKEPT
) -> WeightCheck:
    """Compare every matrix, other tensor and rotary table of ``bundle`` with the original's.

    Quantized matrices must be those that the quantizer decided on, number by number, and their rows near the
    original's; all other tensors must equal the original's, with what was folded into it, rounded to the type of the
    target's activations. The ranks of ``pieces`` share the tensors.
    """
    architecture, manifest = reference.architecture, bundle.manifest
    weights = BundleWeights.open(bundle, architecture)
    checkpoint = reference.checkpoint.folded(bundle_folds(bundle.directory))
    # For every graph: its content, and the tensors that are in no graph before it.
    graphs = [(weights, manifest.matrices, [*weights.quantized_keys, *weights.other_keys])]
    draft = architecture.token_prediction
    if manifest.draft and draft:
        drafts = BundleWeights.open_draft(bundle, architecture)
        keys = [key for key in (*drafts.quantized_keys, *drafts.other_keys) if draft.has_own(key)]
        graphs.append((drafts, manifest.draft.matrices, keys))
    activations = getattr(torch, manifest.target.graph.activations)
    readers = [
        _Reader(held, {matrix.key: matrix.digest for matrix in matrices}, checkpoint, activations)
        for held, matrices, _ in graphs
    ]
    names = [(number, part) for number, (*_, keys) in enumerate(graphs) for part in _parts(keys, checkpoint)]

    def compute(absent: Sequence[int]) -> Iterator[tuple[int, Parcel]]:
        with progress.track("Weights", sum(len(names[index][1]) for index in absent)) as track:
            for index in absent:
                number, part = names[index]
                yield index, Parcel(facts=readers[number].check(part, track).model_dump())

    found = [WeightCheck.model_validate(parcel.facts) for parcel in pieces.each("weights", names, compute)]
    faults = [fault for each in found for fault in each.faults]
    for name, table in zip(("cos_cache", "sin_cache"), reference.rotary_tables(manifest.context_length), strict=True):
        given = weights.constant(name)
        if given is not None and not _near(given, table):
            faults.append(WeightFault(tensor=name, kind="other", detail="not the original's rotary table"))
    return WeightCheck(
        matrices=sum(each.matrices for each in found),
        undecided=sum(each.undecided for each in found),
        tensors=sum(each.tensors for each in found),
        faults=tuple(faults),
    )


def _parts(keys: Sequence[str], checkpoint: Checkpoint) -> list[list[str]]:
    """Return ``keys`` in parts of so many weights or one tensor, in their order."""
    parts: list[list[str]] = []
    room = 0
    for key in keys:
        size = math.prod(checkpoint.shape(key))
        if not parts or size > room:
            parts.append([])
            room = _PART_WEIGHTS
        parts[-1].append(key)
        room -= size
    return parts


@dataclass(frozen=True)
class _Reader:
    """A graph's tensors as they are read back, and the digests of its matrices as they were decided."""

    held: BundleWeights
    decided: Mapping[str, str | None]
    checkpoint: Checkpoint
    activations: torch.dtype

    def check(self, keys: Sequence[str], track: Track) -> WeightCheck:
        """Compare the tensors of ``keys``."""
        faults: list[WeightFault] = []
        undecided = quantized = 0
        for key in keys:
            if self.held.form(key) is None:
                faults += _kept(key, self.held, self.checkpoint, self.activations)
            else:
                quantized += 1
                undecided += self.decided.get(key) is None
                faults += _rounded(key, self.held, self.checkpoint, self.decided.get(key))
            track.advance(1, key)
        others = len(keys) - quantized
        return WeightCheck(matrices=quantized, undecided=undecided, tensors=others, faults=tuple(faults))


def _rounded(key: str, held: BundleWeights, checkpoint: Checkpoint, decided: str | None) -> Iterator[WeightFault]:
    """Yield the faults of a matrix that is stored quantized; ``decided`` is the digest of what it should be."""
    for linear in held.every(key):
        rows = row_distances(linear, _rows(checkpoint, key, linear.codes.shape))
        if decided is not None and not _is(linear, decided):
            yield WeightFault(tensor=key, kind="other", detail=_told(rows))
        elif len(rows.lost) or rows.shifted:
            yield WeightFault(tensor=key, kind="far", detail=_told(rows))


def _is(linear: QuantizedLinear, decided: str) -> bool:
    """Whether ``linear`` has the digest ``decided``, as it is or without the zero points that it spells out."""
    if linear.digest() == decided:
        return True
    points = linear.zero_points
    if points is None or not bool((points == 2 ** (linear.form.bits - 1)).all()):
        return False
    # GatherBlockQuantized always has zero points.
    form = linear.form.model_copy(update={"symmetric": True})
    return replace(linear, form=form, zero_points=None).digest() == decided


def _kept(
    key: str, held: BundleWeights, checkpoint: Checkpoint, activations: torch.dtype
) -> Iterator[WeightFault]:
    """Yield the faults of a tensor that is stored as it is, in fp32 or in the type of the ``activations``."""
    tensor, original = held.tensor(key), checkpoint.read(key)
    same_type = tensor.dtype in (torch.float32, activations)
    if tensor.shape != original.shape or not (same_type and torch.equal(tensor, original.to(tensor.dtype))):
        yield WeightFault(tensor=key, kind="other", detail="not the original's")


def _near(given: Tensor, table: Tensor) -> bool:
    tolerance = max(_ROTARY_TOLERANCE, torch.finfo(given.dtype).eps)
    return given.shape == table.shape and bool(((given.float() - table).abs() <= tolerance).all())


def _rows(checkpoint: Checkpoint, key: str, shape: torch.Size) -> Iterator[Tensor]:
    rows, columns = shape
    slab = max(1, _SLAB_WEIGHTS // columns)
    for start in range(0, rows, slab):
        yield checkpoint.rows(key, start, min(start + slab, rows))


def _told(rows: RowDistances) -> str:
    lost = rows.lost
    # Avoids -0.00.
    offset = round(float(rows.offset.mean()), 2) + 0.0
    told = f"gain {rows.gain:.4f} and offset {offset:+.2f} steps against the original"
    if not len(lost):
        return told
    worst = int(lost[rows.distance[lost].nan_to_num(torch.inf).argmax()])
    return (
        f"{len(lost)} of {len(rows.distance)} rows far from the original's, most of all row {worst} "
        f"({float(rows.distance[worst]):.2f} of its length); {told}"
    )
