"""Checkpoints: the exact state of running averages, in a folder beside the trainer's own checkpoint."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sharded_phema.errors import ModelMismatch, PhemaError, StoreError
from sharded_phema.folder import Folder, is_there, open_folder
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.seal import sealed, unsealed
from sharded_phema.store import open_run
from sharded_phema.store.dcp_reader import SnapshotReader
from sharded_phema.store.dcp_writer import SnapshotWriter
from sharded_phema.world import agree, from_first, grouped

__all__ = ["has_checkpoint", "load_checkpoint", "save_checkpoint"]

RECORD_BYTES = 1 << 16
"""Longest record that is read."""


def save_checkpoint(ema: PostHocEMA, folder: str | os.PathLike[str]) -> None:
    """Store the float32 averages and the training time of their last update, each rank its own shards. Collective.

    What the folder held before is removed once the new state is there whole, so that a killed save loses nothing.

    Args:
        ema: Running averages, of any backend.
        folder: Path or URL on storage that all ranks share; made if missing. Nothing else should lie in it.

    Raises:
        StoreError: A rank's part cannot be written; the state from before is intact.
    """
    place = open_folder(folder)
    state = agree(ema.state_dict)
    clock = {key: float(value) for key, value in state.pop("clock").items()}
    before = from_first(lambda: _numbers(place))
    number = max([*before, 0]) + 1
    if clock["start"] < math.inf:
        writer = SnapshotWriter(f"{folder}/{number:06d}", clock["updated"], start=clock["start"], unit=ema.unit)
        _through_dcp(lambda: save(state, storage_writer=writer, no_dist=not grouped()))
    record = {"unit": ema.unit, "clock": {k: v for k, v in clock.items() if v < math.inf}}
    from_first(lambda: place.write(f"{number:06d}.json", [sealed(record)]))
    from_first(lambda: _remove(place, before))


def load_checkpoint(ema: PostHocEMA, folder: str | os.PathLike[str]) -> float:
    """Continue from what ``save_checkpoint`` stored, on this or another number of ranks. Collective.

    Args:
        ema: New averages of the same model, which were not updated yet.
        folder: The folder.

    Returns:
        Training time of the last update.

    Raises:
        StoreError: There is no whole state in the folder, or it is damaged.
        ModelMismatch: It belongs to another model, or has other averages or another unit of time.
    """
    place = open_folder(folder)
    number, clock = from_first(lambda: _record(place, ema.unit))
    state = agree(ema.state_dict)
    if "start" in clock:
        run = agree(lambda: open_run(f"{folder}/{number:06d}"))
        expected = {label: set(tensors) for label, tensors in state.items() if label != "clock"}
        agree(lambda: _check_same(place, expected, run.record.averages, [p.name for p in run.record.parameters]))
        tensors = {label: state[label] for label in expected}
        reader = SnapshotReader(run.snapshots[-1])
        _through_dcp(lambda: load(tensors, storage_reader=reader, no_dist=not grouped()))
    for key, value in state["clock"].items():
        value.fill_(clock.get(key, math.inf))
    ema.load_state_dict(state)
    return ema.t


def has_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether ``load_checkpoint`` would find a state there. Collective."""
    place = open_folder(folder)
    return from_first(lambda: bool(_whole(place)))


def _through_dcp(act: Callable[[], object]) -> None:
    """Save or load; what failed is raised as it is, where DCP would wrap it in what no ``except`` catches."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        try:
            act()
        except CheckpointException as wrapped:
            errors = [error for error, _ in wrapped.failures.values()]
            raise next((error for error in errors if isinstance(error, PhemaError)), errors[0]) from None


def _check_same(
    place: Folder, expected: Mapping[str, set[str]], averages: tuple[str, ...], parameters: list[str]
) -> None:
    if set(expected) == set(averages) and all(names == set(parameters) for names in expected.values()):
        return
    ours = next(iter(expected.values()), set())
    raise ModelMismatch(
        f"{place.url}: expected the averages {sorted(expected)} of {len(ours)} parameters, "
        f"found {sorted(averages)} of {len(parameters)}; only on one side: {sorted(ours ^ set(parameters))[:3]}",
        hint="make PostHocEMA of the same model, with the same sigma_rels and profiles as when it was saved",
    )


def _record(place: Folder, unit: str) -> tuple[int, dict[str, float]]:
    numbers = _whole(place)
    if not numbers:
        raise StoreError(
            f"{place.url}: expected the state of running averages, found none",
            hint="give the folder that save_checkpoint wrote, or ema.resume() from the run's own snapshots",
        )
    name = f"{numbers[-1]:06d}.json"
    record = unsealed(place.read(name, RECORD_BYTES), f"{place.url}/{name}")
    if record["unit"] != unit:
        raise ModelMismatch(
            f"{place.url}: expected time in {unit}, found {record['unit']}", hint="continue with the unit it began with"
        )
    return numbers[-1], record["clock"]


def _whole(place: Folder) -> list[int]:
    return [number for number in _numbers(place) if is_there(place, f"{number:06d}.json")]


def _numbers(place: Folder) -> list[int]:
    """States in a folder, whole or not, in the order in which they were saved."""
    stems = {entry.name.removesuffix(".json") for entry in place.list("")}
    return sorted(int(stem) for stem in stems if len(stem) == 6 and stem.isdecimal() and stem.isascii())


def _remove(place: Folder, numbers: Sequence[int]) -> None:
    """Remove states: of each its record first, so that no half of one is ever loaded."""
    for number in numbers:
        place.remove(f"{number:06d}.json")
        _remove_tree(place, f"{number:06d}")


def _remove_tree(place: Folder, name: str) -> None:
    for entry in place.list(name):
        path = f"{name}/{entry.name}"
        _remove_tree(place, path)
        place.remove(path)
    place.remove(name)
