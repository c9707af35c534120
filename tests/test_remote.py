"""Elsewhere: whole cycles of a run on other storage, against the same training stored on a local disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Trainer, make_model, shard
from object_store import BUCKET, ObjectStore, client
from ranks import run_ranks
from safetensors.torch import load_file
from torch import nn

from sharded_phema import blocks, feed
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.store import open_run, run, shelf

ROOT = Path(__file__).parents[1]
TARGETS = ["0.07", "window:0.3"]


def fresh(protocol: str) -> str:
    """The URL of a run folder that does not exist."""
    base = f"s3://{BUCKET}" if protocol == "s3" else "memory://runs"
    return f"{base}/{uuid.uuid4().hex}/ema"


class Walk(nn.Module):
    """A weight that walks, a buffer that counts, and a frozen tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(33, 21))
        self.frozen = nn.Parameter(torch.arange(7.0), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))

    @torch.no_grad()
    def step(self, t: int) -> None:
        self.weight += 0.1 * torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(t))
        self.count += 1


def train(root: str | Path, **options: Any) -> torch.Tensor:
    """Train to 60, lose the process, resume at 40 and go on to 80; gives the average that is swapped in at the end."""
    model, at_40 = Walk(), Walk()
    with PostHocEMA(model, root, snapshot_every=10, **options) as ema:
        for t in range(1, 61):
            model.step(t)
            ema.update(t)
            if t == 40:
                at_40.load_state_dict(model.state_dict())
    model = Walk()
    model.load_state_dict(at_40.state_dict())
    with PostHocEMA(model, root, snapshot_every=10, **options) as ema:
        assert ema.resume(40) == 40
        for t in range(41, 81):
            model.step(1000 + t)
            ema.update(t)
        ema.snapshot()
        with ema.swapped("window:0.3"):
            return model.weight.detach().clone()


def rebuilt(root: str | Path, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    reconstruct(root, TARGETS, out=out)
    return {target: load_file(out / target.replace(":", "-") / "model.safetensors") for target in slugs(out)}


def slugs(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def equal(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]) -> bool:
    """The same tensors under the same names, with whatever is in them."""
    assert one.keys() == other.keys() and len(one) == 2
    assert all(one[slug].keys() == other[slug].keys() == {"weight", "frozen", "count"} for slug in one)
    return all(tensor.equal(other[slug][name]) for slug, tensors in one.items() for name, tensor in tensors.items())


@pytest.mark.parametrize(("protocol", "asynchronous"), [("memory", False), ("s3", False), ("s3", True)])
def test_a_run_elsewhere_is_stored_resumed_swapped_and_rebuilt_as_on_a_disk(
    store: ObjectStore, tmp_path: Path, protocol: str, asynchronous: bool
) -> None:
    # Oracle: the same training on a local disk.
    url = fresh(protocol)
    store.watch()
    swapped = train(url, asynchronous=asynchronous)
    requests = store.requests
    assert swapped.equal(train(tmp_path / "ema"))
    here, there = open_run(tmp_path / "ema"), open_run(url)
    assert [s.t for s in there.snapshots] == [s.t for s in here.snapshots] == [*range(10, 81, 10)]
    assert [s.t for s in there.abandoned] == [s.t for s in here.abandoned] == [50, 60]
    assert not there.unfinished and not there.damaged
    for snapshot in (*there.snapshots, *there.abandoned):
        snapshot.check()
    assert equal(rebuilt(url, tmp_path / "there"), rebuilt(tmp_path / "ema", tmp_path / "here"))
    # A rename is a copy, which has no body, and the removal of the original; claims alone are removed.
    assert all(size for method, _, size in requests if method in ("PUT", "POST"))
    assert all("/claims/" in path for method, path, _ in requests if method == "DELETE")
    assert any(method == "PUT" for method, *_ in requests) == (protocol == "s3")


def test_the_command_line_takes_urls(store: ObjectStore, tmp_path: Path) -> None:
    url, model = fresh("s3"), Walk()
    with PostHocEMA(model, url, snapshot_every=10) as ema:
        for t in range(1, 41):
            model.step(t)
            ema.update(t)

    def call(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "sharded_phema", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert [s["folder"].rpartition("/")[0] for s in json.loads(call("info", url, "--json"))["snapshots"]] == (
        [f"{url}/snapshots"] * 4
    )
    call("reconstruct", url, "0.07", "--out", "out", "--format", "dcp")
    assert (tmp_path / "out" / "0.07" / ".metadata").exists()
    assert slugs(tmp_path) == ["out"], "nothing is made under a name like s3:"


def two_ranks(environment: dict[str, str], url: str, folder: str, out: str) -> None:
    """Train once, store in both places, rebuild from each."""
    os.environ.update(environment)
    model = shard(make_model())
    trainer = Trainer(model)
    with (
        PostHocEMA(model, url, snapshot_every=2, asynchronous=True) as there,
        PostHocEMA(model, folder, snapshot_every=2) as here,
    ):
        for t in range(1, 9):
            trainer.step()
            there.update(t)
            here.update(t)
    reconstruct(url, TARGETS, out=f"{out}/there")
    reconstruct(folder, TARGETS, out=f"{out}/here")


def test_two_ranks_write_to_an_object_store_what_they_write_to_a_disk(store: ObjectStore, tmp_path: Path) -> None:
    # Oracle: the same two ranks, training once, on a local disk.
    url = fresh("s3")
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_") or name == "NO_PROXY"}
    run_ranks(2, two_ranks, environment, url, str(tmp_path / "ema"), str(tmp_path))
    there, here = open_run(url), open_run(tmp_path / "ema")
    assert [(s.t, [part.size for part in s.facts.parts]) for s in there.snapshots] == [
        (s.t, [part.size for part in s.facts.parts]) for s in here.snapshots
    ]
    assert [s.t for s in there.snapshots] == [2, 4, 6, 8] and len(there.snapshots[0].facts.parts) == 2
    for slug in slugs(tmp_path / "here"):
        file = f"{slug}/model.safetensors"
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()


KILLED = """
import os, sys, torch
from torch import nn
from sharded_phema import PostHocEMA, blocks
from sharded_phema.folder import remote

remote.UPLOAD_BYTES = 5 << 20
model = nn.Linear(2048, 2048, bias=False)
ema = PostHocEMA(model, sys.argv[1], snapshot_every=1)
ema.update(1)
through = blocks.Digester.through

def killed(self, pieces):
    for sent, piece in enumerate(through(self, pieces)):
        if sent == 5:
            os._exit(9)
        yield piece

blocks.Digester.through = killed
ema.update(2)
"""


def test_nothing_is_seen_of_an_upload_whose_writer_was_killed_and_the_run_goes_on(store: ObjectStore) -> None:
    url = fresh("s3")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, url],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 9, done.stderr
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    found = [entry["Key"] for entry in client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]]
    assert sum("/snapshots/" in key for key in found) == 2, "one part and one record: those of the first snapshot"
    uploads = client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert any(upload["Key"].startswith(prefix) for upload in uploads), "it was killed in the middle of an upload"
    opened = open_run(url)
    assert [s.t for s in opened.snapshots] == [1] and not opened.damaged
    opened.snapshots[0].check()
    model = nn.Linear(2048, 2048, bias=False)
    with PostHocEMA(model, url, snapshot_every=1) as ema:
        ema.resume()
        ema.update(2)
    assert [s.t for s in open_run(url).snapshots] == [1, 2]


def one_by_one(folder: object, act: Any, items: Any) -> tuple[Any, ...]:
    return tuple(map(act, items))


def test_a_rebuild_has_several_requests_in_flight(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, model = fresh("s3"), Walk()
    with PostHocEMA(model, url, snapshot_every=1) as ema:
        for t in range(1, 17):
            model.step(t)
            ema.update(t)

    def timed(out: Path) -> tuple[float, int]:
        blocks._kept.clear()
        store.watch(delay_s=0.05)
        began = time.monotonic()
        reconstruct(url, ["0.07"], out=out, tolerance="exact")
        took, most = time.monotonic() - began, store.most_in_flight
        store.watch()
        return took, most

    many, in_flight = timed(tmp_path / "many")
    with monkeypatch.context() as patch:
        patch.setattr(feed, "of_each", one_by_one)
        patch.setattr(run, "of_each", one_by_one)
        patch.setattr(shelf, "of_each", one_by_one)
        one, single = timed(tmp_path / "one")
    assert (in_flight >= 8, single) == (True, 1)
    assert one > 1.3 * many, "waits are shared; on a quiet machine it is more than three times"
    found = [load_file(tmp_path / name / "0.07" / "model.safetensors") for name in ("many", "one")]
    assert all(found[0][name].equal(found[1][name]) for name in found[1])
