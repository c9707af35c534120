"""FSDP1: the contract for every strategy, and averages, snapshots and swaps against the unsharded run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from contract import check_contract, check_live
from fsdp1_models import LOW, assert_sharded, awkward, make_odd, summoned, tensors, wrap
from models import Trainer, inputs, make_model
from ranks import run_ranks
from safetensors.torch import load_file
from test_sharded import Averages, assembled, assert_same, pieces, train, unsharded
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sharded_phema.backends import backend_of
from sharded_phema.backends.fsdp1 import BACKEND
from sharded_phema.errors import OrderError, UnsupportedModel
from sharded_phema.layout import ShardLayout
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, EVERY = 5, 2
TWO = [(name, original) for name in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD") for original in (True, False)]
FOUR = [("FULL_SHARD", False), ("HYBRID_SHARD", True), ("HYBRID_SHARD", False), ("_HYBRID_SHARD_ZERO2", True)]


def assert_live(layout: ShardLayout) -> None:
    """The storage of a layout is what the model uses now."""
    for shard in layout:
        assert shard.current().data_ptr() == shard.local.data_ptr(), shard.name


def kept(strategy: str, original: bool, low: bool) -> None:
    """One configuration, from before its first forward until after training."""
    model, weights = awkward(strategy, original=original, low=low), tensors(make_model())
    assert backend_of(model) is BACKEND
    early = BACKEND.shard_layout(model, None)
    assert_sharded(model, early, strategy)
    assert all(shard.local.dtype == torch.float32 for shard in early)
    check_contract(BACKEND, model, weights)
    check_live(BACKEND, model, inputs(0))
    with torch.no_grad():
        model(inputs(1))  # leaves the root gathered, and all units where they are not resharded
    check_contract(BACKEND, model, weights)
    trainer = Trainer(model)
    for _ in range(3):
        trainer.step()
        assert_live(early)
    model(inputs(1))  # with a graph: some units then show gathered weights in the place of parameters
    assert_live(early)
    BACKEND.publish(model, None)
    model(inputs(1))
    check_contract(BACKEND, model, summoned(model))
    check_live(BACKEND, model, inputs(0))
    assert_live(early)
    assert not torch.equal(summoned(model)["first.weight"], weights["first.weight"])


def kept_body(cases: list[tuple[str, bool]]) -> None:
    for strategy, original in cases:
        for low in (False, True):
            try:
                kept(strategy, original, low)
            except Exception as error:
                raise AssertionError(f"{strategy}, use_orig_params={original}, bfloat16={low}") from error


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO), (4, FOUR)])
def test_every_strategy_keeps_the_contract_before_during_and_after_training(ranks, cases) -> None:
    """Oracles: the unwrapped model, and what FSDP1 itself gathers."""
    run_ranks(ranks, kept_body, cases)


def averaged_body(root: Path, cases: list[tuple[str, bool]], low: bool) -> list[tuple[list, list[dict[str, Tensor]]]]:
    found = []
    for number, (strategy, original) in enumerate(cases):
        model, path = awkward(strategy, original=original, low=low), []
        # Made before the first forward, when FSDP has not set up its storage for good yet.
        ema, trainer = PostHocEMA(model, root / str(number), snapshot_every=EVERY), Trainer(model)
        for _ in range(STEPS):
            trainer.step()
            ema.update()
            path.append(summoned(model))
        ema.close()
        found.append((pieces(ema), path))
    return found


def fed(root: Path, path: list[dict[str, Tensor]]) -> Averages:
    """The averages of a plain model that is given the weights of each step."""
    model = make_model()
    ema = PostHocEMA(model, root)
    for weights in path:
        model.load_state_dict(weights | {"again.weight": weights["first.weight"]})
        ema.update()
    return assembled([pieces(ema)], model)


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO), (4, FOUR)])
def test_averages_equal_the_unsharded_run_bit_for_bit_and_are_rebuilt_from_snapshots(tmp_path, ranks, cases) -> None:
    straight, _ = unsharded(tmp_path / "one", STEPS)
    results = run_ranks(ranks, averaged_body, tmp_path, cases, False)
    for number, (_, original) in enumerate(cases):
        expected = fed(tmp_path / f"fed{number}", results[0][number][1])
        assert_same(assembled([rank[number][0] for rank in results], make_model()), expected)
        if original:
            # With one flat parameter for the optimizer, Adam's own arithmetic ends runs of vectors elsewhere.
            assert_same(expected, straight)
        assert_same(rebuilt(tmp_path / str(number), tmp_path / f"out{number}", list(expected)), expected)


def rebuilt(root: Path, out: Path, labels: list[str]) -> Averages:
    """The tracked averages, out of the snapshots."""
    reconstruct(root, ["0.05", "0.10"], out=out)
    return dict(zip(labels, map(load_file, sorted(out.glob("*/model.safetensors"))), strict=True))


def test_with_bfloat16_compute_the_float32_masters_are_averaged(tmp_path) -> None:
    """Oracle: a plain model given what FSDP1 itself gathers after each step."""
    results = run_ranks(2, averaged_body, tmp_path, TWO, True)
    for number in range(len(TWO)):
        path = results[0][number][1]
        assert not torch.equal(path[-1]["first.weight"], path[-1]["first.weight"].bfloat16().float())
        expected = fed(tmp_path / f"fed{number}", path)
        assert_same(assembled([rank[number][0] for rank in results], make_model()), expected)


def computed(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(inputs(0)).clone()


def swap_steps(ema: PostHocEMA, trainer: Trainer) -> tuple[Tensor, Tensor]:
    """What the model computes inside of a swap and after it; no_grad forwards leave gathered weights behind."""
    model, own = trainer.model, computed(trainer.model)
    with ema.swapped(sigma_rel=0.10):
        inside = computed(model)
        assert not torch.equal(inside, own)
        assert torch.equal(computed(model), inside)
    assert torch.equal(computed(model), own)
    with pytest.raises(RuntimeError, match="in the evaluation"), ema.swapped(sigma_rel=0.05):
        model(inputs(0)).sum().backward()
        raise RuntimeError("in the evaluation")
    trainer.optimizer.zero_grad()
    return inside, own


def swapped_body(root: Path, low: bool) -> list[tuple[Tensor, Averages, dict[str, Tensor], dict[str, Tensor]]]:
    found = []
    for number, (strategy, original) in enumerate(TWO):
        ends = []
        for swapping in (True, False):
            model = awkward(strategy, original=original, low=low)
            ema, trainer = PostHocEMA(model, root / f"{number}{swapping}"), Trainer(model)
            train(ema, trainer, STEPS)
            if swapping:
                average, (inside, own) = pieces(ema), swap_steps(ema, trainer)
                assert torch.equal(computed(model), own)
            train(ema, trainer, STEPS + 3)
            ends.append(summoned(model))
        found.append((inside, average, *ends))
    return found


@pytest.mark.parametrize("low", [False, True])
def test_a_swap_is_what_the_next_forward_uses_and_training_goes_on_as_without_it(tmp_path, low) -> None:
    """Oracles: a plain model given the average, and the same run without a swap."""
    results = run_ranks(2, swapped_body, tmp_path, low)
    for number in range(len(TWO)):
        inside, _, ended, expected = results[0][number]
        average = list(assembled([rank[number][1] for rank in results], make_model()).values())[1]
        assert torch.equal(inside, plain_output(average, low)), TWO[number]
        assert all(torch.equal(ended[name], expected[name]) for name in expected)


def plain_output(weights: dict[str, Tensor], low: bool) -> Tensor:
    model = make_model()
    model.load_state_dict(weights | {"again.weight": weights["first.weight"]})
    model, batch = (model.bfloat16(), inputs(0).bfloat16()) if low else (model, inputs(0))
    with torch.no_grad():
        return model(batch)


def broken_off_body(root: Path) -> None:
    """A forward that fails inside of a unit leaves the units above it gathered and in the middle of a forward."""
    for number, (strategy, original) in enumerate(TWO[:4]):
        model = awkward(strategy, original=original)
        ema, trainer = PostHocEMA(model, root / str(number)), Trainer(model)
        train(ema, trainer, STEPS)
        own = computed(model)
        with pytest.raises(RuntimeError), ema.swapped(sigma_rel=0.10):
            model(inputs(0)[:, :3])
        assert torch.equal(computed(model), own)
        trainer.step()


def test_a_swap_is_undone_after_a_forward_that_failed(tmp_path) -> None:
    run_ranks(2, broken_off_body, tmp_path)


def in_between_body(root: Path) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    found = []
    for number, (strategy, original) in enumerate(TWO):
        ends = []
        for swapping in (True, False):
            model = awkward(strategy, original=original)
            ema, trainer = PostHocEMA(model, root / f"{number}{swapping}"), Trainer(model)
            train(ema, trainer, 2)
            with model.no_sync():
                model(inputs(20)).square().mean().backward()
            loss = model(inputs(21)).square().mean()
            with ema.swapped(sigma_rel=0.10) if swapping else contextlib.nullcontext():
                pass
            loss.backward()
            trainer.optimizer.step()
            ends.append(summoned(model))
        found.append(tuple(ends))
    return found


def test_a_swap_between_forward_and_backward_and_with_gradients_that_wait_changes_nothing(tmp_path) -> None:
    """Oracle: the same run without it."""
    for rank in run_ranks(2, in_between_body, tmp_path):
        for swapped, straight in rank:
            assert all(torch.equal(swapped[name], straight[name]) for name in straight)


def silent_body(root: Path) -> list[int]:
    counts = []
    for number, (strategy, original) in enumerate(TWO):
        model = awkward(strategy, original=original)
        ema, trainer = PostHocEMA(model, root / str(number)), Trainer(model)
        train(ema, trainer, 1)
        computed(model)
        with CommDebugMode() as collectives:
            ema.update()
            ema.snapshot()
        with CommDebugMode() as step:
            trainer.step()
        assert step.get_total_counts() > 0, "the counter sees what FSDP gathers and reduces"
        counts.append(collectives.get_total_counts())
    return counts


def test_update_and_snapshot_call_no_collective(tmp_path) -> None:
    assert run_ranks(2, silent_body, tmp_path) == [[0] * len(TWO)] * 2


def odd_body() -> None:
    for original in (True, False):
        plain = make_odd()
        weights, ignored = tensors(plain), [plain.scale, *plain.ignored.parameters()]
        plain.frozen = wrap(plain.frozen, original=original)  # a unit that is frozen as a whole
        model = wrap(plain, original=original, ignored_states=ignored)
        check_contract(BACKEND, model, weights)
        check_live(BACKEND, model, inputs(0))
        layout = {shard.name: shard for shard in BACKEND.shard_layout(model, None)}
        assert "passing" not in layout and "again.weight" not in layout and layout["gain"].kind == "buffer"
        assert {name for name, shard in layout.items() if shard.kind == "frozen"} == {"frozen.weight", "frozen.bias"}
        whole = {name for name, shard in layout.items() if shard.local.numel() == weights[name].numel()}
        assert whole >= {"scale", "ignored.weight", "ignored.bias", "gain", "empty"}
        assert sum(shard.local.numel() for shard in layout.values()) < sum(w.numel() for w in weights.values())


def buffers_body() -> None:
    """FSDP1 casts buffers at the first forward; a layout made before sees the cast ones, as forwards fill them."""
    plain = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    names = list(plain.state_dict())
    model = wrap(plain, mixed_precision=LOW)
    layout = BACKEND.shard_layout(model, None)
    assert [shard.name for shard in layout] == names
    model(inputs(0))
    assert_live(layout)
    found = {shard.name: shard.local for shard in layout}
    assert found["1.running_mean"].dtype == torch.bfloat16 and found["1.running_mean"].ne(0).all()
    assert found["1.num_batches_tracked"] == 1


def mixed_units_body() -> None:
    """Frozen and trained parameters in one flat parameter; a module that FSDP ignores; units without a root."""
    plain = make_model()
    plain.first.requires_grad_(False)
    model = wrap(plain, ignored_modules=[plain.middle])
    check_contract(BACKEND, model, tensors(make_model()))
    frozen = [shard.name for shard in BACKEND.shard_layout(model, None) if shard.kind == "frozen"]
    assert frozen == ["first.weight", "first.bias"]
    rootless = make_model()
    rootless.last, rootless.conv = wrap(rootless.last), wrap(rootless.conv, original=False)
    check_contract(BACKEND, rootless, tensors(make_model()))
    check_live(BACKEND, rootless, inputs(0))


def wrappers_body() -> None:
    """Checkpointed before and after sharding, and compiled outside and inside."""
    for original in (True, False):
        for before in (True, False):
            model = make_model()
            if before:
                apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))
            model = wrap(model, original=original)
            if not before:
                apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Conv1d))
            assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
            check_contract(BACKEND, model, tensors(make_model()))
            check_live(BACKEND, model, inputs(0))
    inner = make_model()
    inner.middle = torch.compile(inner.middle, backend="eager")
    model = torch.compile(wrap(inner), backend="eager")
    assert [name for name, _ in model.named_modules()].count("_orig_mod") == 1
    check_contract(BACKEND, model, tensors(make_model()))


def few_body() -> None:
    """Units with fewer elements than ranks: some hold nothing but padding."""
    for original in (True, False):
        plain = nn.Sequential(nn.Linear(5, 1, bias=False), nn.Linear(1, 1), nn.Linear(1, 3, bias=False))
        weights = tensors(plain)
        for index in (0, 1, 2):
            plain[index] = wrap(plain[index], original=original)
        model = wrap(plain, original=original)
        check_contract(BACKEND, model, weights)
        check_live(BACKEND, model, inputs(0))
        assert any(not shard.boxes for shard in BACKEND.shard_layout(model, None))


def apart_body() -> None:
    """Without use_orig_params FSDP1 unties a weight that two units share: then there are two parameters."""
    plain = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    plain[1].weight = plain[0].weight
    plain[0] = wrap(plain[0], original=False)
    model = wrap(plain, original=False)
    assert [shard.name for shard in BACKEND.shard_layout(model, None)] == ["0.weight", "1.weight"]
    Trainer(model).step()
    weights = summoned(model)
    assert not torch.equal(weights["0.weight"], weights["1.weight"])
    check_contract(BACKEND, model, weights)


def several_body(bodies: list[Callable[[], None]]) -> None:
    for body in bodies:
        body()


@pytest.mark.parametrize(
    ("ranks", "bodies"), [(2, [odd_body, buffers_body, mixed_units_body, wrappers_body, apart_body]), (4, [few_body])]
)
def test_oddities_that_fsdp_allows_keep_the_contract(ranks, bodies) -> None:
    """Oracle: the unwrapped model; where FSDP unties a weight, what it gathers."""
    run_ranks(ranks, several_body, bodies)


@contextlib.contextmanager
def pinning() -> Iterator[None]:
    """Pinning memory needs an accelerator; like it, a clone moves the shards to other storage."""
    clone, wait = mock.patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone), lambda stream: None
    with clone, mock.patch.object(torch.cpu.Stream, "synchronize", wait, create=True):
        yield


def offload_body(root: Path) -> list[tuple[list, list[dict[str, Tensor]]]]:
    found = []
    for number, (strategy, original) in enumerate(TWO[:4]):
        with pinning():
            model, path = awkward(strategy, original=original, cpu_offload=CPUOffload(offload_params=True)), []
            storage = model._handle.flat_param.data_ptr()
            ema, trainer = PostHocEMA(model, root / str(number)), Trainer(model)
            assert model._handle.flat_param.data_ptr() != storage, "the shards moved, and not after the averages"
            for _ in range(STEPS):
                trainer.step()
                ema.update()
                path.append(summoned(model))
            check_contract(BACKEND, model, path[-1])
            check_live(BACKEND, model, inputs(0))
        found.append((pieces(ema), path))
    return found


def test_averages_follow_shards_that_are_kept_on_the_cpu(tmp_path) -> None:
    """Oracle: a plain model given what FSDP1 itself gathers after each step."""
    results = run_ranks(2, offload_body, tmp_path)
    for number in range(len(results[0])):
        path = results[0][number][1]
        assert not torch.equal(path[0]["first.weight"], path[-1]["first.weight"])
        expected = fed(tmp_path / f"fed{number}", path)
        assert_same(assembled([rank[number][0] for rank in results], make_model()), expected)


def replaced_body(root: Path) -> None:
    for number, original in enumerate((True, False)):
        model = awkward(original=original)
        ema = PostHocEMA(model, root / str(number))
        train(ema, Trainer(model), 1)
        ema.snapshot()
        param = next(param for param in model.parameters() if param.numel())
        param.data = param.data.clone()
        with pytest.raises(OrderError, match="storage was replaced"), ema.swapped(sigma_rel=0.10):
            pass
        computed(model)  # FSDP copies the weights back into its own storage before it gathers them
        with ema.swapped(sigma_rel=0.10):
            pass


def test_storage_that_was_replaced_is_noticed(tmp_path) -> None:
    run_ranks(2, replaced_body, tmp_path)


def refused(model: nn.Module) -> str:
    with pytest.raises((UnsupportedModel, OrderError)) as caught:
        backend_of(model).shard_layout(model, None)
    return str(caught.value)


def refusals_body() -> None:
    tied = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    tied[1].weight = tied[0].weight
    tied[0] = wrap(tied[0])
    message = refused(wrap(tied))
    assert message.startswith("1.weight: it is the same parameter as 0.weight") and "be in one FSDP unit" in message

    for original in (True, False):
        for policy in ({}, {"auto_wrap_policy": None}):
            model = awkward("SHARD_GRAD_OP", original=original, **policy)
            inner = model.module
            message = refused(inner)
            assert message.startswith("first.") and "pass the outermost FullyShardedDataParallel module" in message
            model(inputs(0)).sum().backward()
            assert refused(inner) == message, "the refusal left the model as it was"

    message = refused(wrap(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)))
    assert message.startswith("weight: a parameter of shape (4, 3, 3, 3)") and "torch.contiguous_format" in message

    model = awkward()
    with FullyShardedDataParallel.summon_full_params(model):
        message = refused(model)
    assert "inside summon_full_params" in message
    check_contract(BACKEND, model, tensors(make_model()))

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    parallel = parallelize_module(nn.Sequential(nn.Linear(4, 8)), mesh["tensor"], {"0": ColwiseParallel()})
    message = refused(wrap(parallel, "FULL_SHARD", device_mesh=mesh["data"]))
    assert message.startswith("0.weight: ") and "tensor parallelism" in message


def test_what_cannot_be_mapped_is_refused_by_name_with_a_mend() -> None:
    run_ranks(2, refusals_body)


def test_plain_modules_are_none_of_fsdp1() -> None:
    assert not BACKEND.knows(make_model(), None)
