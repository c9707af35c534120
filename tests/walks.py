"""Walks: runs whose weights walk randomly, with every average known in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from builders import LABELS, Division, new_run, new_session, no_flush, store

from sharded_phema.layout import whole
from sharded_phema.profile import Profile
from sharded_phema.store import Run, open_run
from sharded_phema.target import parse_target

SHAPES = ((60, 5), (300,), (20, 20))


@dataclass(frozen=True)
class Walk:
    """A stored run and the weights after every step, (steps + 1, elements); those of step 0 are never averaged."""

    run: Run
    weights: np.ndarray

    def average(self, profile: Profile) -> np.ndarray:
        """The average itself, (elements,), of weights that change at whole steps; the first step stands for step 0."""
        share = np.diff(profile.cumulative(np.arange(len(self.weights), dtype=np.float64)), prepend=0.0)
        return share @ np.vstack([self.weights[1:2], self.weights[1:]])

    def error(self, rebuilt: np.ndarray, profile: Profile) -> float:
        """|rebuilt - target| / |raw - target|."""
        target = self.average(profile)
        return float(np.linalg.norm(rebuilt - target) / np.linalg.norm(self.weights[int(profile.t)] - target))


def walk_run(
    root: Path,
    *,
    steps: int = 200,
    every: int = 10,
    labels: Sequence[str] = LABELS,
    size: float = 0.01,
    rate: Callable[[int], float] = lambda step: 1.0,
    dtype: str = "float32",
) -> Walk:
    """Store the averages of a random walk, every so many steps, in one process."""
    rng = np.random.default_rng(5)
    division = Division(SHAPES, tuple([((whole(shape),), 0)] for shape in SHAPES))
    count = sum(int(np.prod(shape)) for shape in SHAPES)
    moves = size * rng.standard_normal((steps, count)) * np.array([[rate(step)] for step in range(1, steps + 1)])
    weights = np.cumsum(np.vstack([rng.standard_normal(count), moves]), axis=0)
    walk = Walk(None, weights)  # type: ignore[arg-type]
    with no_flush():
        new_run(root, division, labels=labels, dtype=dtype)
        new_session(root, division)
        for number, t in enumerate(range(every, steps + 1, every)):
            averages = {label: cut(walk.average(parse_target(label).profile(float(t), 1.0))) for label in labels}
            store(root, division, averages, t=float(t), number=number, dtype=dtype)
    return Walk(open_run(root), weights)


def cut(flat: np.ndarray) -> list[np.ndarray]:
    """The elements as parameters of SHAPES, float32."""
    edges = np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1]
    return [part.reshape(shape).astype(np.float32) for part, shape in zip(np.split(flat, edges), SHAPES, strict=True)]
