"""Ways to rebuild averages from a run folder, one a call of this file, so that memory and bytes are each way's own.

    python benchmarks/ways.py JOB.json WORKER

The clock begins when everything is imported and all workers of the job are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from jobs import Job, Range, Way, done
from meter import Meter
from sharded_phema import reconstruct
from sharded_phema.fit import fit
from sharded_phema.per_tensor import parse_outputs
from sharded_phema.recipe import Plan, plan_rebuild
from sharded_phema.source import sources_of
from sharded_phema.store import names, open_run
from sharded_phema.target import parse_target
from sharded_phema.tensorfile import torch_dtype

__all__ = ["Load", "planned_ranges", "summed"]


def ours(job: Job, worker: int, meter: Meter) -> None:
    """The package's reconstruction."""
    known: dict[str, Any] = {"memory": job.memory, "worker": worker, "workers": job.workers}
    _meet(job, worker)
    with meter:
        reconstruct(job.root, list(job.targets), out=job.out, dtype=job.dtype, **known)


def plan(job: Job, worker: int, meter: Meter) -> None:
    """Planning alone: the records are read, and the least-squares problem is solved."""
    with meter:
        plan_rebuild(open_run(job.root), parse_outputs(list(job.targets)))


def planned_ranges(plan: Plan) -> list[Range]:
    """File, first and last byte of everything that a plan reads of averages, in the order of the files."""
    wanted: dict[str, set[str]] = {}
    for source in plan.sources:
        label = plan.run.record.averages[source.average]
        wanted.setdefault(source.snapshot.where, set()).add(names.tensor_name(label, ""))
    found: list[Range] = []
    for folder, labels in wanted.items():
        for path in sorted(Path(folder).glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(length))
            entries = [e["data_offsets"] for key, e in header.items() if any(key.startswith(one) for one in labels)]
            for begin, end in sorted(entries):
                first, last = 8 + length + begin, 8 + length + end
                if found and found[-1][0] == str(path) and found[-1][2] == first:
                    found[-1] = (*found[-1][:2], last)
                else:
                    found.append((str(path), first, last))
    return found


def classic(job: Job, worker: int, meter: Meter) -> None:
    """Snapshots loaded whole, one after another, and added to float32 sums of up to eight targets; nothing flushed."""
    run = open_run(job.root)
    layout = run.snapshots[0].layout
    held = {p.name: dict(layout.averaged(i)) for i, p in enumerate(run.record.parameters)}

    def load(number: int) -> Iterator[Piece]:
        for rank, path in enumerate(sorted(Path(run.snapshots[number].where).glob("*.safetensors"))):
            for key, tensor in load_file(path).items():
                average = next(i for i, label in enumerate(run.record.averages) if key.startswith(label + "."))
                name = key.removeprefix(run.record.averages[average] + ".").rpartition(":")[0]
                box = held[name][rank][0]  # made runs hold one box each
                yield average, name, box.offsets[0], tensor.view(box.sizes)

    summed(job, meter, load)


Piece = tuple[int, str, int, torch.Tensor]
"""Which average, which parameter, its first row, and the rows."""
Load = Callable[[int], Iterator[Piece]]
"""Gives everything that a snapshot holds."""


def summed(job: Job, meter: Meter, load: Load) -> None:
    """Every snapshot and average, as best they serve all targets, in as many passes as it takes."""
    with meter, torch.no_grad():
        run = open_run(job.root)
        sources, width = sources_of(run), len(run.record.averages)
        t, start = run.snapshots[-1].t, run.snapshots[0].start
        profiles = [parse_target(target).profile(t, start) for target in job.targets]
        fits = fit([source.profile for source in sources], profiles, metric=job.metric)
        weights = [one.coefficients.tolist() for one in fits]
        shapes = {parameter.name: parameter.shape for parameter in run.record.parameters}
        for first in range(0, len(profiles), job.together):
            group = range(first, min(first + job.together, len(profiles)))
            sums = {k: {name: torch.zeros(shape) for name, shape in shapes.items()} for k in group}
            for number in range(len(run.snapshots)):
                for average, name, row, rows in load(number):
                    values = rows.float()
                    for k, total in sums.items():
                        part = total[name][row : row + len(rows)]
                        part.add_(values, alpha=weights[k][number * width + average])
            for k, total in sums.items():
                _save(job, job.targets[k], {name: value.to(torch_dtype(job.dtype)) for name, value in total.items()})


def stock_dcp(job: Job, worker: int, meter: Meter) -> None:
    """``dcp.load`` of each snapshot, kept as checkpoints of torch itself, and the same sums."""
    from rivals import dcp_loader

    summed(job, meter, dcp_loader(Path(job.rival), open_run(job.root), job.sigma_rels))


def ema_pytorch(job: Job, worker: int, meter: Meter) -> None:
    """Another library's synthesis of each target from checkpoints of its own; nothing is written in its time."""
    from rivals import ema_synthesis

    parameters = open_run(job.root).record.parameters
    synthesise = ema_synthesis(Path(job.rival), parameters, job.sigma_rels)
    for target in job.targets:
        with meter:
            values = synthesise(float(target))
        names_ = (parameter.name for parameter in parameters)
        _save(job, target, {n: v.to(torch_dtype(job.dtype)) for n, v in zip(names_, values, strict=True)})


WAYS: dict[str, Way] = {
    "plan": plan,
    "ours": ours,
    "classic": classic,
    "dcp.load": stock_dcp,
    "ema-pytorch": ema_pytorch,
}


def _save(job: Job, target: str, tensors: dict[str, torch.Tensor]) -> None:
    folder = Path(job.out) / parse_target(target).slug
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def _meet(job: Job, worker: int) -> None:
    """Wait for the other workers, whose imports may have taken longer."""
    (Path(job.scratch) / f"{worker}.here").touch()
    while not all((Path(job.scratch) / f"{other}.here").exists() for other in range(job.workers)):
        time.sleep(0.001)


if __name__ == "__main__":
    done(WAYS)
