"""The update of several running averages from one set of weights, one implementation a file."""

from __future__ import annotations

from sharded_phema.kernels.choice import KERNELS, kernels_for
from sharded_phema.kernels.contract import Kernel, Weights
from sharded_phema.kernels.guard import Guard, guarded

__all__ = ["KERNELS", "Guard", "Kernel", "Weights", "guarded", "kernels_for"]
