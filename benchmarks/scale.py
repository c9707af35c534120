"""Scale: what thousands of ranks with thousands of tensors cost to plan, to write down and to open again."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from sharded_phema.folder import Entry
from sharded_phema.layout import Box, ParamShard, ShardLayout
from sharded_phema.manifest import LayoutRecord, Parameter, Part, RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.store import here, layout_id, layout_record, names, open_run
from sharded_phema.store.cuts import Layout
from sharded_phema.transcript import decode, encode

__all__ = ["planned"]

T = TypeVar("T")
COLUMNS = 1024
SESSION = "0" * 12


class Shelf:
    """A folder of records in memory, whose tensor files have a length and no bytes."""

    def __init__(self, url: str, files: dict[str, bytes], lengths: dict[str, int]) -> None:
        self.url, self.files = url, files
        self._folders: dict[str, dict[str, Entry]] = {}
        for name, size in lengths.items():
            parts = name.split("/")
            for depth, base in enumerate(parts):
                leaf = depth == len(parts) - 1
                entry = Entry(base, size if leaf else 0, not leaf)
                self._folders.setdefault("/".join(parts[:depth]), {})[base] = entry

    def read(self, name: str, limit: int) -> bytes:
        return self.files[name]

    def list(self, folder: str) -> tuple[Entry, ...]:
        return tuple(self._folders.get(folder, {}).values())


def planned(ranks: int, tensors: int, snapshots: int, *, blocks: int = 2) -> dict[str, float]:
    """CPU seconds of each step on one process, and bytes of what is sent and stored.

    Args:
        ranks: Processes of the training.
        tensors: Parameters, each cut into as many rows as there are ranks, rounded up, as FSDP2 cuts them.
        snapshots: How many are stored and opened again.
        blocks: Of each rank's file.
    """
    rows = [ranks + 13 * (i % 7) for i in range(tensors)]
    parameters = tuple(Parameter(f"layers.{i}.weight", (n, COLUMNS)) for i, n in enumerate(rows))
    run = RunRecord("r" * 32, "steps", averages=("0.05", "0.1"), parameters=parameters)
    spent: dict[str, float] = {}
    mine = _shards(run, 0, ranks)
    timed(spent, "plan of one rank", lambda: here([mine]))
    sent = [pickle.dumps(here([_shards(run, rank, ranks)])) for rank in range(ranks)]
    plans = timed(spent, "plans of all ranks read", lambda: [pickle.loads(plan) for plan in sent])
    record = timed(spent, "layout of all ranks", lambda: layout_record(run, plans))
    text = timed(spent, "layout as JSON", lambda: encode(record))
    layout = timed(spent, "layout read back", lambda: Layout(decode(LayoutRecord, text, "layout"), run))
    timed(spent, "boxes of every tensor", lambda: [layout.averaged(index) for index in range(tensors)])
    parts = tuple(Part(blocks << 22, bytes(range(16)) * blocks) for _ in range(ranks))
    first = SnapshotRecord(run.run, SESSION, 0, 1.0, 0.0, parts, (1.0, 2.0), (0.5,))
    timed(spent, "record of one snapshot", lambda: encode(first))
    shelf = _shelf(run, record, text, [replace(first, snapshot=i, t=1.0 + i) for i in range(snapshots)])
    opened = timed(spent, f"{snapshots} snapshots opened", lambda: open_run(shelf))  # type: ignore[arg-type]
    assert len(opened.snapshots) == snapshots, opened.damaged[:1]
    sizes = {"plans sent (bytes)": sum(map(len, sent)), "layout (bytes)": len(text)}
    sizes["all records (bytes)"] = sum(map(len, shelf.files.values()))
    return spent | {"all (CPU s)": sum(spent.values())} | sizes


def timed(spent: dict[str, float], step: str, act: Callable[[], T]) -> T:
    """Do a step, and note its CPU seconds."""
    began = time.process_time()
    value = act()
    spent[f"{step} (CPU s)"] = time.process_time() - began
    return value


def _shards(run: RunRecord, rank: int, ranks: int) -> ShardLayout:
    """What FSDP2 gives a rank: rows in chunks of the same length, so that the last ranks may go empty."""
    nothing, found = torch.empty(0), []
    for parameter in run.parameters:
        length = parameter.shape[0]
        chunk = -(-length // ranks)
        begin, end = min(rank * chunk, length), min((rank + 1) * chunk, length)
        boxes = (Box((begin, 0), (end - begin, COLUMNS)),) if begin < end else ()
        found.append(ParamShard(parameter.name, parameter.shape, boxes, nothing, lambda: nothing))
    return tuple(found)


def _shelf(run: RunRecord, layout: LayoutRecord, text: bytes, snapshots: list[SnapshotRecord]) -> Shelf:
    session = SessionRecord(run.run, SESSION, "", 0.0, layout.world_size, layout_id(layout))
    files: dict[str, bytes] = {
        names.RUN: encode(run),
        names.session_file(SESSION): encode(session),
        names.layout_file(session.layout): text,
    }
    lengths: dict[str, int] = {}
    for snapshot in snapshots:
        folder = names.snapshot_folder(snapshot.session, snapshot.snapshot)
        files[names.snapshot_file(folder)] = encode(snapshot)
        lengths |= {names.tensors_file(folder, rank): part.size for rank, part in enumerate(snapshot.parts)}
    return Shelf("memory", files, lengths | _lengths(files))


def _lengths(files: Mapping[str, bytes]) -> dict[str, int]:
    return {name: len(text) for name, text in files.items()}
