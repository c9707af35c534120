"""The update as one would write it down: one tensor after the other, in float64. The others are compared with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_phema.kernels.contract import Tensors, Weights, on_host

__all__ = ["Reference"]


class Reference:
    """Slow, and closest to the truth: every result is rounded once.

    Args:
        averages: As of ``Kernel``; they may be float64, and then nothing is rounded to float32 but parameters.
        params: As of ``Kernel``.
        arithmetic: Dtype to compute in.
    """

    def __init__(
        self, averages: Sequence[Tensors], params: Tensors, *, arithmetic: torch.dtype = torch.float64
    ) -> None:
        self._averages, self._params, self._arithmetic = averages, params, arithmetic

    @torch.no_grad()
    def __call__(self, weights: Weights) -> None:
        """Update every average in place."""
        for tensors, weight in zip(self._averages, on_host(weights), strict=True):
            # What the others multiply with; it has no part in how they round.
            single = torch.tensor(weight, dtype=torch.float32).item()
            for average, param in zip(tensors, self._params, strict=True):
                old, new = average.to(self._arithmetic), param.float().to(self._arithmetic)
                if single:
                    average.copy_((1 - single) * old + single * new)

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Whether all parameters are finite."""
        return torch.tensor(all(param.float().isfinite().all().item() for param in self._params))
