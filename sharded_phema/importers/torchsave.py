"""State dicts that torch.save wrote, one file for each time; Cosmos-style ones by their prefix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sharded_phema.importers.contract import Foreign, Reading, Tensors, single_label
from sharded_phema.importers.extent import Extent
from sharded_phema.importers.naming import below, files_in, sizes_of, time_of
from sharded_phema.importers.torchfile import load

__all__ = ["find_torch"]

_ENDINGS = ("*.pt", "*.pth", "*.bin")


def find_torch(source: Path, reading: Reading) -> Sequence[Foreign]:
    """Files of torch.save in a folder, or one.

    Raises:
        StoreError: There are none, or a name holds no time.
    """
    label = single_label(reading)
    return [
        Foreign(
            str(path),
            time_of(path.stem, reading.time_pattern, str(path)),
            reading.start or 0.0,
            partial(_open, path, reading, label),
            sizes_of([path]),
        )
        for path in files_in(source, _ENDINGS, f"files {', '.join(_ENDINGS)}")
    ]


def _open(path: Path, reading: Reading, label: str) -> dict[str, Tensors]:
    return {label: below(load(Extent.whole(path)), reading.key, reading.prefix, str(path))}
