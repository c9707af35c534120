"""Output folders: safetensors files laid out in advance, filled by several processes at once, committed last."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sharded_phema.errors import OutputError
from sharded_phema.manifest import Parameter
from sharded_phema.tensorfile import DTYPES, header_of
from sharded_phema.world import agree, from_first, rank_and_size

__all__ = ["TensorFiles", "byte_count", "staged", "tensor_files"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """Where each parameter of a model lies in the files of one output folder.

    Attributes:
        dtype: Key into DTYPES.
        headers: First bytes of each file, by file name: everything before the numbers.
        sizes: Length of each file in bytes.
        places: File and first byte of each parameter, in the model's order.
        index: Text of the Hugging Face index file; empty where one file holds everything.
    """

    dtype: str
    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: tuple[tuple[str, int], ...]
    index: str

    def create(self, folder: Path) -> None:
        """Make the folder and its files at full length, headers filled in, numbers not."""
        folder.mkdir(parents=True)
        for name, header in self.headers.items():
            with (folder / name).open("wb") as file:
                file.write(header)
                file.truncate(self.sizes[name])
        if self.index:
            (folder / "model.safetensors.index.json").write_text(self.index)

    def write(self, folder: Path, parameter: Parameter, place: tuple[str, int], start: int, values: NDArray) -> None:  # type: ignore[type-arg]
        """Write elements of one flattened parameter, rounded to the dtype of the files.

        Args:
            folder: Where ``create`` made the files.
            parameter: For messages.
            place: The parameter's entry in ``places``.
            start: First element.
            values: Float array of shape (elements,).

        Raises:
            OutputError: A number does not fit the dtype.
        """
        numbers = torch.from_numpy(values).to(DTYPES[self.dtype][1])
        if not torch.isfinite(numbers).all():
            raise OutputError(
                f"{parameter.name}: its largest magnitude {np.abs(values).max():.3g} does not fit {self.dtype}",
                hint="write float32 or bfloat16, or look for non-finite weights in training",
            )
        name, first_byte = place
        with (folder / name).open("r+b") as file:
            file.seek(first_byte + start * numbers.element_size())
            file.write(numbers.view(torch.uint8).numpy().data)


def tensor_files(parameters: Sequence[Parameter], dtype: str, max_shard_bytes: int) -> TensorFiles:
    """Lay parameters out in safetensors files, in order, a new file where the next would exceed the limit.

    The layout is a pure function of its arguments, so that any number of
    processes write the same bytes. Names follow Hugging Face.

    Args:
        parameters: Names and shapes, in order.
        dtype: A key of DTYPES.
        max_shard_bytes: Limit of a file's numbers; a single larger parameter gets a file of its own.

    Raises:
        OutputError: Unknown dtype.
    """
    if dtype not in DTYPES:
        raise OutputError(f"dtype: expected one of {sorted(DTYPES)}, found {dtype!r}", hint="try float32")
    width = DTYPES[dtype][1].itemsize
    groups: list[list[Parameter]] = [[]]
    for parameter in parameters:
        filled = sum(math.prod(p.shape) for p in groups[-1]) * width
        if groups[-1] and filled + math.prod(parameter.shape) * width > max_shard_bytes:
            groups.append([])
        groups[-1].append(parameter)
    names = _file_names(len(groups))
    headers = {
        name: header_of({p.name: p.shape for p in group}, dtype, {"format": "pt"})
        for name, group in zip(names, groups, strict=True)
    }
    places: list[tuple[str, int]] = []
    sizes = {}
    for name, group in zip(names, groups, strict=True):
        ends = np.cumsum([0, *(math.prod(p.shape) * width for p in group)]).tolist()
        places += [(name, len(headers[name]) + end) for end in ends[:-1]]
        sizes[name] = len(headers[name]) + ends[-1]
    return TensorFiles(dtype, headers, sizes, tuple(places), _index(names, groups, width) if len(names) > 1 else "")


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _index(names: Sequence[str], groups: Sequence[Sequence[Parameter]], width: int) -> str:
    weight_map = {p.name: name for name, group in zip(names, groups, strict=True) for p in group}
    total = sum(math.prod(p.shape) for group in groups for p in group) * width
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


@contextmanager
def staged(out: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """A folder to fill that becomes ``out`` when every process filled its part, and vanishes otherwise.

    Collective. Rank 0 makes the folder beside ``out`` under a name of its own.

    Args:
        out: Final folder; must not exist, or be empty.
        create: Fills the new folder with whatever all processes expect there; runs on rank 0.

    Raises:
        OutputError: ``out`` is taken or cannot be made; the failure of any process is raised on all.
    """
    stage = from_first(lambda: _make_stage(out, create))
    done: list[Exception] = []
    try:
        try:
            yield stage
        except Exception as error:
            done.append(error)
        agree(lambda: _raise_any(done))
        from_first(lambda: _commit(stage, out))
    except BaseException:
        if rank_and_size()[0] == 0:
            shutil.rmtree(stage, ignore_errors=True)
        raise


def _make_stage(out: Path, create: Callable[[Path], None]) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"{out} exists and is not an empty folder; nothing is ever overwritten", hint="give --out another folder"
        )
    stage = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        stage.mkdir(parents=True)
        create(stage)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, OSError):
            raise _not_made(out, error) from error
        raise
    return stage


def _commit(stage: Path, out: Path) -> None:
    for path in sorted(stage.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    try:
        stage.rename(out)
    except OSError as error:
        raise _not_made(out, error) from error


def _not_made(out: Path, error: OSError) -> OutputError:
    return OutputError(f"{out} cannot be made: {error}", hint="check free space and permissions")


def _raise_any(errors: Sequence[Exception]) -> None:
    for error in errors:
        raise error


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
