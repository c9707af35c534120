"""Checkpoints of torch.distributed.checkpoint: stock ones, and torchtitan's with an average in them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_phema.errors import PhemaError, StoreError
from sharded_phema.folder.contract import is_name
from sharded_phema.importers.contract import Foreign, Lazy, Reading, Tensors, single_label, within
from sharded_phema.importers.extent import Extent
from sharded_phema.importers.naming import files_in, sizes_of, time_of
from sharded_phema.importers.torchfile import GLOBALS, load
from sharded_phema.importers.unpickling import Inert, unpickled
from sharded_phema.layout import Box, boxes_of_flat_range, intersection, reach, row_major, whole
from sharded_phema.tensorfile import torch_dtype

__all__ = ["find_dcp", "find_torchtitan"]

_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_AVERAGE = re.compile(r"ema\.(?:state\.)?(.+)\.ema_params")
_MEND = "the checkpoint was written in part, edited, or by another version; take it from a backup"

Chunks = Sequence[tuple[Box, Extent]]


def find_dcp(source: Path, reading: Reading) -> Sequence[Foreign]:
    """Folders with ``.metadata`` in a folder, or one.

    Raises:
        StoreError: There are none, or a name holds no time.
    """
    prefix = f"{reading.key}.{reading.prefix}" if reading.key else reading.prefix
    return _found(source, reading, single_label(reading), lambda name: _without(name, prefix))


def find_torchtitan(source: Path, reading: Reading) -> Sequence[Foreign]:
    """The same of torchtitan, of which the average below ``ema`` is read.

    Its decay ``2 ** (-1 / (half_life_fraction * n))`` at its n-th update makes it a power profile, of which the
    exponent is ``ln 2 / half_life_fraction - 1``.

    Raises:
        StoreError: As ``find_dcp``, or it was not said how long the average is.
    """
    if not reading.profiles:
        raise StoreError(
            f"{source}: the files do not tell how long torchtitan's average is",
            hint="give --profile power:gamma=G with G = ln 2 / half_life_fraction - 1, which is 12.862943611198906 for "
            "0.05, what it is if nothing was said; or exponential:decay=D for a fixed decay; --from dcp reads weights",
        )
    return _found(source, reading, single_label(reading), lambda name: (_AVERAGE.fullmatch(name) or ("", ""))[1])


def _without(name: str, prefix: str) -> str:
    return name.removeprefix(prefix) if name.startswith(prefix) else ""


def _found(source: Path, reading: Reading, label: str, rename: Callable[[str], str]) -> Sequence[Foreign]:
    alone = (source / ".metadata").is_file()
    several = [source] if alone else files_in(source, ["*/"], "folders with .metadata")
    folders = [folder for folder in several if (folder / ".metadata").is_file()]
    if not folders:
        raise StoreError(f"{source}: expected folders with .metadata, found none", hint="give the folder above them")
    return [
        Foreign(
            str(folder),
            time_of(folder.name, reading.time_pattern, str(folder)),
            reading.start or 0.0,
            partial(_open, folder, label, rename),
            sizes_of([folder / ".metadata", *sorted(folder.glob("*.distcp"))]),
        )
        for folder in folders
    ]


def _open(folder: Path, label: str, rename: Callable[[str], str]) -> dict[str, Tensors]:
    path = folder / ".metadata"
    stream = io.BytesIO(Extent.whole(path).read())
    record = unpickled(stream, str(path), allowed=GLOBALS, known=_is_metadata)
    try:
        places = _places(folder, record.field("storage_data"))
        tensors = {
            new: _lazy(folder, name, entry, places.get(name, {}))
            for name, entry in record.field("state_dict_metadata").items()
            if entry.name.endswith(".TensorStorageMetadata") and (new := rename(name))
        }
    except PhemaError:
        raise
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise StoreError(f"{path}: is no such record: {type(error).__name__}: {error}", hint=_MEND) from error
    return {label: within(tensors, "", str(folder))}


def _is_metadata(module: str, name: str) -> bool:
    """Classes of the record itself; a path tells where it was written, and is not looked at."""
    return (
        module in _MODULES
        or (module, name) in [("pathlib", "PosixPath"), ("pathlib", "WindowsPath")]
        or (module == "pathlib._local" and name == "PosixPath")
    )


def _places(folder: Path, data: Mapping[Inert, Inert]) -> dict[str, dict[Any, Extent]]:
    """Where each chunk of each tensor lies, by its offsets."""
    found: dict[str, dict[Any, Extent]] = {}
    files: dict[str, Extent] = {}
    for index, info in data.items():
        name = info.field("relative_path")
        if not isinstance(name, str) or not is_name(name):
            raise StoreError(f"{folder}: refers to the file {str(name)[:80]!r} outside of it", hint=_MEND)
        if isinstance(info.state, dict) and info.state.get("transform_descriptors"):
            raise StoreError(f"{folder}: {name} is compressed or transformed", hint="save it anew without extensions")
        if name not in files:
            files[name] = Extent.whole(folder / name)
        place = files[name].part(info.field("offset"), info.field("length"))
        found.setdefault(index.field("fqn"), {})[index.field("offset", None)] = place
    return found


def _lazy(folder: Path, name: str, entry: Inert, places: Mapping[Any, Extent]) -> Lazy:
    shape, properties = entry.field("size"), entry.field("properties")
    dtype = _dtype_of(properties)
    chunks = []
    for chunk in entry.field("chunks"):
        box = Box(chunk.field("offsets"), chunk.field("sizes"))
        if box.offsets not in places:
            raise StoreError(f"{folder}: a piece of {name} is in no file", hint=_MEND)
        chunks.append((box, places[box.offsets]))
    if sum(box.numel for box, _ in chunks) < whole(shape).numel:
        raise StoreError(f"{folder}: pieces of {name} are missing", hint=_MEND)
    return Lazy(shape, dtype, partial(_read, name, shape, dtype, chunks))


def _dtype_of(properties: Inert) -> str:
    """The dtype comes first in what is pickled of the properties, in every version."""
    state = properties.state if properties.state is not None else properties.args
    first = state["dtype"] if isinstance(state, dict) else state[0]
    return str(first)


def _read(name: str, shape: tuple[int, ...], dtype: str, chunks: Chunks, start: int, stop: int) -> Tensor:
    out = torch.empty(stop - start, dtype=torch_dtype(dtype))
    at = found = 0
    for wanted in boxes_of_flat_range(shape, start, stop):
        view = out[at : at + wanted.numel].view(wanted.sizes)
        for held, place in chunks:
            if (shared := intersection(held, wanted)) is not None:
                view[_slices(wanted, shared)] = _piece(name, dtype, held, place, shared)
                found += shared.numel
        at += wanted.numel
    if found != stop - start:
        raise StoreError(f"{name}: {found} of {stop - start} elements are in the files", hint=_MEND)
    return out


def _piece(name: str, dtype: str, held: Box, place: Extent, shared: Box) -> Tensor:
    """What a chunk has of a box: the numbers from its first to its last are read."""
    lazy = _loaded(place)
    if not isinstance(lazy, Lazy) or (lazy.shape, lazy.dtype) != (held.sizes, dtype):
        raise StoreError(f"{place.path}: holds another piece of {name} than .metadata says", hint=_MEND)
    steps = row_major(held.sizes)
    first = sum((s - h) * step for s, h, step in zip(shared.offsets, held.offsets, steps, strict=True))
    return lazy.read(first, first + reach(shared.sizes, steps)).as_strided(shared.sizes, steps)


@lru_cache(maxsize=4096)
def _loaded(place: Extent) -> Any:
    """A chunk's own header: ranges of it are asked for one after another."""
    return load(place)


def _slices(outer: Box, inner: Box) -> tuple[slice, ...]:
    return Box(tuple(i - o for i, o in zip(inner.offsets, outer.offsets, strict=True)), inner.sizes).slices
