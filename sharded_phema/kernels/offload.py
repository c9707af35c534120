"""The update of averages in host memory: parameters come chunk by chunk, the next on its way while one is averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharded_phema.kernels.contract import Kernel, Tensors, Weights, on_host
from sharded_phema.kernels.foreach import ForeachLerp
from sharded_phema.kernels.pieces import Piece, groups_of, pieces_of

__all__ = ["CHUNK", "OffloadedUpdate"]

CHUNK = 1 << 22
"""Elements of parameters that travel at a time. Twice as many have room in page-locked memory."""

ALIGNED = 16
"""Bytes, of which every copy's address is a multiple."""


class OffloadedUpdate:
    """Holds two chunks of the parameters at most, in host memory; on their device 4 MiB, where they are not float32.

    It waits for copies, and so is called on a thread beside the training. Averages are the same to the last bit as
    those of the kernel that takes the copies in.

    Args:
        averages: As of ``Kernel``, in host memory.
        params: As of ``Kernel``, on any one device.
        make: Makes the kernel for parameters in host memory.
    """

    def __init__(
        self, averages: Sequence[Tensors], params: Tensors, make: Callable[[Sequence[Tensors], Tensors], Kernel]
    ) -> None:
        full = [i for i, param in enumerate(params) if param.numel()]
        pieces = [p for i in full for p in pieces_of(params[i], tuple(a[i] for a in averages), CHUNK)]
        device = params[full[0]].device if full else torch.device("cpu")
        self._road: _Queued | _AtOnce = _Queued(device) if device.type == "cuda" else _AtOnce()
        groups = groups_of(pieces, CHUNK)
        rooms = [_room(groups[i::2], pinned=device.type == "cuda") for i in range(2)]
        self._chunks = [_Chunk(group, rooms[i % 2], make) for i, group in enumerate(groups)]
        self._seen = ForeachLerp([], params)

    @torch.no_grad()
    def __call__(self, weights: Weights) -> None:
        """Update every average in place, and return when that is over."""
        given = on_host(weights)
        arrivals = [self._road.send(chunk) for chunk in self._chunks[:1]]
        for here, following in zip(self._chunks, [*self._chunks[1:], None], strict=True):
            arrived = arrivals.pop()
            if following is not None:
                arrivals.append(self._road.send(following))
            arrived()
            here.update(given)

    def finite(self) -> Tensor:
        """Whether all parameters are finite."""
        return self._seen.finite()


class _Chunk:
    """Pieces of parameters that travel together, and the kernel that averages their copies."""

    def __init__(self, pieces: Sequence[Piece], room: Tensor, make: Callable[..., Kernel]) -> None:
        self._params, averages = [param for param, _ in pieces], [list(own) for _, own in pieces]
        self._copies, start = [], 0
        for param in self._params:
            self._copies.append(room[start : start + param.nbytes].view(param.dtype).view(param.shape))
            start += _padded(param)
        self.update = make([list(column) for column in zip(*averages, strict=True)], self._copies)

    def copy(self, *, queued: bool) -> None:
        """Copy the parameters as they are."""
        for copy, param in zip(self._copies, self._params, strict=True):
            copy.copy_(param, non_blocking=queued)


class _AtOnce:
    """Copies within host memory."""

    def send(self, chunk: _Chunk) -> Callable[[], object]:
        chunk.copy(queued=False)
        return lambda: None


class _Queued:
    """Copies from a device, on a stream of their own. What is given back waits for a chunk's copies, no longer."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, chunk: _Chunk) -> Callable[[], object]:
        with torch.cuda.stream(self._stream):
            chunk.copy(queued=True)
        arrived: Callable[[], object] = self._stream.record_event().synchronize
        return arrived


def _room(groups: Sequence[Sequence[Piece]], *, pinned: bool) -> Tensor:
    longest = max((sum(_padded(param) for param, _ in group) for group in groups), default=0)
    return torch.empty(longest, dtype=torch.uint8, pin_memory=pinned)


def _padded(param: Tensor) -> int:
    return -(-param.nbytes // ALIGNED) * ALIGNED
