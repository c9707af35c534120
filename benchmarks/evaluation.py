"""Evaluation: any average of a recorded training in float64, rounding as in a store, and the error of a rebuild."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sharded_phema.profile import Checkpoint, Profile

__all__ = ["STORAGE", "Bench", "step_weights"]

Array = NDArray[np.float64]
STORAGE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ROWS = 512


def step_weights(profiles: Sequence[Profile], steps: int) -> Array:
    """Weight of the weights after every step in each average, (profiles, steps + 1); rows sum to 1.

    A tracker that is updated at every step realises F(t_k) - F(t_(k-1)); the initial weights have F(0).
    """
    times = np.arange(steps + 1, dtype=np.float64)
    return np.stack([np.diff(profile.cumulative(times), prepend=0.0) for profile in profiles])


class Bench:
    """Averages of one trajectory.

    Args:
        theta: Recorded weights, (steps + 1, sampled).
        profiles: Every average that will be asked for.
    """

    def __init__(self, theta: NDArray[np.float32], profiles: Sequence[Profile]) -> None:
        wanted = list(dict.fromkeys(profiles))
        weights = step_weights(wanted, len(theta) - 1)
        averages = np.zeros((len(wanted), theta.shape[1]))
        for row in range(0, len(theta), _ROWS):
            averages += weights[:, row : row + _ROWS] @ theta[row : row + _ROWS].astype(np.float64)
        self._place = {profile: i for i, profile in enumerate(wanted)}
        self._averages = averages

    def averages(self, profiles: Sequence[Profile]) -> Array:
        """The averages in float64, (profiles, sampled)."""
        return self._averages[[self._place[profile] for profile in profiles]]

    def stored(self, profiles: Sequence[Profile], storage: str) -> Array:
        """The averages as they come back from a store of that dtype, (profiles, sampled)."""
        exact = torch.from_numpy(self.averages(profiles))
        return exact.to(torch.float32).to(STORAGE[storage]).to(torch.float64).numpy()

    def errors(self, stored: Array, coefficients: Array, targets: Sequence[Profile]) -> Array:
        """|rebuilt - target| / |raw - target| of every target, (targets,).

        Args:
            stored: Sources as read, (sources, sampled).
            coefficients: Weights of the sources, (sources, targets).
            targets: What was to be rebuilt.
        """
        wanted = self.averages(targets)
        missed = np.linalg.norm(coefficients.T @ stored - wanted, axis=1)
        return missed / self.raw_distances(targets)

    def raw_distances(self, targets: Sequence[Profile]) -> Array:
        """|raw - target| of every target, (targets,), the raw weights being those at its time."""
        raw = self.averages([Checkpoint(target.t) for target in targets])
        return np.linalg.norm(raw - self.averages(targets), axis=1)
