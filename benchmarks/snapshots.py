"""Snapshots: what storing and checking them costs, beside the same bytes written, read and digested bare.

Variants are timed in turn, several rounds, and the best of each counts: the machine is shared. What is written goes to
the disk that holds ``--folder``, with fsync, and is as long as what is compared with it.

    python benchmarks/snapshots.py [--megabytes 256] [--rounds 20] [--folder DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from scale import planned
from sharded_phema import PostHocEMA
from sharded_phema import blocks as block_files
from sharded_phema.blocks import BLOCK_BYTES, BlockFile
from sharded_phema.folder import Want, open_folder
from sharded_phema.store import open_run
from sharded_phema.store.tensors import write_tensors
from stopwatch import timed

RESULTS = Path(__file__).parent / "results"
PIECES = 16


def tensors_of(megabytes: int) -> dict[str, Tensor]:
    """So many megabytes in pieces of the same length."""
    torch.manual_seed(0)
    return {f"tensor {i}": torch.randn((megabytes << 20) // 4 // PIECES) for i in range(PIECES)}


def bare_write(folder: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    """The same bytes by os.write, then fsync."""
    descriptor = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for tensor in tensors.values():
        view = memoryview(tensor.numpy()).cast("B")
        while view:
            view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
    os.close(descriptor)


def our_write(folder: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    """A tensor file of a snapshot: temporary name, digests, fsync, name, fsync of the folders."""
    write_tensors(open_folder(folder), f"snapshots/{name}", tensors, dict.fromkeys(tensors, "float32"), {"run": "x"})


def write_rounds(folder: str, rank: int, megabytes: int, rounds: int, barrier: Any, out: Any) -> None:
    """One process's seconds of each way in each round; all processes write at the same time."""
    torch.set_num_threads(1)
    tensors, seconds = tensors_of(megabytes), []
    ways = (bare_write, our_write)
    for number in range(-1, rounds):  # the first round only warms up
        times = {}
        for way in ways if number % 2 else ways[::-1]:
            name = f"{way.__name__}-{rank}-{number}"
            barrier.wait()
            times[way.__name__] = timed(partial(way, folder, name, tensors))
            barrier.wait()
            for path in Path(folder).rglob(name):
                path.unlink()
        seconds.append(times)
    out.put(seconds[1:])


def written(folder: str, processes: int, megabytes: int, rounds: int) -> dict[str, Any]:
    """Seconds of both ways, of the slowest process in the best round, and their ratio."""
    context = multiprocessing.get_context("spawn")
    barrier, out = context.Barrier(processes), context.Queue()
    given = (megabytes, rounds, barrier, out)
    workers = [context.Process(target=write_rounds, args=(folder, rank, *given)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    found = [out.get() for _ in workers]
    for worker in workers:
        worker.join()
    slowest = [{way: max(times[way] for times in each) for way in each[0]} for each in zip(*found, strict=True)]
    best = {way: min(times[way] for times in slowest) for way in slowest[0]}
    ratios = [times["our_write"] / times["bare_write"] for times in slowest]
    return {
        "processes": processes,
        "megabytes each": megabytes,
        "bare (s)": best["bare_write"],
        "ours (s)": best["our_write"],
        "ratio of the best": best["our_write"] / best["bare_write"],
        "median ratio": statistics.median(ratios),
    }


def digested(megabytes: int) -> dict[str, float]:
    """Gigabytes per second of digests of 4 MiB blocks."""
    view = memoryview(next(iter(tensors_of(megabytes).values())).numpy()).cast("B")
    ways: dict[str, Callable[[memoryview], object]] = {
        "xxh3_128": xxhash.xxh3_128_digest,
        "crc32": zlib.crc32,
        "blake2b": lambda block: hashlib.blake2b(block).digest(),
    }
    parts = [view[i : i + BLOCK_BYTES] for i in range(0, len(view), BLOCK_BYTES)]
    return {
        name: len(view) / 1e9 / min(timed(lambda digest=digest: [digest(part) for part in parts]) for _ in range(5))
        for name, digest in ways.items()
    }


def held(folder: str, megabytes: int, rounds: int) -> dict[str, float]:
    """Seconds for which a snapshot holds the training, when it is written at once and when beside it."""
    model = nn.ParameterList([nn.Parameter(torch.randn((megabytes << 20) // 8 // PIECES)) for _ in range(PIECES)])
    found = {}
    for asynchronous in (False, True):
        root, seconds = f"{folder}/{asynchronous}", []
        with PostHocEMA(model, root, snapshot_every=1e9, asynchronous=asynchronous) as ema:
            for number in range(1, rounds + 2):
                ema.update(number)
                seconds.append(timed(ema.snapshot))
                ema._session._jobs.wait()  # for the writing, which is not what is measured
        found["asynchronous (s)" if asynchronous else "synchronous (s)"] = min(seconds[1:])
    return found | {"share held": found["asynchronous (s)"] / found["synchronous (s)"]}


def checked(folder: str, rounds: int) -> dict[str, float]:
    """Seconds of reading the tensor files of a run in pieces of 4 MiB, bare and with every block checked."""
    snapshots = open_run(f"{folder}/False").snapshots
    seconds: dict[str, list[float]] = {"bare (s)": [], "checked (s)": []}
    out = memoryview(bytearray(BLOCK_BYTES))
    for _ in range(rounds):
        for way in seconds:
            seconds[way].append(timed(lambda way=way: [_read(s, out, bare=way == "bare (s)") for s in snapshots]))
    best = {way: min(times) for way, times in seconds.items()}
    return best | {"ratio": best["checked (s)"] / best["bare (s)"]}


def _read(snapshot: Any, out: memoryview, *, bare: bool) -> None:
    block_files._kept.clear()
    part, name = snapshot.facts.parts[0], f"{snapshot.name}/rank-00000.safetensors"
    file = BlockFile(snapshot.root, name, part.size, part.digests)
    for begin in range(0, part.size, BLOCK_BYTES):
        piece = out[: min(BLOCK_BYTES, part.size - begin)]
        if bare:
            snapshot.root.fill([Want(name, begin, piece)])
        else:
            file.fill(begin, piece)


def main() -> None:
    """Measure, and keep the figures with what they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="of each process")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder unless given")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--ranks", type=int, default=4096, help="of the training whose planning is measured")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"about": about(given)}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found["written"] = [written(folder, n, given.megabytes, given.rounds) for n in (1, 2)]
        found["digested (GB/s)"] = digested(given.megabytes)
        found["held"] = held(folder, given.megabytes, given.rounds)
        found["read"] = checked(folder, given.rounds)
    found["planned"] = planned(given.ranks, 1000, 100)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "snapshots.json").write_text(json.dumps(found, indent=1) + "\n")
    text = report(found)
    (given.out / "snapshots.md").write_text(text)
    print(text)


def about(given: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": f"python benchmarks/snapshots.py --megabytes {given.megabytes} --rounds {given.rounds}",
        "commit": git.stdout.strip(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "numpy", "xxhash")},
        "load": list(os.getloadavg()),
        "rounds": given.rounds,
        "ranks": given.ranks,
    }


def report(found: Mapping[str, Any]) -> str:
    """The figures as tables."""
    facts = found["about"]
    lines = ["# Snapshots", "", f"`{facts['command']}` on {facts['machine']}; best of {facts['rounds']} rounds."]
    lines += [f"Processes that wanted a core meanwhile, others' among them: {facts['load'][0]:.1f}.", ""]
    lines += ["Writing, against os.write and fsync of the same bytes:", "", *table(found["written"])]
    lines += ["Speed of digests of 4 MiB blocks, GB/s:", "", *table([found["digested (GB/s)"]])]
    lines += ["How long a snapshot of two averages holds the training:", "", *table([found["held"]])]
    lines += ["Reading a run's files from memory of the system, bare and checked:", "", *table([found["read"]])]
    rows = [{"what": what, "": value} for what, value in found["planned"].items()]
    lines += [f"Planning: {facts['ranks']:,} ranks, 1,000 tensors, 2 averages, 100 snapshots:", "", *table(rows)]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of the same keys, as Markdown."""
    shown = [[_text(cell) for cell in row.values()] for row in rows]
    head = [*rows[0]]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *shown)] + [""]


def _text(cell: Any) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)


if __name__ == "__main__":
    main()
