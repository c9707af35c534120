"""What takes bytes that anybody may have written: any at all may come, and nothing but errors of ours may go out."""

from __future__ import annotations

import base64
import os
import pickle
import shutil
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from builders import averages_of, new_run, new_session, no_flush, rows_of, store
from test_damage import InMemory, Small

from sharded_phema import blocks, commit
from sharded_phema.blocks import BlockFile, Digester
from sharded_phema.errors import PhemaError
from sharded_phema.folder import Want
from sharded_phema.folder.local import LocalFolder
from sharded_phema.layout import whole
from sharded_phema.manifest import (
    ClaimRecord,
    FrozenRecord,
    LayoutRecord,
    RunRecord,
    SessionRecord,
    SnapshotRecord,
)
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.store import open_run
from sharded_phema.store.tensors import TensorFile
from sharded_phema.target import parse_target
from sharded_phema.transcript import decode, encode
from sharded_phema.verify import verify

KINDS = (RunRecord, SessionRecord, LayoutRecord, SnapshotRecord, FrozenRecord, ClaimRecord)
IDENTITY = {"run": "r", "session": "s", "snapshot": "0", "t": "1.0", "rank": "0"}


def take(data: bytes) -> None:
    """Give bytes to one of those that read them: which, the first byte says.

    Raises:
        Exception: Any but a PhemaError: a mistake of the reader.
    """
    reader = READERS[data[0] % len(READERS)] if data else records
    with justified(len(data)), suppress(PhemaError):
        reader(data[1:])


def seeds() -> Iterator[bytes]:
    """Inputs that are right, to begin from."""
    for number, reader in enumerate(READERS):
        for seed in SEEDS[reader]():
            yield bytes([number]) + seed


@contextmanager
def justified(size: int) -> Iterator[None]:
    """Fails where more memory is taken than the bytes that are there account for."""
    bound = (16 << 20) + 200 * (size + stored())
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < bound, f"{peak} bytes for an input of {size}"
    finally:
        tracemalloc.stop()


def records(data: bytes) -> None:
    """A record of a kind, sealed as one is: it comes back from what it is written as."""
    kind: Any = KINDS[data[0] % len(KINDS)] if data else RunRecord
    found = decode(kind, sealing(data[1:]), "x")
    assert decode(kind, encode(found), "x") == found


def sealing(body: bytes) -> bytes:
    """Any bytes with the right digest."""
    return body + f',"digest":"{xxhash.xxh3_128_hexdigest(body)}"}}\n'.encode()


def texts(data: bytes) -> None:
    """Bytes as they lie there."""
    kind: Any = KINDS[data[0] % len(KINDS)] if data else RunRecord
    decode(kind, data[1:], "x")


def headers(data: bytes) -> None:
    """A tensor file whose blocks are right."""
    folder = InMemory.__new__(InMemory)
    folder.url, folder.files = "x", {"a": data}
    file = TensorFile(BlockFile(folder, "a", len(data), digests_of(data)), IDENTITY)  # type: ignore[arg-type]
    out = np.empty(3, np.float32)
    with suppress(PhemaError):
        file.fill("w:0", "float32", 4, 1, out)
    with suppress(PhemaError):
        file.fill("w:0", "bfloat16", 4, 1, out)
    file.check([("w:0", "float32", 4)])


def digests_of(data: bytes) -> bytes:
    digester = Digester()
    for _ in digester.through([data]):
        pass
    return digester.digests


def runs(data: bytes) -> None:
    """One file of a run replaced, its digests made right wherever they stand; all of it is read."""
    if len(data) < 2:
        return
    base = folders()[data[0] % len(folders())]
    folder = InMemory.__new__(InMemory)
    folder.url, folder.files = base.url, dict(base.files)
    name = sorted(folder.files)[data[1] % len(folder.files)]
    replaced(folder, name, data[2:])
    blocks._kept.clear()
    read_all(folder)
    verify(folder)  # type: ignore[arg-type]


def replaced(folder: InMemory, name: str, data: bytes) -> None:
    files, parent = folder.files, name.rpartition("/")[0]
    files[name] = data if name.endswith(".safetensors") else sealing(data)
    if parent == "layouts":
        # Under its new name, which all sessions take over.
        digest = xxhash.xxh3_64_hexdigest(files[name])
        files[f"layouts/{digest}.json"] = files.pop(name)
        for path in [path for path in files if path.startswith("sessions/")]:
            files[path] = encode(replace(decode(SessionRecord, files[path], "x"), layout=digest))
    elif name.endswith(".safetensors"):
        facts = {"size": len(data), "digests": digests_of(data)}
        if parent.startswith("frozen"):
            path = name.replace(".safetensors", ".json")
            files[path] = encode(replace(decode(FrozenRecord, files[path], "x"), **facts))
        else:
            path, rank = f"{parent}/snapshot.json", int(name[-17:-12])
            record = decode(SnapshotRecord, files[path], "x")
            parts = [replace(part, **facts) if rank == r else part for r, part in enumerate(record.parts)]
            files[path] = encode(replace(record, parts=tuple(parts)))


def read_all(folder: InMemory) -> None:
    """Every number of a run, as far as it can be read."""
    with suppress(PhemaError):
        run = open_run(folder)  # type: ignore[arg-type]
        run.check_frozen()
        for snapshot in (*run.snapshots, *run.abandoned):
            for a in range(len(snapshot.record.averages)):
                for p, parameter in enumerate(snapshot.record.parameters):
                    with suppress(PhemaError):
                        snapshot.read_box(a, p, whole(parameter.shape))
            for i, tensor in enumerate(snapshot.record.raw):
                with suppress(PhemaError):
                    snapshot.read_raw(i, 0, int(np.prod(tensor.shape, dtype=object)))


@cache
def stored() -> int:
    """Bytes of both runs."""
    return sum(len(text) for folder in folders() for text in folder.files.values())


@cache
def folders() -> tuple[InMemory, ...]:
    """Two runs: one of a model with all kinds of tensors, and one that ranks hold in all ways."""
    made = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for first in (1, 2):
            with PostHocEMA(Small(), root / "whole", sigma_rels=(0.05,)) as ema:
                if first > 1:
                    ema.resume()
                ema.update(first)
        made.append(InMemory(root / "whole"))
        division = rows_of((5, 3), 2, 0, 3)
        new_run(root / "ranks", division)
        new_session(root / "ranks", division)
        store(root / "ranks", division, averages_of(division, 1), t=10.0)
        made.append(InMemory(root / "ranks"))
    return tuple(made)


def paths(data: bytes) -> None:
    """A name in a folder in which links lead out."""
    name = data.decode("utf-8", "surrogateescape")
    with outside_is_forbidden() as root, no_flush():
        folder = LocalFolder("x", str(root))
        acts: tuple[Callable[[], object], ...] = (
            lambda: folder.read(name, 100),
            lambda: folder.fill([Want(name, 0, bytearray(3))]),
            lambda: folder.list(name),
            lambda: folder.write(name, [b"new"]),
            lambda: folder.write(f"{name}/new", [b"new"]),
            lambda: folder.remove(name),
            lambda: folder.clean(name, older_than_s=0.0),
        )
        for act in acts:
            with suppress(PhemaError):
                act()


@contextmanager
def outside_is_forbidden() -> Iterator[Path]:
    """A folder beside a secret; whatever opens, lists, makes or removes anything outside of it fails."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(os.path.realpath(place), "root")
        (root / "a").mkdir(parents=True)
        (root / "a" / "b").write_text("mine")
        (root.parent / "secret").write_text("theirs")
        (root / "out").symlink_to(root.parent)
        (root / "file").symlink_to(root.parent / "secret")
        _watch()
        _ROOTS.append(str(root))
        try:
            yield root
        finally:
            _ROOTS.pop()
            assert (root.parent / "secret").read_text() == "theirs"
            assert sorted(path.name for path in root.parent.iterdir()) == ["root", "secret"]
            shutil.rmtree(root, ignore_errors=True)


_ROOTS: list[str] = []
_FOLLOWING = {"open", "os.listdir", "os.scandir", "os.truncate"}
_NOT_FOLLOWING = {"os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link"}
"""System calls that look at a path, by whether a link at its end is followed."""


@cache
def _watch() -> None:
    sys.addaudithook(_audit)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _ROOTS or event not in _FOLLOWING | _NOT_FOLLOWING or not isinstance(args[0], str | bytes):
        return
    path, root = os.fsdecode(args[0]), _ROOTS[-1]
    parent, last = os.path.split(path)
    path = os.path.realpath(path) if event in _FOLLOWING else os.path.join(os.path.realpath(parent), last)
    # Folders above are opened so that new names in them are flushed, which tells nothing and changes nothing.
    above = event == "open" and os.path.isdir(path) and root.startswith(f"{path.rstrip('/')}/")
    source = event == "open" and path.endswith((".py", ".pyc"))  # for the lines of a traceback
    if not (path == root or path.startswith(f"{root}/") or above or source):
        raise AssertionError(f"{event} {path!r} outside of {root}")


def targets(data: bytes) -> None:
    """What a user, or a record, asks for."""
    found = parse_target(data.decode("utf-8", "replace"))
    assert parse_target(found.text) == found


def messages(data: bytes) -> None:
    """What a rank finds in the key-value store."""
    commit._object(base64.b64encode(data))


READERS = (records, texts, headers, runs, paths, targets, messages)


def _record_seeds() -> Iterator[bytes]:
    for folder in folders():
        for name, text in folder.files.items():
            for number, kind in enumerate(KINDS):
                if f'"sharded_phema {kind.__name__}"'.encode() in text[:60]:
                    yield bytes([number]) + (text[:-46] if name.endswith(".json") else text)


def _run_seeds() -> Iterator[bytes]:
    for number, folder in enumerate(folders()):
        for index, name in enumerate(sorted(folder.files)):
            text = folder.files[name]
            yield bytes([number, index]) + (text[:-46] if name.endswith(".json") else text)


def _tensor_seeds() -> Iterator[bytes]:
    for folder in folders():
        yield from (text for name, text in folder.files.items() if name.endswith(".safetensors"))
    header = b'{"__metadata__":{"run":"r","session":"s","snapshot":"0","t":"1.0","rank":"0"},'
    header += b'"w:0":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}} '
    yield len(header).to_bytes(8, "little") + header + bytes(16)


SEEDS: dict[Callable[[bytes], None], Callable[[], Iterator[bytes]]] = {
    records: _record_seeds,
    texts: lambda: iter([bytes([3]) + text for folder in folders() for text in folder.files.values()][:4]),
    headers: _tensor_seeds,
    runs: _run_seeds,
    paths: lambda: iter([b"a/b", b"out/secret", b"a/../b", b"/etc/passwd", b"file", b"a//b", b".", b"x/y/z", b"a\\b"]),
    targets: lambda: iter([b"0.12", b"power:gamma=6.94@t=5", b"exponential:halflife=7,ramp=0.1", b"decay:cosine:0.2"]),
    messages: lambda: iter([b"\x80\x04K\x07.", pickle.dumps(("hello", 1, None, (2.5,)))]),
}
