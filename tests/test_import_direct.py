"""Reconstruction straight from foreign checkpoints: the bytes that an import would lead to, and no others written."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from builders import listing, no_flush, same_bits
from commands import run
from foreign import TIMES, kept, raw, states
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_cli import launch
from test_import_writing import Big, Killed, peak_of
from torch import nn

from sharded_phema import grid, sums, work
from sharded_phema.errors import ModelMismatch, StoreError
from sharded_phema.importers import Reading, dcp, direct, import_run, inplace, open_foreign, sample
from sharded_phema.importers.extent import Extent, Held, strided
from sharded_phema.layout import Box
from sharded_phema.load import load_into
from sharded_phema.rebuild import preview, reconstruct

TARGETS = ["window:0.3", "decay:linear:0.2@t=450", "0.12", {"0.*": "window:0.5", "*": "0.2"}]


@pytest.fixture(autouse=True, scope="module")
def quick_disk() -> Iterator[None]:
    with no_flush():
        yield


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges that begin and end anywhere inside of tensors, and blocks that are noted often."""
    monkeypatch.setattr(grid, "BLOCK", 101)
    monkeypatch.setattr(work, "CHECKPOINT", 2)
    monkeypatch.setattr(sums, "STRIP_BYTES", 4 * 37)
    monkeypatch.setattr(sums, "LEAST_STRIP", 1)
    monkeypatch.setattr(inplace, "PIECE", 29)


def mixed() -> dict[int, foreign.State]:
    """Numbers of four dtypes, and tensors of every size."""
    kinds = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    found = {}
    for t, state in raw(torch.float64).items():
        names = [name for name in state if state[name].dtype == torch.float64]
        found[t] = state | {name: state[name].to(kinds[i % 4]) for i, name in enumerate(names)}
        found[t] |= {
            "scalar": torch.tensor(t / 7),
            "none": torch.zeros(0, 3),
            "flags": torch.tensor([True, t % 60 == 0]),
        }
    return found


def turned_about() -> dict[int, foreign.State]:
    """Tensors that lie in their storage in other orders, in stretches, or once for many."""
    found = {}
    for t, state in raw().items():
        views = {
            "t": state["0.weight"].t(),
            "cut": state["3.weight"][1:11, ::3],
            "wide": state["0.bias"][:, None].expand(24, 5),
        }
        views |= {
            "far": state["3.weight"].reshape(-1)[::19],
            "cube": state["0.weight"].view(2, 3, 4, 12).permute(2, 0, 3, 1),
        }
        found[t] = views | {"plain": state["3.weight"]}
    return found


def two_widths(dtype: torch.dtype = torch.float32) -> dict[str, dict[int, foreign.State]]:
    return {
        width: kept(lambda step: (1.0 - 1.0 / step) ** (gamma + 1.0), TIMES, dtype)  # noqa: B023
        for width, gamma in (("0.050", 16.97), ("0.100", 6.94))
    }


def write_edm2(root: Path, dtype: torch.dtype) -> None:
    foreign.write_edm2(root, two_widths(dtype), kimg=lambda t: t)


def write_karras(root: Path) -> None:
    foreign.write_karras(root, two_widths().values(), "ema_model.", lambda t: t)


KARRAS = {"profiles": ("0.05", "0.1"), "update_every": 1.0}
SOURCES: dict[str, tuple[Callable[[Path], None], str, dict[str, Any]]] = {
    "hf": (lambda root: foreign.write_hf(root, raw(torch.bfloat16)), "hf", {}),
    "mixed hf": (lambda root: foreign.write_hf(root, mixed()), "hf", {}),
    "torch": (lambda root: foreign.write_torch(root, raw()), "torch", {}),
    "mixed torch": (lambda root: foreign.write_torch(root, mixed()), "torch", {"copy": ("*running*",)}),
    "strided torch": (lambda root: foreign.write_torch(root, turned_about()), "torch", {}),
    "nested": (lambda root: foreign.write_nested(root, raw()), "torch", {"key": "state.model", "prefix": "net_ema."}),
    "dcp": (lambda root: foreign.write_dcp(root, raw(torch.float16)), "dcp", {"key": "model"}),
    "mixed dcp": (lambda root: foreign.write_dcp(root, mixed()), "dcp", {"key": "model"}),
    "lightning": (lambda root: foreign.write_lightning(root, raw()), "lightning", {}),
    "edm2": (lambda root: write_edm2(root, torch.float32), "edm2", {}),
    "edm2 float16": (lambda root: write_edm2(root, torch.float16), "edm2", {"unit": "kimg"}),
    "ema-pytorch": (write_karras, "ema-pytorch", KARRAS),
    "torchtitan": (lambda root: foreign.write_torchtitan(root, raw()), "torchtitan", {"profiles": ("0.1",)}),
}


def rebuilt_files(out: Path) -> dict[str, Any]:
    """What an output holds, but for the identity of the run."""
    found: dict[str, Any] = {}
    for name, data in listing(out).items():
        found[name] = {**json.loads(data), "run": ""} if data and name.endswith("phema.json") else data
    return found


def targets_of(name: str) -> list[Any]:
    """Targets that a source has parameters and times for."""
    whole = [target for target in TARGETS if isinstance(target, str)]
    if name == "edm2":
        return ["window:0.3", "decay:linear:0.2@t=450560", "0.12"]
    weights = name.split()[-1] in ("hf", "torch", "dcp", "lightning", "nested")
    return [*(whole if name == "strided torch" else TARGETS), *(["checkpoint@t=240"] if weights else [])]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", SOURCES)
def test_the_bytes_are_those_that_an_import_leads_to(name, workers, short, tmp_path) -> None:
    # Oracle: the import, and what is rebuilt from that run folder.
    write, format, how = SOURCES[name]
    write(tmp_path / "source")
    targets = targets_of(name)
    imported = import_run(tmp_path / "source", tmp_path / "run", format=format, reading=Reading(**how))
    reconstruct(imported.root.url, targets, out=tmp_path / "two")
    before = listing(tmp_path)
    if workers:
        plans = [reconstruct_one(tmp_path, format, how, targets, (n, workers)) for n in range(workers)]
        assert [plan.summary.finished for plan in plans] == [False, True]  # type: ignore[union-attr]
    else:
        reconstruct_one(tmp_path, format, how, targets)
    assert rebuilt_files(tmp_path / "one") == rebuilt_files(tmp_path / "two")
    after = {file: data for file, data in listing(tmp_path).items() if Path(file).parts[0] != "one"}
    assert after == before, "nothing but the output is written"


def reconstruct_one(
    root: Path, format: str, how: dict[str, Any], targets: Sequence[Any], place: Any = (None, None)
) -> Any:
    opened = open_foreign(root / "source", format=format, reading=Reading(**how))
    return reconstruct(opened, targets, out=root / "one", worker=place[0], workers=place[1])


class Reads:
    """Bytes that are really read of each file while it lasts, once headers were."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, int] = {}
        real = Extent.stretches

        def stretches(extent: Extent, begins: Sequence[int], length: int) -> bytearray:
            self.found[str(extent.path)] = self.found.get(str(extent.path), 0) + len(begins) * length
            return real(extent, begins, length)

        patch.setattr(Extent, "stretches", stretches)


class Wide(nn.Module):
    """4 MB of numbers, so that headers are nothing beside them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.norm = nn.Linear(700, 900), nn.Linear(900, 400), nn.BatchNorm1d(400)


def write_wide(root: Path, times: Sequence[int] = range(10, 201, 10), order: Any = None) -> None:
    for t in times:
        state = {name: tensor.clone() for name, tensor in Wide(t).state_dict().items()}
        (root / f"checkpoint-{t}").mkdir(parents=True)
        save_file(state, root / f"checkpoint-{t}" / "model.safetensors")


def test_what_is_read_is_what_the_plan_says_and_nothing_of_sources_that_it_does_not_use(tmp_path, monkeypatch) -> None:
    # Oracle: the calls that read files.
    write_wide(tmp_path / "source")
    opened = open_foreign(tmp_path / "source", format="hf")
    reads = Reads(monkeypatch)
    words = ("window:0.2@t=150", "--from", "hf", "--tolerance", "0.5", "--json")
    done = run("reconstruct", tmp_path / "source", *words, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    headers, told = dict(reads.found), json.loads(done.stdout)
    assert not (tmp_path / "out").exists() and len(headers) == 20 and max(headers.values()) < 2000
    reads.found.clear()
    plan = reconstruct(opened, ["window:0.2@t=150"], out=tmp_path / "out", tolerance=0.5)
    assert plan.summary is not None and plan.summary.read == told["bytes_to_read"]
    assert plan.bytes_to_read == len(plan.sources) * 4 * opened.numel == told["bytes_to_read"] - 8
    buffers = opened.snapshots[plan.snapshot_of(plan.outputs[0])]
    used = {f"{snapshot.where}/model.safetensors" for snapshot in (buffers, *(s.snapshot for s in plan.sources))}
    assert 1 < len(used) < 20 and reads.found.keys() == used
    assert 0 <= sum(reads.found.values()) - plan.summary.read < 2 * sum(headers.values())


def test_two_workers_read_a_half_each(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(grid, "BLOCK", 1 << 14)
    write_wide(tmp_path / "source", range(10, 41, 10))
    plans = []
    for worker in range(2):
        opened = open_foreign(tmp_path / "source")
        plans.append(reconstruct(opened, ["window:0.5"], out=tmp_path / "out", worker=worker, workers=2))
    whole = plans[0].bytes_to_read
    assert all(plan.summary is not None and plan.summary.read < 0.6 * whole for plan in plans)


def test_bytes_of_mixed_dtypes_are_counted_as_they_lie(short, tmp_path) -> None:
    foreign.write_torch(tmp_path / "source", mixed())
    opened = open_foreign(tmp_path / "source", format="torch")
    state = mixed()[TIMES[0]]
    width = sum(state[p.name].nbytes for p in opened.record.parameters)
    plan = reconstruct(opened, ["window:0.3"], out=tmp_path / "out")
    raw_bytes = sum(state[tensor.name].nbytes for tensor in opened.record.raw)
    assert opened.record.dtype == "float32" and plan.bytes_to_read == len(plan.sources) * width
    assert plan.summary is not None and plan.summary.read == plan.bytes_to_read + raw_bytes
    prepared = preview(opened, ["window:0.3"], out=tmp_path / "two")
    assert prepared.division.read.sum() == plan.summary.read


def peak_of_rebuilding(source: Path, format: str, memory: str) -> int:
    """The second time: modules that are loaded when they are needed are none of the budget."""

    def rebuild(out: Path) -> None:
        opened = open_foreign(source, format=format)
        with no_flush():
            reconstruct(opened, ["window:0.9"], out=out, memory=memory, tolerance="exact")

    rebuild(source.parent / "first")
    shutil.rmtree(source.parent / "first")
    return peak_of(lambda: rebuild(source.parent / "out"))


@pytest.mark.parametrize("kind", ["hf", "dcp", "transposed", "legacy"])
def test_memory_stays_within_the_buffers_however_large_a_tensor_is(kind, tmp_path) -> None:
    # Oracles: the operating system, which sees a copy of a tensor of 64 MB; and the mean of what is all the same.
    state, source = dict(Big().state_dict()), tmp_path / "source"
    first = source / "checkpoint-1" if kind in ("hf", "dcp") else source
    first.mkdir(parents=True)
    if kind == "hf":
        save_file(state, first / "model.safetensors")
    elif kind == "dcp":
        foreign.save_dcp(state, first)
    else:
        turned = {**state, "big.weight": state["big.weight"].t()} if kind == "transposed" else state
        torch.save(turned, first / "m_1.pt", _use_new_zipfile_serialization=kind == "transposed")
    for t in range(2, 5):
        if first == source:
            os.link(first / "m_1.pt", first / f"m_{t}.pt")
        else:
            shutil.copytree(first, source / f"checkpoint-{t}", copy_function=os.link)
    format = {"hf": "hf", "dcp": "dcp"}.get(kind, "torch")
    (peak,) = run_ranks(1, peak_of_rebuilding, source, format, "66MiB" if kind == "hf" else "1GiB")
    assert peak < 32 << 20
    found = load_file(tmp_path / "out" / "window-0.9" / "model.safetensors")
    for name, tensor in state.items():
        expected = tensor.t() if (kind, name) == ("transposed", "big.weight") else tensor
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-8)  # four products, rounded


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def without(root: Path, name: str, format: str, targets: Sequence[str]) -> dict[str, Any]:
    """What is rebuilt of an import of all checkpoints but one."""
    (root / "source" / name).rename(root / "aside")
    imported = import_run(root / "source", root / "run", format=format)
    reconstruct(imported.root.url, targets, out=root / "two")
    (root / "aside").rename(root / "source" / name)
    return rebuilt_files(root / "two")


def numbers_of(files: Mapping[str, Any]) -> dict[str, Any]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(("format", "name"), [("hf", "checkpoint-420"), ("torch", "step_420.pt"), ("dcp", "step-420")])
def test_a_checkpoint_that_was_cut_short_is_left_out_or_refused(format, name, short, tmp_path) -> None:
    # Oracle: the others alone.
    write = {"hf": foreign.write_hf, "torch": foreign.write_torch, "dcp": foreign.write_dcp}[format]
    write(tmp_path / "source", raw())
    expected = without(tmp_path, name, format, ["window:0.3"])
    path = tmp_path / "source" / name
    truncate(next(iter(path.glob("*.safetensors")), next(iter(path.glob("*.distcp")), path)))
    words = ("window:0.3", "--from", format, "--out", tmp_path / "one")
    refused = run("reconstruct", tmp_path / "source", *words, "--strict")
    assert refused.returncode == 1 and f"error: {name} is damaged: " in refused.stderr
    assert not (tmp_path / "one").exists()
    done = run("reconstruct", tmp_path / "source", *words)
    assert done.returncode == 0 and f"{name}" in done.stderr and "left out" in done.stderr, done.stderr
    assert numbers_of(rebuilt_files(tmp_path / "one")) == numbers_of(expected)
    recipe = json.loads((tmp_path / "one" / "window-0.3" / "phema.json").read_text())
    assert recipe["left_out"][0]["snapshot"] == name and recipe["forecast"] > recipe["forecast_before"]
    named = run("reconstruct", tmp_path / "source", *words, "--force", "--leave-out", name)
    assert named.returncode == 0, named.stderr


@pytest.mark.parametrize("harm", ["truncated", "changed", "removed"])
def test_a_checkpoint_that_fails_while_it_is_read_is_left_out(harm, short, tmp_path) -> None:
    # A trainer may remove old checkpoints meanwhile, or write over one.
    foreign.write_hf(tmp_path / "source", raw())
    expected = without(tmp_path, "checkpoint-420", "hf", ["window:0.3"])
    opened = open_foreign(tmp_path / "source")
    path = tmp_path / "source" / "checkpoint-420" / "model.safetensors"
    victim = next(snapshot for snapshot in opened.snapshots if snapshot.t == 420.0)
    assert victim.read_flat(0, 0, 0, 5).shape == (5,)  # its headers were read
    if harm == "truncated":
        truncate(path)
    elif harm == "changed":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    else:
        path.unlink()
    with pytest.raises(StoreError, match="checkpoint-420"):
        reconstruct(opened, ["window:0.3"], out=tmp_path / "one", strict=True)
    assert not (tmp_path / "one").exists() and not (tmp_path / ".one.partial").exists()
    plan = reconstruct(opened, ["window:0.3"], out=tmp_path / "one")
    assert [lost.name for lost in plan.left_out] == ["checkpoint-420"]
    assert re.search({"removed": "No such file"}.get(harm, "was changed while it was read"), plan.left_out[0].reason)
    assert numbers_of(rebuilt_files(tmp_path / "one")) == numbers_of(expected)


def test_where_no_checkpoint_can_be_read_the_first_failure_is_the_error(tmp_path) -> None:
    foreign.write_torch(tmp_path / "source", {t: raw()[t] for t in (30, 60)})
    for path in (tmp_path / "source").iterdir():
        truncate(path)
    with pytest.raises(StoreError, match=r"step_30\.pt"):
        open_foreign(tmp_path / "source")


def test_checkpoints_of_two_models_are_refused_before_anything_is_written(tmp_path) -> None:
    foreign.write_hf(tmp_path / "source", {30: states()[29], 60: {**states()[59], "0.bias": torch.zeros(25)}})
    before = listing(tmp_path)
    with pytest.raises(ModelMismatch, match=r"0.bias is float32 of shape \(25,\) in .*checkpoint-60"):
        open_foreign(tmp_path / "source")
    done = run("reconstruct", tmp_path / "source", "0.1", "--from", "hf", "--out", tmp_path / "new" / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: 0.bias is float32") and listing(tmp_path) == before


def stopped(after: int) -> Any:
    """A progress that is interrupted after some blocks."""

    def progress(sizes: Sequence[float], steps: Iterable[int]) -> Iterator[int]:
        for number in steps:
            if number == after:
                raise Killed
            yield number

    return progress


def test_what_was_killed_goes_on_where_it_stopped_as_long_as_the_files_are_the_same(short, tmp_path) -> None:
    # Oracle: the same, undisturbed.
    foreign.write_torch(tmp_path / "source", raw())
    reconstruct(open_foreign(tmp_path / "source"), TARGETS, out=tmp_path / "two")
    with pytest.raises(Killed):
        reconstruct(open_foreign(tmp_path / "source"), TARGETS, out=tmp_path / "one", progress=stopped(6))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "two", ".one.partial"}
    newest, before = tmp_path / "source" / "step_480.pt", (tmp_path / "source" / "step_480.pt").stat().st_mtime_ns
    os.utime(newest, ns=(0, before + 1))
    done = run("reconstruct", tmp_path / "source", *TARGETS[:3], "--from", "torch", "--out", tmp_path / "one")
    assert done.returncode == 1 and "is there to make something else" in done.stderr
    os.utime(newest, ns=(0, before))
    plan = reconstruct(open_foreign(tmp_path / "source"), TARGETS, out=tmp_path / "one")
    assert plan.summary is not None and plan.summary.read < 0.7 * plan.bytes_to_read
    assert rebuilt_files(tmp_path / "one") == rebuilt_files(tmp_path / "two")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "two", "one"}


def test_under_torchrun_every_process_reads_its_own_part(tmp_path) -> None:
    # Oracle: one process; edm2 has two averages, whose norms the first process tells the others.
    write_edm2(tmp_path / "source", torch.float32)
    words = ("0.12", "window:0.3", "--from", "edm2", "--json", "--out")
    alone = run("reconstruct", tmp_path / "source", *words, tmp_path / "two")
    done = launch("reconstruct", tmp_path / "source", *words, tmp_path / "one", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("three decimals") == alone.stderr.count("three decimals") == 1
    told = json.loads(done.stdout)
    assert told["workers"] == 2 and told["read"] == json.loads(alone.stdout)["read"]
    assert rebuilt_files(tmp_path / "one") == rebuilt_files(tmp_path / "two")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "one", "two"}


@pytest.mark.parametrize("name", SOURCES)
def test_every_number_can_be_read_as_from_a_run_folder(name, short, tmp_path) -> None:
    # Oracle: the import.
    write, format, how = SOURCES[name]
    write(tmp_path / "source")
    imported = import_run(tmp_path / "source", tmp_path / "run", format=format, reading=Reading(**how))
    opened = open_foreign(tmp_path / "source", format=format, reading=Reading(**how))
    assert [(s.t, s.start) for s in opened.snapshots] == [(s.t, s.start) for s in imported.snapshots]
    assert opened.record.averages == imported.record.averages and opened.record.parameters == imported.record.parameters
    for one, two in zip(opened.snapshots[::7], imported.snapshots[::7], strict=True):
        one.check()
        if len(one.record.averages) > 1:
            assert (one.norms, one.gaps) == (two.norms, two.gaps)
        for index, parameter in enumerate(one.record.parameters):
            for average in range(len(one.record.averages)):
                found = [s.read_flat(average, index, 0, math.prod(parameter.shape)) for s in (one, two)]
                np.testing.assert_array_equal(*found)
                box = Box(tuple(min(n, 1) for n in parameter.shape), tuple(max(n - 1, 0) for n in parameter.shape))
                np.testing.assert_array_equal(*(s.read_box(average, index, box) for s in (one, two)))
        for index, tensor in enumerate(one.record.raw):
            assert same_bits(*(s.read_raw(index, 0, math.prod(tensor.shape)) for s in (one, two)))


def test_a_live_model_is_loaded_from_checkpoints_too(tmp_path) -> None:
    foreign.write_hf(tmp_path / "source", raw())
    model = foreign.tiny()
    load_into(model, "checkpoint@t=240", open_foreign(tmp_path / "source"))
    assert all(same_bits(tensor, raw()[240][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("format", ["hf", "torch", "dcp"])
def test_one_checkpoint_alone_is_a_run_too(format, tmp_path) -> None:
    write = {"hf": foreign.write_hf, "torch": foreign.write_torch, "dcp": foreign.write_dcp}[format]
    write(tmp_path / "source", {30: raw()[30]})
    name = {"hf": "", "torch": "step_30.pt", "dcp": "step-30"}[format]
    opened = open_foreign(tmp_path / "source" / name, format=format)
    assert opened.snapshots[0].where == str(tmp_path / "source" / (name or "checkpoint-30"))
    reconstruct(opened, ["checkpoint"], out=tmp_path / "out")


def test_norms_of_a_large_model_are_what_a_sample_of_it_comes_to(tmp_path, monkeypatch) -> None:
    # Oracle: all of it; a sample of a third scatters by some percent.
    write_edm2(tmp_path / "source", torch.float32)
    whole = open_foreign(tmp_path / "source")
    monkeypatch.setattr(sample, "SAMPLE", 250)
    some = open_foreign(tmp_path / "source")
    for one, two in zip(some.snapshots, whole.snapshots, strict=True):
        assert one.norms != two.norms and one.norms == pytest.approx(two.norms, rel=0.3)
        assert one.gaps == pytest.approx(two.gaps, rel=0.5)


def test_numbers_that_do_not_fit_the_dtype_are_an_error(tmp_path) -> None:
    (tmp_path / "source").mkdir()
    for t, largest in ((1, 1e300), (2, math.inf)):
        torch.save({"w": torch.tensor([1.0, largest], dtype=torch.float64)}, tmp_path / "source" / f"m_{t}.pt")
    opened = open_foreign(tmp_path / "source")
    with pytest.raises(StoreError, match=r"magnitude 1e\+300 does not fit float32"):
        opened.snapshots[0].read_flat(0, 0, 0, 2)
    assert opened.snapshots[1].read_flat(0, 0, 0, 2)[1] == math.inf


def test_averages_that_begin_after_their_checkpoint_are_left_out(tmp_path) -> None:
    foreign.write_nested(tmp_path / "source", raw())
    how: dict[str, Any] = {"key": "state.model", "prefix": "net_ema.", "start": 40.0, "profiles": ("0.1",)}
    opened = open_foreign(tmp_path / "source", format="torch", reading=Reading(**how))
    assert [lost.name for lost in opened.damaged] == ["iter_000000030.pt"] and opened.snapshots[0].t == 60.0


@given(st.data())
def test_any_range_of_pieces_in_rows_and_columns_is_read_and_little_else(data) -> None:
    # Oracle: the whole tensor. What is read is at most the rows of a piece between the first and the last number.
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    dim = data.draw(st.integers(0, len(shape) - 1))
    cut = data.draw(st.integers(0, shape[dim]))
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    with tempfile.TemporaryDirectory() as folder:
        chunks = []
        for number, (begin, end) in enumerate([(0, cut), (cut, shape[dim])]):
            piece, path = whole.narrow(dim, begin, end - begin).contiguous(), Path(folder) / f"{number}.distcp"
            torch.save(piece, path)
            offsets = tuple(begin if axis == dim else 0 for axis in range(len(shape)))
            chunks.append((Box(offsets, tuple(piece.shape)), Extent.whole(path)))
        start = data.draw(st.integers(0, whole.numel()))
        stop = data.draw(st.integers(start, whole.numel()))
        found = dcp._read("w", shape, "float32", chunks, start, stop)
    assert same_bits(found, whole.reshape(-1)[start:stop])


@given(st.data())
def test_any_range_of_a_tensor_in_any_order_is_read_and_little_else(data) -> None:
    # Oracle: torch's own view.
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    strides = tuple(data.draw(st.integers(0, 40)) for _ in sizes)
    offset = data.draw(st.integers(0, 9))
    base = torch.arange(offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1, dtype=torch.int32)
    view = base.as_strided(sizes, strides, offset)
    start = data.draw(st.integers(0, view.numel()))
    stop = data.draw(st.integers(start, view.numel()))
    wanted = torch.tensor(view.reshape(-1)[start:stop].tolist(), dtype=torch.int32)
    held = strided(Held(Path("x"), base.numpy().tobytes()), "int32", offset, sizes, strides)
    assert same_bits(held.read(start, stop), wanted)
    with tempfile.NamedTemporaryFile() as file:
        file.write(base.numpy().tobytes())
        file.flush()
        with pytest.MonkeyPatch.context() as patch:
            reads = Reads(patch)
            lazy = strided(Extent.whole(Path(file.name)), "int32", offset, sizes, strides)
            assert same_bits(lazy.read(start, stop), wanted)
    assert sum(reads.found.values()) <= 8 * 4 * (stop - start)


def test_one_row_that_is_most_of_a_tensor_is_read_in_parts(tmp_path, monkeypatch) -> None:
    foreign.save_dcp({"w": torch.ones(2, 500_000)}, tmp_path / "step-1")
    opened = open_foreign(tmp_path, format="dcp")
    opened.snapshots[0].read_flat(0, 0, 0, 10)
    reads = Reads(monkeypatch)
    opened.snapshots[0].read_flat(0, 0, 250_000, 250_100)
    assert sum(reads.found.values()) < 1000


def test_processes_that_see_other_files_are_an_error_and_what_one_cannot_read_none_does(tmp_path, monkeypatch) -> None:
    # Oracle: what a second process would say, put into its mouth.
    foreign.write_hf(tmp_path / "source", raw())
    monkeypatch.setattr(direct, "gather", lambda mine: [mine, ("another", *mine[1:])])
    with pytest.raises(StoreError, match="processes found other checkpoints there"):
        open_foreign(tmp_path / "source")
    where = str(tmp_path / "source" / "checkpoint-60")
    monkeypatch.setattr(direct, "gather", lambda mine: [mine, (mine[0], {where: "bad disk"}, mine[2])])
    opened = open_foreign(tmp_path / "source")
    assert [(lost.name, lost.reason) for lost in opened.damaged] == [("checkpoint-60", "bad disk")]
    assert len(opened.snapshots) == len(TIMES) - 1


def test_a_run_is_the_same_however_its_folder_is_spelled_and_wherever_it_lies(tmp_path, monkeypatch) -> None:
    foreign.write_hf(tmp_path / "source", raw())
    one = open_foreign(tmp_path / "source")
    monkeypatch.chdir(tmp_path / "source")
    assert open_foreign(".").record == one.record and open_foreign("../source").snapshots[0].name == "checkpoint-30"
    (tmp_path / "source").rename(tmp_path / "moved")
    assert open_foreign(tmp_path / "moved").record == one.record
    os.utime(tmp_path / "moved" / "checkpoint-30" / "model.safetensors")
    assert open_foreign(tmp_path / "moved").record.run != one.record.run
