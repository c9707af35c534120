"""Frozen tensors in storage: each rank's stores of them, and what all ranks of a session held at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sharded_phema.blocks import BlockFile
from sharded_phema.errors import StoreError
from sharded_phema.folder import Folder
from sharded_phema.layout import Box, ShardLayout, cut
from sharded_phema.manifest import FrozenRecord, RunRecord, SessionRecord
from sharded_phema.store import names
from sharded_phema.store.cuts import Layout
from sharded_phema.store.records import check_run, read_record, write_record
from sharded_phema.store.stored import Numbers, Stored
from sharded_phema.store.tensors import TensorFile, bits_of, write_tensors
from sharded_phema.tensorfile import dtype_name

__all__ = ["FrozenLayer", "frozen_layers", "stored_frozen", "write_frozen"]


def write_frozen(folder: Folder, record: FrozenRecord, layout: ShardLayout) -> None:
    """Store this rank's boxes of the frozen tensors as they are, and then the record. No collective.

    Args:
        folder: The run folder.
        record: Who stores what; its size and digests are found here.
        layout: The frozen tensors; only first replicas are stored.

    Raises:
        StoreError: A file exists already or cannot be written.
    """
    from sharded_phema.store.boxes import pieces_of  # readers do without torch.distributed.checkpoint, half a second

    tensors = {
        names.box_key(shard.name, number): piece
        for shard in layout
        if shard.replica == 0
        for number, piece in enumerate(pieces_of(shard).values())
    }
    dtypes = {key: dtype_name(tensor.dtype) for key, tensor in tensors.items()}
    name, commit = names.frozen_files(record.session, record.number, record.rank)
    size, digests = write_tensors(folder, name, tensors, dtypes, record.identity)
    write_record(folder, commit, replace(record, size=size, digests=digests))


@dataclass(frozen=True)
class FrozenLayer:
    """What the ranks of one session held of the frozen tensors at one moment.

    Attributes:
        root: The run folder.
        record: The run.
        session: The session.
        numbers: Which of each rank's stores holds its boxes; 0 where they are what the session found stored, which
            is the next layer.
        layout: The boxes of each rank.
    """

    root: Folder
    record: RunRecord
    session: str
    numbers: tuple[int, ...]
    layout: Layout = field(repr=False)
    _files: dict[int, TensorFile] = field(default_factory=dict, init=False, repr=False, compare=False)

    def file(self, rank: int) -> TensorFile:
        """The tensors that a rank stored.

        Raises:
            StoreError: Their record is missing, damaged, or another's.
        """
        if rank not in self._files:
            name, commit = names.frozen_files(self.session, self.numbers[rank], rank)
            where, record = f"{self.root.url}/{commit}", read_record(FrozenRecord, self.root, commit)
            check_run(where, self.record, record)
            expected = (self.session, self.numbers[rank], rank)
            if (found := (record.session, record.number, record.rank)) != expected:
                raise StoreError(
                    f"{where}: expected session, number and rank {expected}, found {found}",
                    hint="the record was swapped with another's; restore the run folder",
                )
            self._files[rank] = TensorFile(BlockFile(self.root, name, record.size, record.digests), record.identity)
        return self._files[rank]

    def check(self) -> None:
        """Read all files of this layer, and prove that they are what their records say.

        Raises:
            StoreError: One is missing or damaged.
        """
        for rank, number in enumerate(self.numbers):
            if number:
                self.file(rank).check(
                    [
                        (names.box_key(tensor.name, i), tensor.dtype, box.numel)
                        for index, tensor in enumerate(self.record.frozen)
                        for holder, boxes in self.layout.frozen(index)
                        if holder == rank
                        for i, box in enumerate(boxes)
                    ]
                )


def frozen_layers(
    folder: Folder,
    record: RunRecord,
    sessions: Mapping[str, SessionRecord],
    layouts: Mapping[str, Layout],
    session: str,
    numbers: Sequence[int],
) -> tuple[FrozenLayer, ...]:
    """What a session held at one moment, then what it had found stored, and so on back to the first store.

    Args:
        folder: The run folder.
        record: The run.
        sessions: Records of all sessions.
        layouts: Their layouts.
        session: Whose snapshot it is.
        numbers: Of which stores, by rank.

    Raises:
        StoreError: Records contradict each other.
    """
    layers: list[FrozenLayer] = []
    while session and record.frozen:
        head = sessions.get(session)
        if head is None or len(numbers) != head.world_size or session in [layer.session for layer in layers]:
            raise StoreError(
                f"{folder.url}: frozen tensors are said to be those of {len(numbers)} ranks of session {session}, "
                f"which {'is missing' if head is None else f'has {head.world_size}'}; {len(layers)} refer to it",
                hint="session records were edited or mixed; restore the run folder",
            )
        layers.append(FrozenLayer(folder, record, session, tuple(numbers), layouts[session]))
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

    def fill(rank: int, number: int, box: Box, first: int, out: Numbers) -> None:
        if layer.numbers[rank]:
            layer.file(rank).fill(names.box_key(tensor.name, number), tensor.dtype, box.numel, first, out)
            return
        earlier = stored_frozen(layers[1:], index)
        for part in cut([box], first, first + out.size):
            out[: part.numel] = earlier.read_box(part).reshape(-1)
            out = out[part.numel :]

    where = f"{layer.root.url}/{names.FROZEN}"
    return Stored(where, tensor.name, tensor.shape, layer.layout.frozen(index), bits_of(tensor.dtype), fill)
