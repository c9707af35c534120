"""Reconstruction: ours against the bare bytes, the classic way, dcp.load and ema-pytorch, each in fresh processes.

Runs are made of random walks whose averages are known, in the shape of a transformer, once for each size; ways take
turns, round by round, with the files in the system's memory (warm) or not (cold). Results are kept size by size: what
is not measured again stays as it was.

    python benchmarks/reconstruct.py [--size 10M 125M] [--targets 1 31] [--caches warm cold] [--rounds 3]
    python benchmarks/reconstruct.py --size 1.5B --targets 1 3 --caches cold --no-plan
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from closeness import errors_of
from compared import CORE_EACH, MANY, ONE_CORE, OURS, report
from costs import multiplied
from fresh import Trial, ran, read_all, sent_to_disk
from jobs import Job
from made import Made, Recipe, made_run
from planning import planned_apart, widths
from rivals import KEEPERS, missing
from sharded_phema.export import byte_count
from sharded_phema.per_tensor import parse_outputs
from sharded_phema.recipe import Plan, plan_rebuild
from sharded_phema.store import open_run
from sharded_phema.tensorfile import torch_dtype
from ways import planned_ranges

RESULTS = Path(__file__).parent / "results"
BOTH = (0.05, 0.1)
KNOWN = {
    "10M": Recipe(10_000_000, 64, 4, BOTH, "float32", ()),
    "125M": Recipe(125_000_000, 16, 4, BOTH, "bfloat16", ()),
    "1.5B": Recipe(1_500_000_000, 16, 8, BOTH[:1], "bfloat16", ()),
}
"""What is made of the sizes that are known by name."""
SLOW = ("classic", "dcp.load", "ema-pytorch")
ORDER = ("plan", "bare read", "bare read and write", *OURS, *SLOW)


@dataclass(frozen=True, slots=True)
class Case:
    """One set of targets and state of the cache, in which all ways are measured side by side."""

    made: Made
    plan: Plan
    targets: tuple[str, ...]
    cache: str
    given: argparse.Namespace

    @property
    def written_bytes(self) -> int:
        """Bytes of all outputs."""
        dtype = self.given.out_dtype or self.made.recipe.dtype
        return self.plan.run.numel * len(self.targets) * torch_dtype(dtype).itemsize

    def files(self, way: str) -> list[Path]:
        """What a way reads of tensors."""
        if way in KEEPERS:
            return [path for path in (self.made.folder / way).rglob("*") if path.is_file()]
        if way == "classic":
            return sorted(self.made.root.rglob("*.safetensors"))
        return sorted({Path(path) for path, _, _ in planned_ranges(self.plan)})

    def obstacle(self, way: str) -> str:
        """Why a way cannot be measured; empty where it can."""
        if way == "ema-pytorch" and len(self.targets) > 1:
            return f"it takes one target at a time, {len(self.targets)} times what one takes"
        if way in KEEPERS and (why := missing(way, self.made)):
            return why
        if way in KEEPERS:
            KEEPERS[way](self.made, self.made.folder / way)
        size, room = sum(path.stat().st_size for path in self.files(way)), _memory("MemTotal")
        if self.cache == "warm" and size > 0.7 * room:
            return f"its {size / 1e9:.0f} GB are not held in {room / 1e9:.0f} GB of memory"
        free = shutil.disk_usage(self.given.out_folder).free
        if way != "plan" and self.written_bytes > free - (1 << 30):
            return f"its outputs take {self.written_bytes / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
        return ""

    def job(self, way: str, out: Path) -> Job:
        """What a way is to do."""
        recipe, given = self.made.recipe, self.given
        return Job(
            way=way.partition(",")[0],
            root=str(self.made.root),
            rival=str(self.made.folder / way),
            out=str(out),
            targets=self.targets,
            sigma_rels=recipe.sigma_rels,
            dtype=given.out_dtype or recipe.dtype,
            output_bytes=self.written_bytes // len(self.targets),
            memory=given.memory,
            metric=given.metric,
            together=max(1, min(8, int(0.6 * _memory("MemAvailable") / (4 * recipe.parameters)))),
            workers=2 if way in (MANY, CORE_EACH) else 1,
            cores=1 if way in (ONE_CORE, CORE_EACH) else 0,
            ranges=tuple(planned_ranges(self.plan)) if "bare" in way else (),
            scratch="",
        )


def measured(case: Case) -> dict[str, Any]:
    """All ways that can be measured, in turn, round by round."""
    obstacles = {way: case.obstacle(way) for way in ORDER if way in case.given.ways}
    ways = [way for way, why in obstacles.items() if not why]
    trials: dict[str, list[Trial]] = {way: [] for way in ways}
    errors: dict[str, dict[str, float]] = {}
    for number in range(case.given.rounds):
        for way in ways if number % 2 == 0 else ways[::-1]:
            if way not in SLOW or number < case.given.rival_rounds:
                trial, errors[way] = _tried(case, way)
                trials[way].append(trial)
                print(
                    f"{case.made.recipe.parameters:,} {case.cache} {len(case.targets)} {way}: {trial}", file=sys.stderr
                )
    forecasts = [target.fit.forecast for target in case.plan.targets]
    return {
        "targets": len(case.targets),
        "cache": case.cache,
        "sources": len(case.plan.sources),
        "stored": case.made.recipe.snapshots * len(case.made.recipe.sigma_rels),
        "planned bytes": case.plan.bytes_to_read,
        "written bytes": case.written_bytes,
        "worst forecast": max(forecasts),
        "gflops": multiplied(len(case.plan.sources), len(case.targets)),
        "ways": {way: _summary(trials[way], errors[way]) for way in ways},
        "left out": {way: why for way, why in obstacles.items() if why},
    }


def _tried(case: Case, way: str) -> tuple[Trial, dict[str, float]]:
    """One run of a way, and the error of each target that it rebuilt."""
    with tempfile.TemporaryDirectory(dir=case.given.out_folder) as scratch:
        out = Path(scratch) / "out"
        files, job = case.files(way), case.job(way, out)  # both look into files
        if case.cache == "warm":
            read_all(files)
        else:
            sent_to_disk([*case.made.root.rglob("*.safetensors"), *files])
        trial = ran(job, threads=case.given.threads)
        found = errors_of(out, case.made) if way in (*OURS, *SLOW) else {}
    assert not found or found.keys() == set(case.targets), f"{way} rebuilt {sorted(found)} of {case.targets}"
    return trial, found


def _summary(trials: Sequence[Trial], errors: Mapping[str, float]) -> dict[str, Any]:
    seconds = [trial.seconds for trial in trials]
    best = trials[seconds.index(min(seconds))]
    found: dict[str, Any] = {
        "best (s)": best.seconds,
        "median (s)": statistics.median(seconds),
        "end to end (s)": min(trial.end_to_end_s for trial in trials),
        "peak (MiB)": max(trial.peak_mib for trial in trials),
        "imported (MiB)": max(trial.imported_mib for trial in trials),
        "asked (bytes)": best.asked_bytes,
        "from disk (bytes)": best.disk_read_bytes,
        "to disk (bytes)": best.disk_written_bytes,
        "seconds": seconds,
    }
    return found | ({"worst error": max(errors.values()), "errors": dict(errors)} if errors else {})


def section(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Everything of one size."""
    recipe = _recipe(name, given)
    with _kept(given.folder) as folder:
        stem = f"{recipe.parameters}-{recipe.snapshots}-{recipe.ranks}-{len(recipe.sigma_rels)}-{recipe.dtype}"
        made = made_run(folder / stem, recipe)
        given = argparse.Namespace(**{**vars(given), "out_folder": given.out_folder or made.folder})
        cases = []
        for count in given.targets:
            plan = plan_rebuild(open_run(made.root), parse_outputs(list(widths(count))))
            cases += [measured(Case(made, plan, widths(count), cache, given)) for cache in given.caches]
        facts = asdict(recipe) | {"parameters": open_run(made.root).numel}
    facts |= {"budget (MiB)": byte_count(given.memory) / (1 << 20), "written in": given.out_dtype or recipe.dtype}
    facts["metric"] = given.metric
    return {"about": about(given), "recipe": facts, "cases": cases}


def _recipe(name: str, given: argparse.Namespace) -> Recipe:
    units = {"k": 10**3, "M": 10**6, "B": 10**9}
    number = round(float(name[:-1]) * units[name[-1]]) if name[-1] in units else int(name)
    known = KNOWN.get(name, Recipe(number, 16, 4, BOTH, "float32", ()))
    every = tuple(dict.fromkeys(target for count in given.targets for target in widths(count)))
    asked = {"snapshots": given.snapshots, "ranks": given.ranks, "dtype": given.dtype, "sigma_rels": given.sigma_rels}
    changed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items() if v}
    return replace(known, targets=every, **changed)


@contextmanager
def _kept(folder: Path | None) -> Iterator[Path]:
    """The folder of runs; one that vanishes unless one was given."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def _memory(kind: str) -> int:
    """Bytes of memory of the machine, by a name in /proc/meminfo."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next(int(words[1]) << 10 for words in lines if words[0] == f"{kind}:")


def about(given: argparse.Namespace) -> dict[str, Any]:
    """What figures were measured on."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    versions = {"python": platform.python_version()} | {n: version(n) for n in ("torch", "numpy", "safetensors")}
    return {
        "command": shlex.join(["python", "benchmarks/reconstruct.py", *sys.argv[1:]]),
        "commit": git.stdout.strip()[:12] + (" with changes" if changed.stdout.strip() else ""),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {_memory('MemTotal') / (1 << 30):.0f} GiB",
        "versions": versions,
        "load": list(os.getloadavg()),
        "rounds": given.rounds,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="*", default=["10M", "125M"], help=f"{', '.join(KNOWN)} or such as 20k")
    parser.add_argument("--targets", nargs="+", type=int, default=[1, 31], help="numbers of widths from 0.02 to 0.28")
    parser.add_argument("--caches", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--ways", nargs="+", choices=ORDER, default=list(ORDER))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rival-rounds", type=int, default=1, help=f"rounds of {', '.join(SLOW)}")
    parser.add_argument("--memory", default="1GiB", help="budget of a worker")
    parser.add_argument("--metric", choices=("trajectory", "paper"), default="trajectory", help="of the classic ways")
    parser.add_argument("--threads", type=int, default=1, help="of torch in each process")
    parser.add_argument("--snapshots", type=int, help="other than the size's own")
    parser.add_argument("--ranks", type=int, help="who stored the run")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of what is stored")
    parser.add_argument("--sigma-rels", nargs="+", type=float, help="what is stored")
    parser.add_argument("--out-dtype", help="of what is written; that of what is stored unless given")
    parser.add_argument("--folder", type=Path, help="where runs are made and kept; a temporary folder unless given")
    parser.add_argument("--out-folder", type=Path, help="where outputs go, such as /dev/shm; beside the run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--plan", nargs=4, type=int, default=(4096, 1000, 64, 31), help="ranks tensors snapshots targets"
    )
    parser.add_argument("--no-plan", action="store_true", help="do not measure planning")
    return parser.parse_args()


def main() -> None:
    """Measure, and keep the figures beside those of other sizes."""
    given = _arguments()
    path = given.out / "reconstruct.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"sizes": {}}
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.size:
        found["sizes"][name] = section(name, given)
        path.write_text(json.dumps(found, indent=1) + "\n")
    if not given.no_plan:
        facts = dict(zip(("ranks", "tensors", "snapshots", "targets"), given.plan, strict=True))
        found["planned"] = {"about": about(given) | facts, **planned_apart(*given.plan)}
    path.write_text(json.dumps(found, indent=1) + "\n")
    text = report(found)
    (given.out / "reconstruct.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
