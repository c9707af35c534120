"""Sample: what a part of the numbers tells of the norms of averages, where to read all of them would cost too much."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sharded_phema.errors import StoreError
from sharded_phema.importers.agreement import Model
from sharded_phema.importers.contract import Tensors
from sharded_phema.importers.portions import Portion, shards_of
from sharded_phema.store import squared_norms

__all__ = ["Norms", "sampled_norms"]

SAMPLE = 1 << 20
"""Elements of each average that are looked at, about."""

Norms = tuple[tuple[float, ...], tuple[float, ...]]
"""Squared norms of averages and of their differences, as a snapshot's record has them; empty where nothing is told."""


def sampled_norms(model: Model, averages: Mapping[str, Tensors]) -> Norms:
    """Norms of the averages of a checkpoint; of a large model what the beginnings of all its tensors come to.

    Norms tell how much rounding counts beside the distance between averages. One average alone has none: nothing is
    read then. Neither is anything told by a checkpoint that cannot be read, which is found out when it is needed.
    """
    if len(model.averages) < 2:
        return (), ()
    sizes = [math.prod(parameter.shape) for parameter in model.parameters]
    share = min(SAMPLE / max(sum(sizes), 1), 1.0)
    counts = [math.ceil(size * share) for size in sizes]
    part = Portion(tuple((0, count) for count in counts), 0)
    try:
        found = squared_norms([shards_of(model, part, averages[label]) for label in model.averages])
    except StoreError:
        return (), ()
    scale = sum(sizes) / max(sum(counts), 1)
    return tuple(scale * norm for norm in found[0]), tuple(scale * gap for gap in found[1])
