"""Sums: weighted sums of stored averages, a strip of elements at a time, in buffers that are made once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from threading import Event
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sharded_phema.blocks import KEPT_BYTES
from sharded_phema.errors import TargetError
from sharded_phema.feed import Feed
from sharded_phema.folder import is_local
from sharded_phema.kernels.summing import summing
from sharded_phema.pages import zeros_in_huge_pages
from sharded_phema.recipe import Plan
from sharded_phema.rounding import STORED_BYTES
from sharded_phema.source import Source
from sharded_phema.store import Piece
from sharded_phema.tensorfile import torch_dtype

__all__ = ["GROUP", "Precision", "Strip", "Sums", "one_thread", "strip_of", "strips"]

STRIP_BYTES = 1 << 20
"""What is read and summed at a time of one stored average: it is hashed and summed while caches hold it."""

REMOTE_STRIP_BYTES = 1 << 22
"""The same where every range costs a request over a network."""

LEAST_STRIP = 1 << 12

PAD = 256
"""Columns of every product that nobody asks for: kernels sum the last few, which fill no whole register, otherwise."""

GROUP = 8
"""Stored averages that are summed in one matrix product, a strip of each, while others are read (24 MiB)."""

ROWS = 8
"""Targets of one call of the matrix product: what it makes of them stays in caches while they are read again."""

AHEAD = 2
"""Groups that are read in advance: the reader need not wait until the sums have taken notice of what it read."""

FEW = 3
"""Targets up to which row by row is faster than a matrix product."""

COMPILE_BYTES = 4 << 30
"""What is read from which on compiling, once a machine and three seconds, pays."""

Precision = Literal["float32", "float64"]
"""What sums are made in."""

Pieces = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class _Mix:
    """Some targets: their sources in groups, and the weights of each group, (targets, sources)."""

    groups: tuple[tuple[Source, ...], ...]
    weights: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Strip:
    """A strip that is wanted.

    Attributes:
        targets: Indices into the plan's targets.
        pieces: Its elements, end to end; at most as many as a strip has.
        last: Whether it is the last one of a block.
    """

    targets: tuple[int, ...]
    pieces: Pieces
    last: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(piece.numel for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class _Step:
    """A group of sources of a strip: what is read, and then added, at once.

    Attributes:
        turn: Which buffer it is read into.
        side: Which sums it is added to: those of the strip before may still be written.
    """

    job: Strip
    group: tuple[Source, ...]
    weights: Tensor
    turn: int
    side: int
    first: bool
    last: bool
    checked: Event = field(default_factory=Event, compare=False)


class Sums:
    """Rebuilds strips in buffers that are made once: fresh ones would cost more than the arithmetic.

    Sources are taken GROUP at a time, in their order of time. A few targets are summed row by row, as
    ``kernels.summing`` says. More are a matrix product, which has the full width of a strip and some more, whatever is
    wanted of it. Each element so goes through the same operations wherever it lies, and comes out the same, bit for
    bit, however the work was divided.

    Args:
        plan: What to rebuild.
        feed: Reads the sources.
        strip: Elements that are summed at a time.
        precision: What products and sums are made in.
        device: Where they are made.

    Raises:
        TargetError: The device cannot be used.
    """

    def __init__(
        self, plan: Plan, feed: Feed, strip: int, precision: Precision = "float32", device: str = "cpu"
    ) -> None:
        self._plan, self._feed, self.strip = plan, feed, strip
        self._dtype, self._device = getattr(torch, precision), _usable(device)
        stored, rows, wide = torch_dtype(plan.run.record.dtype), min(GROUP, len(plan.sources)), strip + PAD
        local = self._device.type == "cpu"
        # Zeros, since what is left over of an earlier strip is multiplied too.
        zeros = zeros_in_huge_pages if local else partial(torch.zeros, pin_memory=True)
        self._read = zeros(AHEAD + 1, rows, wide, dtype=stored)
        self._rows = [[*group[:, :strip].view(torch.uint8).numpy()] for group in self._read]
        few = local and _few(plan, precision)
        self._sum = summing(worth_compiling=_bytes_of(plan) >= COMPILE_BYTES) if few else None
        as_read = few or (local and precision == plan.run.record.dtype)
        self._values = None if as_read else torch.zeros(rows, wide, dtype=self._dtype, device=self._device)
        self._sums = torch.empty(2, len(plan.targets), wide, dtype=self._dtype, device=self._device)
        self._mixes: dict[tuple[int, ...], _Mix] = {}
        self._waiting = False

    def over(self, jobs: Iterable[Strip]) -> Iterator[tuple[Strip, Tensor]]:
        """Strips, each with its sums, (targets, elements), on the CPU, valid until the one after the next is asked for.

        The next sources are read and checked, by a thread, while those that were read are summed.

        Raises:
            StoreError: A source cannot be read, or was damaged before.
        """
        steps = self._steps(jobs)
        with ThreadPoolExecutor(1, "sharded_phema_reader") as reader:
            ahead = deque((step, reader.submit(self._fill, step)) for step in islice(steps, AHEAD))
            while ahead:
                step, read = ahead.popleft()
                self._waiting = not read.done()
                read.result()
                self._waiting = False
                if not step.checked.is_set():
                    self._feed.check(step.group)
                ahead.extend((step, reader.submit(self._fill, step)) for step in islice(steps, 1))
                self._add(step)
                if step.last:
                    yield step.job, self._into(step)[:, : step.job.numel].cpu()

    def _steps(self, jobs: Iterable[Strip]) -> Iterator[_Step]:
        turn = 0
        for side, job in zip(cycle(range(2)), jobs, strict=False):
            mix = self._mix(job.targets)
            for number, (group, weights) in enumerate(zip(mix.groups, mix.weights, strict=True)):
                yield _Step(job, group, weights, turn, side, number == 0, number + 1 == len(mix.groups))
                turn = (turn + 1) % (AHEAD + 1)

    def _into(self, step: _Step) -> Tensor:
        return self._sums[step.side, : len(step.job.targets)]

    def _fill(self, step: _Step) -> None:
        size = step.job.numel * self._read.element_size()
        rows = [row[:size] for row in self._rows[step.turn][: len(step.group)]]
        self._feed.fill(step.group, step.job.pieces, rows)
        # Whichever thread has time: the one that sums, if it waits for what is read, or else this one.
        if not self._waiting:
            self._feed.check(step.group)
            step.checked.set()

    def _add(self, step: _Step) -> None:
        sums, values = self._into(step), self._read[step.turn, : len(step.group)]
        if self._sum is not None:
            self._sum(sums[:, : step.job.numel], values[:, : step.job.numel].unbind(), step.weights, step.first)
            return
        if self._values is not None:
            values = self._values[: len(step.group)].copy_(values)
        for some, weights in zip(torch.split(sums, ROWS), torch.split(step.weights, ROWS), strict=True):
            if step.first:
                torch.mm(weights, values, out=some)
            else:
                some.addmm_(weights, values)

    def _mix(self, targets: tuple[int, ...]) -> _Mix:
        if targets not in self._mixes:
            weights = self._plan.coefficients[:, list(targets)]
            used = np.flatnonzero(weights.any(axis=1))
            groups = [used[first : first + GROUP] for first in range(0, len(used), GROUP)]
            self._mixes[targets] = _Mix(
                tuple(tuple(self._plan.sources[i] for i in group) for group in groups),
                tuple(torch.from_numpy(weights[group].T.copy()).to(self._device, self._dtype) for group in groups),
            )
        return self._mixes[targets]


def strips(pieces: Iterable[Piece], length: int) -> Iterator[Pieces]:
    """Pieces cut into strips of so many elements, the last one shorter."""
    strip: list[Piece] = []
    room = length
    for piece in pieces:
        start = 0
        while start < piece.numel:
            stop = min(start + room, piece.numel)
            strip += piece.cut(start, stop)
            room, start = room - (stop - start), stop
            if not room:
                yield tuple(strip)
                strip, room = [], length
    if strip:
        yield tuple(strip)


def strip_of(plan: Plan, memory: float = math.inf, precision: Precision = "float32") -> tuple[int, int]:
    """How many elements to sum at a time so that all buffers fit, and the bytes that these take.

    Args:
        plan: What to rebuild.
        memory: Bytes that one worker may use.
        precision: What sums are made in.

    Raises:
        TargetError: Not even the least strip fits.
    """
    wide, rows, stored = (4 if precision == "float32" else 8), min(GROUP, len(plan.sources)), _width(plan)
    values = 0 if _few(plan, precision) or precision == plan.run.record.dtype else wide
    # Sums twice: some are written meanwhile. Beside them sums as they are rounded, and what checks make of one row.
    element = rows * (stored * (AHEAD + 1) + values) + 2 * len(plan.targets) * wide + 4 * 4
    strip = (STRIP_BYTES if is_local(plan.run.root) else REMOTE_STRIP_BYTES) // stored
    while (strip + PAD) * element + KEPT_BYTES > memory and strip > LEAST_STRIP:
        strip //= 2
    if (needed := (strip + PAD) * element + KEPT_BYTES) > memory:
        raise TargetError(
            f"memory: {len(plan.targets)} targets need at least {needed} bytes a worker, found a limit of {memory}",
            hint="raise --memory, or rebuild fewer targets at a time",
        )
    return strip, needed


def _few(plan: Plan, precision: Precision) -> bool:
    """Whether sums are made row by row: a matter of the plan alone, on whatever machine."""
    return len(plan.targets) <= FEW and precision == "float32"


def _width(plan: Plan) -> int:
    return STORED_BYTES[plan.run.record.dtype]


def _bytes_of(plan: Plan) -> int:
    """What a plan reads of averages."""
    numel = sum(math.prod(parameter.shape) for parameter in plan.run.record.parameters)
    return len(plan.sources) * numel * _width(plan)


def _usable(device: str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise TargetError(f"device: {device!r} cannot be used: {error}", hint="leave it out for the CPU") from error
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products that do not depend on how many threads shared them; processes share the work instead."""
    threads, fast = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False  # it would round each factor to 10 bits
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = fast
