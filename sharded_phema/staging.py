"""HostCopies: the shards of a snapshot as they are at one moment, in host memory that is made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sharded_phema.errors import OrderError
from sharded_phema.layout import ParamShard, ShardLayout

__all__ = ["HostCopies", "LazyCopies", "alive"]

BUFFER_BYTES = 1 << 28
"""Length up to which buffers are filled; only a larger tensor has a larger one, of its own.

Page-locked memory comes in powers of two: one buffer for everything could take twice what it holds.
"""


class HostCopies:
    """Copies the shards that this rank writes to the host, into the same few buffers each time.

    Holds as many bytes as those shards have: what other replicas write is not copied.

    The copies of one ``take`` last until the next: whoever takes again must first have waited for the reader of
    the copies before, as ``Background.wait`` does.

    Args:
        layouts: Live shards, such as one layout for each average.
    """

    def __init__(self, layouts: Sequence[ShardLayout]) -> None:
        self._layouts = tuple(layouts)
        self._staged: tuple[ShardLayout, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the copies take, from the first ``take`` on."""
        return sum(shard.local.nbytes for layout in self._layouts for shard in layout if shard.replica == 0)

    @torch.no_grad()
    def take(self) -> tuple[ShardLayout, ...]:
        """Copy what the model uses now. The live tensors may change as soon as this returns.

        Each device is waited for once, after all its copies are queued.

        Returns:
            The layouts, every ``local`` of a first replica being a contiguous copy on the host. Other shards keep
            name, boxes and replica, and have an empty ``local``, so that no reader sees weights of a later moment.

        Raises:
            OrderError: A tensor's shape, dtype or device is another than when the layouts were made.
        """
        if not self._staged:
            self._staged = _staged(self._layouts)
        sources = [(shard, shard.current()) for layout in self._layouts for shard in layout if shard.replica == 0]
        for shard, source in sources:
            _check_same_kind(shard, source)
        copies = (copy for layout in self._staged for copy in layout if copy.replica == 0)
        for (_, source), copy in zip(sources, copies, strict=True):
            copy.local.copy_(source, non_blocking=_queues(source.device))
        for device in {source.device for _, source in sources if _queues(source.device)}:
            torch.cuda.current_stream(device).synchronize()
        return self._staged


class LazyCopies:
    """Copies of the layouts that it is called with, in host memory that is made at the first call.

    Later calls must bring the same layouts, as live as they are then.
    """

    def __init__(self) -> None:
        self._copies = HostCopies(())

    def __call__(self, layouts: tuple[ShardLayout, ...]) -> tuple[ShardLayout, ...]:
        """The layouts, in host memory."""
        if not self._copies.nbytes:
            self._copies = HostCopies(layouts)
        return self._copies.take()


def alive(layouts: tuple[ShardLayout, ...]) -> tuple[ShardLayout, ...]:
    """The layouts themselves, for who writes at once."""
    return layouts


def _staged(layouts: Sequence[ShardLayout]) -> tuple[ShardLayout, ...]:
    """The layouts with host memory in the place of the live tensors."""
    shards = [shard for layout in layouts for shard in layout if shard.replica == 0]
    views = iter(_views([shard.local for shard in shards]))
    return tuple(
        tuple(_with_local(shard, next(views) if shard.replica == 0 else _nothing(shard)) for shard in layout)
        for layout in layouts
    )


def _views(locals_: Sequence[Tensor]) -> list[Tensor]:
    """Host memory for each tensor, cut out of few buffers."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, local in enumerate(locals_):
        kinds.setdefault((local.device, local.dtype), []).append(index)
    views: dict[int, Tensor] = {}
    for (device, dtype), indices in kinds.items():
        for run in _runs(indices, locals_):
            lengths = [locals_[index].numel() for index in run]
            # A queued copy into memory that is not page-locked waits for the device, one tensor after the other.
            buffer = torch.empty(sum(lengths), dtype=dtype, pin_memory=_queues(device))
            for index, piece in zip(run, torch.split(buffer, lengths), strict=True):
                views[index] = piece.view(locals_[index].shape)
    return [views[index] for index in range(len(locals_))]


def _runs(indices: Sequence[int], locals_: Sequence[Tensor]) -> list[list[int]]:
    """The indices in order, cut where a buffer would grow beyond its length."""
    runs: list[list[int]] = []
    room = -1
    for index in indices:
        room -= locals_[index].nbytes
        if room < 0:
            runs.append([])
            room = BUFFER_BYTES - locals_[index].nbytes
        runs[-1].append(index)
    return runs


def _check_same_kind(shard: ParamShard, source: Tensor) -> None:
    found, expected = _kind(source), _kind(shard.local)
    if found != expected:
        raise OrderError(
            f"{shard.name}: expected {expected} as when the averages were made, found {found}",
            hint="make PostHocEMA after the last model.to(...), model.half() or load_state_dict(assign=True)",
        )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def _queues(device: torch.device) -> bool:
    """Whether copies from a device may be queued; others are over when the call returns."""
    return device.type == "cuda"


def _nothing(shard: ParamShard) -> Tensor:
    return torch.empty(0, dtype=shard.local.dtype)


def _with_local(shard: ParamShard, local: Tensor) -> ParamShard:
    return replace(shard, local=local, current=lambda: local)
