"""What a run folder says of itself: frozen records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from sharded_phema.layout import Box

__all__ = [
    "VERSION",
    "ClaimRecord",
    "Cut",
    "FrozenRecord",
    "LayoutRecord",
    "Parameter",
    "Part",
    "R",
    "RawTensor",
    "Record",
    "RunRecord",
    "SessionRecord",
    "SnapshotRecord",
]

VERSION = 1
"""Version of the format; a reader refuses any other."""

Record: TypeAlias = "ClaimRecord | RunRecord | SessionRecord | LayoutRecord | FrozenRecord | SnapshotRecord"
R = TypeVar("R", "ClaimRecord", "RunRecord", "SessionRecord", "LayoutRecord", "FrozenRecord", "SnapshotRecord")


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
        world_size: Number of ranks, each of which may write a part of every snapshot.
        layout: Identity of the layout of its ranks.
        frozen_from: The earlier session that held the frozen tensors which this one found stored; empty for none.
        frozen_numbers: Which of its stores held the pieces of each of that session's ranks, as ``Part.frozen``.
    """

    run: str
    session: str
    parent: str
    resumed_at: float
    world_size: int
    layout: str
    frozen_from: str = ""
    frozen_numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ClaimRecord:
    """A process that goes on with a run.

    Attributes:
        run: Identity of the run.
        number: Number of the claim, higher than all that lay there when it was made.
        host: Name of its machine, for people.
        pid: Its process number.
        place: Where that number means this process: a boot of a machine, and a container.
    """

    run: str
    number: int
    host: str
    pid: int
    place: str


@dataclass(frozen=True, slots=True)
class Cut:
    """Which rank writes what of one tensor; in one of two forms.

    Attributes:
        dim: Rank r writes the slab from ``edges[r]`` to ``edges[r + 1]`` of this dimension; 0 in the other form.
        edges: One more than there are ranks; empty in the other form.
        ranks: Ranks that write anything, in order.
        boxes: What each of these writes.
    """

    dim: int = 0
    edges: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    boxes: tuple[tuple[Box, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class LayoutRecord:
    """Which rank writes which boxes of which tensor, in the run's order; shared by all sessions that are cut alike.

    Attributes:
        run: Identity of the run.
        world_size: Number of ranks.
        averaged: Of each averaged parameter.
        copied: Of each copied tensor.
        frozen: Of each frozen tensor.
    """

    run: str
    world_size: int
    averaged: tuple[Cut, ...]
    copied: tuple[Cut, ...] = ()
    frozen: tuple[Cut, ...] = ()


@dataclass(frozen=True, slots=True)
class FrozenRecord:
    """One rank's frozen tensors as of one moment of a session.

    Attributes:
        run: Identity of the run.
        session: The session that stored them.
        number: Number of this store among the rank's own in the session, from 1.
        rank: Who stored them.
        size: Length of the tensor file in bytes.
        digests: XXH3-128 of each block of the tensor file, end to end; 16 bytes a block.
    """

    run: str
    session: str
    number: int
    rank: int
    size: int = 0
    digests: bytes = b""

    @property
    def identity(self) -> dict[str, str]:
        """What the tensor file says of itself, so that a swapped or stale one is told."""
        return {"frozen": str(self.number)} | {key: str(getattr(self, key)) for key in ("run", "session", "rank")}


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of a snapshot.

    Attributes:
        size: Length of its tensor file in bytes; 0 where it has none.
        digests: XXH3-128 of each block of the tensor file, end to end; 16 bytes a block.
        frozen: Number of the rank's own store that holds its frozen tensors as they were then; 0 where they were
            those that the session found stored.
    """

    size: int = 0
    digests: bytes = b""
    frozen: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """One snapshot. It exists once this record does, which is written last.

    Attributes:
        run: Identity of the run.
        session: The session that took it.
        snapshot: Number within its session, from 0.
        t: Training time, in the run's unit.
        start: Training time of the first update that entered the averages.
        parts: What each rank wrote, in rank order.
        norms: Squared norm of each average; empty where a number in it is not finite.
        gaps: The same of the difference of each pair of averages, in the order of ``itertools.combinations``.
        frozen_mark: Digest of the fingerprints of all frozen tensors as they were then; empty where there are none.
    """

    run: str
    session: str
    snapshot: int
    t: float
    start: float
    parts: tuple[Part, ...]
    norms: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()
    frozen_mark: str = ""

    def identity(self, rank: int) -> dict[str, str]:
        """What the tensor file of a rank says of itself, so that a swapped or stale one is told."""
        facts = {key: str(getattr(self, key)) for key in ("run", "session", "snapshot")}
        return facts | {"t": repr(float(self.t)), "rank": str(rank)}
