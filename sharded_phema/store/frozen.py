"""Frozen tensors on disk: each rank's stores of them, and what all ranks of a session held at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sharded_phema.errors import StoreError
from sharded_phema.fingerprint import MODULUS
from sharded_phema.layout import ShardLayout, cut
from sharded_phema.manifest import FrozenRecord, LayoutRecord, RunRecord, SessionRecord, encode
from sharded_phema.store import names
from sharded_phema.store.boxes import pieces_of
from sharded_phema.store.files import place, write_text
from sharded_phema.store.records import check_run, read_layouts, read_record
from sharded_phema.store.stored import Numbers, Stored
from sharded_phema.store.tensors import bits_of, first_byte, read_bits, write_tensors
from sharded_phema.tensorfile import dtype_name

__all__ = ["FrozenLayer", "frozen_layers", "marks_of", "stored_frozen", "write_frozen"]


def write_frozen(root: Path, record: FrozenRecord, layout: ShardLayout) -> None:
    """Store this rank's boxes of the frozen tensors as they are, and then the record. No collective.

    Args:
        root: Run folder.
        record: Who stores what; its size is found here.
        layout: The frozen tensors; only first replicas are stored.

    Raises:
        StoreError: A file exists already or cannot be written.
    """
    tensors = {
        names.box_key(shard.name, number): piece
        for shard in layout
        if shard.replica == 0
        for number, piece in enumerate(pieces_of(shard).values())
    }
    dtypes = {key: dtype_name(tensor.dtype) for key, tensor in tensors.items()}
    path, commit = names.frozen_paths(root, record.session, record.number, record.rank)
    place(path, lambda temporary: write_tensors(temporary, tensors, dtypes, record.identity))
    write_text(commit, encode(replace(record, size=path.stat().st_size)))


@dataclass(frozen=True)
class FrozenLayer:
    """What the ranks of one session held of the frozen tensors at one moment.

    Attributes:
        root: Run folder.
        record: The run.
        session: The session.
        numbers: Which of each rank's stores holds its boxes; 0 where they are what the session found stored, which
            is the next layer.
        layouts: The boxes of each rank.
    """

    root: Path
    record: RunRecord
    session: str
    numbers: tuple[int, ...]
    layouts: tuple[LayoutRecord, ...] = field(repr=False)
    _stores: dict[int, FrozenRecord] = field(default_factory=dict, repr=False, compare=False)

    def store(self, rank: int) -> FrozenRecord:
        """The record of a rank's store.

        Raises:
            StoreError: It is missing, damaged, or another's.
        """
        if rank not in self._stores:
            path = names.frozen_paths(self.root, self.session, self.numbers[rank], rank)[1]
            record = read_record(FrozenRecord, path)
            check_run(path, self.record, record)
            expected = (self.session, self.numbers[rank], rank, len(self.record.frozen))
            if (found := (record.session, record.number, record.rank, len(record.marks))) != expected:
                raise StoreError(
                    f"{path}: expected session, number, rank and tensors {expected}, found {found}",
                    hint="the record was swapped with another's; restore the run folder",
                )
            self._stores[rank] = record
        return self._stores[rank]

    def read(self, rank: int, index: int, number: int, first: int, out: Numbers) -> None:
        """Fill an array with elements of one box that a rank stored of a frozen tensor."""
        tensor, store = self.record.frozen[index], self.store(rank)
        path = names.frozen_paths(self.root, self.session, self.numbers[rank], rank)[0]
        key, numel = names.box_key(tensor.name, number), self.layouts[rank].frozen[index][number].numel
        begin = first_byte(path, store.size, store.identity, key, tensor.dtype, numel)
        read_bits(path, begin + out.itemsize * first, out)


def frozen_layers(root: Path, record: RunRecord, session: str, numbers: Sequence[int]) -> tuple[FrozenLayer, ...]:
    """What a session held at one moment, then what it had found stored, and so on back to the first store.

    Raises:
        StoreError: A record is missing, damaged or contradicts another.
    """
    layers: list[FrozenLayer] = []
    while session:
        path = names.session_path(root, session)
        head = read_record(SessionRecord, path)
        check_run(path, record, head)
        if len(numbers) != head.world_size or session in [layer.session for layer in layers]:
            raise StoreError(
                f"{path}: a later session refers to the frozen tensors of {len(numbers)} ranks of this one, expected "
                f"{head.world_size}, and each session once",
                hint="session records were edited or mixed; restore the run folder",
            )
        layers.append(FrozenLayer(root, record, session, tuple(numbers), read_layouts(root, record, head)))
        session, numbers = head.frozen_from, head.frozen_numbers
    return tuple(layers)


def stored_frozen(layers: Sequence[FrozenLayer], index: int) -> Stored:
    """A frozen tensor, by its index in the run's record, as the first of some layers has it."""
    if not layers:
        raise StoreError(
            "a rank's frozen tensors are said to be stored earlier, and no session before it stored any",
            hint="session records were edited or mixed; restore the run folder",
        )
    layer, tensor = layers[0], layers[0].record.frozen[index]

    def fill(rank: int, number: int, first: int, out: Numbers) -> None:
        if layer.numbers[rank]:
            layer.read(rank, index, number, first, out)
            return
        earlier = stored_frozen(layers[1:], index)
        for box in cut([layer.layouts[rank].frozen[index][number]], first, first + out.size):
            out[: box.numel] = earlier.read_box(box).reshape(-1)
            out = out[box.numel :]

    boxes = [layout.frozen[index] for layout in layer.layouts]
    where = layer.root / "frozen"
    return Stored(where, tensor.name, tensor.shape, boxes, bits_of(tensor.dtype), fill)


def marks_of(layer: FrozenLayer) -> tuple[int, ...]:
    """Fingerprints of the whole frozen tensors as a layer has them.

    Raises:
        StoreError: A record is missing or damaged.
    """
    ranks = enumerate(layer.layouts)
    marks = [layer.store(rank).marks if layer.numbers[rank] else layout.marks for rank, layout in ranks]
    # A rank that holds no frozen element may have none.
    return tuple(sum(of) % MODULUS for of in zip(*filter(None, marks), strict=True))
