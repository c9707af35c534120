"""The document of the format is enough: a reader that was written from it alone gets every tensor bit for bit."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from torch import nn

from sharded_phema.posthoc import PostHocEMA
from sharded_phema.store import open_run

BLOCK = 4 << 20


def record(root: Path, name: str, kind: str) -> dict[str, Any]:
    text = (root / name).read_bytes()
    body, seal = text[:-46], text[-46:]
    assert seal == b',"digest":"%s"}\n' % xxhash.xxh3_128_hexdigest(body).encode()
    found = json.loads(body + b"}")
    assert (found.pop("format"), found.pop("version")) == (f"sharded_phema {kind}", 1)
    return found


def boxes(cut: dict[str, Any], shape: list[int]) -> dict[int, list[tuple[slice, ...]]]:
    """What each rank holds."""
    if not cut["edges"]:
        listed = zip(cut["ranks"], cut["boxes"], strict=True)
        return {
            rank: [tuple(slice(o, o + s) for o, s in zip(b["offsets"], b["sizes"], strict=True)) for b in held]
            for rank, held in listed
        }
    whole = tuple(slice(0, length) for length in shape)
    ranges = enumerate(pairwise(cut["edges"]))
    return {r: [(*whole[: cut["dim"]], slice(a, b), *whole[cut["dim"] + 1 :])] for r, (a, b) in ranges if a < b}


class Part:
    """A tensor file whose blocks and identity are right."""

    def __init__(self, path: Path, size: int, digests: str, identity: dict[str, object]) -> None:
        data = path.read_bytes()
        assert len(data) == size
        assert "".join(xxhash.xxh3_128_hexdigest(data[i : i + BLOCK]) for i in range(0, size, BLOCK)) == digests
        self.file = safe_open(path, "pt")
        assert self.file.metadata() == {key: str(value) for key, value in identity.items()}

    def fill(self, out: torch.Tensor, key: str, held: list[tuple[slice, ...]]) -> None:
        for number, box in enumerate(held):
            out[box] = self.file.get_tensor(f"{key}:{number}")


def frozen_part(root: Path, run: str, session: str, number: int, rank: int) -> Part:
    stem = f"frozen/{session}-{number:06d}/rank-{rank:05d}"
    facts = record(root, f"{stem}.json", "FrozenRecord")
    identity = {"frozen": number, "run": run, "session": session, "rank": rank}
    assert {key: facts[key] for key in ("run", "session", "rank", "number")} == {
        "run": run,
        "session": session,
        "rank": rank,
        "number": number,
    }
    return Part(root / f"{stem}.safetensors", facts["size"], facts["digests"], identity)


def read_snapshot(root: Path, folder: str) -> dict[str, torch.Tensor]:
    """Every tensor of a snapshot: averages as <average>.<parameter>, others by name."""
    run, facts = record(root, "run.json", "RunRecord"), record(root, f"{folder}/snapshot.json", "SnapshotRecord")
    session = record(root, f"sessions/{facts['session']}.json", "SessionRecord")
    assert run["run"] == facts["run"] == session["run"] and len(facts["parts"]) == session["world_size"]
    name = f"layouts/{session['layout']}.json"
    layout = record(root, name, "LayoutRecord")
    assert xxhash.xxh3_64_hexdigest((root / name).read_bytes()) == session["layout"]
    parts = {}
    for rank, part in enumerate(facts["parts"]):
        identity = {key: facts[key] for key in ("run", "session", "snapshot")} | {"t": repr(facts["t"]), "rank": rank}
        if part["size"]:
            parts[rank] = Part(root / f"{folder}/rank-{rank:05d}.safetensors", part["size"], part["digests"], identity)
    found = {}

    def read(key: str, tensor: dict[str, Any], cut: dict[str, Any], dtype: str, files: dict[int, Part]) -> torch.Tensor:
        out = torch.empty(tensor["shape"], dtype=getattr(torch, dtype))
        for rank, held in boxes(cut, tensor["shape"]).items():
            files[rank].fill(out, key, held)
        return out

    for parameter, cut in zip(run["parameters"], layout["averaged"], strict=True):
        for average in run["averages"]:
            key = f"{average}.{parameter['name']}"
            found[key] = read(key, parameter, cut, run["dtype"], parts)
    for tensor, cut in zip(run["copied"], layout["copied"], strict=True):
        found[tensor["name"]] = read(f"copied:{tensor['name']}", tensor, cut, tensor["dtype"], parts)
    stores = dict(enumerate(part["frozen"] for part in facts["parts"]))
    owner = session["session"]
    while not any(stores.values()) and session["frozen_from"]:
        owner, stores = session["frozen_from"], dict(enumerate(session["frozen_numbers"]))
        session = record(root, f"sessions/{owner}.json", "SessionRecord")
    for tensor, cut in zip(run["frozen"], layout["frozen"], strict=True):
        files = {rank: frozen_part(root, run["run"], owner, number, rank) for rank, number in stores.items() if number}
        found[tensor["name"]] = read(tensor["name"], tensor, cut, tensor["dtype"], files)
    return found


class Model(nn.Module):
    """More than a block of numbers, a scalar, no elements, a buffer, a frozen tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(1100, 1000))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.empty(3, 0))
        self.still = nn.Parameter(torch.arange(5, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("count", torch.tensor([True, False]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reader_written_from_the_document_alone_gets_every_tensor(tmp_path: Path, dtype: str) -> None:
    # Oracle: the averages themselves, as they were in memory, rounded by torch.
    torch.manual_seed(1)
    model, expected = Model(), {}
    for first in (1, 4):
        with PostHocEMA(model, tmp_path / "ema", dtype=dtype, snapshot_every=100) as ema:
            if first > 1:
                ema.resume()
            for t in range(first, first + 2):
                with torch.no_grad():
                    model.wide += 0.1 * torch.randn_like(model.wide)
                ema.update(t)
            state = ema.state_dict()
            expected[ema.t] = {f"{a}.{n}": x.clone() for a in state if a != "clock" for n, x in state[a].items()}
    run = open_run(tmp_path / "ema")
    assert [s.t for s in run.snapshots] == [2.0, 5.0]
    for snapshot in run.snapshots:
        found = read_snapshot(tmp_path / "ema", snapshot.name)
        averages = {name: whole.to(getattr(torch, dtype)) for name, whole in expected[snapshot.t].items()}
        assert found.keys() == averages.keys() | {"still", "count"} and len(averages) == 6
        assert all(found[name].equal(whole) for name, whole in averages.items())
        assert found["still"].equal(model.still) and found["count"].equal(model.count)


def test_two_slabs_and_boxes_of_the_document_hold_what_the_package_says(tmp_path: Path) -> None:
    # Oracle: counting elements of a numbered tensor.
    numbers = np.arange(5 * 7).reshape(5, 7)
    slabs = boxes({"dim": 1, "edges": [0, 3, 3, 7], "ranks": [], "boxes": []}, [5, 7])
    assert {rank: numbers[held[0]].tolist() for rank, held in slabs.items()} == {
        0: numbers[:, :3].tolist(),
        2: numbers[:, 3:].tolist(),
    }
