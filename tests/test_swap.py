"""Swaps: averages that are rebuilt from snapshots, in place of the weights of sharded and replicated models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from allocations import Allocations
from builders import Free, listing, same_bits, tensors_of
from models import Trainer, inputs, make_model, shard
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sharded_phema import blocks
from sharded_phema.errors import OrderError, StoreError
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.store import open_run
from sharded_phema.sums import AHEAD, GROUP, PAD, STRIP_BYTES

EVERY, STEPS = 3, 12
TARGETS = {"0.07": "0.07", "decay": "decay:linear:0.5", "then": "0.05@t=7", "window": "window:0.3"}
PARTS = {"first.*": 0.07, "*": "window:0.3"}


def columns() -> nn.Module:
    """Two layers whose weights are cut by columns, without FSDP."""
    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), make_model()
    for layer in (model.first, model.last):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(layer.weight.dim() - 1)]))
    model.again.weight = model.first.weight
    assert isinstance(model.first.weight, DTensor)
    return model


def kind_of_model(kind: str) -> nn.Module:
    if kind == "fsdp2":
        return shard(make_model())
    return nn.parallel.DistributedDataParallel(make_model()) if kind == "ddp" else make_model()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, gathered."""
    found = {}
    for name, param in model.named_parameters():
        found[name.removeprefix("module.")] = (param.full_tensor() if isinstance(param, DTensor) else param).clone()
    return {name: value.detach() for name, value in found.items()}


def trained(kind: str, root: Path) -> tuple[nn.Module, PostHocEMA]:
    model = kind_of_model(kind)
    ema, trainer = PostHocEMA(model, root, snapshot_every=EVERY), Trainer(model)
    for step in range(1, STEPS + 1):
        trainer.step()
        ema.update(step)
    return model, ema


def rebuilt_body(kind: str, root: Path) -> tuple[dict[str, dict[str, Tensor]], list[Tensor], dict[str, Tensor]]:
    """The weights inside each swap, what forward gave inside them, and the weights before and after."""
    model, ema = trained(kind, root)
    with torch.no_grad():
        own = model(inputs(0))
    before, seen, outputs = whole(model), {}, []
    for name, target in (TARGETS | {"parts": PARTS}).items():
        with ema.swapped(target, offload=name == "decay"), torch.no_grad():
            outputs.append(model(inputs(0)))
            for module in model.modules():
                getattr(module, "reshard", lambda: None)()
            seen[name] = whole(model)
            with pytest.raises(OrderError, match="swapped"), ema.swapped(0.05):
                pass
        with torch.no_grad():
            assert torch.equal(model(inputs(0)), own)
        for module in model.modules():
            getattr(module, "reshard", lambda: None)()
        assert all(same_bits(value, before[key]) for key, value in whole(model).items())
    return seen, outputs, before


@pytest.mark.parametrize(("kind", "ranks"), [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)])
def test_a_rebuilt_average_in_place_is_the_one_that_reconstruct_writes(tmp_path, kind, ranks) -> None:
    results = run_ranks(ranks, rebuilt_body, kind, tmp_path / "run")
    expected = {}
    for name, target in (TARGETS | {"parts": PARTS}).items():
        # One by one: which stored averages several targets share depends on all of them.
        reconstruct(tmp_path / "run", [target], out=tmp_path / name)
        expected[name] = tensors_of(next((tmp_path / name).iterdir()))
    for seen, outputs, before in results:
        for name, weights in seen.items():
            assert all(same_bits(value, expected[name][key]) for key, value in weights.items()), name
            assert not torch.equal(weights["conv.weight"], before["conv.weight"])
        for weights, output in zip(seen.values(), outputs, strict=True):
            model = make_model()
            model.load_state_dict(weights | {"again.weight": weights["first.weight"]})
            with torch.no_grad():
                assert torch.equal(model(inputs(0)), output)


def columns_body(root: Path) -> dict[str, Tensor]:
    model = columns()
    ema = PostHocEMA(model, root, snapshot_every=EVERY)
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for index, param in enumerate(model.parameters()):
                local = param.to_local() if isinstance(param, DTensor) else param
                local.mul_(1.0 + 0.01 * step * (index + 1))
        ema.update(step)
    with ema.swapped("decay:linear:0.5"):
        return whole(model)


def test_columns_are_read_box_by_box(tmp_path) -> None:
    found = run_ranks(2, columns_body, tmp_path / "run")
    reconstruct(tmp_path / "run", ["decay:linear:0.5"], out=tmp_path / "out")
    expected = tensors_of(next((tmp_path / "out").iterdir()))
    assert all(same_bits(one[name], expected[name]) for one in found for name in expected)


def damaged_body(root: Path) -> tuple[str, bool]:
    """A file of one snapshot is damaged, then one of each: all ranks hear of it and have their weights back."""
    model, ema = trained("fsdp2", root)
    before = whole(model)
    paths = [Path(snapshot.where) / "rank-00001.safetensors" for snapshot in open_run(root).snapshots]

    def spoil(paths: list[Path]) -> None:
        for path in paths if dist.get_rank() == 0 else []:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        dist.barrier()

    spoil(paths[1:2])
    with ema.swapped("window:0.3"):
        assert not all(same_bits(value, before[name]) for name, value in whole(model).items())
    spoil(paths)
    blocks._kept.clear()  # what one rank had read before is in its memory yet
    with pytest.raises(StoreError) as caught, ema.swapped("window:0.3"):
        pass
    ema.update()
    return str(caught.value), all(same_bits(value, before[name]) for name, value in whole(model).items())


def test_a_damaged_snapshot_is_told_on_all_ranks_and_the_weights_are_back(tmp_path) -> None:
    (first, same), (second, also) = run_ranks(2, damaged_body, tmp_path / "run")
    assert first == second and "rank-00001.safetensors" in first
    assert same and also


def test_snapshots_that_a_resumed_run_left_behind_are_not_rebuilt_from(tmp_path) -> None:
    """Oracle: a run that was never further than the state that was resumed."""
    for root, last in ((tmp_path / "long", 12), (tmp_path / "short", 7)):
        model = Free(w=5)
        ema = PostHocEMA(model, root, snapshot_every=3)
        for step in range(1, last + 1):
            model.set(w=torch.full((5,), float(step % 4 + step)))
            ema.update(step)
            if step == 7:
                state = {key: dict(value) for key, value in ema.state_dict().items()}
                state = {key: {k: v.clone() for k, v in value.items()} for key, value in state.items()}
    seen = []
    for root in (tmp_path / "long", tmp_path / "short"):
        model = Free(w=5)
        ema = PostHocEMA(model, root, snapshot_every=3)
        ema.load_state_dict(state)
        ema.update(8)
        files = listing(root)
        with ema.swapped("window:0.5"):
            seen.append(model.w.detach().clone())
        assert listing(root) == files
    assert torch.equal(seen[0], seen[1])


def test_without_a_snapshot_there_is_nothing_to_rebuild_from(tmp_path) -> None:
    model = Free(w=3)
    ema = PostHocEMA(model, tmp_path / "run")
    model.set(w=[1.0, 2.0, 3.0])
    ema.update()
    with pytest.raises(OrderError, match="has stored no snapshot"), ema.swapped(0.07):
        pass
    assert model.w.tolist() == [1.0, 2.0, 3.0]
    with ema.swapped(0.05):  # a tracked one needs none
        assert model.w.tolist() == [1.0, 2.0, 3.0]


def frugal_body(root: Path) -> int:
    """Elements of the largest tensor that a rebuilt swap makes beside the saved weights."""
    model = nn.Sequential(nn.Linear(3000, 2001, bias=False))
    torch.distributed.fsdp.fully_shard(model)
    ema = PostHocEMA(model, root, snapshot_every=1)
    ema.update()
    ema.update()
    with Allocations() as made, ema.swapped("window:0.5"):
        pass
    return made.elements


def test_a_rebuilt_swap_makes_nothing_larger_than_the_saved_shard_and_its_buffers(tmp_path) -> None:
    # Three strips of each of the four averages that two snapshots hold.
    assert GROUP > 4 and AHEAD == 2
    for largest in run_ranks(2, frugal_body, tmp_path / "run"):
        assert largest <= max(3000 * 1001, (AHEAD + 1) * 4 * (STRIP_BYTES // 4 + PAD)) < 3000 * 2001


def non_contiguous() -> Free:
    model = Free(w=(4, 3))
    model.w = nn.Parameter(torch.zeros(3, 4).t())
    return model


def test_a_parameter_that_no_flat_view_reaches_is_filled_too(tmp_path) -> None:
    model = non_contiguous()
    ema = PostHocEMA(model, tmp_path / "run", snapshot_every=2)
    for step in range(1, 9):
        model.set(w=torch.arange(12.0).view(4, 3) * step)
        ema.update(step)
    assert not model.w.is_contiguous()
    with ema.swapped("window:0.5"):
        found = model.w.detach().clone()
    reconstruct(tmp_path / "run", ["window:0.5"], out=tmp_path / "out")
    assert torch.equal(found, tensors_of(next((tmp_path / "out").iterdir()))["w"])
    assert torch.equal(model.w.detach(), torch.arange(12.0).view(4, 3) * 8)
