"""Direct: foreign checkpoints opened as the run that an import would make of them, of which nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sharded_phema.errors import StoreError
from sharded_phema.folder import Folder, open_folder
from sharded_phema.importers.agreement import Model, check_open, check_times, identity_of, model_of
from sharded_phema.importers.contract import Foreign, Reading, Tensors
from sharded_phema.importers.formats import find
from sharded_phema.importers.inplace import InPlace
from sharded_phema.importers.portions import empty_shards, portions
from sharded_phema.importers.sample import Norms, sampled_norms
from sharded_phema.manifest import Part, RunRecord, SnapshotRecord
from sharded_phema.store import Damaged, Layout, Run, Snapshot, here, layout_record
from sharded_phema.world import agree, gather, rank_and_size

__all__ = ["open_foreign"]

_ALL = 1 << 62


def open_foreign(
    source: str | Path,
    *,
    format: str = "",
    reading: Reading | None = None,
    assumed: Callable[[str], object] = lambda sentence: None,
) -> Run:
    """Checkpoints of another package as a run, which ``reconstruct`` takes. Called by every rank.

    Headers are read, and what is rebuilt later reads its ranges of the files themselves, to the bits that an import
    would have led to. Where checkpoints hold several averages, norms of these tell how much rounding counts: of a large
    model they are those of a sample, so that coefficients may differ a little from the import's. A checkpoint whose
    headers cannot be read counts as a damaged snapshot. Nothing that lies on disk is executed.

    Args:
        source: Folder of the checkpoints, or one file.
        format: A key of ``FORMATS``; empty for the one that the folder looks like.
        reading: What the files do not tell.
        assumed: Is told each thing that the files do not tell and that was assumed.

    Raises:
        StoreError: The source is not of the format, or none of its checkpoints can be read.
        ModelMismatch: The checkpoints are of several models.
    """
    opened = agree(lambda: _opened(Path(source), format, reading or Reading()))
    for sentence in dict.fromkeys(sentence for one in opened.found for sentence in one.assumed):
        assumed(sentence)
    return _run(opened, *_agreed(opened))


@dataclass(frozen=True)
class _Opened:
    """What a process sees in a folder.

    Attributes:
        source: Folder of the checkpoints, or one file.
        unit: What training time counts.
        found: The checkpoints, in order of time.
        model: What those that can be read have in common.
        first: The first of these, and its tensors, with which the others are compared.
        broken: Why others cannot be read, by ``where``.
        norms: What norms each has, by ``where``; plans are made by the first process, and only it looks.
    """

    source: Path
    unit: str
    found: Sequence[Foreign]
    model: Model
    first: tuple[Foreign, Tensors]
    broken: Mapping[str, str]
    norms: Mapping[str, Norms]

    @property
    def root(self) -> Folder:
        """The folder in which the checkpoints lie, also where the source is one of them."""
        alone = self.source.is_file() or any(Path(one.where) == self.source for one in self.found)
        return open_folder(self.source.parent if alone else self.source)

    @property
    def names(self) -> tuple[str, ...]:
        """What each checkpoint is called in that folder."""
        return tuple(os.path.relpath(one.where, self.root.url) for one in self.found)

    @property
    def identity(self) -> str:
        """The same for the same files, read alike, however the folder is spelled."""
        files = [replace(one, where=name) for one, name in zip(self.found, self.names, strict=True)]
        return identity_of(files, self.model, self.unit)


def _opened(source: Path, format: str, reading: Reading) -> _Opened:
    unit, found = find(source, format, reading)
    check_times(found)
    first: tuple[Model, Foreign, Tensors] | None = None
    broken: dict[str, StoreError] = {}
    norms: dict[str, Norms] = {}
    for one in found:
        try:
            _check_start(one)
            if first is None:
                model, averages = model_of(one, reading.copy)
                first = model, one, averages[model.averages[0]]
            else:
                averages = _compared(*first, one)
            norms[one.where] = sampled_norms(first[0], averages) if rank_and_size()[0] == 0 else ((), ())
        except StoreError as error:
            broken[one.where] = error
    if first is None:
        raise next(iter(broken.values()))
    reasons = {where: error.message for where, error in broken.items()}
    return _Opened(source, unit, found, first[0], first[1:], reasons, norms)


def _compared(model: Model, first: Foreign, tensors: Tensors, one: Foreign) -> Mapping[str, Tensors]:
    return check_open(model, tensors, first.where, one)


def _check_start(one: Foreign) -> None:
    if not 0.0 <= one.start <= one.t:
        raise StoreError(
            f"{one.where}: is of time {one.t:g}, and its averages begin at {one.start:g}",
            hint="give another start, or leave it out",
        )


def _agreed(opened: _Opened) -> tuple[Mapping[str, str], Mapping[str, Norms]]:
    """What cannot be read by some process, and why; and norms.

    Raises:
        StoreError: Processes see other files.
    """
    identities, broken, norms = zip(*gather((opened.identity, opened.broken, opened.norms)), strict=True)
    if len(set(identities)) > 1:
        raise StoreError(
            f"{opened.source}: processes found other checkpoints there than the first one did",
            hint="put them where all processes see them alike, and wait until no more are written",
        )
    return {where: reason for one in broken for where, reason in one.items()}, norms[0]


def _run(opened: _Opened, broken: Mapping[str, str], norms: Mapping[str, Norms]) -> Run:
    """Snapshots of a run of one rank, which holds every tensor whole."""
    model, identity, root = opened.model, opened.identity, opened.root
    raw = {"dtype": model.dtype, "copied": model.copied}
    record = RunRecord(identity, opened.unit, model.averages, model.parameters, **raw)  # type: ignore[arg-type]
    layout = Layout(layout_record(record, [here(empty_shards(model, portions(model, _ALL)[0]))]), record)
    snapshots, damaged = [], []
    for number, (one, name) in enumerate(zip(opened.found, opened.names, strict=True)):
        parts, told = (Part(sum(one.size[::2])),), norms.get(one.where, ((), ()))
        facts = SnapshotRecord(identity, identity[:12], number, one.t, one.start, parts, *told)
        if one.where in broken:
            damaged.append(Damaged(name, broken[one.where], facts))
        else:
            place = InPlace(model, partial(_compared, model, *opened.first, one))
            snapshots.append(Snapshot(root, name, record, facts, layout, (), place))
    return Run(root, record, tuple(snapshots), (), (), tuple(damaged), head="")
