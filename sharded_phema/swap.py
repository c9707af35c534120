"""Swap: the model computes with other weights for a while, and has its own back, bit for bit, on any exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sharded_phema.layout import ShardLayout
from sharded_phema.replicas import Shared, spread

__all__ = ["Own", "weights_swapped"]


@contextmanager
def weights_swapped(
    layout: ShardLayout,
    shared: Sequence[Shared],
    fill: Callable[[], object],
    publish: Callable[[], object],
    *,
    offload: bool,
) -> Iterator[None]:
    """Have the model compute with what ``fill`` writes into its local shards. Called by every rank.

    Args:
        layout: Live local shards.
        shared: The parameters of which every rank has a part in the layout, and holds the whole.
        fill: Writes the other weights into ``local`` of the layout's shards. Where it fails, it does so on all ranks.
        publish: Makes the next forward use what was written.
        offload: Keep the model's own weights on the CPU meanwhile, rather than beside the shards.
    """
    own = Own(layout, shared, offload=offload)
    try:
        fill()
        spread(shared)
        publish()
        yield
    finally:
        own.put_back()
        publish()


class Own:
    """A copy of a model's own weights, which are overwritten meanwhile.

    What all ranks hold is copied whole, so that a rank puts it back alone: the others may be elsewhere after an error.

    Args:
        layout: Live local shards.
        shared: The parameters of which every rank has a part in the layout, and holds the whole.
        offload: Keep the copy on the CPU, rather than beside the shards.
    """

    def __init__(self, layout: ShardLayout, shared: Sequence[Shared], *, offload: bool) -> None:
        parts = {tensor.name for tensor in shared}
        self._live = [tensor.local for tensor in shared] + [s.local for s in layout if s.name not in parts]
        with torch.no_grad():
            self._copies = [t.to("cpu", copy=True) if offload else t.clone() for t in self._live]

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the copy back. Called by each rank alone."""
        for live, copy in zip(self._live, self._copies, strict=True):
            live.copy_(copy)
