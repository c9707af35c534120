"""Closeness: how far rebuilt averages are from those that were tracked at every step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from made import Made
from tiled import Walks, add_tiled

__all__ = ["errors_of"]

PIECES, PIECE = 4, 1 << 15
"""Of a tensor so many pieces of so many elements are compared, from its first to its last; all of a shorter one."""


def errors_of(out: Path, made: Made) -> dict[str, float]:
    """|rebuilt - tracked| / |raw weights - tracked| of each target that lies in a folder, by its name."""
    walks = made.walks
    return {
        target: _error(out / target, made, walks, index)
        for index, target in enumerate(made.recipe.targets)
        if (out / target).exists()
    }


def _error(folder: Path, made: Made, walks: Walks, target: int) -> float:
    begins, begin = {}, 0
    for parameter in made.parameters:
        begins[parameter.name] = begin
        begin += math.prod(parameter.shape)
    gap, distance, seen = 0.0, 0.0, set()
    for name, tensor in _tensors(folder):
        seen.add(name)
        flat = tensor.reshape(-1)
        for start in _starts(flat.numel()):
            found = flat[start : start + PIECE].double().numpy()
            wanted = _values(walks, walks.wanted[target], begins[name] + start, found.size)
            raw = _values(walks, walks.raw, begins[name] + start, found.size)
            gap += float(np.square(found - wanted).sum())
            distance += float(np.square(raw - wanted).sum())
    assert seen == begins.keys(), f"{folder} lacks {sorted(begins.keys() - seen)[:3]}"
    return math.sqrt(gap / distance)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)


def _starts(numel: int) -> list[int]:
    if numel <= PIECES * PIECE:
        return list(range(0, numel, PIECE))
    return [round(start) for start in np.linspace(0, numel - PIECE, PIECES).tolist()]


def _values(walks: Walks, moving: NDArray[np.float64], first: int, count: int) -> NDArray[np.float64]:
    out = np.zeros(count)
    add_tiled(out, moving, first)
    add_tiled(out, walks.still, first)
    return out
