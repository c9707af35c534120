"""The update by torch's multi-tensor lerp: one launch per average for all float32 tensors of a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CHUNK", "ForeachLerp"]

CHUNK = 1 << 20
"""Elements of a low-precision parameter that are widened to float32 at a time (4 MiB)."""


class ForeachLerp:
    """Moves running averages towards live parameters: ``a += w * (p - a)``, in float32.

    The parameter lists are fixed at construction, so that an update runs no
    Python code that grows with the model except for low-precision parameters,
    which are widened chunk by chunk into one scratch buffer.

    Args:
        averages: K lists of float32 tensors, each list in the order of ``params``, contiguous.
        params: Live local tensors of any floating dtype, each of the shape of its averages.
    """

    def __init__(self, averages: Sequence[Sequence[Tensor]], params: Sequence[Tensor]) -> None:
        # Zero-element tensors have nothing to move, and foreach kernels differ in how they take them.
        full = [i for i, p in enumerate(params) if p.numel() and p.dtype == torch.float32]
        low = [i for i, p in enumerate(params) if p.numel() and p.dtype != torch.float32]
        self._params = [params[i] for i in full]
        self._averages = [[average[i] for i in full] for average in averages]
        self._chunks = [chunk for i in low for chunk in _chunks(params[i], [average[i] for average in averages])]

    @torch.no_grad()
    def __call__(self, weights: Sequence[float]) -> None:
        """Update every average in place.

        Args:
            weights: Weight in [0, 1] that the parameters get in each of the K averages.
        """
        if self._params:
            for average, weight in zip(self._averages, weights, strict=True):
                torch._foreach_lerp_(average, self._params, weight)
        for param, pieces in self._chunks:
            widened = param.float()
            for piece, weight in zip(pieces, weights, strict=True):
                piece.lerp_(widened, weight)


def _chunks(param: Tensor, averages: Sequence[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """Aliases of at most CHUNK elements each; a parameter that no flat view reaches stays whole."""
    if not param.is_contiguous():
        return [(param, list(averages))]
    cuts = [torch.split(tensor.view(-1), CHUNK) for tensor in (param, *averages)]
    return [(cut[0], list(cut[1:])) for cut in zip(*cuts, strict=True)]
