"""Outputs: strips end up where their tensors lie, in every folder, rounded once; what cannot be written is told."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import examples, listing, no_flush, same_bits, shapes, tensors_of
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema import outputs as module
from sharded_phema.errors import OutputError
from sharded_phema.export import tensor_files
from sharded_phema.layout import Box
from sharded_phema.manifest import Parameter, RawTensor, RunRecord
from sharded_phema.outputs import Outputs
from sharded_phema.store import Piece
from sharded_phema.sums import strips


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


def outputs_of(sizes: list[tuple[int, ...]], dtype: str = "float32", limit: int = 1 << 40, raw: Any = ()) -> Outputs:
    parameters = tuple(Parameter(f"w{i}", shape) for i, shape in enumerate(sizes))
    files = tensor_files(parameters, dtype, limit, raw)
    return Outputs(files, RunRecord("run", "steps", (), parameters, copied=tuple(raw)))


def flat(parameter: int, start: int, count: int) -> Piece:
    return Piece(parameter, Box((start,), (count,)), True)


@examples(80)
@given(
    st.lists(shapes, min_size=1, max_size=6),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(1, 3),
    st.data(),
)
def test_strips_over_many_parameters_in_any_order_give_what_torch_rounds(
    sizes, dtype, sums, limit, strip, open_files, data
) -> None:
    # Oracle: torch's conversion of the whole arrays, read with the safetensors library. One target goes to two folders.
    numels = [math.prod(shape) for shape in sizes]
    values = torch.randn(2, sum(numels), dtype=sums, generator=torch.Generator().manual_seed(1))
    pieces = [flat(p, 0, numel) for p, numel in enumerate(numels) if numel]
    jobs = list(strips(pieces, strip))
    assert [sum(piece.numel for piece in job) for job in jobs[:-1]] == [strip] * len(jobs[:-1])
    begins = np.cumsum([0, *(sum(piece.numel for piece in job) for job in jobs)])
    outputs = outputs_of(sizes, dtype, limit)
    with tempfile.TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OPEN_FILES", open_files)
        folders = [Path(parent, name) for name in "abc"]
        for folder in folders:
            outputs.files.create(folder)
        written = 0
        for number in data.draw(st.permutations(range(len(jobs)))):
            part = values[:, begins[number] : begins[number + 1]]
            written += outputs.write(jobs[number], part, [[folders[0], folders[2]], [folders[1]]])
            assert len(outputs._open) <= open_files
        outputs.close()
        assert written == 3 * sum(numels) * torch.finfo(getattr(torch, dtype)).bits // 8
        for folder, target in zip(folders, (0, 1, 0), strict=True):
            found = tensors_of(folder)
            for i, part in enumerate(torch.split(values[target], numels)):
                assert same_bits(found[f"w{i}"], part.to(getattr(torch, dtype)).reshape(sizes[i]))


def test_what_lies_end_to_end_in_a_file_is_written_at_once(tmp_path, monkeypatch) -> None:
    # Oracle: by hand. Three parameters of 4 elements in one file, the last one begins another.
    outputs, calls = outputs_of([(4,), (4,), (4,), (4,)], limit=48), []
    outputs.files.create(tmp_path / "out")
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append((len(data), offset))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    begins = [place.begin for place in outputs.files.places]
    outputs.write([flat(0, 1, 3), flat(1, 0, 4), flat(2, 0, 2), flat(3, 0, 4)], torch.ones(1, 13), [[tmp_path / "out"]])
    assert calls == [(4 * 9, begins[0] + 4), (16, begins[3])]
    calls.clear()
    outputs.write([flat(0, 0, 2), flat(0, 3, 1), flat(2, 0, 1)], torch.ones(1, 4), [[tmp_path / "out"]])
    assert [count for count, _ in calls] == [8, 4, 4]
    outputs.close()


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_all_of_them(tmp_path, monkeypatch) -> None:
    outputs, real = outputs_of([(50,)]), os.pwrite
    outputs.files.create(tmp_path / "out")
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:7], offset))
    assert outputs.write([flat(0, 0, 50)], torch.arange(50.0)[None], [[tmp_path / "out"]]) == 200
    outputs.close()
    assert tensors_of(tmp_path / "out")["w0"].tolist() == [*range(50)]


@pytest.mark.parametrize("what", ["open", "pwrite", "dup", "fsync"])
def test_whatever_fails_of_the_disk_is_one_error_that_says_that_it_goes_on(tmp_path, monkeypatch, what) -> None:
    outputs = outputs_of([(5,)])
    outputs.files.create(tmp_path / "out")
    if what in ("dup", "fsync"):
        outputs.write([flat(0, 0, 5)], torch.ones(1, 5), [[tmp_path / "out"]])

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, what, fail)
    monkeypatch.setattr(module, "OPEN_FILES", 1)
    outputs.files.create(tmp_path / "other")
    with pytest.raises(OutputError, match="cannot be written: No space left on device") as caught:
        if what == "dup":
            outputs.duplicates()
        outputs.write([flat(0, 0, 5)], torch.ones(1, 5), [[tmp_path / "other"]])
    assert "goes on where it stopped" in caught.value.hint and isinstance(caught.value.__cause__, OSError)
    monkeypatch.undo()
    outputs.close()


def test_descriptors_are_given_out_for_every_open_file_and_none_is_left(tmp_path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    outputs = outputs_of([(4,), (4,), (4,)], limit=16)
    outputs.files.create(tmp_path / "out")
    outputs.write([flat(0, 0, 4), flat(2, 0, 4)], torch.ones(1, 8), [[tmp_path / "out"]])
    given_out = outputs.duplicates()
    found = {os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in given_out}
    assert {Path(name).name for name in found} == {outputs.files.places[i].file for i in (0, 2)}
    outputs.close()
    outputs.close()
    for descriptor in given_out:
        os.fsync(descriptor)
        os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) == before and outputs.duplicates() == []


def test_a_file_that_gives_way_to_others_is_on_disk_first(tmp_path, monkeypatch) -> None:
    outputs, flushed = outputs_of([(4,), (4,), (4,)], limit=16), []
    outputs.files.create(tmp_path / "out")
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    monkeypatch.setattr(os, "fsync", lambda d: flushed.append(Path(os.readlink(f"/proc/self/fd/{d}")).name))
    for index in (0, 1, 0, 2):
        outputs.write([flat(index, 0, 4)], torch.ones(1, 4), [[tmp_path / "out"]])
    assert flushed == [outputs.files.places[1].file], "the one that was used least recently"
    outputs.close()


@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "too large"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_number_that_does_not_fit_is_refused_by_name_and_nothing_of_its_target_is_written(
    tmp_path, dtype, bad, sums
) -> None:
    # Oracle: torch.finfo; halfway to the next power of two is the first number that is rounded to infinity.
    largest = torch.finfo(getattr(torch, dtype)).max
    digits = {"float32": 24, "bfloat16": 8, "float16": 11}[dtype]
    if bad == "too large":
        bad = 2.0 ** math.frexp(largest)[1] * (1 - 2.0 ** -(digits + 1))
    if sums == torch.float32 and dtype == "float32" and math.isfinite(bad):
        pytest.skip("float32 has no such number")
    outputs = outputs_of([(3,), (3,), (3,)], dtype)
    outputs.files.create(tmp_path / "out")
    before = listing(tmp_path)
    values = torch.ones(1, 9, dtype=sums)
    values[0, 4] = bad
    with pytest.raises(OutputError, match=rf"w1: its largest magnitude .* does not fit {dtype}") as caught:
        outputs.write([flat(p, 0, 3) for p in range(3)], values, [[tmp_path / "out"]])
    assert caught.value.hint and not isinstance(caught.value.__cause__, OSError)
    values[0, 4] = largest
    outputs.close()
    assert listing(tmp_path) == before
    outputs.write([flat(p, 0, 3) for p in range(3)], values, [[tmp_path / "out"]])
    outputs.close()
    assert tensors_of(tmp_path / "out")["w1"].double().tolist() == [1.0, largest, 1.0]


def test_other_tensors_keep_their_infinities_and_are_refused_where_a_number_does_not_fit(tmp_path) -> None:
    # Oracle: torch's conversion. A parameter is written in the dtype of the output, a buffer in its own.
    raw = (RawTensor("left", (4,), "float32", "parameter"), RawTensor("count", (2,), "int64", "buffer"))
    outputs = outputs_of([(1,)], "float16", raw=raw)
    outputs.files.create(tmp_path / "out")
    values = torch.tensor([1.0, math.inf, math.nan, -2.0])
    assert outputs.write_raw(0, 0, values, [tmp_path / "out"]) == 8
    assert outputs.write_raw(1, 1, torch.tensor([1 << 40]), [tmp_path / "out"]) == 8
    with pytest.raises(OutputError, match="left: its largest magnitude 1e\\+05 does not fit float16"):
        outputs.write_raw(0, 1, torch.tensor([1e5]), [tmp_path / "out"])
    outputs.close()
    found = tensors_of(tmp_path / "out")
    assert same_bits(found["left"], values.half()) and found["count"].tolist() == [0, 1 << 40]
