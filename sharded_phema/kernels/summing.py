"""Weighted sums of a few rows of numbers, on the CPU: compiled in one pass, or by torch, with the same bits."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharded_phema.kernels.fused import KINDS
from sharded_phema.kernels.library import Unavailable, is_built, library

__all__ = ["Summing", "summing", "torch_sums"]

Summing = Callable[[Tensor, Sequence[Tensor], Tensor, bool], None]
"""Adds ``weights[k, j] * rows[j]`` to ``sums[k]``, j by j, or to nothing where the last argument says so.

Each product is rounded to float32, and then each sum, so that every implementation gives the same bits.

Sums: contiguous rows of float32, (targets, elements). Rows: contiguous, of one dtype, float32, bfloat16 or
float16, (elements,) each. Weights: contiguous float32, (targets, rows).
"""

_log = logging.getLogger(__name__)


def summing(*, worth_compiling: bool) -> Summing:
    """The fastest way there is here.

    Args:
        worth_compiling: Whether there is so much to sum that compiling, once a machine and some seconds, pays.
    """
    if not worth_compiling and not is_built():
        return torch_sums
    try:
        return _Compiled()
    except Unavailable as reason:
        _log.info("sums are made without the compiled kernel, which is faster: %s", reason)
        return torch_sums


class _Compiled:
    def __init__(self) -> None:
        self._sum = library().phema_sum

    def __call__(self, sums: Tensor, rows: Sequence[Tensor], weights: Tensor, fresh: bool) -> None:
        values = (ctypes.c_void_p * len(rows))(*(row.data_ptr() for row in rows))
        into = (ctypes.c_void_p * len(sums))(*(one.data_ptr() for one in sums))
        kind, count = KINDS[rows[0].dtype], sums.shape[1]
        self._sum(len(rows), values, kind, weights.data_ptr(), len(sums), into, int(fresh), count)


def torch_sums(sums: Tensor, rows: Sequence[Tensor], weights: Tensor, fresh: bool) -> None:
    """The same by torch, which reads and writes the sums once for each row."""
    if fresh:
        sums.fill_(-0.0)  # the one number that leaves whatever is added to it as it is
    wide, product = torch.empty_like(sums[0]), torch.empty_like(sums[0])
    for row, column in zip(rows, weights.T.tolist(), strict=True):
        wide.copy_(row)
        for total, weight in zip(sums, column, strict=True):
            # Not add_ with alpha, which some machines fuse and so round once.
            total.add_(torch.mul(wide, weight, out=product))
