"""Preparing: everything about a reconstruction that can be said before it runs. Reads records, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharded_phema.errors import OutputError, StoreError, TargetError
from sharded_phema.export import TensorFiles, byte_count, tensor_files
from sharded_phema.fit import Metric
from sharded_phema.like import stem_of
from sharded_phema.outputs import Outputs
from sharded_phema.per_tensor import Output
from sharded_phema.recipe import Plan, plan_rebuild
from sharded_phema.select import Tolerance
from sharded_phema.source import MovementWish
from sharded_phema.store import Run
from sharded_phema.sums import Precision, strip_of
from sharded_phema.work import Division, divide

__all__ = ["FORMATS", "Prepared", "Wish", "prepare"]

FORMATS = ("safetensors", "dcp")

WHOLE = 1 << 62
"""Limit of a file that may have any length."""


@dataclass(frozen=True)
class Wish:
    """What ``reconstruct`` is asked for; see there.

    Raises:
        OutputError: Format, dtype, sizes or workers are none.
        TargetError: The precision is none.
    """

    outputs: tuple[Output, ...]
    out: Path
    format: str = "safetensors"
    dtype: str = "float32"
    max_shard_size: str | int = "5GB"
    tolerance: Tolerance = "auto"
    metric: Metric = "trajectory"
    movement: MovementWish = "auto"
    memory: str | int = "1GiB"
    precision: Precision = "float32"
    device: str = "cpu"
    like: Path | None = None
    leave_out: tuple[str, ...] = ()
    strict: bool = False
    force: bool = False
    limit: int = field(init=False)
    budget: int = field(init=False)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            expected = " or ".join(FORMATS)
            raise OutputError(f"format: expected {expected}, found {self.format!r}", hint="leave format out")
        if self.precision not in ("float32", "float64"):
            raise TargetError(
                f"precision: expected float32 or float64, found {self.precision!r}", hint="leave precision out"
            )
        whole = self.format == "dcp" or self.max_shard_size == "none"
        object.__setattr__(self, "limit", WHOLE if whole else byte_count(self.max_shard_size))
        object.__setattr__(self, "budget", byte_count(self.memory))


@dataclass(frozen=True)
class Prepared:
    """A reconstruction that can be carried out.

    Attributes:
        wish: What was asked for.
        plan: Which stored averages make up which target.
        files: Where tensors lie in each output.
        division: Who rebuilds what.
        strip: Elements that are summed at a time.
        memory: Bytes of the buffers of one worker.
    """

    wish: Wish
    plan: Plan
    files: TensorFiles
    division: Division
    strip: int
    memory: int

    @property
    def slugs(self) -> tuple[str, ...]:
        """Folder of each output."""
        return tuple(output.output.slug for output in self.plan.outputs)

    @property
    def request(self) -> dict[str, Any]:
        """All that the bytes of the outputs depend on, but for the coefficients: plain values."""
        plan, wish, averages = self.plan, self.wish, self.plan.run.record.averages
        return {
            "run": plan.run.record.run,
            "outputs": [[output.slug, [[p, t.text] for p, t in output.patterns]] for output in wish.outputs],
            "times": [target.t for target in plan.targets],
            "sources": [[source.snapshot.name, averages[source.average]] for source in plan.sources],
            "left out": sorted(lost.name for lost in plan.left_out),
            **{"format": wish.format, "dtype": wish.dtype, "max shard size": wish.limit, "metric": wish.metric},
            **{"precision": wish.precision, "device": wish.device.partition(":")[0], "like": str(wish.like or "")},
        }


def prepare(
    run: Run, wish: Wish, workers: int, *, once: Callable[[Callable[[], Any]], Any] = lambda solve: solve()
) -> Prepared:
    """Plan a reconstruction down to the blocks of each worker.

    Args:
        run: Where the averages are stored.
        wish: What to rebuild.
        workers: How many share it.
        once: Solves once for several processes, as ``plan_rebuild`` takes it.

    Raises:
        StoreError: There are no snapshots; or some are damaged, and the wish is strict.
        TargetError: A target cannot be rebuilt, or the memory will not do.
        ForecastError: The forecast of a target is above the tolerance, a number.
        OutputError: An unknown dtype.
    """
    if wish.strict and (lost := [d for d in run.damaged if not d.abandoned]):
        raise StoreError(
            f"{lost[0].name} is damaged: {lost[0].reason}",
            hint="restore it from a backup, or rebuild without --strict to leave it out",
        )
    record = run.record
    stem = stem_of(wish.like) if wish.like else "model"
    files = tensor_files(record.parameters, wish.dtype, wish.limit, record.raw, stem=stem)
    settings: dict[str, Any] = {"tolerance": wish.tolerance, "metric": wish.metric, "movement": wish.movement}
    plan = plan_rebuild(_without(run, wish.leave_out), wish.outputs, once=once, **settings)
    strip, memory = strip_of(plan, wish.budget, wish.precision)
    return Prepared(wish, plan, files, divide(plan, Outputs(files, record), workers), strip, memory)


def _without(run: Run, names: Sequence[str]) -> Run:
    """The run without the snapshots that the user names, by their folders."""
    found = {snapshot.name.rpartition("/")[2]: snapshot.name for snapshot in (*run.snapshots, *run.abandoned)}
    found |= {damaged.name.rpartition("/")[2]: damaged.name for damaged in run.damaged}
    bare = [name.rstrip("/").rpartition("/")[2] for name in names]
    if unknown := [name for name in bare if name not in found]:
        raise TargetError(
            f"leave out {unknown[0]}: {run.root.url} holds no such snapshot",
            hint="sharded-phema info lists those of a run; checkpoints of another package go by their own names",
        )
    return run.without({found[name]: "left out as asked" for name in bare}) if bare else run
