"""The update by torch's multi-tensor operations: no compiler is needed, and parameters are read once an average."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from sharded_phema.kernels.contract import Tensors, Weights, on_host
from sharded_phema.kernels.pieces import Piece, groups_of, pieces_of

__all__ = ["CHUNK", "ForeachLerp"]

CHUNK = 1 << 20
"""Elements of parameters of another dtype that are widened to float32 at a time (4 MiB)."""


class ForeachLerp:
    """Runs on any device. One launch an average for all float32 tensors.

    Parameters of another dtype are widened into one scratch buffer, as many at a time as fill it.

    Args:
        averages: As of ``Kernel``.
        params: As of ``Kernel``.
    """

    def __init__(self, averages: Sequence[Tensors], params: Tensors) -> None:
        # Zero-element tensors have nothing to move, and foreach kernels differ in how they take them.
        full = [i for i, p in enumerate(params) if p.numel() and p.dtype == torch.float32]
        low = [i for i, p in enumerate(params) if p.numel() and p.dtype != torch.float32]
        self._params = [params[i] for i in full]
        self._averages = [[average[i] for i in full] for average in averages]
        pieces = [
            piece for i in low for piece in pieces_of(params[i], tuple(average[i] for average in averages), CHUNK)
        ]
        groups = groups_of(pieces, CHUNK)
        room = torch.empty(CHUNK if groups else 0, device=params[low[0]].device if groups else None)
        self._groups = [_Group(group, room) for group in groups]
        self._yes = torch.ones((), dtype=torch.bool, device=params[0].device if len(params) else None)

    @torch.no_grad()
    def __call__(self, weights: Weights) -> None:
        """Update every average in place."""
        given = on_host(weights)
        if self._params:
            _lerp(self._averages, self._params, given)
        for group in self._groups:
            group.update(given)

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Whether all parameters are finite."""
        found = [torch.stack(torch._foreach_norm(self._params, inf)).isfinite().all()] if self._params else []
        found += [group.finite() for group in self._groups]
        return torch.stack([*found, self._yes]).all()


class _Group:
    """Pieces of parameters that are widened together.

    Args:
        pieces: At most CHUNK elements.
        room: Where to, (CHUNK,); other groups use it at other times.
    """

    def __init__(self, pieces: Sequence[Piece], room: Tensor) -> None:
        self._params = [param for param, _ in pieces]
        self._averages = [list(tensors) for tensors in zip(*(averages for _, averages in pieces), strict=True)]
        lengths = [param.numel() for param in self._params]
        self._used = room[: sum(lengths)]
        views = torch.split(self._used, lengths)
        self._room = [view.view(param.shape) for view, param in zip(views, self._params, strict=True)]

    def update(self, weights: Sequence[float]) -> None:
        torch._foreach_copy_(self._room, self._params)
        _lerp(self._averages, self._room, weights)

    def finite(self) -> Tensor:
        torch._foreach_copy_(self._room, self._params)
        largest: Tensor = torch.linalg.vector_norm(self._used, inf)
        return largest.isfinite()


def _lerp(averages: Sequence[list[Tensor]], params: list[Tensor], weights: Sequence[float]) -> None:
    for average, weight in zip(averages, weights, strict=True):
        if weight:
            torch._foreach_lerp_(average, params, weight)
