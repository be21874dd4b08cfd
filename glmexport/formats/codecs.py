"""The codec of every format that there is: the table that a new one is entered in."""

from __future__ import annotations

import math

from glmexport.formats.affine import AffineCodec
from glmexport.formats.codec import Codec
from glmexport.foundation.recipe import Format


def codec_of(form: Format) -> Codec:
    """Return the codec of matrices that are stored as ``form``."""
    return AffineCodec(form)


def stored_bits(shape: tuple[int, ...], form: Format | None) -> int:
    """Return the bits that a tensor of ``shape`` takes stored as ``form``; in fp32 where that is None."""
    return math.prod(shape) * 32 if form is None else codec_of(form).stored_bits(shape)
