"""What a reader of foreign checkpoints gives, and how it is told to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from sharded_phema.errors import StoreError
from sharded_phema.target import parse_target
from sharded_phema.tracked import tracked_set

__all__ = ["Find", "Foreign", "Lazy", "Reading", "Tensors", "label_of", "single_label", "within"]


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor in a file, of which nothing is read before it is asked for.

    Attributes:
        shape: Its global shape.
        dtype: Its dtype, by torch's name.
        read: Gives the elements ``[start, stop)`` of the flattened tensor as a 1-d tensor of its dtype.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], Tensor]


Tensors: TypeAlias = Mapping[str, Lazy]
"""Tensors of one model by name, in the model's order."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """One foreign checkpoint.

    Attributes:
        where: File or folder, for people.
        t: Training time of its weights, in the run's unit.
        start: Training time of the first weights that its averages hold.
        open: Reads what it holds: for each average, spelled as a target without a time, its tensors.
        size: Bytes of its files, and when they were changed: tells whether an import may go on.
        assumed: What its files do not tell, and what was taken for it.
    """

    where: str
    t: float
    start: float
    open: Callable[[], Mapping[str, Tensors]]
    size: tuple[int, ...]
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """How foreign checkpoints are to be read.

    Args:
        profiles: What the tensors are, as targets that a run can store; without any, what the format says, or
            ``checkpoint``: the weights themselves.
        unit: What training time counts; empty for what the format counts, mostly steps.
        start: Training time of the first weights that the averages hold; None where the files or the format tell.
        update_every: Steps from one update of the averages to the next, for packages whose files do not tell.
        time_pattern: Regular expression whose first group in a file's or folder's name is the training time; empty
            for the last integer there.
        key: Place of the state dict inside of a checkpoint, with dots between its parts.
        prefix: Only tensors whose names begin so are read, without it.
        copy: Patterns of names, as of files, of tensors that are copied instead of averaged.

    Raises:
        TargetError: A profile is none.
    """

    profiles: tuple[str, ...] = ()
    unit: str = ""
    start: float | None = None
    update_every: float | None = None
    time_pattern: str = ""
    key: str = ""
    prefix: str = ""
    copy: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for profile in self.profiles:
            parse_target(profile)


Find: TypeAlias = Callable[[Path, Reading], Sequence[Foreign]]
"""Finds the checkpoints of one format below a folder. Reads names and headers, no tensors."""


def single_label(reading: Reading) -> str:
    """The average that every tensor of a checkpoint belongs to, spelled as a run records it.

    Raises:
        StoreError: Several are given.
        TargetError: It is nothing that a checkpoint can hold.
    """
    labels = reading.profiles or ("checkpoint",)
    if len(labels) > 1:
        raise StoreError(
            f"--profile {' --profile '.join(labels)}: expected one, because these checkpoints hold one average each",
            hint="give one, such as exponential:decay=0.9999 or 0.05; the default is checkpoint",
        )
    return label_of(labels[0], reading.start or 0.0)


def label_of(text: str, start: float) -> str:
    """How a run records an average.

    Args:
        text: The average, as a target.
        start: Training time before which nothing was averaged.

    Raises:
        TargetError: It is nothing that a checkpoint can hold.
    """
    target = parse_target(text)
    stored = target.time is None and (target.kind == "checkpoint" or target.every > 0.0)
    return target.text if stored else tracked_set([text], start).labels[0]


def within(tensors: Tensors, prefix: str, where: str) -> Tensors:
    """Tensors whose names begin with a prefix, without it.

    Raises:
        StoreError: There is none.
    """
    found = {name.removeprefix(prefix): lazy for name, lazy in tensors.items() if name.startswith(prefix)}
    if not found:
        some = ", ".join(list(tensors)[:3]) or "none at all"
        raise StoreError(
            f"{where}: expected tensors{f' whose names begin with {prefix!r}' if prefix else ''}, found {some}",
            hint="name what is wanted with --key, where it lies in the file, and --prefix, how its names begin",
        )
    return found
