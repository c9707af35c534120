"""Frozen: which of a rank's stores holds the tensors that do not train, so that they are stored once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sharded_phema.errors import StoreError
from sharded_phema.fingerprint import MODULUS, fingerprints
from sharded_phema.layout import ParamShard, ShardLayout, cut
from sharded_phema.store import FrozenLayer, Run, Stored, marks_of, stored_frozen
from sharded_phema.world import agree, gather

__all__ = ["Found", "Frozen", "found_in"]

CHUNK = 1 << 20
"""Elements that are read at a time."""

Marks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Frozen tensors that a run folder holds already, as of its last snapshot.

    Attributes:
        session: Whose they are; empty for none.
        numbers: Which store of each rank of that session.
        marks: Fingerprints of the whole tensors; empty where they cannot be read.
    """

    session: str = ""
    numbers: tuple[int, ...] = ()
    marks: Marks = ()


def found_in(run: Run) -> Found:
    """What the last snapshot of a run says of its frozen tensors.

    Raises:
        StoreError: A record of a session is missing or damaged.
    """
    if not (run.snapshots and run.record.frozen):
        return Found()
    layers = run.snapshots[-1].frozen
    # A session all of whose ranks refer to what it found is of no more interest itself.
    held = next((layer for layer in layers if any(layer.numbers)), None)
    if held is None:
        return Found()
    try:
        return Found(held.session, held.numbers, marks_of(layers[0]))
    except StoreError:
        return Found(held.session, held.numbers)


class Frozen:
    """What this rank knows of its frozen tensors in storage. Made on every rank at once: collective.

    Later no rank asks another. A rank whose tensors changed stores its own again, whatever the others do.

    Args:
        layout: Live shards of the frozen tensors.
        found: What the run folder holds already.
    """

    def __init__(self, layout: ShardLayout, found: Found) -> None:
        self.found = found
        own = agree(lambda: _marks(layout))
        same = bool(found.marks) and _added(gather(own)) == found.marks
        # A rank that has none never stores any; () is what no tensors' marks are equal to.
        self._inherited: Marks = own if same or not _written(layout) else ()
        self._asked = same or not (found.session and _written(layout))
        self._last, self._number, self._tries = self._inherited, 0, 0

    def inherited(self, layout: ShardLayout, layers: Callable[[], Sequence[FrozenLayer]]) -> Marks:
        """Fingerprints of this rank's part of what was found stored; empty where the rank's own tensors differ.

        Weights may have been loaded after this object was made. What is stored is read then, once, and compared.

        Args:
            layout: Live shards of the frozen tensors.
            layers: Where the tensors that were found lie.
        """
        if not self._asked:
            self._asked = True
            own = _marks(layout)
            self._inherited = self._last = own if _same(layout, own, layers) else ()
        return self._inherited

    def number(self, layout: ShardLayout, store: Callable[[int, Marks], None]) -> int:
        """Which of this rank's stores holds its tensors as they are now; 0 for what was found. No collective.

        Args:
            layout: Live shards of the frozen tensors.
            store: Stores them under a number, with their fingerprints; called where they changed.
        """
        marks = _marks(layout)
        if marks != self._last:
            self._tries += 1  # a number whose store failed may have left a file: it is not used again
            store(self._tries, marks)
            self._last, self._number = marks, self._tries
        return self._number


def _written(layout: ShardLayout) -> bool:
    """Whether this rank writes any element."""
    return any(shard.replica == 0 and box.numel for shard in layout for box in shard.boxes)


def _marks(layout: ShardLayout) -> Marks:
    """Fingerprints of what this rank writes of each tensor."""
    return tuple(fingerprints([shard if shard.replica == 0 else replace(shard, boxes=()) for shard in layout]))


def _added(marks: Sequence[Marks]) -> Marks:
    return tuple(sum(of) % MODULUS for of in zip(*marks, strict=True))


def _same(layout: ShardLayout, own: Marks, layers: Callable[[], Sequence[FrozenLayer]]) -> bool:
    """Whether what is stored is what this rank has; False where it cannot be read."""
    try:
        found = layers()
        pairs = enumerate(zip(layout, own, strict=True))
        return all(_stored_mark(shard, stored_frozen(found, index)) == mark for index, (shard, mark) in pairs)
    except StoreError:
        return False


def _stored_mark(shard: ParamShard, stored: Stored) -> int:
    """Fingerprint of what is stored of the boxes that this rank writes, chunk by chunk."""
    mark = 0
    for box in shard.boxes if shard.replica == 0 else ():
        for start in range(0, box.numel, CHUNK):
            for part in cut([box], start, start + CHUNK):
                bits = torch.from_numpy(stored.read_box(part))
                mark += fingerprints([replace(shard, boxes=(part,), local=bits)])[0]
    return mark % MODULUS
