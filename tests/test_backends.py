"""Backends: the contract, for every kind of model that is supported, and refusals for those that are not."""

import pytest
import torch
from contract import check_contract, check_live
from models import inputs, make_model, shard
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sharded_phema.backends import backend_of
from sharded_phema.errors import UnsupportedModel


def whole_parameters() -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in make_model().named_parameters()}


def plain_body() -> None:
    model = make_model()
    backend = backend_of(model)
    assert backend.name == "plain"
    check_contract(backend, model, whole_parameters())
    check_live(backend, model, inputs(0))


def ddp_body() -> None:
    model = nn.parallel.DistributedDataParallel(make_model())
    backend = backend_of(model)
    check_contract(backend, model, whole_parameters())
    check_live(backend, model, inputs(0))


def fsdp2_body(mesh_shape: tuple[int, ...], low_precision: bool) -> None:
    model = shard(make_model(), mesh_shape=mesh_shape, low_precision=low_precision)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    backend = backend_of(model)
    assert backend.name == "fsdp2"
    check_contract(backend, model, whole_parameters())
    check_live(backend, model, inputs(0))
    # A forward without backward leaves the root gathered; the layout must still show the shards.
    with torch.no_grad():
        model(inputs(1))
    check_contract(backend, model, whole_parameters())


def mixed_body() -> None:
    """A scalar that FSDP refuses is ignored by it and stays whole on every rank."""
    model = make_model()
    model.scale = nn.Parameter(torch.tensor(3.0))
    whole = {name: param.detach().clone() for name, param in model.named_parameters()}
    fully_shard(model, ignored_params={model.scale})
    check_contract(backend_of(model), model, whole)


def dtensor_body() -> None:
    """DTensors without FSDP: columns over one axis, replicas over the other."""
    mesh = init_device_mesh("cpu", (2, 2))
    model, whole = nn.Linear(5, 7, bias=False), {}
    whole["weight"] = model.weight.detach().clone()
    model.weight = nn.Parameter(distribute_tensor(whole["weight"], mesh, [Replicate(), Shard(1)]))
    check_contract(backend_of(model), model, whole)


def partial_mesh_body() -> None:
    """Pairs of ranks hold the same shards, which the placements do not tell: their mesh is half of the world."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
    model = nn.Linear(4, 3)
    whole = {"weight": torch.arange(12.0).view(3, 4), "bias": torch.ones(3)}
    model.weight = nn.Parameter(distribute_tensor(whole["weight"], mesh, [Shard(0)]))
    nn.init.ones_(model.bias)
    check_contract(backend_of(model), model, whole)


def test_a_plain_module_keeps_the_contract() -> None:
    plain_body()


@pytest.mark.parametrize("body", [plain_body, ddp_body])
def test_replicated_modules_keep_the_contract_on_two_ranks(body) -> None:
    run_ranks(2, body)


@pytest.mark.parametrize(
    ("ranks", "mesh_shape", "low_precision"), [(2, (), False), (4, (), False), (2, (), True), (4, (2, 2), False)]
)
def test_fully_sharded_modules_keep_the_contract(ranks: int, mesh_shape: tuple[int, ...], low_precision: bool) -> None:
    run_ranks(ranks, fsdp2_body, mesh_shape, low_precision)


def test_a_parameter_that_fsdp_ignores_is_held_whole_and_written_once() -> None:
    run_ranks(2, mixed_body)


def test_dtensors_cut_by_columns_and_replicated_keep_the_contract() -> None:
    run_ranks(4, dtensor_body)


def test_replicas_that_a_mesh_does_not_show_are_found() -> None:
    run_ranks(4, partial_mesh_body)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"expected a torch\.nn\.Module"):
        backend_of({"weight": torch.zeros(1)})


def test_a_deepspeed_engine_is_refused_rather_than_taken_for_a_plain_module() -> None:
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    with pytest.raises(UnsupportedModel, match="found DeepSpeedEngine"):
        backend_of(engine)


def test_wrapper_segments_are_no_part_of_names() -> None:
    compiled = torch.compile(make_model())
    layout = backend_of(compiled).shard_layout(compiled, None)
    assert [shard.name for shard in layout] == list(whole_parameters())
