"""Reconstruction as a whole: the same bytes however the work is cut, killed, shared or stored, in bounded memory."""

from __future__ import annotations

import errno
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from builders import Division, listing, new_run, new_session, no_flush, numbers, same_bits, store, tensors_of
from commands import run
from object_store import BUCKET
from ranks import run_ranks
from torch import Tensor, nn
from worlds import random_holding

from sharded_phema import feed, grid, outputs, sums, work
from sharded_phema.errors import OutputError, StoreError
from sharded_phema.grid import RawRange
from sharded_phema.job import begin
from sharded_phema.layout import Box, boxes_of_flat_range, whole
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import preview, reconstruct
from sharded_phema.recipe import Plan
from sharded_phema.store import open_run

SHAPES = ((700, 251), (1000,), (), (0, 3), (64, 1025), (77_777,))
"""About 320,000 elements: several strips of any length, none of which divides a parameter."""

SNAPSHOTS = 9
"""Of two averages each: more sources than are summed in one product."""

TARGETS = ["0.07", "0.12", "0.2", "decay:linear:0.2", "window:0.3", "0.1@t=5"]

SLICES = {"grid": 1 << 14, "checkpoint": 2, "strip": 1 << 12}
"""Small blocks, noted often."""


@pytest.fixture(autouse=True, scope="module")
def quick_disk() -> Iterator[None]:
    with no_flush():
        yield


def rows(ranks: int) -> Division:
    """Parameters cut into rows of their first dimension as FSDP2 cuts them; scalars are on rank 0."""
    held = []
    for shape in SHAPES:
        length, step = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        size = -(-length // ranks)
        edges = [min(rank * size, length) * step for rank in range(ranks + 1)]
        held.append([(boxes_of_flat_range(shape, a, b), 0) for a, b in itertools.pairwise(edges)])
    return Division(SHAPES, tuple(held))


def flat(ranks: int) -> Division:
    """All parameters end to end cut into equal runs, as ZeRO and FSDP1 cut them."""
    numels = [math.prod(shape) for shape in SHAPES]
    step, begin, held = -(-sum(numels) // ranks), 0, []
    for shape, numel in zip(SHAPES, numels, strict=True):
        ends = [min(max(rank * step - begin, 0), numel) for rank in range(ranks)] + [numel]
        held.append([(boxes_of_flat_range(shape, a, b), 0) for a, b in itertools.pairwise(ends)])
        begin += numel
    return Division(SHAPES, tuple(held))


def odd(ranks: int) -> Division:
    """Columns, tiles, copies and idle ranks, by chance."""
    held = []
    for index, shape in enumerate(SHAPES):
        seen: dict[tuple[Box, ...], int] = {}
        one = []
        for boxes in random_holding(Random(index), shape, ranks):
            one.append((boxes, seen.get(boxes, 0) if boxes else 0))
            seen[boxes] = seen.get(boxes, 0) + 1
        held.append(one)
    return Division(SHAPES, tuple(held))


WORLDS = {"one": lambda: rows(1), "rows of 3": lambda: rows(3), "runs of 4": lambda: flat(4), "odd 5": lambda: odd(5)}


def stored(root: str | Path, division: Division, snapshots: int = SNAPSHOTS, dtype: str = "float32") -> str | Path:
    """A run of random averages."""
    labels = ("power:gamma=6", "power:gamma=16")
    new_run(root, division, labels=labels, dtype=dtype)
    new_session(root, division)
    for number in range(snapshots):
        averages = {label: numbers(division.shapes, 10 * number + i) for i, label in enumerate(labels)}
        # Norms are sums over the ranks: their last bits, and so those of the coefficients, would depend on the world.
        with mock.patch("builders.squared_norms", lambda layouts: ((), ())):
            store(root, division, averages, t=number + 1.0, number=number, dtype=dtype)
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run as some world stored it, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("run") / "ema"
            stored(made[name], WORLDS[name]())
        return made[name]

    return get


def slices(patch: pytest.MonkeyPatch, values: dict[str, int]) -> None:
    patch.setattr(grid, "BLOCK", values.get("grid", grid.BLOCK))
    patch.setattr(work, "CHECKPOINT", values.get("checkpoint", work.CHECKPOINT))
    patch.setattr(sums, "STRIP_BYTES", 4 * values["strip"] if "strip" in values else sums.STRIP_BYTES)


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes | None]]:
    """What one worker makes of the run with the constants as they are, by precision and number of targets."""
    out, found = tmp_path_factory.mktemp("reference"), {}
    for precision in ("float32", "float64"):
        for name, targets in (("all", TARGETS), ("first", TARGETS[:1])):
            rebuilt(world("one"), out / precision / name, targets, precision=precision)
            found[f"{precision} {name}"] = listing(out / precision / name)
    return found


def rebuilt(root: str | Path, out: Path, targets: list[str] = TARGETS, **options: Any) -> Plan:
    return reconstruct(root, targets, out=out, tolerance="exact", movement="constant", **options)


def assert_same(out: Path, expected: dict[str, bytes | None]) -> None:
    found = listing(out)
    assert found.keys() == expected.keys()
    different = [name for name in found if found[name] != expected[name]]
    assert not different  # the bytes themselves would take minutes to show


# However the work is cut.


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("targets", ["all", "first"])
@pytest.mark.parametrize("strip", [12, 13, 15, 16, 17])
def test_the_length_of_strips_does_not_show_in_the_bits(
    world, reference, tmp_path, monkeypatch, strip, targets, precision
) -> None:
    # Kernels of matrix products sum the last few columns otherwise: 1/16 of a vector differs, if any does.
    slices(monkeypatch, {"strip": 1 << strip, "grid": (1 << strip) * 3 // 2})
    rebuilt(world("one"), tmp_path / "out", TARGETS if targets == "all" else TARGETS[:1], precision=precision)
    assert_same(tmp_path / "out", reference[f"{precision} {targets}"])


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", WORLDS)
def test_neither_the_number_of_workers_nor_the_world_that_stored_shows_in_the_bits(
    world, reference, tmp_path, monkeypatch, name, workers
) -> None:
    slices(monkeypatch, SLICES | {"grid": 30_000 + workers})
    order = Random(workers).sample(range(workers), workers)
    for worker in order:
        plan = rebuilt(world(name), tmp_path / "out", worker=worker, workers=workers)
        assert plan.summary is not None and plan.summary.finished == (worker == order[-1])
    assert_same(tmp_path / "out", reference["float32 all"])


def test_a_budget_that_makes_strips_short_does_not_show_in_the_bits(world, reference, tmp_path) -> None:
    prepared = preview(world("one"), TARGETS, out=tmp_path / "out", memory="66MiB")
    assert prepared.strip < sums.STRIP_BYTES // 4 and prepared.memory <= 66 << 20
    rebuilt(world("one"), tmp_path / "out", memory="66MiB")
    assert_same(tmp_path / "out", reference["float32 all"])


@pytest.mark.parametrize("columns", [1 << 12, 1 << 17])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_every_column_of_a_product_that_is_asked_for_is_summed_alike(columns, precision) -> None:
    # Oracle: all columns are the same, so that all sums must be. What is not asked for stands behind them.
    generator = torch.Generator().manual_seed(0)
    with sums.one_thread():
        for targets in (*range(1, 10), 31) if columns == 1 << 12 else (1, 2, 5, 31):
            for sources in (1, 2, 7, 8, 16):
                weights = torch.randn(targets, sources, generator=generator, dtype=precision)
                values = torch.randn(sources, columns + sums.PAD, generator=generator, dtype=precision)
                values[:, :columns] = values[:, :1]
                total = torch.empty(targets, columns + sums.PAD, dtype=precision)
                torch.mm(weights, values, out=total)
                assert (total[:, :columns] == total[:, :1]).all()
                total[:, :columns] = total[:, 1:2]
                total.addmm_(weights, values)
                assert (total[:, :columns] == total[:, :1]).all()


def test_all_workers_together_write_every_byte_of_every_file_once(world, tmp_path, monkeypatch) -> None:
    # Oracle: counting. What is truncated to its length reads as zeros, so that a gap might not show otherwise.
    slices(monkeypatch, SLICES)
    counts: dict[str, np.ndarray] = {}
    real = outputs.os.pwrite

    def pwrite(descriptor: int, data: memoryview, begin: int) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        name = str(Path(*Path(path).parts[-2:]))
        counts.setdefault(name, np.zeros(os.fstat(descriptor).st_size, int))[begin : begin + len(data)] += 1
        return real(descriptor, data, begin)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for worker in range(3):
        rebuilt(world("odd 5"), tmp_path / "out", TARGETS[:2], max_shard_size=300_000, worker=worker, workers=3)
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.safetensors"))
    # A file whose tensors have no elements is never opened.
    assert {*counts} <= {*files} and len(files) > 4
    for name in files:
        header = 8 + int.from_bytes((tmp_path / "out" / name).read_bytes()[:8], "little")
        written = counts.get(name, np.zeros(header, int))
        assert (written[:header] == 0).all() and (written[header:] == 1).all(), name


# Killed and started again.


def command(root: Path, out: Path, *more: object) -> list[str]:
    words = ["reconstruct", root, *TARGETS, "--out", out, "--tolerance", "exact", "--movement", "constant", *more]
    return [str(word) for word in words]


def child(words: list[str], values: dict[str, int], dies: tuple[str, int], started: Any) -> None:
    """The command line in a process of its own that kills itself at some system call, or is killed from outside."""
    what, count = dies
    patch = pytest.MonkeyPatch()
    slices(patch, values)
    if what == "time":
        patch.setattr(os, "pwrite", slowed(os.pwrite))
    else:
        calls = iter(range(count))
        real = getattr(os, what)

        def call(*args: Any) -> Any:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        patch.setattr(os, what, call)
    started.send(True)
    done = run(*words)
    if done.returncode:
        sys.stderr.write(done.stderr)
    os._exit(done.returncode)


def slowed(real: Callable[..., int]) -> Callable[..., int]:
    def call(*args: Any) -> int:
        time.sleep(0.002)
        return real(*args)

    return call


def killed(words: list[str], dies: tuple[str, int], values: dict[str, int] = SLICES) -> int | None:
    """Exit code of a process that is killed at some moment: less than 0 if it was."""
    processes = multiprocessing.get_context("fork")  # as little time as may be before the moment
    here, there = processes.Pipe(duplex=False)
    process = processes.Process(target=child, args=(words, values, dies, there))
    process.start()
    here.recv()
    if dies[0] == "time":
        process.join(dies[1] / 1000)
        process.kill()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_moment_and_started_again_it_ends_in_the_same_bytes(world, reference, tmp_path, seed) -> None:
    # Oracle: the run that nobody disturbed. Each time as many ranks as before or others; the last one is left alone.
    rng, out, deaths = Random(seed), tmp_path / "out", 0
    root = world(rng.choice(sorted(WORLDS)))
    for _ in range(5):
        what = rng.choice(["time", "pwrite", "pwrite", "fsync", "rename"])
        most = {"time": 700, "pwrite": 250, "fsync": 20, "rename": 4}[what]
        workers = rng.choice([1, 2, 3])
        more = ["--worker", rng.randrange(workers), "--workers", workers]
        code = killed(command(root, out, *more), (what, rng.randrange(most)))
        deaths += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
        if out.exists():
            break
        assert {path.name for path in tmp_path.iterdir()} <= {".out.partial"}
    assert deaths
    if not out.exists():
        assert killed(command(root, out), ("pwrite", 10**9)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert_same(out, reference["float32 all"])


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_noted_as_done_is_not_read_again(world, reference, tmp_path, monkeypatch, workers) -> None:
    # Oracle: the blocks that the journal lacks, and what they cost by the plan. The second time with other workers.
    root, out = world("rows of 3"), tmp_path / "out"
    assert killed(command(root, out), ("pwrite", 12 * len(TARGETS) * 4)) == -signal.SIGKILL
    slices(monkeypatch, SLICES)
    options: dict[str, Any] = {"tolerance": "exact", "movement": "constant"}
    prepared = preview(root, TARGETS, out=out, **options)
    blocks = len(prepared.division.grid)
    job = begin(out, prepared.request, prepared.plan.coefficients, blocks, lambda files: pytest.fail("made anew"))
    done = job.done()
    assert SLICES["checkpoint"] <= done.sum() < blocks, "something was noted, and something remains"
    asked: dict[int, int] = {}
    real = feed.Feed.fill

    def fill(self: Any, sources: Any, pieces: Any, rows: Any) -> None:
        for piece in pieces:
            for i in range(piece.box.offsets[0], piece.box.offsets[0] + piece.numel):
                asked[piece.parameter, i] = asked.get((piece.parameter, i), 0) + len(sources)
        real(self, sources, pieces, rows)

    monkeypatch.setattr(feed.Feed, "fill", fill)
    for worker in range(workers):
        rebuilt(root, out, worker=worker, workers=workers)
    remaining = {
        (piece.parameter, i)
        for number in np.flatnonzero(~done).tolist()
        for piece in prepared.division.grid[number]
        for i in range(piece.box.offsets[0], piece.box.offsets[0] + piece.numel)
    }
    assert asked.keys() == remaining and {*asked.values()} == {len(prepared.plan.sources)}
    assert_same(out, reference["float32 all"])


def test_a_kill_loses_at_most_what_was_not_noted_yet(world, tmp_path, monkeypatch) -> None:
    # Two checkpoints are under way at most: one whose files are flushed while the next one is computed.
    root, out, writes = world("one"), tmp_path / "out", 15
    slices(monkeypatch, SLICES)
    options: dict[str, Any] = {"tolerance": "exact", "movement": "constant"}
    prepared = preview(root, TARGETS, out=out, **options)
    per_block = [(len(prepared.division.grid[n]) + 3) * len(TARGETS) for n in range(len(prepared.division.grid))]
    assert killed(command(root, out), ("pwrite", writes * len(TARGETS) * 4)) == -signal.SIGKILL
    job = begin(out, prepared.request, prepared.plan.coefficients, len(prepared.division.grid), lambda files: None)
    # At least so many blocks were written, each of which is some strips and a part of each parameter, in each output.
    written = int(np.searchsorted(np.cumsum(per_block), writes * len(TARGETS) * 4))
    assert job.done().sum() >= written - 3 * SLICES["checkpoint"]
    assert not isinstance(prepared.division.grid[0], RawRange)


def test_three_processes_without_a_process_group_share_the_work(world, reference, tmp_path) -> None:
    # As a Slurm array starts them: all at once, none knows of the others.
    words = [sys.executable, "-m", "sharded_phema", *command(world("runs of 4"), tmp_path / "out", "--workers", 3)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*words, "--worker", str(worker), "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for worker in range(3)
    ]
    ends = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ends
    found = [json.loads(out) for out, _ in ends]
    assert any(one["finished"] for one in found) and all(one["workers"] == 3 for one in found)
    # Model of 4 bytes an element in each target; empty and 0-d parameters included.
    assert sum(one["written"] for one in found) == 4 * len(TARGETS) * sum(math.prod(shape) for shape in SHAPES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(tmp_path / "out", reference["float32 all"])


# Memory.

_MEASURED = """
import sys
from sharded_phema.rebuild import reconstruct
for root in sys.argv[3:]:
    reconstruct(root, ["0.1"], out=f"{sys.argv[1]}/{root.rpartition('/')[2]}", memory=sys.argv[2], tolerance="exact",
                movement="constant")
    status = open("/proc/self/status").read()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
"""


def test_memory_stays_within_the_budget_and_does_not_grow_with_the_number_of_snapshots(tmp_path) -> None:
    # Oracle: the system's own count, of runs of 160, 480 and 400 MiB: many small snapshots, and a large model.
    budget = 80 << 20
    for name, snapshots, numel in (("few", 20, 2 << 20), ("many", 60, 2 << 20), ("large", 2, 50 << 20)):
        root, shape = tmp_path / name, (numel // 4096, 4096)
        division = Division((shape,), ([((whole(shape),), 0)],))
        values = np.random.default_rng(0).standard_normal(numel, np.float32).reshape(shape)
        new_run(root, division, labels=("power:gamma=6",))
        new_session(root, division)
        with mock.patch("builders.squared_norms", lambda layouts: ((), ())):
            for number in range(snapshots):
                store(root, division, {"power:gamma=6": [values]}, t=number + 1.0, number=number)
    del values
    roots = [tmp_path / name for name in ("few", "many", "large")]
    words = [sys.executable, "-c", _MEASURED, tmp_path / "out", str(budget), *roots]
    done = subprocess.run(
        [*map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    few, many, large = (1024 * int(word) for word in done.stdout.split())
    for path in (*roots, tmp_path / "out"):
        shutil.rmtree(path)
    assert large < budget + (300 << 20)
    # What is read together is 16 averages at most; records and digests of 40 snapshots more are small.
    assert many - few < 16 << 20
    assert large - many < 32 << 20, "as the model of 8 MiB, and not of 200"


# Damage.


def spoil(snapshot: Any, where: float) -> None:
    """Flip a bit in the numbers of a rank's file, which no length and no header tells."""
    path = sorted(Path(snapshot.where).glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int(where * (len(data) - header - 1))] ^= 16
    path.write_bytes(data)


@pytest.fixture
def damaged(tmp_path) -> SimpleNamespace:
    """A run with a snapshot that turns out damaged when it is read, and what the others give."""
    root = Path(stored(tmp_path / "run", rows(3)))
    rebuilt(root, tmp_path / "whole")
    victim = open_run(root).snapshots[3]
    name = Path(victim.name).name
    rebuilt(root, tmp_path / "less", leave_out=[name])
    assert listing(tmp_path / "less") != listing(tmp_path / "whole")
    less = listing(tmp_path / "less")
    shutil.rmtree(tmp_path / "less")
    shutil.rmtree(tmp_path / "whole")
    spoil(victim, 0.7)
    return SimpleNamespace(root=root, name=name, less=less, victim=victim)


def models_of(files: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """Without the recipe, which says why something was left out."""
    return {name: data for name, data in files.items() if not name.endswith("phema.json")}


def test_a_snapshot_that_turns_out_damaged_is_left_out_and_strict_refuses(damaged, tmp_path, monkeypatch) -> None:
    # Oracle: the same run told to leave that snapshot out.
    slices(monkeypatch, SLICES)
    with pytest.raises(StoreError, match="is damaged between bytes") as caught:
        rebuilt(damaged.root, tmp_path / "out", strict=True)
    assert damaged.name in caught.value.message and caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    plan = rebuilt(damaged.root, tmp_path / "out")
    assert [Path(lost.name).name for lost in plan.left_out] == [damaged.name]
    assert models_of(listing(tmp_path / "out")) == models_of(damaged.less)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    done = run(*command(damaged.root, tmp_path / "strict", "--strict"))
    assert done.returncode == 1 and "is damaged between bytes" in done.stderr and not (tmp_path / "strict").exists()


def test_workers_of_their_own_refuse_damage_and_go_on_when_told_to_leave_it_out(damaged, tmp_path, monkeypatch) -> None:
    # They cannot tell each other what they found: what one leaves out, all must.
    slices(monkeypatch, SLICES)
    codes = [run(*command(damaged.root, tmp_path / "out", "--worker", i, "--workers", 3)) for i in range(3)]
    assert sum(done.returncode for done in codes) == 1
    (failed,) = [done for done in codes if done.returncode]
    assert damaged.name in failed.stderr and "leave the snapshot out" in failed.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run", ".out.partial"}, "what others have done stays"
    less = ["--leave-out", damaged.name, "--workers", 3]
    refused = run(*command(damaged.root, tmp_path / "out", *less, "--worker", 0))
    assert refused.returncode == 1 and "to make something else" in refused.stderr and "--force" in refused.stderr
    for worker in range(3):
        done = run(*command(damaged.root, tmp_path / "out", *less, "--worker", worker, "--force"))
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    assert listing(tmp_path / "out") == damaged.less


def test_a_snapshot_that_the_disk_does_not_give_back_is_left_out_too(damaged, tmp_path, monkeypatch) -> None:
    # A bad sector of the run is no full disk under the output: nobody goes on from there.
    shutil.rmtree(damaged.root)
    stored(damaged.root, rows(3))
    real = os.preadv

    def preadv(descriptor: int, *args: Any) -> int:
        if damaged.name in os.readlink(f"/proc/self/fd/{descriptor}") and args[1] > 100_000:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, *args)

    slices(monkeypatch, SLICES)
    monkeypatch.setattr(os, "preadv", preadv)
    plan = rebuilt(damaged.root, tmp_path / "out")
    assert [Path(lost.name).name for lost in plan.left_out] == [damaged.name]
    assert models_of(listing(tmp_path / "out")) == models_of(damaged.less)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def full_disk(root: str, out: str, rank: int) -> tuple[str, bool]:
    """What two ranks raise where the disk of one is full, and whether what they made is kept."""
    with pytest.MonkeyPatch.context() as patch:
        slices(patch, SLICES)
        real, calls = os.pwrite, iter(range(100))

        def pwrite(*args: Any) -> int:
            if next(calls, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        if torch.distributed.get_rank() == rank:
            patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutputError, match="No space left on device") as caught:
            rebuilt(root, Path(out))
    torch.distributed.barrier()
    kept = (Path(out).parent / f".{Path(out).name}.partial").is_dir()
    torch.distributed.barrier()
    with pytest.MonkeyPatch.context() as patch:
        slices(patch, SLICES)
        rebuilt(root, Path(out))
    return caught.value.hint, kept


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_on_any_rank_keeps_what_was_made(world, reference, tmp_path, rank) -> None:
    for hint, kept in run_ranks(2, full_disk, str(world("one")), str(tmp_path / "out"), rank):
        assert kept and "goes on where it stopped" in hint
    assert_same(tmp_path / "out", reference["float32 all"])


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_is_full_is_one_error_and_the_same_call_goes_on(
    world, reference, tmp_path, monkeypatch, call
) -> None:
    slices(monkeypatch, SLICES)
    real, calls = getattr(os, call), iter(range(300 if call == "pwrite" else 40))

    def fail(*args: Any) -> Any:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OutputError, match="No space left on device") as caught:
            rebuilt(world("one"), tmp_path / "out")
    assert "goes on where it stopped" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    rebuilt(world("one"), tmp_path / "out")
    assert_same(tmp_path / "out", reference["float32 all"])


# Whole models.


class Mixed(nn.Module):
    """Averaged, left-out, frozen and counted tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(37, 29)
        self.mlp = nn.Linear(29, 31)
        self.head = nn.Linear(31, 7)
        self.base = nn.Parameter(torch.randn(11, 13).to(torch.bfloat16), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("running", torch.zeros(19))

    @torch.no_grad()
    def step(self) -> None:
        for param in (p for p in self.parameters() if p.requires_grad):
            param += 0.1 * torch.randn_like(param)
        self.count += 1
        self.running += torch.randn(19)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    torch.manual_seed(2)
    root, model, states = tmp_path_factory.mktemp("mixed") / "ema", Mixed(), {}
    with PostHocEMA(model, root, snapshot_every=10, exclude=["head.*"]) as ema:
        for t in range(1, 81):
            model.step()
            ema.update(t)
            states[t] = {name: value.clone() for name, value in model.state_dict().items()}
    return SimpleNamespace(root=root, states=states)


@pytest.mark.parametrize("format", ["safetensors", "dcp"])
def test_several_times_per_tensor_targets_and_the_rest_of_the_model_come_out_alike_in_workers(
    mixed, tmp_path, monkeypatch, format
) -> None:
    # Oracle: one process; and the model's own state as of the snapshot at or before each target's time.
    targets: list[Any] = ["0.1", "0.1@t=35", "0.2@t=50", {"attn.*": 0.07, "*": "window:0.3"}]
    options: dict[str, Any] = {"format": format, "dtype": "bfloat16"}
    plan = reconstruct(mixed.root, targets, out=tmp_path / "one", **options)
    monkeypatch.setattr(grid, "BLOCK", 100)
    monkeypatch.setattr(work, "CHECKPOINT", 1)
    for worker in (2, 0, 3, 1):
        reconstruct(mixed.root, targets, out=tmp_path / "many", worker=worker, workers=4, **options)
    one, many = listing(tmp_path / "one"), listing(tmp_path / "many")
    assert one.keys() == many.keys()
    if format == "dcp":  # its metadata names the moment and the host
        one, many = ({k: v for k, v in files.items() if not k.endswith(".metadata")} for files in (one, many))
    assert one == many
    if format == "dcp":
        return
    seen = []
    for output in plan.outputs:
        latest = max(plan.targets[index].t for index in output.choice)
        state = mixed.states[int(latest) // 10 * 10]
        found = tensors_of(tmp_path / "many" / output.output.slug)
        assert found.keys() == state.keys()
        for name in ("count", "running", "base"):
            assert same_bits(found[name], state[name])
        assert same_bits(found["head.weight"], state["head.weight"].bfloat16())
        seen.append(found["attn.weight"])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


# Beside a model of Hugging Face.


def test_beside_the_configuration_of_a_model_the_output_opens_with_from_pretrained(tmp_path, monkeypatch) -> None:
    # Oracle: the output's own tensors, and the average by hand: coefficients times what snapshots hold.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=101, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with PostHocEMA(model, tmp_path / "run", snapshot_every=2) as ema:
        for step in range(8):
            tokens = torch.randint(0, 101, (4, 16), generator=torch.Generator().manual_seed(step))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    for name, limit in (("one", "5GB"), ("shards", "50KB")):
        plan = reconstruct(
            tmp_path / "run", ["0.1"], out=tmp_path / name, like=tmp_path / "model", max_shard_size=limit
        )
        folder = tmp_path / name / "0.1"
        files = {path.name for path in folder.iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json", "phema.json"} <= files
        assert ("model.safetensors.index.json" in files) == (name == "shards")
        assert (len([file for file in files if file.endswith(".safetensors")]) > 1) == (name == "shards")
        assert (folder / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()
        opened, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        found = dict(opened.named_parameters())
        assert opened.lm_head.weight.data_ptr() == opened.transformer.wte.weight.data_ptr(), "tied as before"
        wanted = by_hand(plan)
        assert found.keys() == wanted.keys()
        written = tensors_of(folder)
        for key, value in found.items():
            assert same_bits(value.detach(), written[key])
            torch.testing.assert_close(value.detach(), wanted[key], rtol=1e-5, atol=1e-6)
        assert not torch.equal(found["transformer.wte.weight"], model.transformer.wte.weight)
        with torch.no_grad():
            assert opened(input_ids=tokens).logits.isfinite().all()


def test_beside_a_model_of_diffusers_the_files_have_the_names_that_it_looks_for(tmp_path, monkeypatch) -> None:
    # Oracle: the output's own tensors.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    model = diffusers.UNet2DModel(8, 1, 1, layers_per_block=1, norm_num_groups=4, add_attention=False, **blocks)
    with PostHocEMA(model, tmp_path / "run", snapshot_every=2) as ema:
        for _ in range(4):
            with torch.no_grad():
                for param in model.parameters():
                    param += 0.1 * torch.randn_like(param)
            ema.update()
    model.save_pretrained(tmp_path / "pipeline" / "unet")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    for name, limit in (("one", "5GB"), ("shards", "5KB")):
        like = tmp_path / "pipeline" / "unet"
        reconstruct(tmp_path / "run", ["0.1"], out=tmp_path / name, like=like, max_shard_size=limit)
        opened, report = diffusers.UNet2DModel.from_pretrained(tmp_path / name / "0.1", output_loading_info=True)
        assert not any(report.values()), report
        written = tensors_of(tmp_path / name / "0.1")
        assert all(same_bits(value, written[key]) for key, value in opened.state_dict().items())
        assert not torch.equal(opened.conv_in.weight, model.conv_in.weight)
    with pytest.raises(OutputError, match="found a pipeline") as caught:
        reconstruct(tmp_path / "run", ["0.1"], out=tmp_path / "no", like=tmp_path / "pipeline")
    assert "unet" in caught.value.hint


def by_hand(plan: Plan) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for source, (weight,) in zip(plan.sources, plan.coefficients.tolist(), strict=True):
        for index, parameter in enumerate(plan.run.record.parameters):
            values = source.snapshot.read_flat(source.average, index, 0, math.prod(parameter.shape)).astype(np.float64)
            part = torch.from_numpy(weight * values).view(parameter.shape)
            total[parameter.name] = total.get(parameter.name, torch.zeros(parameter.shape, dtype=torch.float64)) + part
    return {name: value.float() for name, value in total.items()}


def test_what_is_no_model_or_another_one_is_refused_and_nothing_is_written(world, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    header = json.dumps({"strange": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (other / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    before = listing(tmp_path)
    for like, words in ((tmp_path / "empty", "expected the folder of a model"), (other, "none of its 1 tensors")):
        with pytest.raises(OutputError, match=words) as caught:
            rebuilt(world("one"), tmp_path / "out", like=like)
        assert caught.value.hint
    (other / "model.safetensors").write_bytes(b"\xff" * 20)
    before = listing(tmp_path)
    with pytest.raises(OutputError, match="cannot be read"):
        rebuilt(world("one"), tmp_path / "out", like=other)
    assert listing(tmp_path) == before


# Wherever the run lies.


@pytest.mark.parametrize("protocol", ["memory", "s3"])
def test_a_run_behind_a_url_gives_the_same_bytes(world, reference, tmp_path, request, protocol) -> None:
    if protocol == "s3":
        request.getfixturevalue("store")
    name = uuid.uuid4().hex
    url = f"s3://{BUCKET}/{name}/ema" if protocol == "s3" else f"memory://{name}/ema"
    stored(url, rows(3))
    for worker in range(2):
        rebuilt(url, tmp_path / "out", worker=worker, workers=2)
    assert_same(tmp_path / "out", reference["float32 all"])
