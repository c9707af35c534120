"""Guard: what becomes of an update whose parameters contain NaN or infinity, as the user asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sharded_phema.errors import OrderError, TargetError
from sharded_phema.kernels.contract import Kernel

__all__ = ["Guard", "guarded"]


class Guard(Protocol):
    """Runs the kernels of all devices."""

    def __call__(self, weights: Sequence[float]) -> None:
        """Update every average in place."""

    def skipped(self) -> int:
        """How many updates were left out so far. Waits for the device."""

    def check(self) -> None:
        """Prove that the averages hold something, if there was an update. Waits for the device.

        Raises:
            OrderError: All updates were left out.
        """


def guarded(non_finite: str, kernels: Sequence[Kernel], count: int) -> Guard:
    """The kernels behind what was asked for.

    Args:
        non_finite: "average" takes parameters as they are, "skip" leaves updates out.
        kernels: One for each device.
        count: Number of averages.

    Raises:
        TargetError: It is neither.
    """
    if non_finite == "average":
        return _Open(kernels)
    if non_finite == "skip":
        return _Skipping(kernels, count)
    raise TargetError(f'non_finite: expected "average" or "skip", found {non_finite!r}', hint='try non_finite="skip"')


class _Open:
    """Leaves nothing out."""

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        self._kernels = kernels

    def __call__(self, weights: Sequence[float]) -> None:
        for kernel in self._kernels:
            kernel(weights)

    def skipped(self) -> int:
        return 0

    def check(self) -> None:
        pass


class _Skipping:
    """Leaves an update out, on this rank alone, where a parameter of this rank is not finite.

    The device decides, and is not waited for: parameters on a single one, that is. What such an update would have
    weighed goes to the next one that is taken, so that the averages are those of a run that called ``update`` at the
    other times only.
    """

    def __init__(self, kernels: Sequence[Kernel], count: int) -> None:
        self._kernels = kernels
        devices = [kernel.finite().device for kernel in kernels] or [torch.device("cpu")]
        self._weights = torch.zeros(count, dtype=torch.float64, device=devices[0])
        self._each = list(self._weights)
        self._owed = torch.zeros_like(self._weights)
        self._skipped = torch.zeros((), dtype=torch.int64, device=devices[0])

    @torch.no_grad()
    def __call__(self, weights: Sequence[float]) -> None:
        for place, weight in zip(self._each, weights, strict=True):
            place.fill_(weight)  # a launch that carries a number; a copy of a list would be waited for
        finite = self._finite()
        due = self._weights + self._owed * (1 - self._weights)
        nothing = torch.zeros_like(due)
        self._owed.copy_(torch.where(finite, nothing, due))
        self._skipped += finite.logical_not()
        given = torch.where(finite, due, nothing).float()
        for kernel in self._kernels:
            kernel(given)

    def _finite(self) -> Tensor:
        found = [kernel.finite().to(self._owed.device) for kernel in self._kernels]
        return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool)

    def skipped(self) -> int:
        return int(self._skipped)

    def check(self) -> None:
        if bool((self._owed == 1).any()):
            raise OrderError(
                "no finite weights were averaged yet: every update was skipped, because this rank's parameters "
                "contain NaN or infinity",
                hint="mend the training, or start averaging later with start=...",
            )
