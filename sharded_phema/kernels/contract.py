"""What every kernel does, and how: ``a += w * (p - a)`` for K averages of many tensors.

Averages are float32, and so is the arithmetic, whatever the parameters are. One multiplication is fused with one
addition, from the average where ``w < 0.5`` and from the parameter above, so that weight 1 gives the parameter itself;
torch's ``lerp`` does the same. So kernels agree to one unit in the last place of the larger of average and parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Kernel", "Tensors", "Weights", "on_host"]

Tensors = Sequence[Tensor]

Weights = Sequence[float] | Tensor
"""Weight in [0, 1] that the parameters get in each average; a tensor of shape (averages,) where a device decides."""


class Kernel(Protocol):
    """Moves running averages of the parameters on one device towards them.

    Made of K lists of contiguous float32 averages, each in the order of the parameters, and of the live local
    parameters, of any floating dtype, strides and alignment, some perhaps empty. Everything that grows with the number
    of tensors is done when it is made.
    """

    def __call__(self, weights: Weights) -> None:
        """Update every average in place; weight 0 leaves one as it is, even where parameters are NaN."""

    def finite(self) -> Tensor:
        """Whether all parameters, in float32, are finite: 0-d, bool, on their device, which is not waited for."""


def on_host(weights: Weights) -> Sequence[float]:
    """The weights as numbers. Waits for the device that decides them, if any."""
    return weights.tolist() if isinstance(weights, Tensor) else weights
