"""The update on the CPU in one pass: each parameter is read once, each average read and written once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sharded_phema.kernels.contract import Tensors, Weights, on_host
from sharded_phema.kernels.foreach import ForeachLerp
from sharded_phema.kernels.library import library

__all__ = ["FusedUpdate"]

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""As ``fused.cpp`` numbers them."""


class FusedUpdate:
    """Walks a table of pointers on as many threads as torch uses, without holding Python's lock.

    What no flat view reaches, and other dtypes, are left to ``ForeachLerp``.

    Args:
        averages: As of ``Kernel``, on the CPU.
        params: As of ``Kernel``, on the CPU.

    Raises:
        Unavailable: The compiled part cannot be had.
    """

    def __init__(self, averages: Sequence[Tensors], params: Tensors) -> None:
        self._library = library()
        taken = [i for i, param in enumerate(params) if param.dtype in KINDS and param.is_contiguous()]
        others = sorted(set(range(len(params))) - set(taken))
        self._others = ForeachLerp([[average[i] for i in others] for average in averages], [params[i] for i in others])
        # The tensors are kept because the table holds their addresses only.
        self._kept = [(params[i], *(average[i] for average in averages)) for i in taken if params[i].numel()]
        table = np.array([[tensor.data_ptr() for tensor in row] for row in self._kept], np.uint64)
        table = table.reshape(len(self._kept), 1 + len(averages))
        self._params, self._averages = table[:, 0].copy(), table[:, 1:].copy()
        self._kinds = np.array([KINDS[row[0].dtype] for row in self._kept], np.int8)
        self._starts = np.cumsum([0, *(row[0].numel() for row in self._kept)], dtype=np.int64)
        self._weights = (ctypes.c_float * len(averages))()
        params_at, averages_at = self._params.ctypes.data, self._averages.ctypes.data
        kinds_at, starts_at = self._kinds.ctypes.data, self._starts.ctypes.data
        weights_at = ctypes.addressof(self._weights)
        self._update = (len(self._kept), len(averages), params_at, kinds_at, averages_at, starts_at, weights_at)
        self._look = (len(self._kept), params_at, kinds_at, starts_at)

    def __call__(self, weights: Weights) -> None:
        """Update every average in place."""
        given = on_host(weights)
        for index, weight in enumerate(given):
            self._weights[index] = weight
        self._library.phema_update(*self._update, torch.get_num_threads())
        self._others(given)

    def finite(self) -> Tensor:
        """Whether all parameters are finite."""
        found = self._library.phema_finite(*self._look, torch.get_num_threads())
        return self._others.finite() & bool(found)
