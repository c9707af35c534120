"""States: rebuilt weights in memory, as dictionaries of names and tensors, each process its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sharded_phema.errors import TargetError
from sharded_phema.export import tensor_files
from sharded_phema.feed import Feed
from sharded_phema.layout import whole
from sharded_phema.losses import Losses, leaving_out
from sharded_phema.manifest import Parameter, RawTensor
from sharded_phema.per_tensor import Wanted, parse_outputs
from sharded_phema.recipe import Plan, plan_rebuild
from sharded_phema.select import Tolerance
from sharded_phema.store import Piece, Run
from sharded_phema.sums import Strip, Sums, one_thread, strip_of, strips
from sharded_phema.sweeping.supply import MOST, Supplied, Supply, forecasts_of
from sharded_phema.tensorfile import torch_dtype
from sharded_phema.world import agree, from_first, rank_and_size

__all__ = ["State", "state_supply"]

State = dict[str, Tensor]
"""Whole tensors by name, on the CPU: averages in float32, and what was stored as it is."""

BUFFERS = 96 << 20
"""Bytes left to buffers of sums, whatever else; each state adds a row to them."""

ROW = 1 << 20


@contextmanager
def state_supply(run: Run, memory: int, tolerance: Tolerance) -> Iterator[Supply]:
    """Rebuilds dictionaries of tensors, straight into memory: names, dtypes and numbers are those of the files.

    Args:
        run: Where the averages are stored.
        memory: Bytes of one process for its rebuilt weights and for what rebuilding takes.
        tolerance: As ``reconstruct`` takes it.

    Raises:
        TargetError: Not even one fits.
    """
    states = _States(run, memory, tolerance)
    yield Supply(states.each * rank_and_size()[1], states.rebuilt)


class _States:
    def __init__(self, run: Run, memory: int, tolerance: Tolerance) -> None:
        self._run, self._memory, self._tolerance = run, memory, tolerance
        tensors: list[Parameter | RawTensor] = [*run.record.parameters, *run.record.raw]
        places = tensor_files(run.record.parameters, "float32", 1 << 62, run.record.raw).places
        self._dtypes = [torch_dtype(place.dtype) for place in places]
        self._shapes = [tensor.shape for tensor in tensors]
        self._names = [tensor.name for tensor in tensors]
        self._size = sum(whole(s).numel * d.itemsize for s, d in zip(self._shapes, self._dtypes, strict=True))
        self.each = min(MOST, (memory - BUFFERS) // (self._size + ROW))
        if self.each < 1:
            raise TargetError(
                f"memory: one rebuilt model takes {self._size + ROW + BUFFERS} bytes of a process, "
                f"found a limit of {memory}",
                hint="raise --memory, or take --form folder",
            )

    @contextmanager
    def rebuilt(self, wanted: Sequence[Wanted]) -> Iterator[Supplied]:
        rank, size = rank_and_size()
        share = range(len(wanted))[rank::size]
        outputs = parse_outputs(wanted)
        found: dict[int, State] = {}

        def planned(run: Run) -> Plan:
            return plan_rebuild(run, outputs, tolerance=self._tolerance, once=from_first)

        def act(plan: Plan, losses: Losses) -> None:
            found.clear()
            found.update(agree(lambda: self._filled(plan, share, losses)))

        plan = leaving_out(planned(self._run), planned, act)
        self._run = plan.run  # what is damaged need not be found again
        try:
            yield Supplied(found, forecasts_of(plan))
        finally:
            found.clear()

    @torch.no_grad()
    def _filled(self, plan: Plan, share: Sequence[int], losses: Losses) -> dict[int, State]:
        """This process's outputs of a plan, all of them in one pass."""
        made = zip(self._names, self._shapes, self._dtypes, strict=True)
        empty = [(name, shape, dtype) for name, shape, dtype in made]
        states = {index: {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in empty} for index in share}
        if states:
            _Filling(plan, losses, states, self._memory - len(states) * self._size).run()
            for index, state in states.items():
                self._carry_over(plan, index, state, losses)
        return states

    def _carry_over(self, plan: Plan, index: int, state: State, losses: Losses) -> None:
        """What was stored as it is, as of the time of the output."""
        snapshot, record = plan.run.snapshots[plan.snapshot_of(plan.outputs[index])], plan.run.record
        for number, tensor in enumerate(record.raw):
            numel = whole(tensor.shape).numel
            if number < len(record.copied):
                with losses.reading(snapshot):
                    values = snapshot.read_raw(number, 0, numel)
            else:
                # Frozen tensors are no snapshot's own: without them, no other snapshot would do either.
                values = snapshot.read_raw(number, 0, numel)
            state[tensor.name].copy_(values.view(tensor.shape))


@dataclass(frozen=True)
class _Filling:
    """Sums of some outputs of a plan, written into their states."""

    plan: Plan
    losses: Losses
    states: dict[int, State]
    memory: int

    def run(self) -> None:
        feed = Feed(self.losses)
        with one_thread():
            sums = Sums(self.plan, feed, strip_of(self.plan, self.memory)[0])
            flats = {index: [tensor.view(-1) for tensor in state.values()] for index, state in self.states.items()}
            filled = [0] * len(self.plan.run.record.parameters)
            try:
                for job, values in sums.over(self._jobs(sums.strip)):
                    parts = torch.split(values, [piece.numel for piece in job.pieces], dim=1)
                    for piece, numbers in zip(job.pieces, parts, strict=True):
                        start = filled[piece.parameter]
                        filled[piece.parameter] = start + piece.numel
                        for index, flat in flats.items():
                            row = numbers[job.targets.index(self.plan.outputs[index].choice[piece.parameter])]
                            flat[piece.parameter][start : start + piece.numel].copy_(row)
                feed.finish()
            finally:
                feed.close()

    def _jobs(self, strip: int) -> Iterator[Strip]:
        """All averaged parameters as strips, each of one choice of targets."""
        shapes = [parameter.shape for parameter in self.plan.run.record.parameters]
        choices = [
            tuple(sorted({self.plan.outputs[index].choice[parameter] for index in self.states}))
            for parameter in range(len(shapes))
        ]
        for targets, some in groupby(range(len(shapes)), choices.__getitem__):
            pieces = (Piece.of(index, whole(shapes[index]), shapes[index]) for index in some)
            yield from (Strip(targets, pieces) for pieces in strips(pieces, strip))
