"""The table of the codec of every format, to which a new one is added."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from glmexport.formats.affine import AffineCodec
from glmexport.formats.codec import Codec
from glmexport.formats.normal_float import NormalFloatCodec
from glmexport.foundation.recipe import CodecName, Format

_CODECS: Mapping[CodecName, Callable[[Format], Codec]] = {"affine": AffineCodec, "nf4": NormalFloatCodec}


def codec_of(form: Format) -> Codec:
    """Return the codec of matrices that are stored as ``form``."""
    return _CODECS[form.codec](form)


def stored_bits(shape: tuple[int, ...], form: Format | None) -> int:
    """Return the bits that a tensor of ``shape`` takes stored as ``form``; in fp32 where that is None."""
    return math.prod(shape) * 32 if form is None else codec_of(form).stored_bits(shape)
