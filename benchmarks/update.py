"""The update of running averages: ours, with each kernel, beside what others do, and beside a plain copy.

Each competitor first shows that its averages are right: three updates against float64. Then all take turns, round by
round, and medians count: the machine is shared. Ratios are medians of the ratios within a round.

Other packages are beside the point of this one and not in its extras; those that cannot be imported are named. Here:
pip install diffusers ema-pytorch, and pip install --no-deps timm, of which one file is used.

    python benchmarks/update.py [--elements 24576000] [--rounds 15] [--threads 1,2]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from competitors import COMPETITORS, Entry, copies, model_of
from sharded_phema.errors import PhemaError
from sharded_phema.kernels.reference import Reference
from stopwatch import timed

RESULTS = Path(__file__).parent / "results"
OURS, LERP, MULADD = "ours, fused", "torch._foreach_lerp_", "torch._foreach_mul_, _foreach_add_"
WEIGHTS = (1e-3, 2e-4, 5e-5)
MODELS = {"10 large tensors": 10, "3,000 small tensors": 3000}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOW = {"ours, reference (float64)": 3}
"""Rounds that a competitor takes part in, where that is not all."""
PACKAGES = ("torch", "numpy", "diffusers", "timm", "ema-pytorch", "triton")


def error_of(make: Callable[[nn.Module, Sequence[float]], Entry], dtype: torch.dtype) -> float:
    """Largest error of the averages after three updates, as a share of how far they moved altogether.

    The tool's own start, a copy of the parameters, is everybody's.
    """
    model, weights = model_of(7, 7 * 1000, dtype), (0.3, 0.01)
    expected = [[average.double() for average in tensors] for tensors in copies(model, len(weights))]
    before = [[average.clone() for average in tensors] for tensors in expected]
    truth = Reference(expected, [param.detach() for param in model.parameters()])
    entry = make(model, weights)
    for _ in range(3):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn(param.shape))
        entry.update()
        truth(weights)
    errors = []
    for found, true, start in zip(entry.averages, expected, before, strict=True):
        moved = torch.cat([(b - a).flatten() for a, b in zip(start, true, strict=True)]).norm()
        missed = torch.cat([(a.detach().double() - b).flatten() for a, b in zip(found, true, strict=True)]).norm()
        errors.append(float(missed / moved))
    return max(errors)


def verdicts() -> dict[str, dict[str, str]]:
    """What is to be said of each competitor, by dtype: nothing where it is right, "absent" where it cannot run."""
    found: dict[str, dict[str, str]] = {}
    for name, make in COMPETITORS.items():
        found[name] = {}
        for dtype, kind in DTYPES.items():
            try:
                error = error_of(make, kind)
            except (ImportError, PhemaError, RuntimeError) as reason:
                found[name][dtype] = f"absent: {str(reason).splitlines()[0]}"
                continue
            # Rounding of float32 numbers near 1 that move by a hundredth.
            found[name][dtype] = "" if error < 1e-4 else f"wrong by {error:.0%} of the way"
    return found


def measured(model: nn.Module, width: int, names: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each competitor in each round, the plain copy of one average among them."""
    entries = {name: COMPETITORS[name](model, WEIGHTS[:width]).update for name in names}
    source = torch.zeros(sum(param.numel() for param in model.parameters())).add_(1)
    target = torch.zeros_like(source).add_(1)
    acts = {"copy": lambda: target.copy_(source), **entries}
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(-2, rounds):  # the first rounds only warm up
        order = [*acts] if number % 2 else [*acts][::-1]
        for name in order:
            if number >= SLOW.get(name, rounds):
                continue
            spent = timed(acts[name])
            if number >= 0:
                seconds[name].append(spent)
    return seconds


def row(seconds: Mapping[str, Sequence[float]], name: str, elements: int, moved: int) -> dict[str, Any]:
    """A competitor's median, how much longer it takes than ours, and bytes a second against the plain copy's."""
    ratios = [theirs / mine for theirs, mine in zip(seconds[name], seconds[OURS], strict=False)]
    speed = moved * elements / statistics.median(seconds[name])
    copied = 8 * elements / statistics.median(seconds["copy"])
    found = {"ms": 1e3 * statistics.median(seconds[name]), "times ours": statistics.median(ratios)}
    return found | {"least bytes at": speed / 1e9, "of the copy's": speed / copied}


def main() -> None:
    """Check, measure, and keep the figures with what they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=24_576_000, help="of the model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", default="1,2", help="of torch, one run for each")
    parser.add_argument("--widths", default="1,2,3", help="numbers of averages")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args()
    said = verdicts()
    cases = []
    for threads in map(int, given.threads.split(",")):
        torch.set_num_threads(threads)
        for title, count in MODELS.items():
            for dtype, kind in DTYPES.items():
                model = model_of(count, given.elements, kind)
                names = [name for name in COMPETITORS if not said[name][dtype].startswith("absent")]
                for width in map(int, given.widths.split(",")):
                    seconds = measured(model, width, names, given.rounds)
                    moved = 8 * width + kind.itemsize
                    rows = {name: row(seconds, name, given.elements, moved) for name in (*names, "copy")}
                    case = {"threads": threads, "model": title, "dtype": dtype, "averages": width, "rows": rows}
                    cases.append(case)
                    print(threads, title, dtype, width, f"{rows[OURS]['ms']:.1f} ms", flush=True)
    found = {"about": about(given), "verdicts": said, "cases": cases, "bars": bars(cases)}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "update.json").write_text(json.dumps(found, indent=1) + "\n")
    text = report(found)
    (given.out / "update.md").write_text(text)
    print(text)


def bars(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for: two averages of float32 parameters."""
    found = []
    for case in cases:
        if case["averages"] == 2 and case["dtype"] == "float32":
            for other, least in ((LERP, 1.4), (MULADD, 2.0)):
                ratio = case["rows"][other]["times ours"]
                where = f"{case['model']}, {case['threads']} threads"
                found.append(
                    {"against": other, "where": where, "at least": least, "found": ratio, "met": ratio >= least}
                )
    return found


def about(given: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    options = f"--elements {given.elements} --rounds {given.rounds} --threads {given.threads} --widths {given.widths}"
    return {
        "command": f"python benchmarks/update.py {options}",
        "commit": git.stdout.strip() + (", with changes" if changed.stdout else ""),
        "machine": f"{platform.platform()}, {_processor()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "load": list(os.getloadavg()),
        "elements": given.elements,
        "rounds": given.rounds,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def report(found: Mapping[str, Any]) -> str:
    """The figures as tables."""
    facts = found["about"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = ["# The update of running averages", "", f"`{facts['command']}` on {facts['machine']}; {versions}.", ""]
    lines += [
        f"Commit {facts['commit']}. Models of {facts['elements']:,} elements; medians of {facts['rounds']} rounds."
    ]
    lines += [
        f"Processes that wanted a core meanwhile, others' among them: {facts['load'][0]:.1f}. Nothing was measured"
    ]
    lines += ["on CUDA.", "", "Milliseconds, and how many times as long as ours with the fused kernel.", ""]
    lines += ["| bar, two averages, float32 | where | at least | found |", "|---|---|---|---|"]
    for bar in found["bars"]:
        verdict = "" if bar["met"] else " (not met)"
        lines.append(f"| {bar['against']} | {bar['where']} | {bar['at least']} | {bar['found']:.2f}{verdict} |")
    for threads in dict.fromkeys(case["threads"] for case in found["cases"]):
        for title in MODELS:
            cases = [case for case in found["cases"] if (case["threads"], case["model"]) == (threads, title)]
            lines += ["", f"## {title}, {threads} threads", "", *_table(cases, found["verdicts"])]
    lines += ["", "## What is to be said of some", ""]
    for name, said in found["verdicts"].items():
        lines += [f"- {name}, {dtype}: {text}" for dtype, text in said.items() if text]
    return "\n".join(lines) + "\n"


def _table(cases: Sequence[Mapping[str, Any]], said: Mapping[str, Mapping[str, str]]) -> list[str]:
    heads = [f"{case['dtype']}, K={case['averages']}" for case in cases]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name in ("copy", *said):
        cells = [_cell(case["rows"].get(name), said.get(name, {}).get(case["dtype"], "")) for case in cases]
        if any(cells):
            lines.append(f"| {'copy of one average' if name == 'copy' else name} | {' | '.join(cells)} |")
    speeds = [format(case["rows"][OURS]["of the copy's"], ".2f") for case in cases]
    return [*lines, f"| ours: bytes a second, of the copy's | {' | '.join(speeds)} |"]


def _cell(row: Mapping[str, float] | None, said: str) -> str:
    return f"{row['ms']:.1f}, {row['times ours']:.2f}{', wrong' if said else ''}" if row else ""


if __name__ == "__main__":
    main()
