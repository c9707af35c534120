"""DeepSpeed: the contract, averages and swaps of engines of every stage, against weights gathered by other means."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

# On a machine of one's own DeepSpeed may be missing; where CI is set it must not be.
if importlib.util.find_spec("deepspeed") is None and not os.environ.get("CI"):
    pytest.skip("DeepSpeed is not installed: pip install -c constraints.txt -e '.[deepspeed]'", allow_module_level=True)

import torch
from builders import lay, same_bits, tensors_of
from contract import check_contract, check_live
from models import inputs
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from zero_engines import (
    LR,
    Recipe,
    Wrapper,
    check_configured,
    counted_collectives,
    engine_of,
    groups_of,
    make_model,
    module_weights,
    started,
    train_step,
    whole_tensors,
)

from sharded_phema.backends import backend_of
from sharded_phema.errors import UnsupportedModel
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct

pytestmark = pytest.mark.timeout(900)  # a world runs all recipes: a minute on two idle cores

ZERO, STAGE_3, BF16 = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", torch.bfloat16
CPU = {"device": "cpu"}
ACCUMULATE_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}

RECIPES = {
    "0": Recipe(0, "AdamW"),
    "0-fused": Recipe(0, "FusedAdam", adam="fused"),
    # Without decay: a step that DeepSpeed makes when it begins decays masters before the first gradient.
    "0-bf16": Recipe(0, "FP16_UnfusedOptimizer", BF16, decay=0.0),
    "0-bf16-fused": Recipe(0, "FP16_Optimizer", BF16, adam="fused", decay=0.0),
    "1": Recipe(1, ZERO),
    "1-bf16": Recipe(1, ZERO, BF16),
    "1-bf16-fp32-grads": Recipe(1, "BF16_Optimizer", BF16, config=ACCUMULATE_FP32),
    "2": Recipe(2, ZERO),
    "2-round-robin": Recipe(2, ZERO, zero={"round_robin_gradients": True}),
    "2-bf16": Recipe(2, ZERO, BF16),
    "2-bf16-round-robin": Recipe(2, ZERO, BF16, zero={"round_robin_gradients": True}),
    "2-bf16-offload": Recipe(2, ZERO, BF16, zero={"offload_optimizer": CPU}, adam="cpu"),
    "2-fused": Recipe(2, ZERO, adam="fused"),
    "3": Recipe(3, STAGE_3),
    "3-persistent": Recipe(3, STAGE_3, zero={"stage3_param_persistence_threshold": 20}),
    "3-bf16": Recipe(3, STAGE_3, BF16),
    "3-bf16-sub-groups": Recipe(3, STAGE_3, BF16, zero={"sub_group_size": 10}),
    "3-bf16-persistent": Recipe(3, STAGE_3, BF16, zero={"stage3_param_persistence_threshold": 20}),
    "3-bf16-offload": Recipe(3, STAGE_3, BF16, zero={"offload_optimizer": CPU, "offload_param": CPU}, adam="cpu"),
}
ON_FOUR = {
    "2-bf16-round-robin": RECIPES["2-bf16-round-robin"],
    "3-bf16-sub-groups": RECIPES["3-bf16-sub-groups"],
    "3-bf16-hpz": Recipe(3, STAGE_3, BF16, zero={"zero_hpz_partition_size": 2}),
    "3-bf16-hpz-persistent": Recipe(
        3, STAGE_3, BF16, zero={"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 20}
    ),
}
AVERAGES: dict[str, Any] = {"sigma_rels": (0.05, 0.2), "profiles": ("exponential:decay=0.8",)}
STEPS = 5
REBUILT = ("0-bf16", "1-bf16-fp32-grads", "2-round-robin", "3-bf16-sub-groups", "3-bf16-hpz")
"""Recipes whose snapshots are rebuilt, one for each way to hold masters."""


@dataclass
class Run:
    """What one rank saw, before the first step and after each."""

    masters: list[list[tuple]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    average: list[tuple] = field(default_factory=list)
    swapped: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None


def pieces(layout) -> list[tuple]:
    return [(shard.name, shard.global_shape, shard.boxes, shard.local.clone()) for shard in layout]


def assembled(ranks: list[list[tuple]]) -> dict[str, Tensor]:
    """Whole tensors from the pieces of all ranks, which must leave nothing out."""
    whole: dict[str, Tensor] = {}
    for name, shape, boxes, values in (piece for rank in ranks for piece in rank):
        lay(whole.setdefault(name, torch.full(shape, torch.nan)), boxes, values)
    assert not any(value.isnan().any() for value in whole.values())
    return whole


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(found[name], value), name


def given(engine, how: str) -> tuple[Any, Any]:
    """Model and optimizer as a user gives them."""
    return (engine, None) if how == "engine" else (engine.module, Wrapper(engine.optimizer))


def ways(recipe: Recipe) -> tuple[str, ...]:
    # Stage 0 in float32 leaves the optimizer as it was: nothing tells its module from one without DeepSpeed.
    return ("engine",) if recipe.stage == 0 and recipe.dtype == torch.float32 else ("engine", "module")


def check_backend(engine, recipe: Recipe) -> None:
    for model, optimizer in (given(engine, how) for how in ways(recipe)):
        backend = backend_of(model, optimizer)
        assert backend.name == "zero"
        with counted_collectives() as called:
            layout = backend.shard_layout(model, optimizer)
        assert not called
        trained = [shard for shard in layout if shard.kind == "trained"]
        held, total = sum(s.local.numel() for s in trained), sum(math.prod(s.global_shape) for s in trained)
        assert held == total if recipe.stage == 0 else held < 0.7 * total, "the masters are really sharded"
        assert {shard.name for shard in layout if shard.kind == "frozen"} == {"scale", "loose"}
        check_contract(backend, model, whole_tensors(recipe), optimizer)
        check_live(backend, model, inputs(0, recipe.dtype), optimizer)
        check_configured(engine, recipe)


def run_body(recipe: Recipe, root: Path) -> Run:
    how = ways(recipe)[-1]
    with engine_of(recipe) as engine:
        check_backend(engine, recipe)
        run = averaged(engine, recipe, root, *given(engine, how))
        model, optimizer = given(engine, how)
        check_live(backend_of(model, optimizer), model, inputs(0, recipe.dtype), optimizer)
    with engine_of(recipe) as engine:
        for weights in run.weights:
            train_step(engine, recipe.dtype)
            assert_same(module_weights(engine), weights)  # training knows nothing of averages and swaps
    return run


def averaged(engine, recipe: Recipe, root: Path, model: Any, optimizer: Any) -> Run:
    run = Run()
    ema = PostHocEMA(model, root, optimizer=optimizer, snapshot_every=2, **AVERAGES)
    for _ in range(STEPS + 1):
        train_step(engine, recipe.dtype)
        with counted_collectives() as called, CommDebugMode() as mode:
            ema.update()  # at times a snapshot, too
        assert not called and mode.get_total_counts() == 0
        run.masters.append(pieces(ema._layout))
        run.weights.append(module_weights(engine))
        with ema.swapped(0.05), torch.no_grad():
            run.swapped, run.output = module_weights(engine), engine(inputs(0, recipe.dtype))
        kept = getattr(engine.optimizer, "persistent_parameters", ())
        assert all(param.data.numel() == param.ds_numel for param in kept), "still gathered, as DeepSpeed left them"
        assert_same(module_weights(engine), run.weights[-1])
    ema.close()
    run.average = pieces(ema._averages.layout(0))
    return run


def recipes_body(recipes: dict[str, Recipe], root: Path) -> dict[str, Run]:
    found = {}
    for name, recipe in recipes.items():
        try:
            found[name] = run_body(recipe, root / name)
        except BaseException as error:
            error.add_note(f"recipe {name}")
            raise
    return found


def reference(recipe: Recipe, masters: list[dict[str, Tensor]], root: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The oracle: one process, whose plain float32 parameters are set to the masters of each step. No DeepSpeed."""
    model = make_model()
    model.loose.requires_grad_(False)
    for name in ("scale", "loose"):
        model.get_parameter(name).data = model.get_parameter(name).data.to(recipe.dtype)
    with PostHocEMA(model, root, snapshot_every=2, **AVERAGES) as ema:
        for weights in masters:
            with torch.no_grad():
                for name, value in weights.items():
                    model.get_parameter(name).copy_(value)
            ema.update()
    return model, assembled([pieces(ema._averages.layout(0))])


def check_run(recipe: Recipe, ranks: list[Run], folder: Path) -> None:
    masters = [assembled([run.masters[step] for run in ranks]) for step in range(STEPS + 1)]
    for run in ranks:
        for known, weights in zip(masters, run.weights, strict=True):
            assert_same({name: weights[name] for name in known}, {n: v.to(recipe.dtype) for n, v in known.items()})
    assert all(not torch.equal(masters[0][name], masters[-1][name]) for name in masters[0]), "training moves all"
    model, expected = reference(recipe, masters, folder / "one")
    average = assembled([run.average for run in ranks])
    assert_same(average, expected)
    check_swapped(recipe, ranks, model, average)


def check_rebuilt(root: Path, folder: Path) -> None:
    """Snapshots of the run, and of the unsharded one that is in the folder, rebuild to the same bits."""
    for name, where in (("one", folder / "one"), ("zero", root)):
        reconstruct(where, [0.05, 0.12], out=folder / f"rebuilt-{name}", tolerance="exact")
    targets = sorted(path.name for path in (folder / "rebuilt-one").iterdir())
    assert len(targets) == 2
    for target in targets:
        assert_same(tensors_of(folder / "rebuilt-zero" / target), tensors_of(folder / "rebuilt-one" / target))


def check_swapped(recipe: Recipe, ranks: list[Run], model: nn.Module, average: dict[str, Tensor]) -> None:
    """The forward inside of the swap is that of an unsharded model with the average, to the last bit."""
    rounded = {name: value.to(recipe.dtype) for name, value in average.items()}
    for name, param in model.named_parameters():
        param.data = rounded.get(name, param.data)
    model.again.weight = model.first.weight
    with torch.no_grad():
        output = model(inputs(0, recipe.dtype))
    for run in ranks:
        assert_same({name: run.swapped[name] for name in rounded}, rounded)
        assert run.output is not None and same_bits(run.output, output)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> tuple[Path, list[dict[str, Run]]]:
    """Every recipe on two ranks; starting ranks and importing DeepSpeed is paid once."""
    root = tmp_path_factory.mktemp("two")
    return root, run_ranks(2, recipes_body, RECIPES, root, timeout=600)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory) -> tuple[Path, list[dict[str, Run]]]:
    root = tmp_path_factory.mktemp("four")
    return root, run_ranks(4, recipes_body, ON_FOUR, root, timeout=600)


@pytest.mark.parametrize("name", RECIPES)
def test_averages_of_a_zero_run_are_those_of_an_unsharded_run_over_the_same_masters(tmp_path, on_two, name) -> None:
    root, ranks = on_two
    check_run(RECIPES[name], [runs[name] for runs in ranks], tmp_path)
    if name in REBUILT:
        check_rebuilt(root / name, tmp_path)


@pytest.mark.parametrize("name", ON_FOUR)
def test_on_four_ranks_averages_are_those_of_an_unsharded_run_over_the_same_masters(tmp_path, on_four, name) -> None:
    root, ranks = on_four
    check_run(ON_FOUR[name], [runs[name] for runs in ranks], tmp_path)
    if name in REBUILT:
        check_rebuilt(root / name, tmp_path)


def plain_weights() -> list[dict[str, Tensor]]:
    """Training without DeepSpeed, on the same batches: weights after each step."""
    model, path = make_model(), []
    optimizer = torch.optim.AdamW(groups_of(model, RECIPES["0"].decay), lr=LR)
    for step in range(STEPS + 1):
        model(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        path.append({name: param.detach().clone() for name, param in model.named_parameters()})
    return path


def test_stages_train_alike(on_two) -> None:
    """To the last bit where sums and vector lengths are the same; each rank has the same batch, so that means are."""
    found, plain = on_two[1][0], plain_weights()
    for name, expected in [
        ("0", plain),
        ("2", found["1"].weights),
        ("2-bf16", found["1-bf16"].weights),
        ("1-bf16-fp32-grads", found["1-bf16"].weights),
    ]:
        for weights, others in zip(found[name].weights, expected, strict=True):
            assert_same(weights, others)
    # In one buffer other elements are the last that do not fill a vector, and these are rounded without fused sums.
    for name in ("1", "2-round-robin", "3", "3-persistent", "0-fused", "2-fused"):
        for weights, others in zip(found[name].weights, plain, strict=True):
            torch.testing.assert_close(weights, others, rtol=0, atol=2e-6)


def checkpoint_body(folder: Path) -> None:
    for name in ("0-bf16", "1-bf16-fp32-grads", "2-bf16-round-robin", "3-bf16-persistent"):
        recipe = RECIPES[name]
        with engine_of(recipe) as engine:
            backend = backend_of(engine)
            first = backend.shard_layout(engine, None)
            train_step(engine, recipe.dtype)
            engine.save_checkpoint(str(folder), tag=name)
            saved = [shard.local.clone() for shard in first]
            train_step(engine, recipe.dtype)
            engine.load_checkpoint(str(folder), tag=name)
            for shard, value, again in zip(first, saved, backend.shard_layout(engine, None), strict=True):
                assert torch.equal(shard.local, value), f"{name} {shard.name}: a layout made before is live still"
                assert again.local.data_ptr() == shard.local.data_ptr() == shard.current().data_ptr()


def test_loading_a_checkpoint_of_deepspeed_fills_the_masters_that_a_layout_watches(tmp_path) -> None:
    run_ranks(2, checkpoint_body, tmp_path, timeout=300)


def refusal(model: object, optimizer: object = None) -> str:
    """The error that PostHocEMA meets, without any communication before it."""
    with counted_collectives() as called, pytest.raises(UnsupportedModel) as caught:
        backend_of(model, optimizer).shard_layout(model, optimizer)  # type: ignore[arg-type]
    assert not called
    return str(caught.value)


def bare_modules_body() -> dict[str, str]:
    found = {}
    for name in ("1-bf16-fp32-grads", "2", "3"):
        with engine_of(RECIPES[name]) as engine:
            found[name] = refusal(engine.module)
            found[f"{name} other"] = refusal(nn.Linear(2, 2), engine.optimizer)
    return found


def refusals_body() -> dict[str, dict[str, str]]:
    bodies = (bare_modules_body, no_optimizer_body, marked_body, pipeline_body, drifted_body)
    return {body.__name__: body() for body in bodies}


@pytest.fixture(scope="module")
def refused() -> dict[str, dict[str, str]]:
    """All refusals, met by one rank one after another."""
    return run_ranks(1, refusals_body, timeout=300)[0]


def test_a_module_without_its_engine_or_optimizer_is_refused(refused) -> None:
    for name, text in refused["bare_modules_body"].items():
        if name.endswith("other"):
            assert "trains none of the 2 parameters of Linear" in text
        else:
            assert "scale" in text or "first.weight" in text or "loose" in text
            assert "belongs to a DeepSpeed engine" in text and "optimizer=engine.optimizer" in text


def no_optimizer_body() -> dict[str, str]:
    import deepspeed

    found = {}
    for stage in (0, 3):
        config = {"train_micro_batch_size_per_gpu": 6, "zero_optimization": {"stage": stage}}
        with started():
            engine, *_ = deepspeed.initialize(model=nn.Linear(4, 4), config=config, dist_init_required=False)
        found[str(stage)] = refusal(engine)
        engine.destroy()
    return found


def test_an_engine_that_trains_nothing_is_refused(refused) -> None:
    found = refused["no_optimizer_body"]
    assert "has no optimizer (it has NoneType)" in found["0"]
    assert "has no optimizer (it has DeepSpeedZeRoOffload)" in found["3"]


def marked_body() -> dict[str, str]:
    """What needs hardware or far more set-up than a test has is imitated by the mark that DeepSpeed leaves."""
    found = {}
    with engine_of(RECIPES["3"]) as engine:
        for option in ("swap_optimizer", "params_in_nvme_and_cpu", "zenflow", "zero_quantized_nontrainable_weights"):
            setattr(engine.optimizer, option, True)
            found[option] = refusal(engine)
            setattr(engine.optimizer, option, False)
        engine.optimizer.offloaded_states.add("hp_params")
        found["offloaded_states"] = refusal(engine)
        engine.optimizer.offloaded_states.clear()
        for mark, value in (("allreduce", False), ("tensor_model_parallel", True)):
            setattr(engine.module.conv.weight, mark, value)
            found[mark] = refusal(engine)
            delattr(engine.module.conv.weight, mark)
        keeper = type(engine.optimizer)
        engine.optimizer.__class__ = type("SuperOffloadOptimizer_Stage3", (keeper,), {})
        found["class"] = refusal(engine)
        engine.optimizer.__class__ = keeper
        assert len(backend_of(engine).shard_layout(engine, None)) == len(whole_tensors(RECIPES["3"]))
    return found


def test_what_cannot_be_mapped_is_refused_by_its_name(refused) -> None:
    found = refused["marked_body"]
    for option in ("swap_optimizer", "params_in_nvme_and_cpu", "zenflow", "zero_quantized_nontrainable_weights"):
        assert f"DeepSpeedZeroOptimizer_Stage3.{option} is on" in found[option]
    assert "engine.reload_states()" in found["offloaded_states"]
    assert "conv.weight: an expert's parameter (allreduce=False)" in found["allreduce"]
    assert "conv.weight: a slice of a tensor parallel parameter" in found["tensor_model_parallel"]
    assert "DeepSpeed's SuperOffloadOptimizer_Stage3 cannot be mapped; expected one of FP16_Unfused" in found["class"]


def pipeline_body() -> dict[str, str]:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    with started():
        deepspeed.init_distributed("gloo")
        model = PipelineModule([nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=1, loss_fn=nn.MSELoss())
        return {"pipeline": refusal(model)}


def test_a_pipeline_is_refused(refused) -> None:
    assert "PipelineModule: each rank holds only its own stage" in refused["pipeline_body"]["pipeline"]


def drifted_body() -> dict[str, str]:
    found = {}
    for name in ("2-bf16", "3-bf16"):
        with engine_of(RECIPES[name]) as engine:
            weights = engine.module.conv.weight
            with torch.no_grad():
                getattr(weights, "ds_tensor", weights).add_(1.0)
            found[name] = refusal(engine)
            engine.optimizer.refresh_fp32_params()
            check_live(backend_of(engine), engine, inputs(0, BF16))
    # The step of zero gradients that stage 0 begins with decays masters, here by more than bfloat16 rounds away.
    with engine_of(replace(RECIPES["0-bf16"], decay=0.5)) as engine:
        found["first"] = refusal(engine)
        train_step(engine, BF16)
        check_live(backend_of(engine), engine, inputs(0, BF16))
    with engine_of(RECIPES["2-bf16"]) as engine:
        engine.module.float()
        found["cast"] = refusal(engine)
    return found


def test_weights_that_are_not_their_masters_are_refused_for_undoing_a_swap_would_change_them(refused) -> None:
    found = refused["drifted_body"]
    for name in ("2-bf16", "3-bf16"):
        assert "conv.weight: the weights in use are not those of the float32 master" in found[name]
        assert "refresh_fp32_params()" in found[name]
    assert "after the first optimizer step" in found["first"]
    assert "do not move or cast the module after deepspeed.initialize" in found["cast"]


def test_without_deepspeed_wrapped_optimizers_do_not_make_a_module_one_of_zero() -> None:
    model = make_model()
    wrapped = Wrapper(Wrapper(torch.optim.AdamW(model.parameters())))
    assert backend_of(model, wrapped).name == "plain"
    wrapped.optimizer = wrapped
    assert backend_of(model, wrapped).name == "plain"
