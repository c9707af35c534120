"""Folders of ema-pytorch's and pytorch-posthoc-ema's ``PostHocEMA``: files ``INDEX.STEP.pt``, one for each average.

Both let an average decay as if it were updated at each step, however seldom they update it; what they really keep is
``profile.Unaware``. Neither its width nor ``update_every`` is in the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sharded_phema.errors import StoreError
from sharded_phema.importers.contract import Foreign, Lazy, Reading, Tensors, within
from sharded_phema.importers.extent import Extent
from sharded_phema.importers.naming import files_in, sizes_of
from sharded_phema.importers.torchfile import load, tensors_of
from sharded_phema.spelling import spelled
from sharded_phema.target import Target, parse_target
from sharded_phema.width import gamma_of

__all__ = ["find_ema_pytorch", "find_posthoc_ema"]

_NAME = re.compile(r"([0-9]+)\.([0-9]+)")
_STATE = ("step", "initted")


def find_ema_pytorch(source: Path, reading: Reading) -> Sequence[Foreign]:
    """Checkpoints of ema-pytorch, which counts its calls from the first step on.

    Raises:
        StoreError: There are none, or it was not said what they hold.
    """
    return _found(source, reading, "ema_model.", "100", lambda path, step: 1.0)


def find_posthoc_ema(source: Path, reading: Reading) -> Sequence[Foreign]:
    """Checkpoints of pytorch-posthoc-ema, which counts its calls from ``update_after_step`` on.

    Raises:
        StoreError: There are none, or it was not said what they hold.
    """
    return _found(source, reading, "", "10", _first_call)


def _found(
    source: Path, reading: Reading, prefix: str, every: str, first: Callable[[Path, int], float]
) -> Sequence[Foreign]:
    files = _by_step(source)
    count = 1 + max(index for several in files.values() for index in several)
    labels = _labels(reading, count, every)
    found = []
    for step, several in sorted(files.items()):
        if len(several) != count:
            absent = next(index for index in range(count) if index not in several)
            raise StoreError(
                f"{source}: {absent}.{step}.pt is missing; other steps have {count} files",
                hint=f"move the other files of step {step} away",
            )
        paths = tuple(several[index] for index in range(count))
        start = first(paths[0], step) if reading.start is None else reading.start
        opened = partial(_open, paths, labels, prefix)
        found.append(Foreign(f"{source}/*.{step}.pt", float(step), start, opened, sizes_of(paths)))
    return found


def _by_step(source: Path) -> Mapping[int, dict[int, Path]]:
    files: dict[int, dict[int, Path]] = {}
    for path in files_in(source, ["*.pt"], "files INDEX.STEP.pt"):
        if (name := _NAME.fullmatch(path.stem)) is None or int(name[2]) == 0:
            raise StoreError(
                f"{path}: expected a name INDEX.STEP.pt", hint="a folder of PostHocEMA holds no other .pt files"
            )
        files.setdefault(int(name[2]), {})[int(name[1])] = path
    return files


def _labels(reading: Reading, count: int, every: str) -> tuple[str, ...]:
    """What was really kept, from what was asked for."""
    if len(reading.profiles) != count or reading.update_every is None:
        raise StoreError(
            f"{count} averages in the folder, and their files do not tell which: found {len(reading.profiles)} "
            f"--profile and {'no' if reading.update_every is None else 'one'} --update-every",
            hint=f"give --profile for each of sigma_rels or gammas, in order, such as --profile 0.05 --profile "
            f"power:gamma=3, and --update-every, which was {every} if nothing was said",
        )
    return tuple(_label(text, reading.update_every) for text in reading.profiles)


def _label(text: str, every: float) -> str:
    target = parse_target(text)
    if target.kind not in ("width", "power") or target.time is not None:
        raise StoreError(f"--profile {text}: expected a width or power:gamma=G", hint="as PostHocEMA was told")
    gamma = gamma_of(target.amount) if target.kind == "width" else target.amount
    return Target("power", gamma, "", None, every=every).text


def _open(paths: Sequence[Path], labels: Sequence[str], prefix: str) -> dict[str, Tensors]:
    return {label: _tensors(path, prefix) for label, path in zip(labels, paths, strict=True)}


def _tensors(path: Path, prefix: str) -> Tensors:
    return within(_outside_state(tensors_of(load(Extent.whole(path)))), prefix, str(path))


def _outside_state(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    return {name: lazy for name, lazy in tensors.items() if name not in _STATE}


def _first_call(path: Path, step: int) -> float:
    """The step of the first call, from the calls that the file has counted.

    Raises:
        StoreError: The count was rounded when it was stored.
    """
    held: Any = tensors_of(load(Extent.whole(path))).get("step")
    if held is None or held.shape != ():
        raise StoreError(f"{path}: holds no step", hint="expected a file of pytorch-posthoc-ema; try ema-pytorch")
    calls = float(held.read(0, 1).item())
    exact = held.dtype.startswith("int") or calls < {"float32": 2**24, "float16": 2**11}.get(held.dtype, 2**8)
    if not exact or not 0 < calls <= step:
        raise StoreError(
            f"{path}: counts {spelled(calls)} calls in {held.dtype}, which is rounded",
            hint="say at which step the averages began, which is update_after_step: --start 100",
        )
    return step - calls + 1.0
