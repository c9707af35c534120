from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import examples, no_flush, same_bits, shapes, tensors_of
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import OutputError
from sharded_phema.export import byte_count, tensor_files
from sharded_phema.layout import Box
from sharded_phema.manifest import Parameter, RawTensor, RunRecord
from sharded_phema.outputs import Outputs
from sharded_phema.store import Piece
from sharded_phema.tensorfile import CODES, DTYPES, torch_dtype

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


@st.composite
def models(draw):
    found = draw(st.lists(st.tuples(st.text(min_size=1, max_size=6), shapes), max_size=6, unique_by=lambda x: x[0]))
    return tuple(Parameter(name, shape) for name, shape in found if name != "__metadata__")


def values_of(parameters, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(math.prod(parameter.shape)) for parameter in parameters]


def outputs_of(files, parameters, raw=()):
    return Outputs(files, RunRecord("run", "steps", (), tuple(parameters), copied=tuple(raw)))


def write(outputs, folder, parameter, start, values):
    """Write elements of one parameter, given in float64, into one folder."""
    piece = Piece(parameter, Box((start,), (values.size,)), True)
    outputs.write([piece], torch.from_numpy(values)[None], [[folder]])


def write_all(folder, outputs, values, block=7):
    """Fill every file block by block, last block first: the order must not matter."""
    outputs.files.create(folder)
    jobs = [(p, i) for p, flat in enumerate(values) for i in range(0, flat.size, block)]
    for p, i in reversed(jobs):
        write(outputs, folder, p, i, values[p][i : i + block])
    outputs.close()


@examples(40)
@given(models(), st.sampled_from(sorted(DTYPES)), st.integers(1, 400))
def test_files_parse_with_the_library_and_hold_torchs_rounding(parameters, dtype, limit):
    # Oracle: the safetensors library reads what torch's own conversion gives.
    values = values_of(parameters)
    files = tensor_files(parameters, dtype, limit)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "out"
        write_all(folder, outputs_of(files, parameters), values)
        found = tensors_of(folder)
        assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(files.sizes)
        assert all((folder / name).stat().st_size == size for name, size in files.sizes.items())
    assert found.keys() == {parameter.name for parameter in parameters}
    for parameter, flat in zip(parameters, values, strict=True):
        expected = torch.from_numpy(flat).reshape(parameter.shape).to(getattr(torch, dtype))
        assert same_bits(found[parameter.name], expected)


@examples(40)
@given(models(), st.sampled_from(sorted(DTYPES)), st.integers(1, 400))
def test_the_index_covers_each_parameter_once_and_no_file_exceeds_the_limit(parameters, dtype, limit):
    files = tensor_files(parameters, dtype, limit)
    bytes_of = {p.name: math.prod(p.shape) * DTYPES[dtype][1].itemsize for p in parameters}
    place_of = {p.name: place.file for p, place in zip(parameters, files.places, strict=True)}
    held = {file: [name for name in place_of if place_of[name] == file] for file in files.sizes}
    for file, names in held.items():
        assert sum(map(bytes_of.get, names)) <= limit or len([name for name in names if bytes_of[name]]) == 1
        assert files.sizes[file] == len(files.headers[file]) + sum(map(bytes_of.get, names))
    if len(files.sizes) == 1:
        assert (list(files.sizes), files.index) == (["model.safetensors"], "")
        return
    index = json.loads(files.index)
    assert index["weight_map"] == place_of
    assert index["metadata"]["total_size"] == sum(bytes_of.values())
    count = len(files.sizes)
    assert list(files.sizes) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


@examples(40)
@given(models(), st.integers(1, 400))
def test_numbers_begin_at_a_multiple_of_8_bytes_and_lie_end_to_end(parameters, limit):
    files = tensor_files(parameters, "float32", limit)
    for header in files.headers.values():
        assert len(header) % 8 == 0
        assert int.from_bytes(header[:8], "little") == len(header) - 8
        assert json.loads(header[8:])["__metadata__"] == {"format": "pt"}
    ends = {file: len(header) for file, header in files.headers.items()}
    for parameter, place in zip(parameters, files.places, strict=True):
        assert place.begin == ends[place.file]
        ends[place.file] += 4 * math.prod(parameter.shape)
    assert ends == files.sizes


@st.composite
def raw_models(draw):
    """Tensors of any dtype beside averaged parameters, and values of them."""
    names = draw(st.lists(st.text("abc.", min_size=1, max_size=4), max_size=5, unique=True))
    made = []
    for name in names:
        dtype, shape = draw(st.sampled_from(sorted(CODES))), draw(shapes)
        raw = torch.randint(0, 2, (math.prod(shape) * torch_dtype(dtype).itemsize,), dtype=torch.uint8)
        tensor = RawTensor(f"raw tensor {name}", shape, dtype, draw(st.sampled_from(["parameter", "buffer"])))
        made.append((tensor, raw.view(torch_dtype(dtype))))
    return made


@examples(40)
@given(models(), raw_models(), st.sampled_from(sorted(DTYPES)), st.integers(1, 400))
def test_files_of_mixed_dtypes_parse_and_every_tensor_begins_at_a_multiple_of_its_width(parameters, raw, dtype, limit):
    # Oracle: the safetensors library; torch's conversion of the floating parameters, all others as they were.
    tensors = [tensor for tensor, _ in raw]
    files = tensor_files(parameters, dtype, limit, tensors)
    values = values_of(parameters)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "out"
        outputs = outputs_of(files, parameters, tensors)
        write_all(folder, outputs, values)
        for index, ((_, numbers), place) in enumerate(zip(raw, files.places[len(parameters) :], strict=True)):
            assert place.begin % torch_dtype(place.dtype).itemsize == 0
            for i in reversed(range(0, numbers.numel(), 7)):
                outputs.write_raw(index, i, numbers[i : i + 7], [folder])
        outputs.close()
        found = tensors_of(folder)
        assert all((folder / name).stat().st_size == size for name, size in files.sizes.items())
        assert not files.index or json.loads((folder / INDEX).read_text())["weight_map"].keys() == found.keys()
    assert found.keys() == {p.name for p in parameters} | {tensor.name for tensor in tensors}
    for tensor, numbers in raw:
        rounded = tensor.kind == "parameter" and tensor.dtype in ("float64", "float32", "float16", "bfloat16")
        expected = numbers.to(torch_dtype(dtype)) if rounded else numbers
        assert same_bits(found[tensor.name], expected.reshape(tensor.shape))
    for parameter, flat in zip(parameters, values, strict=True):
        assert same_bits(found[parameter.name], torch.from_numpy(flat).reshape(parameter.shape).to(torch_dtype(dtype)))


def test_an_index_is_written_where_there_are_several_files(tmp_path):
    parameters = (Parameter("a", (3,)), Parameter("b", (2, 2)))
    one, several = tensor_files(parameters, "float32", 100), tensor_files(parameters, "float32", 20)
    one.create(tmp_path / "one")
    several.create(tmp_path / "several")
    assert not (tmp_path / "one" / INDEX).exists()
    assert json.loads((tmp_path / "several" / INDEX).read_text())["metadata"]["total_size"] == 28


def test_a_parameter_larger_than_the_limit_has_a_file_of_its_own():
    parameters = tuple(Parameter(name, (size,)) for name, size in (("a", 2), ("big", 50), ("c", 2), ("d", 2)))
    files = tensor_files(parameters, "float32", 16)
    numbers = [int(place.file.split("-")[1]) for place in files.places]
    assert numbers == [1, 2, 3, 3]


def test_an_unknown_dtype_is_refused():
    with pytest.raises(OutputError, match="found 'float64'") as caught:
        tensor_files((), "float64", 1)
    assert "float32" in caught.value.hint


@pytest.mark.parametrize("bad", [65520.0, -1e5, math.inf, math.nan])
def test_a_number_that_float16_cannot_hold_is_refused_with_the_parameters_name(tmp_path, bad):
    # 65519.99 still rounds to the largest float16, 65504; 65520 is the first that does not.
    parameter = Parameter("layer.weight", (3,))
    files = tensor_files([parameter], "float16", 100)
    files.create(tmp_path / "out")
    outputs = outputs_of(files, [parameter])
    write(outputs, tmp_path / "out", 0, 0, np.array([0.0, 65519.99, 1.0]))
    with pytest.raises(OutputError, match=r"layer\.weight: .* does not fit float16") as caught:
        write(outputs, tmp_path / "out", 0, 0, np.array([0.0, bad, 1.0]))
    outputs.close()
    assert "bfloat16" in caught.value.hint
    assert tensors_of(tmp_path / "out")["layer.weight"].tolist() == [0.0, 65504.0, 1.0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9), ("512MiB", 512 * 2**20), ("1kb", 1000), ("1KiB", 1024), ("2 gib", 2 * 2**30),
        (" 7 ", 7), ("7B", 7), (1234, 1234), ("1.5KB", 1500), (".5MB", 500_000), ("0.001KB", 1),
    ],
)  # fmt: skip
def test_a_size_is_read_in_decimal_or_binary_units(text, size):
    assert byte_count(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "0", 0, -5, "-5GB", "5XB", "5 G B", "1.2.3GB", ".", "1e9", "five", "0.0001", "nan", "inf", "9" * 400],
)
def test_what_is_no_positive_size_is_refused(text):
    with pytest.raises(OutputError, match="expected a size such as 5GB") as caught:
        byte_count(text)
    assert caught.value.hint
