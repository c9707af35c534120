"""Planning: what it takes to open a run that thousands of ranks stored, and to plan a reconstruction from it.

The run's records are written as the package writes them; its tensor files have a length and no bytes.

    python benchmarks/planning.py RANKS TENSORS SNAPSHOTS TARGETS
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meter import resident_mib
from sharded_phema.folder import Entry, Folder, open_folder
from sharded_phema.manifest import Cut, LayoutRecord, Parameter, Part, RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.per_tensor import parse_outputs
from sharded_phema.recipe import Plan, plan_rebuild
from sharded_phema.store import commit_snapshot, create_run, layout_id, names, open_run, start_session
from stopwatch import timed

__all__ = ["planned_apart", "widths"]

COLUMNS, SESSION, WORKERS = 1024, "0" * 12, 64
BLOCK_BYTES = 4 << 20


def widths(count: int) -> tuple[str, ...]:
    """So many widths at equal distances from 0.02 to 0.28; alone, the one in the middle."""
    if count == 1:
        return ("0.15",)
    return tuple(f"{0.02 + 0.26 * k / (count - 1):.4f}".rstrip("0") for k in range(count))


def planned_apart(ranks: int, tensors: int, snapshots: int, targets: int) -> dict[str, float]:
    """Seconds and MiB of opening and planning, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, __file__, *map(str, (ranks, tensors, snapshots, targets))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    found: dict[str, float] = json.loads(done.stdout)
    return found


@dataclass(frozen=True, slots=True)
class _Hollow:
    """A folder whose tensor files are told, not there. Only what opening a run asks for."""

    folder: Folder
    lengths: Sequence[int]

    @property
    def url(self) -> str:
        return self.folder.url

    def read(self, name: str, limit: int) -> bytes:
        return self.folder.read(name, limit)

    def list(self, folder: str) -> tuple[Entry, ...]:
        found = self.folder.list(folder)
        if folder.startswith(f"{names.SNAPSHOTS}/"):
            leaves = (names.tensors_file("", rank).rpartition("/")[2] for rank in range(len(self.lengths)))
            found += tuple(Entry(leaf, size, False) for leaf, size in zip(leaves, self.lengths, strict=True))
        return found


def _write_records(root: str, ranks: int, tensors: int, snapshots: int) -> tuple[int, ...]:
    """Records of a run whose ranks hold rows of every tensor; the lengths of a rank's files in every snapshot."""
    folder = open_folder(root)
    rows = [ranks + 13 * (index % 7) for index in range(tensors)]
    parameters = tuple(Parameter(f"layers.{index}.weight", (n, COLUMNS)) for index, n in enumerate(rows))
    run = RunRecord("r" * 32, "steps", averages=("0.05", "0.1"), parameters=parameters)
    cuts = tuple(Cut(0, tuple(min(rank * -(-n // ranks), n) for rank in range(ranks + 1))) for n in rows)
    layout = LayoutRecord(run.run, ranks, cuts)
    create_run(folder, run)
    start_session(folder, SessionRecord(run.run, SESSION, "", 0.0, ranks, layout_id(layout)), layout)
    sizes = tuple(8 * COLUMNS * sum(c.edges[rank + 1] - c.edges[rank] for c in cuts) for rank in range(ranks))
    parts = tuple(Part(size, bytes(range(16)) * -(-size // BLOCK_BYTES)) for size in sizes)
    for number in range(snapshots):
        t = 100.0 * (number + 1)
        commit_snapshot(folder, SnapshotRecord(run.run, SESSION, number, t, 1.0, parts, (1e3, 1e3), (1e-2 * t,)))
    return sizes


def _shared_out(plan: Plan) -> dict[str, float]:
    """Seconds of sharing the work out to workers, where the package does that in a module of its own."""
    if importlib.util.find_spec("sharded_phema.grid") is None:
        return {}
    grid: Any = importlib.import_module("sharded_phema.grid")

    def share() -> None:
        blocks = grid.grid_of(plan.sources[0].snapshot.layout)
        each = grid.shares(blocks.costs([1.0] * len(plan.run.record.parameters), []), WORKERS)
        assert len(each) == WORKERS and sum(map(len, each)) == len(blocks)

    return {f"work of {WORKERS} workers (s)": timed(share)}


def main() -> None:
    """Measure once, and print it as JSON."""
    ranks, tensors, snapshots, targets = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as root:
        if not (child := os.fork()):  # what making the records takes is not to be counted
            (Path(root) / "sizes").write_text(json.dumps(_write_records(f"{root}/run", ranks, tensors, snapshots)))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, "the records could not be written"
        folder: Any = _Hollow(open_folder(f"{root}/run"), json.loads((Path(root) / "sizes").read_text()))
        before, plans, runs = resident_mib("VmRSS"), [], []
        began = time.process_time()
        found = {"opening (s)": timed(lambda: runs.append(open_run(folder)))}
        assert len(runs[0].snapshots) == snapshots, runs[0].damaged[:1]
        found["planning (s)"] = timed(lambda: plans.append(plan_rebuild(runs[0], parse_outputs(list(widths(targets))))))
        found |= _shared_out(plans[0])
        found["all (s)"] = math.fsum(found.values())
        found["all (CPU s)"] = time.process_time() - began
        found |= {"peak (MiB)": resident_mib("VmHWM"), "imported (MiB)": before}
        records = sum(path.stat().st_size for path in Path(root).rglob("*.json"))
        found |= {"records (bytes)": records, "parameters": plans[0].run.numel, "sources": len(plans[0].sources)}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
