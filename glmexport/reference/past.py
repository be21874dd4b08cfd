"""The cache of a decoder layer for tokens that it has seen: keys and values, or the latents that they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

#: Tensors that a layer keeps of the tokens of one text, each [tokens, heads, width] fp32: keys and values; or latents
#: and rotary keys, of one head; then the indexer's keys, where there are some.
Parts = tuple[Tensor, ...]


class Past:
    """The first tokens of several texts in the cache of one decoder layer, which is transformers' own.

    A layer that runs with it appends the tokens that it is given, as many to each text. Shorter texts are padded
    before those, where the mask lets none of them look.
    """

    def __init__(self, layer: int, texts: Sequence[Parts]) -> None:
        """Fill the cache of ``layer`` with the parts of every text; a text of which nothing is kept has none."""
        from transformers.cache_utils import Cache, DynamicIndexedLayer

        self._layer = layer
        self.lengths = [parts[0].shape[0] if parts else 0 for parts in texts]
        self.longest = max(self.lengths)
        self.cache = Cache(layer_class_to_replicate=DynamicIndexedLayer)
        if not self.longest:
            return
        kinds = max(texts, key=len)
        padded = [
            torch.stack([_padded(parts[kind] if parts else like[:0], self.longest) for parts in texts])
            for kind, like in enumerate(kinds)
        ]
        keys, values, *indexed = padded
        self.cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
        for each in indexed:
            self.cache.update_indexer(each[:, :, 0], layer)

    def mask(self, count: int) -> Tensor:
        """Return what ``count`` further tokens of every text look at, [texts, 1, count, tokens] bool."""
        places = torch.arange(self.longest + count)
        new = torch.ones(count, len(places), dtype=torch.bool).tril(self.longest)
        padding = (places >= torch.tensor(self.lengths)[:, None]) & (places < self.longest)
        return (new & ~padding[:, None])[:, None]

    def appended(self) -> list[Parts]:
        """Return the parts of the tokens of every text that were appended."""
        kept = self.cache.layers[self._layer]
        parts = [kept.keys.transpose(1, 2), kept.values.transpose(1, 2)]
        if kept.indexer_keys is not None:
            parts.append(kept.indexer_keys[:, :, None])
        return [tuple(part[text, self.longest :] for part in parts) for text in range(len(self.lengths))]


def _padded(part: Tensor, length: int) -> Tensor:
    return pad(part, (0, 0, 0, 0, 0, length - len(part)))
