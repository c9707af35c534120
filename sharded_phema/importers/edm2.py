"""Network pickles of EDM2, ``NAME-KIMG-STD.pkl``: their tensors and constants, and nothing of the code in them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from sharded_phema.errors import StoreError, TargetError
from sharded_phema.importers.contract import Foreign, Lazy, Reading, Tensors, label_of, within
from sharded_phema.importers.extent import Bytes, Extent, Held
from sharded_phema.importers.naming import files_in, sizes_of
from sharded_phema.importers.torchfile import DEEPEST, GLOBALS, Storage, legacy_storage
from sharded_phema.importers.unpickling import Inert, sealed, unpickled

__all__ = ["find_edm2"]

_NAME = re.compile(r"(.*)-([0-9]+)-([0-9]*\.[0-9]+)")
_CODE = ("torch_utils.persistence", "_reconstruct_persistent_obj")
_ROUNDED = "sigma_rel is as in the names of files, which round it to three decimals"
# Of longer bytes only so many are read with the pickle: what comes before the numbers of a tensor.
_LONG, _HEAD = 1 << 16, 4096


def find_edm2(source: Path, reading: Reading) -> Sequence[Foreign]:
    """Pickles in a folder, those of one time together.

    Training time is counted in images, as EDM2 does, unless the unit is said to be ``kimg``. Names round to thousands
    of images; the true number is a multiple of 1,024.

    Raises:
        StoreError: There are none, or a time has other widths than the first.
    """
    found: dict[int, dict[str, Path]] = {}
    for path in files_in(source, ["*.pkl"], "pickles NAME-KIMG-STD.pkl"):
        if (name := _NAME.fullmatch(path.stem)) is None or int(name[2]) == 0:
            raise StoreError(
                f"{path}: expected a name NAME-KIMG-STD.pkl with KIMG above 0", hint="move other pickles away"
            )
        if name[3] in found.setdefault(int(name[2]), {}):
            raise StoreError(f"{path}: a second pickle of that time and width", hint="import one run at a time")
        found[int(name[2])][name[3]] = path
    labels = _labels(reading, sorted(set().union(*found.values())))
    return [_foreign(kimg, files, labels, reading) for kimg, files in sorted(found.items())]


def _labels(reading: Reading, texts: Sequence[str]) -> dict[str, str]:
    if reading.profiles:
        raise StoreError("--profile: the names of EDM2's pickles tell their widths", hint="leave --profile out")
    try:
        return {text: label_of(text, 0.0) for text in texts}
    except TargetError as error:
        raise StoreError(f"a name holds a width that cannot be: {error.message}", hint=error.hint) from error


def _foreign(kimg: int, files: Mapping[str, Path], labels: Mapping[str, str], reading: Reading) -> Foreign:
    if missing := labels.keys() - files.keys():
        raise StoreError(
            f"{next(iter(files.values()))}: its time has no pickle of width {min(missing)}, others have",
            hint="move the pickles of times that lack one away",
        )
    paths = {label: files[text] for text, label in labels.items()}
    images = -(-kimg * 1000 // 1024) * 1024
    exact = images if images // 1000 == kimg else kimg * 1000
    t = float(kimg if reading.unit == "kimg" else exact)
    where = str(next(iter(paths.values())).with_name(f"*-{kimg:07d}-*.pkl"))
    opened = partial(_open, paths, reading.prefix)
    return Foreign(where, t, reading.start or 0.0, opened, sizes_of(paths.values()), (_ROUNDED,))


def _open(paths: Mapping[str, Path], prefix: str) -> dict[str, Tensors]:
    return {label: within(network_tensors(path), prefix, str(path)) for label, path in paths.items()}


def network_tensors(path: Path) -> dict[str, Lazy]:
    """Parameters and buffers of the network under ``ema`` in a pickle.

    Raises:
        StoreError: The pickle asks for anything but tensors, constants and what holds them, or has no network.
    """
    whole = Extent.whole(path)
    with whole.file() as raw:
        file = _Skipping(whole, cast(BinaryIO, raw))
        allowed = {
            **GLOBALS,
            ("torch.storage", "_load_from_bytes"): file.storage,
            ("dnnlib.util", "EasyDict"): sealed(dict),
            _CODE: lambda meta: Inert("network", (meta,)),
        }
        value = unpickled(cast(BinaryIO, file), str(path), allowed=allowed, known=_is_module)
    if not isinstance(value, dict) or not isinstance(value.get("ema"), Inert):
        raise StoreError(f"{path}: holds no network under 'ema'", hint="expected a network pickle of EDM2")
    return dict(_tensors(value["ema"], "", str(path)))


def _is_module(module: str, name: str) -> bool:
    return module.startswith("torch.nn.modules.") and name.isidentifier()


def _tensors(network: Inert, path: str, where: str) -> Iterator[tuple[str, Lazy]]:
    """Names as ``state_dict`` gives them."""
    meta = network.args[0] if network.name == "network" else {"state": network.state}
    state = meta.get("state") if isinstance(meta, dict) else None
    if not isinstance(state, dict) or not isinstance(state.get("_parameters"), dict) or path.count(".") > DEEPEST:
        raise StoreError(f"{where}: {path or 'ema'} is no module", hint="expected a network pickle of EDM2")
    hidden = state.get("_non_persistent_buffers_set") or ()
    own: dict[str, Any] = {**state["_parameters"], **(state.get("_buffers") or {})}
    for name, tensor in own.items():
        if isinstance(tensor, Lazy) and name not in hidden:
            yield f"{path}{name}", tensor
    for name, inner in (state.get("_modules") or {}).items():
        if isinstance(inner, Inert):
            yield from _tensors(inner, f"{path}{name}.", where)


class _Skipping:
    """A file whose long stretches of bytes, which are tensors, are left where they are when a pickle is read."""

    def __init__(self, whole: Extent, file: BinaryIO) -> None:
        self._whole, self._file, self._last = whole, io.BufferedReader(file, 1 << 14), (0, 0)  # type: ignore[type-var]

    def read(self, count: int = -1) -> bytes:
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline()

    def readinto(self, buffer: memoryview) -> int:
        """Fill the beginning only of what is long: the rest of that memory is never looked at, nor even touched."""
        view = memoryview(buffer).cast("B")
        if len(view) <= _LONG:
            return self._file.readinto(view)
        begin = self._file.tell()
        self._whole.part(begin, len(view))  # the file must be as long
        self._last = (begin, len(view))
        self._file.readinto(view[:_HEAD])
        self._file.seek(begin + len(view))
        return len(view)

    def storage(self, numbers: Any) -> Storage:
        """What stands for the numbers of a tensor, which are a file of torch.save in themselves."""
        if not isinstance(numbers, bytes):
            raise ValueError(f"expected bytes, found {type(numbers).__name__}")
        place: Bytes = Held(self._whole.path, numbers)
        if len(numbers) > _LONG:
            if self._last[1] != len(numbers):
                raise ValueError("long bytes that are no tensor's")
            place = self._whole.part(*self._last)
        return legacy_storage(place, numbers[:_HEAD] if len(numbers) > _LONG else numbers)
