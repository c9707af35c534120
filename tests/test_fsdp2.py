"""DTensors: which indices a place of a mesh keeps, and the contract and training for FSDP with tensor parallelism."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from builders import examples
from contract import check_contract, check_live
from hypothesis import assume, given
from hypothesis import strategies as st
from models import inputs
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from worlds import assert_equal, averages_here, laid_together

from sharded_phema.backends import backend_of
from sharded_phema.backends.fsdp2 import Split, boxes_of, runs_on_mesh
from sharded_phema.errors import UnsupportedModel
from sharded_phema.layout import Box
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct

# Indices ---------------------------------------------------------------------------------------------------------


@st.composite
def meshes(draw):
    shape = tuple(draw(st.lists(st.integers(0, 17), min_size=1, max_size=3)))
    dims = st.one_of(st.none(), st.integers(0, len(shape) - 1))
    axis = st.builds(Split, st.integers(1, 5), dims, st.sampled_from([1, 1, 2, 3, 4]))
    return shape, draw(st.lists(axis, min_size=1, max_size=3))


def placement(split: Split):
    if split.dim is None:
        return Replicate()
    return Shard(split.dim) if split.first == 1 else _StridedShard(split.dim, split_factor=split.first)


def indices(shape, splits, place) -> list[list[int]]:
    """The oracle: every dimension's indices, cut by torch's own placements."""
    kept = [torch.arange(length) for length in shape]
    for split, coordinate in zip(splits, place, strict=True):
        if split.dim is not None:
            alone = placement(Split(split.ranks, 0, split.first))
            kept[split.dim] = alone._split_tensor(kept[split.dim], split.ranks, with_padding=False)[0][coordinate]
    return [dim.tolist() for dim in kept]


@examples(150)
@given(meshes())
def test_runs_are_the_indices_that_torchs_placements_keep(case):
    shape, splits = case
    for place in itertools.product(*(range(split.ranks) for split in splits)):
        runs = runs_on_mesh(shape, splits, place)
        expected = indices(shape, splits, place)
        for dim, wanted in zip(runs, expected, strict=True):
            assert [i for run in dim for i in range(run.offsets[0], run.offsets[0] + run.sizes[0])] == wanted
            assert all(a.offsets[0] + a.sizes[0] < b.offsets[0] for a, b in itertools.pairwise(dim)), "no two adjacent"
        # torch tells the first index only, and that only of shards that hold something.
        sizes, offsets = _compute_local_shape_and_global_offset(
            shape, tuple(split.ranks for split in splits), place, [placement(split) for split in splits]
        )
        assert sizes == tuple(sum(run.numel for run in dim) for dim in runs)
        if all(sizes):
            assert offsets == tuple(dim[0].offsets[0] for dim in runs)


@examples(150)
@given(meshes())
def test_boxes_end_to_end_are_the_shard_or_there_are_none(case):
    # Oracle: the whole tensor indexed by torch's own indices.
    shape, splits = case
    tensor = torch.arange(math.prod(shape)).view(shape)
    for place in itertools.product(*(range(split.ranks) for split in splits)):
        runs = runs_on_mesh(shape, splits, place)
        shard = tensor
        for dim, kept in enumerate(indices(shape, splits, place)):
            shard = shard.index_select(dim, torch.tensor(kept, dtype=torch.int64))
        boxes = boxes_of(runs)
        if boxes is None:
            assert any(len(dim) > 1 for dim in runs[1:]), "what is cut by rows only always is boxes"
        else:
            parts = [tensor[box.slices].reshape(-1) for box in boxes]
            assert torch.equal(torch.cat([tensor.new_empty(0), *parts]), shard.reshape(-1))


@examples(150)
@given(st.integers(0, 60), st.integers(1, 6), st.integers(1, 6))
def test_a_shard_of_fully_shard_after_tensor_parallelism_is_one_run_wherever_its_size_is_what_placements_say(n, dp, tp):
    """fully_shard cuts what tensor parallelism left. Where its placements mean otherwise, some rank's size differs."""
    splits, same, runs = [Split(dp, 0, tp), Split(tp, 0)], True, {}
    for d, t in itertools.product(range(dp), range(tp)):
        parts = Shard._custom_chunk(Shard._custom_chunk(torch.arange(n), tp, 0)[t], dp, 0)[d].tolist()
        runs[d, t] = (runs_on_mesh((n,), splits, (d, t))[0], parts)
        same = same and sum(run.numel for run in runs[d, t][0]) == len(parts)
    assume(same)
    for found, parts in runs.values():
        assert found == ((Box((parts[0],), (len(parts),)),) if parts else ())


def test_each_shard_of_hybrid_sharding_with_tensor_parallelism_has_one_replica_on_each_replicated_place() -> None:
    """Closed form for eight ranks (replicas, fully_shard, tensor parallelism): ten rows, halved and cut in 3 and 2."""
    splits = [Split(2, None), Split(2, 0, 2), Split(2, 0)]
    found = [runs_on_mesh((10,), splits, place)[0] for place in itertools.product(range(2), repeat=3)]
    rows = [(0, 3), (5, 3), (3, 2), (8, 2)]
    assert found == [(Box((first,), (count,)),) for first, count in rows] * 2


# Contract --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Columns and rows of tensor parallelism, even there as torch asks; uneven, empty and unplanned for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 10)
        self.down = nn.Linear(10, 7)
        self.head = nn.Linear(7, 1)
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(self.norm(x)))))


def make_block() -> Block:
    torch.manual_seed(3)
    return Block()


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors}


def planned(model: Block, mesh: DeviceMesh) -> Block:
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def two_dimensional() -> Block:
    """fully_shard over 'dp' of what tensor parallelism over 'tp' left."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    model = planned(make_block(), mesh["tp"])
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def placements(model: nn.Module) -> dict[str, tuple]:
    assert all(isinstance(param, DTensor) for param in model.parameters())
    return {name: (tuple(p.device_mesh.shape), p.placements) for name, p in model.named_parameters()}


def check(model: nn.Module, whole: dict[str, Tensor], batch: Tensor) -> None:
    backend = backend_of(model)
    assert backend.name == "fsdp2"
    check_contract(backend, model, whole)
    check_live(backend, model, batch)
    # A forward without backward leaves the root gathered; the layout must still show the shards.
    with torch.no_grad():
        model(batch)
    check_contract(backend, model, whole)


def two_dimensional_body() -> list:
    model, tp = two_dimensional(), dist.get_world_size() // 2
    strided = _StridedShard(0, split_factor=tp) if tp > 1 else Shard(0)
    assert placements(model) == {
        "norm.weight": ((2,), (Shard(0),)),
        "norm.bias": ((2,), (Shard(0),)),
        "up.weight": ((2, tp), (strided, Shard(0))),
        "up.bias": ((2, tp), (strided, Shard(0))),
        "down.weight": ((2, tp), (Shard(0), Shard(1))),
        "down.bias": ((2, tp), (Shard(0), Replicate())),
        "head.weight": ((2,), (Shard(0),)),
        "head.bias": ((2,), (Shard(0),)),
    }
    check(model, whole_tensors(make_block()), inputs(0))
    return [(s.name, s.boxes, tuple(s.local.shape)) for s in backend_of(model).shard_layout(model, None)]


def tensor_parallel_body() -> None:
    """Without FSDP: what is not planned is an ordinary parameter on every rank."""
    model = planned(make_block(), init_device_mesh("cpu", (2,)))
    found = {name: p.placements for name, p in model.named_parameters() if isinstance(p, DTensor)}
    expected = {
        "up.weight": (Shard(0),),
        "up.bias": (Shard(0),),
        "down.weight": (Shard(1),),
        "down.bias": (Replicate(),),
    }
    assert found == expected
    check(model, whole_tensors(make_block()), inputs(0))


def uneven_body() -> None:
    """Lengths that tensor parallelism does not divide cannot be computed with, but can be sharded."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(13, 5), nn.Linear(3, 13), nn.Linear(13, 1))
    whole = whole_tensors(model)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel(), "2": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    assert placements(model)["0.weight"] == ((2, 2), (_StridedShard(0, split_factor=2), Shard(0)))
    check_contract(backend_of(model), model, whole)


def policies_body() -> None:
    options = [
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        {"reshard_after_forward": False},
        {"shard_placement_fn": lambda param: Shard(param.ndim - 1)},
    ]
    for chosen in options:
        model = make_block()
        # torch shards uneven lengths along dimension 0 only.
        divisible = "shard_placement_fn" in chosen
        ignored = {p for p in model.parameters() if p.shape[-1] % 2} if divisible else set()
        fully_shard(model, ignored_params=ignored, **chosen)
        assert sum(isinstance(p, DTensor) for p in model.parameters()) == (2 if divisible else 8)
        check(model, whole_tensors(make_block()), inputs(0))


def distributed_tensors_body() -> None:
    """Placements that only distribute_tensor makes, on meshes that leave ranks out, and as buffers."""
    world, torch_seed = dist.get_world_size(), torch.Generator().manual_seed(1)
    everyone = init_device_mesh("cpu", (2, world // 2))
    some = DeviceMesh("cpu", [0, 2, 3])
    tensors = {
        "rows": ((8, 3), everyone, [_StridedShard(0, split_factor=2), Shard(1)]),
        "single_row": ((1, 8), everyone, [Replicate(), _StridedShard(1, split_factor=2)]),
        "twice": ((9, 2), everyone, [Shard(0), Shard(0)]),
        "few_ranks": ((5, 2), some, [Shard(0)]),
        "fewer_rows": ((2, 2), some, [Shard(0)]),
        "no_rows": ((0, 3), some, [Shard(0)]),
        "scalar": ((), everyone, [Replicate(), Replicate()]),
    }
    model, whole = nn.Module(), {}
    for kind in ("parameter", "buffer"):
        for name, (shape, mesh, how) in tensors.items():
            value = torch.randn(shape, generator=torch_seed)
            tensor = distribute_tensor(value, mesh, how)
            assert tensor.placements == tuple(how)
            whole[f"{name}_{kind}"] = value
            if kind == "buffer":
                model.register_buffer(f"{name}_buffer", tensor)
            else:
                model.register_parameter(f"{name}_parameter", nn.Parameter(tensor))
    check_contract(backend_of(model), model, whole)
    shards = {shard.name: shard for shard in backend_of(model).shard_layout(model, None)}
    assert len(shards["rows_parameter"].boxes) == 2, "two runs of rows"
    assert (dist.get_rank() == 1) == (shards["few_ranks_parameter"].boxes == ()), "rank 1 is no part of the mesh"
    assert {s.kind for s in shards.values()} == {"trained", "buffer"}


def refused_body() -> list[str]:
    mesh, messages = init_device_mesh("cpu", (2,)), []
    columns = distribute_tensor(torch.randn(3, 8), mesh, [_StridedShard(1, split_factor=2)])
    partial = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])
    wrong = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)], shape=torch.Size((8, 2)), stride=(2, 1))
    for tensor in (columns, partial, wrong):
        model = nn.Module()
        model.register_parameter("weight", nn.Parameter(tensor))
        with pytest.raises(UnsupportedModel) as caught:
            backend_of(model).shard_layout(model, None)
        messages.append(str(caught.value))
    return messages


def buffers_only_body() -> None:
    mesh, model = init_device_mesh("cpu", (2,)), nn.Linear(2, 1)
    model.register_buffer("table", distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)]))
    whole = {name: p.detach().clone() for name, p in make_linear(model).items()}
    assert backend_of(model).name == "fsdp2"
    check_contract(backend_of(model), model, whole)


def make_linear(model: nn.Module) -> dict[str, Tensor]:
    for param in model.parameters():
        nn.init.ones_(param)
    return {**dict(model.named_parameters()), "table": torch.arange(6.0).view(3, 2)}


def two_ranks_body() -> None:
    two_dimensional_body()  # tensor parallelism of one
    tensor_parallel_body()
    policies_body()
    buffers_only_body()


def four_ranks_body() -> list:
    uneven_body()
    distributed_tensors_body()
    return two_dimensional_body()


def test_tensor_parallelism_policies_and_buffers_keep_the_contract_on_two_ranks() -> None:
    run_ranks(2, two_ranks_body)


def test_two_dimensional_meshes_and_any_placement_keep_the_contract_on_four_ranks() -> None:
    ranks = run_ranks(4, four_ranks_body)
    boxes = {name: [dict((n, b) for n, b, _ in rank)[name] for rank in ranks] for name, _, _ in ranks[0]}
    # Closed form: ten rows halved by tensor parallelism, then each half cut into three and two.
    rows = [((0, 0), (3, 5)), ((5, 0), (3, 5)), ((3, 0), (2, 5)), ((8, 0), (2, 5))]
    assert boxes["up.weight"] == [(Box(*place),) for place in rows]
    columns = [((0, 0), (4, 5)), ((0, 5), (4, 5)), ((4, 0), (3, 5)), ((4, 5), (3, 5))]
    assert boxes["down.weight"] == [(Box(*place),) for place in columns]
    assert boxes["head.weight"][2:] == [(), ()], "the second half of a single row"


def test_what_cannot_be_mapped_is_refused_by_name_with_a_mend() -> None:
    for columns, partial, wrong in run_ranks(2, refused_body):
        assert "weight: placements" in columns and "leave a rank alternating columns\nhint: let the mesh" in columns
        assert "weight: placement P(sum) on axis 0 of mesh (2,) cannot be mapped" in partial
        assert "hint: redistribute the tensor to Shard or Replicate" in partial
        assert "mean a shard of (4, 2) at (" in wrong and "the model holds (2, 2)" in wrong


# Training --------------------------------------------------------------------------------------------------------


def train(model: nn.Module, ema: PostHocEMA, steps: int) -> list[dict[str, Tensor]]:
    """Whole parameters after each step."""
    optimizer, path = torch.optim.Adam(model.parameters(), lr=0.02, foreach=False), []
    for step in range(1, steps + 1):
        model(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        path.append({n: whole_of(p) for n, p in model.named_parameters()})
    return path


def whole_of(param: Tensor) -> Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()


def training_body(root: Path, kind: str) -> tuple[list, list, list[bool]]:
    model = two_dimensional() if kind == "2d" else planned(make_block(), init_device_mesh("cpu", (2,)))
    assert sum(isinstance(p, DTensor) for p in model.parameters()) == (8 if kind == "2d" else 4)
    ema = PostHocEMA(model, root, snapshot_every=2)
    path = train(model, ema, 5)
    with CommDebugMode() as collectives:
        ema.update(6)
        ema.snapshot()
    checks = [collectives.get_total_counts() == 0]
    return averages_here(ema), path, checks + swap_checks(model, ema)


def swap_checks(model: nn.Module, ema: PostHocEMA) -> list[bool]:
    average = make_block()
    shards = backend_of(model).shard_layout(model, None)
    before = [shard.local.clone() for shard in shards]
    with torch.no_grad():
        own = model(inputs(0))
        with ema.swapped(sigma_rel=0.10):
            inside = model(inputs(0))
            average.load_state_dict({n: whole_of(p) for n, p in resharded(model).named_parameters()}, strict=False)
        again = model(inputs(0))
    # The sums of tensor parallelism are in another order than those of one process.
    close = torch.allclose(inside_whole(inside), average(inputs(0)), rtol=1e-5, atol=1e-6)
    undone = [torch.equal(shard.local, value) for shard, value in zip(shards, before, strict=True)]
    return [close, torch.equal(own, again), not torch.equal(own, inside), *undone]


def inside_whole(output: Tensor) -> Tensor:
    return output.full_tensor() if isinstance(output, DTensor) else output


def resharded(model: nn.Module) -> nn.Module:
    backend_of(model).publish(model, None)
    return model


@pytest.mark.parametrize(("ranks", "kind"), [(4, "2d"), (2, "tp")])
def test_averages_snapshots_and_swaps_of_tensor_parallel_training_are_those_of_its_weights(tmp_path, ranks, kind):
    """Oracle: whole weights of each step fed to PostHocEMA of a plain model, as sums of training differ in order."""
    results = run_ranks(ranks, training_body, tmp_path / "many", kind)
    path, model = results[0][1], make_block()
    assert all(torch.equal(other[1][-1][name], value) for other in results for name, value in path[-1].items())
    assert not torch.equal(path[0]["up.weight"], path[-1]["up.weight"])
    assert all(all(checks) for _, _, checks in results)
    ema = PostHocEMA(model, tmp_path / "one", snapshot_every=2)
    for weights in (*path, path[-1]):
        model.load_state_dict(weights, strict=False)
        ema.update()
    ema.close()
    assert_equal(laid_together([found for found, _, _ in results]), laid_together([averages_here(ema)]))
    outputs = []
    for name in ("one", "many"):
        reconstruct(tmp_path / name, ["0.07"], out=tmp_path / f"{name}-out")
        outputs.append((tmp_path / f"{name}-out" / "0.07" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1], "the snapshots hold the same averages"
