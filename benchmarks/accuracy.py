"""How well averages are rebuilt on real trainings, against the paper's procedure and against the forecast.

Trains five small models on this machine's CPU (about six minutes; kept in the cache), recording every step. Then
rebuilds every target from every set of sources and writes accuracy.json, accuracy.md and accuracy.png.

python benchmarks/accuracy.py
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

from bars import Bar, bars
from evaluation import Bench
from grid import FULL, QUICK, Grid
from measure import Case, measured, noiseless_choices
from picture import write_scatter
from sparse import SparseCase, sparse_cases
from tables import report
from trainings import TRAININGS, Trajectory, recorded

Item = TypeVar("Item")
_HERE = Path(__file__).resolve().parent


def main() -> None:
    """Train, measure, report."""
    options = _options()
    grid = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    runs = [
        recorded(
            training, options.cache, steps=grid.steps, sampled=grid.sampled, quick=options.quick, progress=_progress
        )
        for training in TRAININGS
    ]
    cases, sparse = _measure(grid, runs)
    found = bars(cases, sparse)
    options.out.mkdir(parents=True, exist_ok=True)
    _write_json(options.out / "accuracy.json", grid, runs, cases, sparse, found)
    (options.out / "accuracy.md").write_text(report(grid, runs, cases, sparse, found))
    write_scatter(cases, options.out / "accuracy.png")
    for bar in found:
        print(f"{'pass' if bar.passed else 'FAIL'}  {bar.claim}: {bar.found:.3g} ({bar.worst})")
    print(f"tables, numbers and picture: {options.out}/accuracy.md, .json, .png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(tempfile.gettempdir()) / "sharded_phema-trajectories"
    parser.add_argument(
        "--cache", type=Path, default=cache, help="recorded trainings, 1 GB; remove when they change (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=_HERE / "results", help="folder of the results (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny runs of a few seconds: a test, no evidence")
    return parser.parse_args()


def _measure(grid: Grid, runs: Sequence[Trajectory]) -> tuple[list[Case], list[SparseCase]]:
    choices, cases, sparse = {}, [], []
    for count in _progress(grid.snapshots, "solving"):
        choices |= noiseless_choices(grid, count)
    for run in _progress(runs, "measuring"):
        bench = Bench(run.theta, grid.everything())
        cases += measured(run.training, bench, grid, choices)
        for count in grid.sparse_snapshots:
            sparse += sparse_cases(run.training, bench, grid, count)
    return cases, sparse


def _progress(items: Sequence[Item], label: str) -> Iterable[Item]:
    """The items, with a bar on stderr if that is a terminal."""
    return track(items, description=label, console=Console(stderr=True)) if sys.stderr.isatty() else items


def _write_json(
    path: Path,
    grid: Grid,
    runs: Sequence[Trajectory],
    cases: Sequence[Case],
    sparse: Sequence[SparseCase],
    found: Sequence[Bar],
) -> None:
    content = {
        "about": _about(),
        "grid": {"steps": grid.steps, "sampled": grid.sampled, "tracked": [0.05, 0.1]},
        "trainings": {run.training.name: {"title": run.training.title, **run.about} for run in runs},
        "bars": [{field.name: getattr(bar, field.name) for field in fields(Bar)} for bar in found],
        "cases": _columns(Case, cases),
        "sparse": _columns(SparseCase, sparse),
    }
    path.write_text(_one_row_a_line(content))


def _about() -> dict[str, Any]:
    packages = ("torch", "numpy", "scipy", "scikit-learn")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python benchmarks/accuracy.py {' '.join(sys.argv[1:])}".strip(),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "sharded_phema", "benchmarks/*.py")),
        "machine": {"system": platform.platform(), "processor": _processor(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(_HERE.parent), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _columns(kind: type, rows: Sequence[Case] | Sequence[SparseCase]) -> dict[str, Any]:
    short = [[float(f"{x:.3g}") if isinstance(x, float) else x for x in astuple(row)] for row in rows]
    # JSON has no NaN: a method without a forecast has null there.
    clean = [[None if x != x else x for x in row] for row in short]
    return {"columns": [field.name for field in fields(kind)], "rows": clean}


def _one_row_a_line(content: dict[str, Any]) -> str:
    lines = []
    for key, value in content.items():
        if isinstance(value, dict) and "rows" in value:
            rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in value["rows"])
            lines.append(f'{json.dumps(key)}: {{"columns": {json.dumps(value["columns"])}, "rows": [\n{rows}\n]}}')
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, indent=1)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
