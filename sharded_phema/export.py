"""Output files: safetensors laid out in advance, so that several processes can fill them at once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharded_phema.errors import OutputError
from sharded_phema.manifest import Parameter, RawTensor
from sharded_phema.tensorfile import DTYPES, header_of, torch_dtype

__all__ = ["DRAFTS", "Place", "TensorFiles", "byte_count", "tensor_files"]

DRAFTS = ".drafts"
"""Folder beside checkpoints that are made, in which averages are rebuilt first: the sums are read once for all targets,
and the numbers are those of a safetensors export, bit for bit."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: its file, the byte of it at which its numbers begin, and its dtype there."""

    file: str
    begin: int
    dtype: str


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """Where each tensor of a model lies in the files of one output folder.

    Attributes:
        headers: First bytes of each file, by file name: everything before the numbers.
        sizes: Length of each file in bytes.
        places: Place of each tensor: parameters in the model's order, then those that are written as they are.
        index: Text of the Hugging Face index file; empty where one file holds everything.
        stem: What names of files begin with.
    """

    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: tuple[Place, ...]
    index: str
    stem: str

    def create(self, folder: Path) -> None:
        """Make the folder and its files at full length, headers filled in, numbers not."""
        folder.mkdir(parents=True)
        for name, header in self.headers.items():
            with (folder / name).open("wb") as file:
                file.write(header)
                file.truncate(self.sizes[name])
        if self.index:
            (folder / f"{self.stem}.safetensors.index.json").write_text(self.index)


def tensor_files(
    parameters: Sequence[Parameter],
    dtype: str,
    max_shard_bytes: int,
    raw: Sequence[RawTensor] = (),
    *,
    stem: str = "model",
) -> TensorFiles:
    """Lay a model's tensors out in safetensors files, in order, a new file where the next would exceed the limit.

    The layout is a pure function of its arguments, so that any number of
    processes write the same bytes. Names follow Hugging Face.

    Args:
        parameters: Names and shapes of averaged parameters, in order.
        dtype: What they are written in, a key of DTYPES.
        max_shard_bytes: Limit of a file's numbers; a single larger tensor gets a file of its own.
        raw: Tensors that were stored as they are, which follow. Parameters of a floating dtype are written in
            ``dtype`` too; buffers, whole numbers and the 8-bit floats of quantized weights keep their own.
        stem: What names of files begin with: "model", or what the library that opens them expects.

    Raises:
        OutputError: Unknown dtype.
    """
    if dtype not in DTYPES:
        raise OutputError(f"dtype: expected one of {sorted(DTYPES)}, found {dtype!r}", hint="try float32")
    tensors = {p.name: (p.shape, dtype) for p in parameters} | {r.name: (r.shape, _written(r, dtype)) for r in raw}
    groups: list[dict[str, tuple[tuple[int, ...], str]]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = _bytes(*tensor)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += size
    names = _file_names(stem, len(groups))
    headers, sizes = {}, {}
    places: dict[str, Place] = {}
    for file, group in zip(names, groups, strict=True):
        headers[file], begins = header_of(group, {"format": "pt"})
        sizes[file] = len(headers[file]) + sum(_bytes(*tensor) for tensor in group.values())
        places |= {name: Place(file, begin, group[name][1]) for name, begin in begins.items()}
    index = _index({name: places[name].file for name in tensors}, sum(_bytes(*t) for t in tensors.values()))
    return TensorFiles(headers, sizes, tuple(places[name] for name in tensors), index if len(names) > 1 else "", stem)


def _written(tensor: RawTensor, dtype: str) -> str:
    """What a tensor that was stored as it is is written in."""
    own = torch_dtype(tensor.dtype)
    # An 8-bit float means something only together with the scales that are stored beside it.
    floating = own.is_floating_point and own.itemsize > 1
    return dtype if tensor.kind == "parameter" and floating else tensor.dtype


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * torch_dtype(dtype).itemsize


def _file_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _index(weight_map: Mapping[str, str], total: int) -> str:
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def byte_count(text: str | int) -> int:
    """Bytes in a size such as ``"5GB"`` (decimal), ``"512MiB"`` (binary) or a plain number.

    Raises:
        OutputError: Not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(text))
    try:
        size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise OutputError(f"expected a size such as 5GB or 512MiB, found {text!r}", hint="for example 5GB")
    return size
