"""Sharded runs against the unsharded run: averages, snapshots, resume and swaps, on real gloo ranks."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from allocations import Allocations
from builders import lay, unclaimed
from models import Trainer, gathered, inputs, make_model, shard
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from sharded_phema.errors import ModelMismatch, OrderError, PhemaError
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.store import open_run
from sharded_phema.store.dcp_reader import SnapshotReader

Averages = dict[str, dict[str, Tensor]]
STEPS, EVERY = 12, 4


def train(ema: PostHocEMA, trainer: Trainer, steps: int) -> None:
    while trainer.done < steps:
        trainer.step()
        ema.update(trainer.done)


def pieces(ema: PostHocEMA) -> list[tuple[str, str, tuple, Tensor]]:
    """Label, name, boxes and values of every local piece of every average."""
    return [
        (label, piece.name, piece.boxes, piece.local.clone())
        for label, layout in ema._averages_by_label().items()
        for piece in layout
    ]


def assembled(ranks: list[list[tuple[str, str, tuple, Tensor]]], like: nn.Module) -> Averages:
    """The averages of all ranks as whole tensors."""
    shapes = {name: param.shape for name, param in like.named_parameters()}
    whole: Averages = {}
    for label, name, boxes, values in (piece for rank in ranks for piece in rank):
        lay(whole.setdefault(label, {}).setdefault(name, torch.full(shapes[name], torch.nan)), boxes, values)
    return whole


def assert_same(found: Averages, expected: Averages) -> None:
    assert found.keys() == expected.keys()
    for label in expected:
        assert found[label].keys() == expected[label].keys()
        for name, value in expected[label].items():
            assert torch.equal(found[label][name], value), f"{label} {name}"


def unsharded(root: Path, steps: int = STEPS, dtype: torch.dtype = torch.float32) -> tuple[Averages, dict[str, Tensor]]:
    """The oracle: the same training in one process. Averages, and the trained weights."""
    model = make_model(dtype)
    ema = PostHocEMA(model, root, snapshot_every=EVERY)
    train(ema, Trainer(model, dtype), steps)
    ema.close()
    return assembled([pieces(ema)], model), {name: param.detach() for name, param in model.named_parameters()}


def sharded_body(root: Path, steps: int, dtype: torch.dtype, mesh_shape: tuple[int, ...] = ()) -> tuple[list, dict]:
    model = shard(make_model(dtype), mesh_shape=mesh_shape)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    # Made before the first forward, when FSDP has not set up its storage for good yet.
    ema = PostHocEMA(model, root, snapshot_every=EVERY)
    train(ema, Trainer(model, dtype), steps)
    ema.close()
    return pieces(ema), gathered(model)


RunOf = Callable[[int, torch.dtype, tuple[int, ...]], tuple[Path, list[tuple[list, dict]]]]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """Trains on some ranks, once for each way; folder of the run, which tests only read or copy, and results."""

    @functools.cache
    def trained(ranks: int, dtype: torch.dtype, mesh: tuple[int, ...]) -> tuple[Path, list]:
        root = tmp_path_factory.mktemp("run") / "ema"
        return root, run_ranks(ranks, sharded_body, root, STEPS, dtype, mesh)

    return trained


@pytest.mark.parametrize(
    ("ranks", "dtype", "mesh"),
    [(2, torch.float32, ()), (4, torch.float32, ()), (2, torch.bfloat16, ()), (4, torch.float32, (2, 2))],
)
def test_sharded_averages_equal_the_unsharded_run_bit_for_bit(tmp_path, run_of, ranks, dtype, mesh) -> None:
    expected, weights = unsharded(tmp_path / "one", dtype=dtype)
    _, results = run_of(ranks, dtype, mesh)
    # The oracle holds only if training itself agrees to the bit; it does, as every rank sees the same batch.
    assert all(torch.equal(found[name], weights[name]) for _, found in results for name in weights)
    assert any(piece[3].numel() == 0 for found, _ in results for piece in found), "some shard is empty"
    assert all(piece[3].dtype == torch.float32 for found, _ in results for piece in found)
    assert_same(assembled([found for found, _ in results], make_model()), expected)


def masters_body(root: Path, steps: int) -> tuple[list, list[dict[str, Tensor]]]:
    model = shard(make_model(), low_precision=True)
    ema, trainer, path = PostHocEMA(model, root, snapshot_every=EVERY), Trainer(model), []
    for _ in range(steps):
        trainer.step()
        ema.update()
        path.append(gathered(model))
    return pieces(ema), path


def test_with_bfloat16_compute_the_float32_masters_are_averaged(tmp_path) -> None:
    results = run_ranks(2, masters_body, tmp_path / "many", STEPS)
    model, path = make_model(), results[0][1]
    assert not torch.equal(path[-1]["first.weight"], path[-1]["first.weight"].bfloat16().float())
    ema = PostHocEMA(model, tmp_path / "one", snapshot_every=EVERY)
    for weights in path:
        model.load_state_dict(weights | {"again.weight": weights["first.weight"]})
        ema.update()
    assert_same(assembled([found for found, _ in results], model), assembled([pieces(ema)], model))


def frugal_body(root: Path, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    model = nn.Sequential(nn.Linear(1500, 2001, bias=False), nn.Linear(3, 1)).to(dtype)
    fully_shard(model)
    full = 1500 * 2001
    ema = PostHocEMA(model, root, snapshot_every=1000)
    ema.update()
    with CommDebugMode() as collectives, Allocations() as update:
        ema.update()
    with CommDebugMode() as more, Allocations() as snapshot:
        tracemalloc.start()  # what is copied outside of torch, such as the bytes of a file
        ema.snapshot()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert dist.get_world_size() > 1 and 4 * full > 10**7
    return collectives.get_total_counts(), more.get_total_counts(), update.elements, snapshot.elements, peak


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float32), (4, torch.bfloat16)])
def test_update_and_snapshot_call_no_collective_and_allocate_nothing_of_the_models_size(tmp_path, ranks, dtype) -> None:
    for update_calls, snapshot_calls, updated, stored, peak in run_ranks(ranks, frugal_body, tmp_path, dtype):
        assert (update_calls, snapshot_calls) == (0, 0)
        assert updated == 0, "whatever is widened has room that was made before, or none"
        # Norms are taken in chunks.
        assert stored <= 1 << 20 < 1500 * 2001
        assert peak < 10**6, "bytes held by Python while a snapshot of 12 MB shards is written"


def counting_body(root: Path) -> int:
    """The counter of the test above does count."""
    model = nn.Linear(8, 8)
    fully_shard(model)
    with CommDebugMode() as collectives:
        model.weight.full_tensor()
    return collectives.get_total_counts()


def test_the_counter_of_collectives_sees_a_gather(tmp_path) -> None:
    assert run_ranks(2, counting_body, tmp_path) == [1, 1]


def rebuild_body(outs: dict[Path, Path]) -> None:
    """Rebuild runs, one after another; ``outs`` has the folder for each."""
    for root, out in outs.items():
        reconstruct(root, ["0.03", "0.07", "decay:linear:0.5", "0.10"], out=out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_any_number_of_writers_and_rebuilders_gives_the_same_bytes(tmp_path, run_of) -> None:
    unsharded(tmp_path / "w1")
    rebuild_body({tmp_path / "w1": tmp_path / "w1-r1"})
    expected = contents(tmp_path / "w1-r1")
    weights = {name: data for name, data in expected.items() if name.endswith(".safetensors")}
    assert len(weights) == 4
    for rebuilders in (1, 2, 3):
        outs = {run_of(writers, torch.float32, ())[0]: tmp_path / f"w{writers}-r{rebuilders}" for writers in (2, 4)}
        run_ranks(rebuilders, rebuild_body, outs)
        for out in outs.values():
            found = contents(out)
            assert {name: found[name] for name in weights} == weights
            assert found.keys() == expected.keys()
    model = make_model()
    tensors = load_file(tmp_path / "w4-r3" / "0.03" / "model.safetensors")
    # A tied weight is stored once; torch names the other end of the tie as missing.
    assert model.load_state_dict(tensors, strict=False).missing_keys == ["again.weight"]


def killed_body(root: Path, checkpoint: Path, kill_at: int) -> None:
    model = shard(make_model())
    ema, trainer = PostHocEMA(model, root, snapshot_every=EVERY), Trainer(model)
    while True:
        trainer.step()
        ema.update(trainer.done)
        if trainer.done == 6:
            dcp.save(
                {"ema": ema, "model": model.state_dict(), "optimizer": trainer.optimizer.state_dict()},
                checkpoint_id=checkpoint,
            )
        if trainer.done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def resumed_body(root: Path, checkpoint: Path, steps: int) -> tuple[list, dict]:
    model = shard(make_model())
    ema, trainer = PostHocEMA(model, root, snapshot_every=EVERY), Trainer(model)
    warm_up(trainer)
    state = {"ema": ema, "model": model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    dcp.load(state, checkpoint_id=checkpoint)
    model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.done = int(ema.t)
    train(ema, trainer, steps)
    ema.close()
    return pieces(ema), gathered(model)


def warm_up(trainer: Trainer) -> None:
    """Adam makes its state at the first step; there must be something for the checkpoint to fill."""
    for param in trainer.model.parameters():
        param.grad = torch.zeros_like(param)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


@pytest.mark.parametrize(("before", "after"), [(2, 2), (4, 2), (2, 4)])
def test_a_run_killed_and_resumed_equals_an_uninterrupted_one(tmp_path, before, after) -> None:
    expected, weights = unsharded(tmp_path / "one")
    root, checkpoint = tmp_path / "ema", tmp_path / "checkpoint"
    with pytest.raises(AssertionError, match="died without a traceback"):
        run_ranks(before, killed_body, root, checkpoint, 9)
    assert [snapshot.t for snapshot in open_run(root).snapshots] == [4, 8]
    results = run_ranks(after, resumed_body, root, checkpoint, STEPS)
    assert all(torch.equal(found[name], weights[name]) for _, found in results for name in weights)
    assert_same(assembled([found for found, _ in results], make_model()), expected)
    run = open_run(root)
    # The snapshot at 8 was taken by the lost part of the run; its successor was taken by the resumed one.
    assert ([snapshot.t for snapshot in run.snapshots], [left.t for left in run.abandoned]) == ([4, 8, 12], [8])
    reconstruct(root, ["0.07"], out=tmp_path / "resumed")
    reconstruct(tmp_path / "one", ["0.07"], out=tmp_path / "straight")
    name = "0.07/model.safetensors"
    assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def from_snapshot_body(root: Path, t: float | None) -> tuple[list, float]:
    ema = PostHocEMA(shard(make_model()), root, snapshot_every=EVERY)
    return [ema.resume(t), pieces(ema)][::-1]  # type: ignore[return-value]


@pytest.mark.parametrize(("ranks", "t", "steps"), [(2, None, 12), (3, 8, 8), (4, 4, 4)])
def test_averages_come_back_from_a_snapshot_alone_on_any_number_of_ranks(tmp_path, run_of, ranks, t, steps) -> None:
    shutil.copytree(run_of(4, torch.float32, ())[0], tmp_path / "ema")
    expected, _ = unsharded(tmp_path / "one", steps)
    results = run_ranks(ranks, from_snapshot_body, tmp_path / "ema", t)
    assert [found[1] for found in results] == [steps] * ranks
    assert_same(assembled([found[0] for found in results], make_model()), expected)


def dcp_load_body(root: Path) -> dict[str, Tensor]:
    """Stock dcp.load through the store's reader, into DTensors of another cut than the snapshot's."""
    run, model = open_run(root), make_model()
    fully_shard(model)
    label = run.record.averages[0]
    dcp.load({label: dict(model.named_parameters())}, storage_reader=SnapshotReader(run.snapshots[-1]))
    return gathered(model)


def test_stock_dcp_load_reads_a_snapshot_into_any_sharding(tmp_path, run_of) -> None:
    expected, _ = unsharded(tmp_path / "one")
    first = next(iter(expected.values()))
    for found in run_ranks(3, dcp_load_body, run_of(4, torch.float32, ())[0]):
        assert all(torch.equal(found[name], first[name]) for name in first)


def swap_body(root: Path) -> tuple[Tensor, list[bool]]:
    model = shard(make_model())
    ema = PostHocEMA(model, root, snapshot_every=EVERY)
    train(ema, Trainer(model), 5)
    before = gathered(model)
    with torch.no_grad():
        own = model(inputs(0))
    with ema.swapped(sigma_rel=0.10), torch.no_grad():
        averaged = model(inputs(0))
    with pytest.raises(RuntimeError, match="in the evaluation"), ema.swapped(sigma_rel=0.05):
        model(inputs(0)).sum().backward()
        raise RuntimeError("in the evaluation")
    with torch.no_grad():
        checks = [torch.equal(model(inputs(0)), own), not torch.equal(own, averaged)]
    after = gathered(model)
    return averaged, checks + [torch.equal(after[name], before[name]) for name in before]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_swap_is_what_the_next_forward_uses_and_is_undone(tmp_path, ranks) -> None:
    averages, _ = unsharded(tmp_path / "one", steps=5)
    model = make_model()
    average = averages[list(averages)[1]]
    model.load_state_dict(average | {"again.weight": average["first.weight"]})
    with torch.no_grad():
        expected = model(inputs(0))
    for found, checks in run_ranks(ranks, swap_body, tmp_path / "many"):
        assert torch.equal(found, expected)
        assert all(checks)


def divergent_body(root: Path) -> str:
    """Rank 1 holds another model: every rank must hear of it, and none may wait for the other."""
    model = nn.Linear(4, 3 + dist.get_rank())
    with pytest.raises(ModelMismatch) as caught:
        PostHocEMA(model, root)
    return str(caught.value)


def test_ranks_with_different_models_all_raise_before_anything_is_written(tmp_path) -> None:
    messages = run_ranks(2, divergent_body, tmp_path / "ema")
    assert messages[0] == messages[1]
    assert "rank 1 holds other parameters than rank 0: expected weight of shape (3, 4)" in messages[0]
    assert not (tmp_path / "ema").exists()


def failing_body(root: Path, out: Path) -> str:
    with pytest.raises(PhemaError) as caught:
        reconstruct(root, ["0.07@t=99"], out=out)
    return str(caught.value)


def test_a_reconstruction_that_cannot_be_raises_on_every_rank_and_writes_nothing(tmp_path) -> None:
    unsharded(tmp_path / "one")
    messages = run_ranks(2, failing_body, tmp_path / "one", tmp_path / "out")
    assert messages[0] == messages[1] and "training time 99 lies outside" in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def unrestored_body(root: Path) -> str:
    ema = PostHocEMA(shard(make_model()), root, snapshot_every=EVERY)
    with pytest.raises(OrderError) as caught:
        ema.update(13)
    return str(caught.value)


def test_a_folder_with_snapshots_is_not_continued_without_its_averages(tmp_path) -> None:
    unsharded(tmp_path / "one")
    before = contents(tmp_path / "one")
    for message in run_ranks(2, unrestored_body, tmp_path / "one"):
        assert "their averages were not restored" in message and "ema.resume()" in message
    assert unclaimed(contents(tmp_path / "one")) == unclaimed(before)
