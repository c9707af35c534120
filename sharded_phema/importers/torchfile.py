"""Files of torch.save, of either format, read without torch.load: tensors stay in the file until they are asked for."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from sharded_phema.errors import StoreError
from sharded_phema.importers.contract import Lazy
from sharded_phema.importers.extent import Bytes, Extent, strided
from sharded_phema.importers.unpickling import Inert, Stand, inert, unpickled
from sharded_phema.tensorfile import CODES, torch_dtype

__all__ = ["DEEPEST", "GLOBALS", "Storage", "legacy_storage", "load", "tensors_of"]

_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "",
}
DEEPEST = 200
"""Mappings or modules inside of each other beyond which something holds itself."""

_MAGIC = 0x1950A86A20F9469CFC6C
_MEND = "the file is damaged, or no torch.save wrote it; nothing was executed"

Places = dict[str, Bytes]


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers of one dtype (none: bytes) under a key, of which the places are known when they are read at last."""

    dtype: str
    key: str
    numel: int
    places: Places

    def extent(self) -> Bytes:
        """Where they lie.

        Raises:
            StoreError: Nowhere.
        """
        if self.key not in self.places:
            raise StoreError(f"the storage {self.key!r} of a tensor is missing", hint=_MEND)
        return self.places[self.key]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Lazy:
    # The dtype of a tensor over bytes comes last: _rebuild_tensor_v3.
    dtype = storage.dtype or (rest[2] if len(rest) > 2 else "")
    if not isinstance(storage, Storage) or dtype not in CODES:
        raise StoreError(f"a tensor of {dtype or 'no dtype'}, expected one of {', '.join(CODES)}", hint=_MEND)
    numbers = (offset, *shape, *strides)
    if not all(type(number) is int for number in numbers):
        raise StoreError(f"a tensor with {numbers} for its offset, shape and strides", hint=_MEND)

    def read(start: int, stop: int) -> Any:
        return strided(storage.extent(), dtype, offset, shape, strides).read(start, stop)

    return Lazy(tuple(shape), dtype, read)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


GLOBALS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch", "device"): inert("torch.device"),
    ("torch", "Tensor"): inert("torch.Tensor"),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda make, kind, args, state: make(*args),
    ("torch.nn.parameter", "Parameter"): inert("torch.nn.parameter.Parameter"),
    ("torch.serialization", "_get_layout"): inert("torch.layout"),
    ("torch.storage", "UntypedStorage"): "",
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch", dtype): dtype for dtype in CODES},
}
"""What a file of torch.save may ask for, and what stands for it; storages and dtypes are names of dtypes."""
for _module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
    GLOBALS |= {(_module, _name): inert(_name) for _name in ("ndarray", "dtype", "scalar", "_reconstruct")}


def load(extent: Extent, *, known: Callable[[str, str], bool] = lambda module, name: False) -> Any:
    """What torch.save wrote, with a ``Lazy`` for each tensor. Nothing of it is executed.

    Args:
        extent: The file, or a part of one.
        known: Classes beside tensors and constants that may appear; they come as ``Inert``.

    Raises:
        StoreError: It is no such file, is damaged, or asks for anything else.
    """
    with extent.file() as file:
        start = extent.part(0, min(4, extent.length)).read()
        if start == b"PK\x03\x04":
            return _of_zip(extent, cast(BinaryIO, file), known)
        places: Places = {}
        return _of_legacy(extent, cast(BinaryIO, file), str(extent.path), known, places)


def _of_zip(extent: Extent, file: BinaryIO, known: Callable[[str, str], bool]) -> Any:
    where = str(extent.path)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise StoreError(f"{where}: is no zip file: {error}", hint=_MEND) from error
    pickles = [entry.filename for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1 or len({entry.filename for entry in entries}) != len(entries):
        raise StoreError(f"{where}: expected one data.pkl and no file twice, found {len(pickles)}", hint=_MEND)
    places: Places = {entry.filename.partition("/")[2]: _inside(extent, entry) for entry in entries}
    if "byteorder" in places and places["byteorder"].read() != b"little":
        raise StoreError(f"{where}: its numbers are not little-endian", hint="save it anew on a common machine")
    data = {name.removeprefix("data/"): place for name, place in places.items() if name.startswith("data/")}
    stream = io.BytesIO(places["data.pkl"].read())
    return unpickled(stream, where, allowed=GLOBALS, known=known, persistent=_storages(data))


def _inside(extent: Extent, entry: zipfile.ZipInfo) -> Extent:
    """Where the bytes of a member lie; its own header must say the same as the directory."""
    head = bytes(extent.part(entry.header_offset, 30).read())
    name, extra = struct.unpack("<26xHH", head)
    begin = entry.header_offset + 30
    own = bytes(extent.part(begin, name).read())
    plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
    if head[:4] != b"PK\x03\x04" or own != entry.orig_filename.encode() or not plain:
        raise StoreError(
            f"{extent.path}: its member {entry.filename[:80]!r} is compressed, or not what the directory says",
            hint=_MEND,
        )
    return extent.part(begin + name + extra, entry.file_size)


def _of_legacy(extent: Bytes, file: BinaryIO, where: str, known: Callable[[str, str], bool], places: Places) -> Any:
    """Pickles one after another, then the storages in the order of their list of keys."""
    found: list[Storage] = []
    storages = _storages(places, found)
    for expected in (_MAGIC, 1001):
        if unpickled(file, where) != expected:
            raise StoreError(f"{where}: no torch.save wrote this", hint=_MEND)
    unpickled(file, where)  # sizes of C's integers
    value = unpickled(file, where, allowed=GLOBALS, known=known, persistent=storages)
    keys, widths = unpickled(file, where), {storage.key: storage.dtype for storage in found}
    at = file.tell()
    for key in keys if isinstance(keys, list) else [None]:
        if key not in widths:
            raise StoreError(f"{where}: lists a storage {str(key)[:80]!r} that no tensor has", hint=_MEND)
        (numel,) = struct.unpack("<q", extent.part(at, 8).read())
        size = numel * (torch_dtype(widths[key]).itemsize if widths[key] else 1)
        places[key] = extent.part(at + 8, size)
        at += 8 + size
    return value


def legacy_storage(extent: Bytes, head: bytes) -> Storage:
    """The one storage that pickling a tensor outside of torch.save makes: a legacy file in an extent.

    Args:
        extent: Where the bytes lie.
        head: The first of them, with all pickles in it.

    Raises:
        StoreError: It is no such thing.
    """
    places: Places = {}
    where = str(extent.path)
    value = _of_legacy(extent, io.BytesIO(head), where, lambda module, name: False, places)
    if not isinstance(value, Storage):
        raise StoreError(f"{where}: expected the numbers of a tensor, found {type(value).__name__}", hint=_MEND)
    return value


def _storages(places: Places, found: list[Storage] | None = None) -> Stand:
    def load_storage(pid: Any) -> Storage:
        tag, dtype, key, _, numel, *view = pid
        if tag != "storage" or not isinstance(dtype, str) or type(numel) is not int or any(v for v in view):
            raise StoreError(f"a storage is said to be {str(pid)[:80]}", hint=_MEND)
        storage = Storage(dtype, str(key), numel, places)
        if found is not None:
            found.append(storage)
        return storage

    return load_storage


def tensors_of(value: Any, path: str = "") -> Mapping[str, Lazy]:
    """All tensors below a mapping, by their names with dots between.

    Raises:
        StoreError: It has no end, because it holds itself.
    """
    if path.count(".") > DEEPEST:
        raise StoreError(f"mappings in mappings without an end: {path[:80]}", hint=_MEND)
    if isinstance(value, Lazy):
        return {path: value}
    if isinstance(value, Inert) or not isinstance(value, Mapping):
        return {}
    parts = [tensors_of(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items()]
    return {name: lazy for part in parts for name, lazy in part.items()}
