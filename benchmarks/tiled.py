"""Tiled walks: weights that move at random, a few ten thousand of them repeated over a model of any size.

Element i of the model is ``moving[i % 65537] + still[i % 32771]``. Both lengths are prime, so that no two elements of
up to 2.1 billion share both numbers: what is read from the wrong place is wrong. Averages leave ``still`` as it is,
and those of ``moving`` are tracked at every step, which costs the same for a model of any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharded_phema.width import gamma_of, step_weight

__all__ = ["START", "Walks", "add_tiled", "walked"]

Array = NDArray[np.float64]

MOVING, STILL = 65_537, 32_771
START = 1.0
"""Training time of the first step, which is the first that is averaged."""
# Squared distance from 0 over the squared distance walked in the run, as `sharded-phema plan` expects by default.
_STILLNESS = 10.0
_COLUMNS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Walks:
    """Walks of one run, and averages of them that were tracked at every step.

    Attributes:
        times: Training times of the snapshots. (snapshots,)
        stored: What the run stores. (snapshots, averages, walks)
        wanted: The wanted averages at the end. (targets, walks)
        raw: The walks at the end. (walks,)
        still: What does not move. (STILL,)
    """

    times: Array
    stored: Array
    wanted: Array
    raw: Array
    still: Array

    def save(self, path: Path) -> None:
        """Write them to a file."""
        np.savez(path, times=self.times, stored=self.stored, wanted=self.wanted, raw=self.raw, still=self.still)

    @classmethod
    def load(cls, path: Path) -> Walks:
        """What ``save`` wrote."""
        with np.load(path) as found:
            return cls(**{name: found[name] for name in ("times", "stored", "wanted", "raw", "still")})

    def stored_values(self, snapshot: int, average: int, first: int, count: int) -> NDArray[np.float32]:
        """Elements of a stored average of the flattened model from ``first`` on."""
        out = np.zeros(count, np.float32)
        add_tiled(out, self.stored[snapshot, average].astype(np.float32), first)
        add_tiled(out, self.still.astype(np.float32), first)
        return out


def add_tiled(out: NDArray[np.floating], tile: NDArray[np.floating], first: int) -> None:
    """Add a repeated tile to elements of the model from ``first`` on, in place."""
    shift = first % tile.size
    head = min(out.size, -shift % tile.size)
    out[:head] += tile[shift : shift + head]
    whole = (out.size - head) // tile.size * tile.size
    body = out[head : head + whole].reshape(-1, tile.size)
    body += tile
    rest = out[head + whole :]
    rest += tile[: rest.size]


def walked(widths: Sequence[float], wanted: Sequence[float], snapshots: int, steps: int, seed: int = 0) -> Walks:
    """Let the walks walk, and track averages of some widths.

    Args:
        widths: What the run stores.
        wanted: What is to be rebuilt at the end.
        snapshots: How many are stored, at equal distances, the last at the end.
        steps: From one snapshot to the next; an average is moved at each.
        seed: Of the random numbers.
    """
    rng, total = np.random.default_rng(seed), snapshots * steps
    rows = _weights((*widths, *wanted), total, every=steps)
    keep = [row[: len(widths)] for row in rows]
    weights = np.concatenate([*keep, rows[-1][len(widths) :]])
    averages, raw = np.empty((len(weights), MOVING)), np.empty(MOVING)
    for begin in range(0, MOVING, _COLUMNS):
        some = slice(begin, min(begin + _COLUMNS, MOVING))
        increments = rng.standard_normal((total, some.stop - begin)) / total**0.5
        path = np.cumsum(increments, axis=0, out=increments)
        averages[:, some], raw[some] = weights @ path, path[-1]
    stored = averages[: snapshots * len(widths)].reshape(snapshots, len(widths), MOVING)
    times = np.arange(1, snapshots + 1, dtype=np.float64) * steps
    still = rng.standard_normal(STILL) * _STILLNESS**0.5
    return Walks(times, stored, averages[snapshots * len(widths) :], raw, still)


def _weights(widths: Sequence[float], total: int, *, every: int) -> list[Array]:
    """What each average weighs each step, at every ``every``-th step: (widths, total) each."""
    return [weights.copy() for step, weights in enumerate(_tracked(widths, total), 1) if step % every == 0]


def _tracked(widths: Sequence[float], total: int) -> Iterator[Array]:
    """The same after each step, moved on as a training moves its averages."""
    gammas, weights = [gamma_of(width) for width in widths], np.zeros((len(widths), total))
    for step in range(1, total + 1):
        entering = np.array([step_weight(gamma, step, 1) for gamma in gammas])
        weights *= 1.0 - entering[:, None]
        weights[:, step - 1] = entering
        yield weights
