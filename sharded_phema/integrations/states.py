"""States: exact averages beside checkpoints whose place no callback is told, the latest few in their own folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sharded_phema.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from sharded_phema.errors import StoreError
from sharded_phema.folder import Folder, open_folder
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.world import from_first

__all__ = ["Note", "restore_state", "save_state"]

Note = Mapping[str, Any]
"""What a checkpoint tells of its averages: ``run_dir``; ``t``, their training time; ``state``, the name of the folder
that holds them, empty where none does; ``saved``, the states that were kept when it was written, oldest first."""


def save_state(ema: PostHocEMA, note: Note, session: str, keep: int) -> dict[str, Any]:
    """Store a state, once for all checkpoints of the same training time, and drop those that are too many. Collective.

    Only states that this training, or what it goes on from, has saved are dropped, not those of an abandoned timeline.

    Args:
        ema: Running averages.
        note: The last one that was given, or the one of the checkpoint that training goes on from.
        session: Text that no other stretch of training has, the same on all ranks.
        keep: How many stay; -1 keeps all.

    Returns:
        The note for the checkpoint.

    Raises:
        StoreError: The state cannot be written.
    """
    name = f"{ema.t:.17g}-{session}"
    if note["state"] == name:
        return dict(note)
    states, saved = _beside(ema.root), [*note["saved"], name]
    save_checkpoint(ema, f"{states}/{name}")
    kept = saved if keep == -1 else saved[-keep:]
    from_first(lambda: _remove_all(open_folder(states), saved[: len(saved) - len(kept)]))
    return {"run_dir": ema.root, "t": ema.t, "state": name, "saved": kept}


def restore_state(ema: PostHocEMA, note: Note) -> None:
    """Continue from the state that a checkpoint tells of, or from the run's snapshot of its time. Collective.

    Args:
        ema: New averages, which were not updated yet.
        note: What the checkpoint tells.

    Raises:
        StoreError: There is neither, or it is damaged.
        ModelMismatch: It belongs to another model, or has other averages or another unit of time.
    """
    for root in dict.fromkeys((ema.root, note["run_dir"])):
        place = f"{_beside(root)}/{note['state']}"
        if note["state"] and has_checkpoint(place):
            load_checkpoint(ema, place)
            return
    try:
        ema.resume(note["t"])
    except StoreError as error:
        raise StoreError(
            f"the checkpoint's averages: expected their state {note['state'] or '(none was saved)'} in "
            f"{_beside(ema.root)}, or a snapshot of the same time; found neither. {error.message}",
            hint="go on from a later checkpoint, or give run_dir= if the folder was moved; keep=-1 keeps every state",
        ) from error


def _beside(root: str) -> str:
    return f"{root}-checkpoints"


def _remove_all(folder: Folder, names: Sequence[str]) -> None:
    for name in names:
        _remove(folder, name)


def _remove(folder: Folder, name: str) -> None:
    """Remove a folder, its records first, so that no half of a state is ever loaded."""
    for entry in sorted(folder.list(name), key=lambda entry: entry.is_folder):
        _remove(folder, f"{name}/{entry.name}")
    folder.remove(name)
