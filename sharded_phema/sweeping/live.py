"""Live: rebuilt weights in the user's own model, sharded or not, whose own weights come back in the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharded_phema.load import load_into
from sharded_phema.mapping import held_by
from sharded_phema.per_tensor import Wanted
from sharded_phema.replicas import shared_out
from sharded_phema.select import Tolerance
from sharded_phema.swap import Own
from sharded_phema.sweeping.supply import Supplied, Supply, forecasts_of
from sharded_phema.world import rank_and_size

__all__ = ["live_supply"]


@contextmanager
def live_supply(root: str | Path, model: Any, optimizer: Any, tolerance: Tolerance) -> Iterator[Supply]:
    """Loads one average after the other into a live model, which every process's metric is given.

    A copy of this process's shards stays in host memory, from which they are put back on any exit. Collective.

    Args:
        root: Run folder.
        model: As ``load_into`` takes it.
        optimizer: The same.
        tolerance: The same.

    Raises:
        PhemaError: The model cannot be mapped.
    """
    backend, held = held_by(model, optimizer, alike=False)
    layout, shared = shared_out(held)
    own = Own(layout, shared, offload=True)

    @contextmanager
    def rebuilt(wanted: Sequence[Wanted]) -> Iterator[Supplied]:
        (one,) = wanted
        plan = load_into(model, one, root, optimizer=optimizer, tolerance=tolerance)
        yield Supplied({0: model}, forecasts_of(plan), counts=rank_and_size()[0] == 0)

    try:
        yield Supply(1, rebuilt)
    finally:
        own.put_back()
        backend.publish(model, optimizer)
