"""Swap: the model computes with other weights for a while, and has its own back, bit for bit, on any exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sharded_phema.layout import ShardLayout
from sharded_phema.replicas import Shared, spread

__all__ = ["weights_swapped"]


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
    # What all ranks hold is saved whole, so that a rank puts it back alone: the others may be elsewhere after an error.
    parts = {tensor.name for tensor in shared}
    touched = [tensor.local for tensor in shared] + [shard.local for shard in layout if shard.name not in parts]
    saved = [_copied(local, offload) for local in touched]
    try:
        fill()
        spread(shared)
        publish()
        yield
    finally:
        _put_back(touched, saved)
        publish()


def _copied(local: Tensor, offload: bool) -> Tensor:
    return local.to("cpu", copy=True) if offload else local.clone()


@torch.no_grad()
def _put_back(touched: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    for local, value in zip(touched, saved, strict=True):
        local.copy_(value)
