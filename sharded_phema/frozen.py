"""Frozen: which of a rank's stores holds the tensors that do not train, so that they are stored once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import xxhash

from sharded_phema.errors import StoreError
from sharded_phema.fingerprint import MODULUS, fingerprints
from sharded_phema.layout import ParamShard, ShardLayout, cut
from sharded_phema.store import FrozenLayer, Run, Stored, stored_frozen
from sharded_phema.world import agree, gather

__all__ = ["Found", "Frozen", "Marks", "found_in", "mark_of"]

CHUNK = 1 << 20
"""Elements that are read at a time."""

Marks = tuple[int, ...]
"""Fingerprints of what a rank writes of each frozen tensor."""


@dataclass(frozen=True, slots=True)
class Found:
    """Frozen tensors that a run folder holds already, as of its last snapshot.

    Attributes:
        session: Whose they are; empty for none.
        numbers: Which store of each rank of that session.
        mark: Digest of the fingerprints of the whole tensors.
    """

    session: str = ""
    numbers: tuple[int, ...] = ()
    mark: str = ""


def found_in(run: Run) -> Found:
    """What the last snapshot of a run says of its frozen tensors."""
    if not (run.snapshots and run.record.frozen):
        return Found()
    last = run.snapshots[-1]
    # A session all of whose ranks refer to what it found is of no more interest itself.
    held = next((layer for layer in last.frozen if any(layer.numbers)), None)
    return Found() if held is None else Found(held.session, held.numbers, last.facts.frozen_mark)


def mark_of(ranks: Sequence[Marks]) -> str:
    """Digest of the fingerprints of whole tensors, from those of the pieces of all ranks; empty for no tensors."""
    totals = [sum(of) % MODULUS for of in zip(*ranks, strict=True)]
    return xxhash.xxh3_128_hexdigest(repr(totals).encode()) if totals else ""


class Frozen:
    """What this rank knows of its frozen tensors in storage. Made on every rank at once: collective.

    Later no rank asks another. A rank whose tensors changed stores its own again, whatever the others do.

    Args:
        layout: Live shards of the frozen tensors.
        found: What the run folder holds already.
    """

    def __init__(self, layout: ShardLayout, found: Found) -> None:
        self.found = found
        own = agree(lambda: marks_here(layout))
        same = bool(found.mark) and mark_of(gather(own)) == found.mark
        # A rank that has none never stores any; () is what no tensors' marks are equal to.
        self.marks: Marks = own if same or not _written(layout) else ()
        self._asked = same or not (found.session and _written(layout))
        self._number, self._tries = 0, 0

    def recognise(self, layout: ShardLayout, layers: Callable[[], Sequence[FrozenLayer]]) -> None:
        """Compare this rank's tensors with what was found stored, if that was not done before.

        Weights may have been loaded after this object was made. What is stored is read then, once.

        Args:
            layout: Live shards of the frozen tensors.
            layers: Where the tensors that were found lie.
        """
        if not self._asked:
            self._asked = True
            own = marks_here(layout)
            self.marks = own if _same(layout, own, layers) else ()

    def number(self, layout: ShardLayout, store: Callable[[int], None]) -> int:
        """Which of this rank's stores holds its tensors as they are now; 0 for what was found. No collective.

        Args:
            layout: Live shards of the frozen tensors.
            store: Stores them under a number; called where they changed.
        """
        marks = marks_here(layout)
        if marks != self.marks:
            self._tries += 1  # a number whose store failed may have left a file: it is not used again
            store(self._tries)
            self.marks, self._number = marks, self._tries
        return self._number


def _written(layout: ShardLayout) -> bool:
    """Whether this rank writes any element."""
    return any(shard.replica == 0 and box.numel for shard in layout for box in shard.boxes)


def marks_here(layout: ShardLayout) -> Marks:
    """Fingerprints of what this rank writes of each tensor."""
    return tuple(fingerprints([shard if shard.replica == 0 else replace(shard, boxes=()) for shard in layout]))


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
