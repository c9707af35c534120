"""Scale: a quarter of a large training plans and opens in little time, with records of little size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sharded_phema.layout import Box, intersection
from sharded_phema.store.cuts import Slabs, near


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    """The module of the benchmark, which measures the same at full size."""
    path = Path(__file__).parents[1] / "benchmarks" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_thousand_ranks_with_a_thousand_tensors_plan_in_seconds_and_few_megabytes(scale: ModuleType) -> None:
    # Bounds: a quarter of what is allowed for 4,096 ranks, 10 s and 100 MB for 100 snapshots; a tenth are opened here.
    found = scale.planned(1024, 1000, 10, blocks=3)
    assert found["all (CPU s)"] < 2.5 * 3, "three times as much, because the machine may be busy"
    one = (found["all records (bytes)"] - found["layout (bytes)"]) / 10
    assert found["layout (bytes)"] + 100 * one < 25e6


def test_slabs_near_a_box_are_those_that_share_elements_with_it() -> None:
    # Oracle: looking at every slab.
    edges = np.array([0, 3, 4, 9, 12])
    for dim, shape in ((0, (12, 5)), (1, (5, 12))):
        slabs = Slabs(shape, dim, np.array([1, 2, 5, 7]), edges)
        assert len(slabs) == 4 and [rank for rank, _ in slabs] == [1, 2, 5, 7]
        assert sum(boxes[0].numel for _, boxes in slabs) == 60
        for start in range(12):
            for stop in range(start + 1, 13):
                box = Box(*(((start, 1), (stop - start, 3)) if dim == 0 else ((1, start), (3, stop - start))))
                expected = [rank for rank, (slab,) in slabs if intersection(slab, box) is not None]
                assert [rank for rank, _ in near(slabs, box)] == expected
