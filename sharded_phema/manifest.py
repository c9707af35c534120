"""What a run folder says of itself: frozen records and their versioned JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sharded_phema.errors import StoreError
from sharded_phema.layout import Box

__all__ = [
    "VERSION",
    "FrozenRecord",
    "LayoutRecord",
    "Parameter",
    "PartRecord",
    "RawTensor",
    "RunRecord",
    "SessionRecord",
    "decode",
    "encode",
]

VERSION = 1
"""Version of the format; a reader refuses any other."""

R = TypeVar("R", "RunRecord", "SessionRecord", "LayoutRecord", "PartRecord", "FrozenRecord")


@dataclass(frozen=True, slots=True)
class Parameter:
    """Name and global shape of one parameter of the unwrapped model."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor of the unwrapped model that is stored as it is.

    Attributes:
        name: Its name.
        shape: Its global shape.
        dtype: Its own dtype, by torch's name.
        kind: "parameter" or "buffer".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run stores of its model; written once, when its folder is made.

    Attributes:
        run: Random identity of the run.
        unit: What training time counts: steps, samples, tokens ...
        dtype: What the averages are rounded to in every snapshot: float32, float16 or bfloat16.
        averages: What each tracked average follows, spelled as a target, in order.
        parameters: Every averaged parameter, in the order of the layout.
        copied: Tensors that every snapshot holds as they are, in the order of the layout.
        frozen: Tensors that are stored as they are once, and again where they change.
    """

    run: str
    unit: str
    dtype: str = field(default="float32", kw_only=True)
    averages: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    copied: tuple[RawTensor, ...] = ()
    frozen: tuple[RawTensor, ...] = ()

    @property
    def raw(self) -> tuple[RawTensor, ...]:
        """All tensors that are stored as they are: the copied ones, then the frozen ones."""
        return self.copied + self.frozen


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One uninterrupted stretch of training that stored snapshots.

    Attributes:
        run: Identity of the run.
        session: Random identity of the stretch.
        parent: The session that this one continued; empty for the first.
        resumed_at: Training time of the state that it continued from. Snapshots that
            earlier sessions took later than this belong to an abandoned timeline.
        world_size: Number of ranks, each of which writes a part of every snapshot.
        frozen_from: The earlier session that held the frozen tensors which this one found stored; empty for none.
        frozen_numbers: Which of its stores held the pieces of each of that session's ranks, as ``PartRecord.frozen``.
    """

    run: str
    session: str
    parent: str
    resumed_at: float
    world_size: int
    frozen_from: str = ""
    frozen_numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LayoutRecord:
    """The boxes that one rank stores throughout a session, by tensor in the run's order.

    Attributes:
        run: Identity of the run.
        session: The session.
        rank: The rank.
        boxes: Of each averaged parameter.
        copied: Of each copied tensor.
        frozen: Of each frozen tensor.
        marks: Fingerprints of the rank's boxes of the frozen tensors, of the content that the session found stored;
            empty where there was none, or other content than the rank's own.
    """

    run: str
    session: str
    rank: int
    boxes: tuple[tuple[Box, ...], ...]
    copied: tuple[tuple[Box, ...], ...] = ()
    frozen: tuple[tuple[Box, ...], ...] = ()
    marks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FrozenRecord:
    """One rank's frozen tensors as of one moment of a session.

    Attributes:
        run: Identity of the run.
        session: The session that stored them.
        number: Number of this store among the rank's own in the session, from 1.
        rank: Who stored them.
        size: Length of the tensor file in bytes.
        marks: Fingerprint of the rank's boxes of each frozen tensor.
    """

    run: str
    session: str
    number: int
    rank: int
    size: int
    marks: tuple[int, ...]

    @property
    def identity(self) -> dict[str, str]:
        """What the tensor file says of itself, so that a swapped or stale one is told."""
        return {"frozen": str(self.number)} | {key: str(getattr(self, key)) for key in ("run", "session", "rank")}


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One rank's part of one snapshot. A snapshot exists once the parts of all ranks do.

    Attributes:
        run: Identity of the run.
        session: The session that took the snapshot.
        snapshot: Number of the snapshot within its session, from 0.
        rank: Who wrote the part.
        t: Training time, in the run's unit.
        start: Training time of the first update that entered the averages.
        size: Length of the tensor file in bytes.
        norms: Squared norm of the rank's part of each average; empty where a number in it is not finite.
        gaps: The same of the difference of each pair of averages, in the order of ``itertools.combinations``.
        frozen: Number of the rank's own store that holds its frozen tensors as they were then; 0 where they were
            those that the session found stored.
    """

    run: str
    session: str
    snapshot: int
    rank: int
    t: float
    start: float
    size: int
    norms: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()
    frozen: int = 0

    @property
    def identity(self) -> dict[str, str]:
        """What the part's tensor file says of itself, so that a swapped or stale one is told."""
        return {key: str(getattr(self, key)) for key in ("run", "session", "snapshot", "rank")}


def encode(record: RunRecord | SessionRecord | LayoutRecord | PartRecord | FrozenRecord) -> str:
    """JSON text of a record; :func:`decode` gives back an equal record, floats to the last bit."""
    head = {"format": f"sharded_phema {type(record).__name__}", "version": VERSION}
    # Boxes and fingerprints are many; the other records are read by people too.
    indent = None if isinstance(record, LayoutRecord | FrozenRecord) else 1
    return json.dumps(head | dataclasses.asdict(record), allow_nan=False, indent=indent) + "\n"


def decode(kind: type[R], text: str | bytes, where: object) -> R:
    """The record that a JSON text holds.

    Args:
        kind: Class of record to expect.
        text: What was read.
        where: The file, for messages.

    Raises:
        StoreError: The text is no such record, or of another version.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
        head = {"format": data.pop("format"), "version": data.pop("version")}
        if head != {"format": f"sharded_phema {kind.__name__}", "version": VERSION}:
            raise ValueError(f"expected a {kind.__name__} of version {VERSION}, found {head}")
        record: R = _typed(kind, data, kind.__name__)
        return record
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise StoreError(
            f"{where}: not a record of sharded_phema that this version reads: {error}",
            hint="the file was damaged or edited, or a newer version wrote it; restore it or upgrade",
        ) from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type, lists becoming tuples and objects becoming records."""
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        if not isinstance(value, dict) or set(value) != set(hints):
            raise ValueError(f"{where} needs exactly {sorted(hints)}, found {_shown(value)}")
        make: Any = hint
        return make(**{key: _typed(hints[key], value[key], f"{where}.{key}") for key in hints})
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, found {_shown(value)}")
        return tuple(_typed(get_args(hint)[0], item, where) for item in value)
    return _scalar(hint, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    # JSON writes 5.0 and 5 alike, and Python takes True for a number.
    fits = isinstance(value, hint) or (hint is float and isinstance(value, int))
    if not fits or isinstance(value, bool):
        raise ValueError(f"{where} must be {hint.__name__}, found {_shown(value)}")
    if hint is int and value < 0:
        raise ValueError(f"{where} must not be negative, found {value}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, found {value}")
    return hint(value)


def _shown(value: Any) -> str:
    text = sorted(value) if isinstance(value, dict) else repr(value)
    return f"{text!s:.200}"
