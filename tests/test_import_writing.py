"""Bringing runs along: bounded memory, interruptions, mixtures, and the command line."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import foreign
import pytest
import torch
from builders import listing, no_flush, same_bits
from commands import run
from foreign import raw, states
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import nn

from sharded_phema.errors import ModelMismatch, OrderError, OutputError, StoreError
from sharded_phema.folder import open_folder
from sharded_phema.importers.agreement import Model
from sharded_phema.importers.bringing import import_run, reading_of
from sharded_phema.importers.contract import Reading
from sharded_phema.importers.portions import empty_shards, portions
from sharded_phema.importers.writing import NOTE
from sharded_phema.layout import tally, whole
from sharded_phema.manifest import Parameter, RawTensor, RunRecord
from sharded_phema.store import claim_run, open_run
from sharded_phema.tensorfile import torch_dtype

shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@given(st.lists(shapes, min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 400), st.booleans())
def test_portions_hold_every_element_once_and_fit_the_budget(several, averages, budget, half) -> None:
    dtype = "float16" if half else "float32"
    parameters = tuple(Parameter(f"p{i}", shape) for i, shape in enumerate(several))
    raw_tensor = RawTensor("n", (3,), "int64", "buffer")
    dtypes = {p.name: dtype for p in parameters} | {"n": "int64"}
    model = Model(tuple(map(str, range(averages))), dtype, parameters, (raw_tensor,), dtypes)
    parts = portions(model, budget)
    largest = max(averages * torch_dtype(dtype).itemsize, 8)  # one element of each average at least
    assert all(part.nbytes <= max(budget, largest) for part in parts)
    assert all(part.nbytes for part in parts)
    layouts = [(*a, *b) for a, b in (empty_shards(model, part) for part in parts)]
    for index, shape in enumerate([*several, (3,)]):
        boxes = [box for layout in layouts for box in layout[index].boxes]
        assert sum(box.numel for box in boxes) == math.prod(shape) and tally(boxes) == tally([whole(shape)])


def peak_of(act: Callable[[], object]) -> int:
    """Most bytes that lay in memory at once while something was done, beyond those before."""

    def bytes_of(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the most begins anew
    before = bytes_of("VmRSS")
    act()
    return bytes_of("VmHWM") - before


def peak_of_import(source: Path, folder: Path, name: str) -> int:
    """Of a second import: modules that are loaded when they are needed are none of the budget.

    In a process of its own: in one that has done much else before, holes in memory are filled or not, as it happens.
    """

    def bring(run: str) -> None:
        with no_flush():
            import_run(source, folder / run, format=name, memory="16MiB")

    bring("first")
    return peak_of(lambda: bring("run"))


class Big(nn.Module):
    """72 MB, most of it in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.big, self.other = nn.Linear(4000, 4000), nn.Linear(1000, 2000)


@pytest.mark.parametrize("format", ["torch", "legacy", "hf", "edm2", "dcp"])
def test_memory_stays_within_the_budget_however_large_a_checkpoint_is(format, tmp_path) -> None:
    # Oracle: the operating system, which sees a copy of the model; and the numbers, bit for bit.
    model = Big()
    state, source = dict(model.state_dict()), tmp_path / "checkpoint-0000001"
    source.mkdir()
    if format == "edm2":
        foreign.write_pickle(source / "net-0000001-0.050.pkl", {"ema": foreign.as_edm2(model)})
    elif format == "hf":
        save_file(state, source / "model.safetensors")
    elif format == "dcp":
        foreign.save_dcp(state, source)
    else:
        torch.save(state, source / "m_1.pt", _use_new_zipfile_serialization=format == "torch")
    folder, name = tmp_path if format == "hf" else source, "torch" if format == "legacy" else format
    (peak,) = run_ranks(1, peak_of_import, folder, tmp_path, name)
    assert peak < 28 << 20
    found = open_run(tmp_path / "run")
    assert len(found.snapshots[0].facts.parts) > 10
    for index, parameter in enumerate(found.record.parameters):
        numbers = found.snapshots[0].read_flat(0, index, 0, math.prod(parameter.shape))
        assert same_bits(torch.from_numpy(numbers).view(parameter.shape), state[parameter.name])


def test_the_measure_sees_a_copy_of_a_model() -> None:
    assert peak_of(lambda: torch.ones(16 << 20)) >= 60 << 20


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_in_any_order_of_rows_and_columns_are_read_as_they_are(legacy, tmp_path) -> None:
    # Oracle: torch's own views, and its own way to store them.
    base = torch.randn(6, 8, 5)
    views = {"t": base[0].t(), "cut": base[1:4, ::2, 1:3], "wide": torch.randn(3, 1).expand(3, 4), "one": base[2, 3, 4]}
    views |= {"whole": base.permute(2, 0, 1), "same": base[0], "none": base[:0]}
    torch.save(views, tmp_path / "m_1.pt", _use_new_zipfile_serialization=not legacy)
    found = import_run(tmp_path, tmp_path / "run", format="torch", memory="100")
    for index, parameter in enumerate(found.record.parameters):
        numbers = found.snapshots[0].read_flat(0, index, 0, math.prod(parameter.shape))
        assert same_bits(torch.from_numpy(numbers).view(parameter.shape), views[parameter.name].contiguous())


class Killed(BaseException):
    """Stands for a signal."""


def until(step: int) -> Any:
    """A progress that is interrupted at a step."""

    def progress(sizes: Sequence[float], steps: Iterable[int]) -> Iterator[int]:
        for number in steps:
            if number == step:
                raise Killed
            yield number

    return progress


@pytest.mark.parametrize("step", [0, 1, 9, 31])
def test_an_interrupted_import_is_no_run_and_goes_on_where_it_stopped(step, tmp_path) -> None:
    # Oracle: the same import, undisturbed.
    foreign.write_hf(tmp_path / "source", raw())
    with no_flush():
        import_run(tmp_path / "source", tmp_path / "whole", memory="6KB")
        with pytest.raises(Killed):
            import_run(tmp_path / "source", tmp_path / "run", memory="6KB", progress=until(step))
    assert "is no run folder" in run("info", tmp_path / "run").stderr
    kept = {name: data for name, data in listing(tmp_path / "run").items() if name.endswith("snapshot.json")}
    with pytest.raises(OutputError, match="of other files, or with other options"), no_flush():
        import_run(tmp_path / "source", tmp_path / "run", memory="7KB")
    with no_flush():
        import_run(tmp_path / "source", tmp_path / "run", memory="6KB")
    after = listing(tmp_path / "run")
    assert after == listing(tmp_path / "whole") and NOTE not in after
    assert {name: after[name] for name in kept} == kept
    assert run("verify", tmp_path / "run").returncode == 0
    with pytest.raises(OutputError, match="a run lies there already"):
        import_run(tmp_path / "source", tmp_path / "run")


def test_what_lies_in_the_way_is_refused_and_left_alone(tmp_path) -> None:
    foreign.write_hf(tmp_path / "source", raw())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="is not empty"):
        import_run(tmp_path / "source", tmp_path / "run")
    assert (tmp_path / "run" / "mine").read_text() == "precious"


def test_two_imports_into_one_folder_at_once_are_refused(tmp_path) -> None:
    # The other one is alive: it is the parent of this process.
    foreign.write_hf(tmp_path / "source", raw())
    with pytest.raises(Killed):
        import_run(tmp_path / "source", tmp_path / "run", progress=until(3))
    identity = json.loads((tmp_path / "run" / NOTE).read_text())["importing"]
    with mock.patch.object(os, "getpid", os.getppid):
        claim_run(open_folder(tmp_path / "run"), RunRecord(identity, "steps", (), ()))
    with pytest.raises(OrderError, match="is training into this folder"):
        import_run(tmp_path / "source", tmp_path / "run")


def changed(**tensors: torch.Tensor) -> foreign.State:
    return {**states()[29], **tensors}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"0.weight": torch.zeros(24, 12)}, r"checkpoint-30 holds .*, .*checkpoint-60 does not \(8 tensors"),
        (changed(extra=torch.zeros(2)), "checkpoint-60 holds extra, .*checkpoint-30 does not"),
        (changed(**{"0.bias": torch.zeros(25)}), r"0.bias is float32 of shape \(25,\) in .*checkpoint-60"),
        (changed(**{"3.bias": torch.zeros(12).half()}), r"3.bias is float16 of shape \(12,\) in .*checkpoint-60"),
    ],
)
def test_checkpoints_of_two_models_are_refused_with_the_first_difference(state, message, tmp_path) -> None:
    foreign.write_hf(tmp_path / "source", {30: states()[29], 60: state})
    with pytest.raises(ModelMismatch, match=message) as caught:
        import_run(tmp_path / "source", tmp_path / "run")
    assert "two models" in caught.value.hint and not (tmp_path / "run").exists()


def test_two_checkpoints_of_one_time_are_refused(tmp_path) -> None:
    (tmp_path / "source").mkdir()
    for name in ("a_5.pt", "b_5.pt"):
        torch.save(states()[0], tmp_path / "source" / name)
    with pytest.raises(StoreError, match=r"a_5.pt and .*b_5.pt are both of training time 5"):
        import_run(tmp_path / "source", tmp_path / "run")


def test_names_without_a_time_and_dtypes_that_cannot_be_averaged_are_refused(tmp_path) -> None:
    (tmp_path / "source").mkdir()
    torch.save({"w": torch.zeros(3).to(torch.float8_e5m2), "b": torch.zeros(2)}, tmp_path / "source" / "last.pt")
    with pytest.raises(StoreError, match="expected a training time above 0 in the name 'last'"):
        import_run(tmp_path / "source", tmp_path / "run")
    how: dict[str, Any] = {"time_pattern": "[0-9"}
    with pytest.raises(StoreError, match="--time-pattern"):
        import_run(tmp_path / "source", tmp_path / "run", reading=Reading(**how))
    (tmp_path / "source" / "last.pt").rename(tmp_path / "source" / "m7.pt")
    with pytest.raises(StoreError, match="w is of float8_e5m2, which cannot be averaged") as caught:
        import_run(tmp_path / "source", tmp_path / "run")
    assert "--copy w" in caught.value.hint
    found = import_run(tmp_path / "source", tmp_path / "run", reading=Reading(copy=("w",)))
    assert [tensor.name for tensor in found.record.copied] == ["w"]


def test_numbers_that_are_not_finite_have_no_norms(tmp_path) -> None:
    (tmp_path / "source").mkdir()
    torch.save({"w": torch.tensor([1.0, math.inf]), "b": torch.ones(3)}, tmp_path / "source" / "m_1.pt")
    found = import_run(tmp_path / "source", tmp_path / "run", memory="32")
    assert found.snapshots[0].norms == () and len(found.snapshots[0].facts.parts) > 1


def test_the_command_line_imports_and_says_what_it_assumed(tmp_path) -> None:
    foreign.write_edm2(tmp_path / "source", {"0.100": raw()}, kimg=lambda t: t)
    done = run("import", tmp_path / "source", "-o", tmp_path / "run", "--unit", "kimg", "--json")
    assert done.returncode == 0, done.stderr
    assert "three decimals" in done.stderr and json.loads(done.stdout)["unit"] == "kimg"
    refused = run("import", tmp_path / "source", "-o", tmp_path / "run2", "--profile", "0.05")
    assert refused.returncode == 1 and "hint: leave --profile out" in refused.stderr
    words = ("import", tmp_path / "source", "--from", "torch", "-o", tmp_path / "run3", "--profile", "decay:linear:0.2")
    assert run(*words).stderr.startswith("error: target 'decay:linear:0.2': a decay cannot be tracked")


def test_reconstruct_from_checkpoints_reads_them_where_they_lie(tmp_path) -> None:
    # Oracle: the two steps, one after the other.
    foreign.write_nested(tmp_path / "source", raw())
    how = ("--key", "state.model", "--prefix", "net_ema.")
    assert run("import", tmp_path / "source", "--from", "torch", "-o", tmp_path / "run", *how).returncode == 0
    assert run("reconstruct", tmp_path / "run", "window:0.5", "--out", tmp_path / "two").returncode == 0
    words = [f"--reading={key}={value}" for key, value in (("key", "state.model"), ("prefix", "net_ema."))]
    done = run("reconstruct", tmp_path / "source", "window:0.5", "--from", "torch", *words, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / n / "window-0.5" / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and all(same_bits(one[key], two[key]) for key in one)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert before == ["one", "run", "source", "two"]
    for more, text in (
        (["nonsense"], "neither a width nor a kind"),
        (["0.1", "--reading", "colour=red"], "expected NAME=VALUE with one of"),
        (["0.1", "--reading", "start=soon"], "expected NAME=VALUE with one of"),
        (["0.1", "--leave-out", "x"], "holds no such snapshot"),
    ):
        failed = run("reconstruct", tmp_path / "source", *more, "--from", "torch", *words, "--out", tmp_path / "no")
        assert failed.returncode == 1 and text in failed.stderr, failed.stderr
    alone = run("reconstruct", tmp_path / "run", "0.1", "--reading", "start=3", "--out", tmp_path / "no")
    assert alone.returncode == 1 and "--reading says how --from reads" in alone.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_words_say_how_to_read() -> None:
    words = [
        "profile=0.05",
        "profile=power:gamma=3",
        "start=5",
        "update-every=10",
        "time-pattern=s=([0-9]+)",
        "copy=a*",
    ]
    assert reading_of(words) == Reading(("0.05", "power:gamma=3"), "", 5.0, 10.0, "s=([0-9]+)", copy=("a*",))
