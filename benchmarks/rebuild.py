"""Reconstruction against a bare read of all stored averages and against the classic way, side by side in one run.

The classic way loads every snapshot file whole, one after another, and adds it to one
float32 sum per target, as published scripts do. Ours is timed twice: with all stored
averages, as the classic way, and with the few that the default tolerance needs. Ratios are
what counts: the machine is shared, and all ways are timed in turn, several rounds, warm cache.

    python benchmarks/rebuild.py [--elements 10000000] [--snapshots 16] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

import sharded_phema
from sharded_phema import PostHocEMA, reconstruct
from sharded_phema.per_tensor import parse_outputs
from sharded_phema.recipe import Plan, plan_rebuild
from sharded_phema.store import open_run
from stopwatch import timed

ONE = ["0.15"]
NINE = ["0.03", "0.06", "0.08", "0.12", "0.15", "0.18", "0.20", "0.22", "0.25"]
WAYS = ("bare read", "classic", "ours, exact", "ours, auto")
RESULTS = Path(__file__).parent / "results" / "rebuild.json"


def store_run(root: Path, elements: int, snapshots: int) -> None:
    """A run of a model of ten square layers that moves a little between snapshots."""
    width = int((elements / 10) ** 0.5)
    model = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(10))
    with PostHocEMA(model, root, snapshot_every=100) as ema, torch.no_grad():
        for i in range(1, snapshots + 1):
            for param in model.parameters():
                param += 0.01 * torch.randn_like(param)
            ema.update(100 * i)


def bare_read(plan: Plan) -> None:
    """The bytes that the plan needs, read into one buffer of 4 MiB."""
    buffer = memoryview(bytearray(1 << 22))
    for path in sorted({path for source in plan.sources for path in Path(source.snapshot.where).glob("*.safetensors")}):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def classic(plan: Plan) -> list[dict[str, torch.Tensor]]:
    """Whole files, one after another, each added to the sum of every target."""
    sums: list[dict[str, torch.Tensor]] = [{} for _ in plan.targets]
    weights = {(s.snapshot.where, s.average): row for s, row in zip(plan.sources, plan.coefficients, strict=True)}
    labels = plan.run.record.averages
    for folder in dict.fromkeys(source.snapshot.where for source in plan.sources):
        for path in sorted(Path(folder).glob("*.safetensors")):
            for key, tensor in load_file(path).items():
                average = next(i for i, label in enumerate(labels) if key.startswith(label + "."))
                name = key.removeprefix(labels[average] + ".").rpartition(":")[0]  # one process stores one box each
                for total, weight in zip(sums, weights[folder, average], strict=True):
                    total.setdefault(name, torch.zeros_like(tensor)).add_(tensor, alpha=float(weight))
    return sums


def measure(root: Path, targets: list[str], rounds: int) -> dict[str, float]:
    """Median seconds of each way, and how far the two results are apart."""
    plan = plan_rebuild(open_run(root), parse_outputs(targets), tolerance="exact")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    gap = 0.0
    for i in range(rounds):
        with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
            out = Path(scratch) / f"out{i}"
            seconds["bare read"].append(timed(lambda: bare_read(plan)))
            found: list[list[dict[str, torch.Tensor]]] = []
            seconds["classic"].append(timed(lambda found=found: found.append(classic(plan))))
            exact = {"out": out, "tolerance": "exact"}
            seconds["ours, exact"].append(timed(lambda exact=exact: reconstruct(root, targets, **exact)))
            few = out.with_name("few")
            seconds["ours, auto"].append(timed(lambda few=few: reconstruct(root, targets, out=few)))
            for planned, total in zip(plan.targets, found[0], strict=True):
                ours = load_file(out / planned.target.slug / "model.safetensors")
                gap = max([gap, *(float((ours[name] - total[name]).abs().max()) for name in total)])
    return {way: statistics.median(times) for way, times in seconds.items()} | {"largest difference": gap}


def main() -> None:
    """Measure, print a table, and keep the figures with what they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=10_000_000, help="parameters of the model")
    parser.add_argument("--snapshots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "ema"
        store_run(root, given.elements, given.snapshots)
        measured = {f"{len(targets)} targets": measure(root, targets, given.rounds) for targets in (ONE, NINE)}
    table = Table("way", *measured, title="time, as a multiple of a bare read of the stored averages")
    for way in WAYS:
        table.add_row(way, *(f"{times[way] / times['bare read']:.2f}" for times in measured.values()))
    Console().print(table)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(facts(given) | {"seconds": measured}, indent=1) + "\n")


def facts(given: argparse.Namespace) -> dict[str, object]:
    """What the figures were measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "versions": {"torch": torch.__version__, "sharded_phema": sharded_phema.__version__},
        "elements": given.elements,
        "snapshots": given.snapshots,
    }


if __name__ == "__main__":
    main()
