"""Lightning: with each strategy the averages are those of a loop written by hand, resumed and swapped bit for bit."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_cpu import BATCHES, LR, Module, batches, launched, loss_of, trainer_of
from models import Awkward, inputs
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from sharded_phema.errors import OrderError, StoreError, TargetError
from sharded_phema.integrations.lightning import PostHocEMACallback
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.store import open_run

ROOT = Path(__file__).parents[1]
WORLDS = [("ddp", "fsdp1", "fsdp2"), ("zero1", "zero2", "zero3")]
TARGETS = ("0.10", "0.12", "decay:linear:0.5")
STEPS = BATCHES  # two epochs, two batches to a step


class Probe(pl.Callback):
    """Looks at the shards of the averaged model as training goes on."""

    def __init__(self, kind: str, ours: PostHocEMACallback) -> None:
        self.kind, self.ours, self.seen = kind, ours, []

    def shards(self) -> list[Tensor]:
        return [shard.local.clone() for shard in self.ours.ema._layout]

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        check_mode(self.kind, trainer.strategy.model)
        assert self.ours.ema.t == trainer.global_step
        self.before = self.shards()

    def on_validation_batch_end(self, trainer: Any, *rest: Any) -> None:
        if not trainer.sanity_checking:
            self.networks = networks()
            self.seen.append(not all(map(torch.equal, self.shards(), self.before)))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        assert all(map(torch.equal, self.shards(), self.before))

    def on_exception(self, trainer: Any, module: Any, error: BaseException) -> None:
        assert isinstance(error, ArithmeticError), error
        assert all(map(torch.equal, self.shards(), self.before)), "the swap was not undone"


def networks() -> int:
    """How many there are in this process."""
    return sum(type(thing) is Awkward for thing in gc.get_objects())


def check_mode(kind: str, model: Any) -> None:
    """The strategy did to the model what it is named after."""
    if kind == "single":
        assert type(model) is Module
    elif kind == "ddp":
        assert type(model) is DistributedDataParallel
    elif kind == "fsdp1":
        assert type(model) is FullyShardedDataParallel
    elif kind == "fsdp2":
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    else:
        assert model.zero_optimization_stage() == int(kind[-1])


def in_turn(kinds: tuple[str, ...], folder: Path) -> dict[str, Any]:
    launched()
    found: dict[str, Any] = {kind: everything(kind, folder / kind) for kind in kinds}
    if "ddp" in kinds:
        found["times"] = [time_of(unit, folder / unit) for unit in ("samples", "tokens")]
    return found


def time_of(unit: str, folder: Path) -> float:
    """Training time of two steps of two batches each, where ranks have batches of 3 and 4 rows of 5 numbers."""
    rows = [torch.ones(3 + dist.get_rank(), 5)] * 4
    told = rows if unit == "samples" else [{"input_ids": row} for row in rows]
    ours = PostHocEMACallback(folder, unit=unit)
    trainer = trainer_of("ddp", folder, [ours, Times()], max_epochs=1)
    trainer.fit(Telling(), DataLoader(told, batch_size=None))  # type: ignore[arg-type]
    return Times.last


class Telling(Module):
    """Takes batches that name what they hold."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["input_ids"] if isinstance(batch, dict) else batch, batch_idx)


class Times(pl.Callback):
    """Remembers the training time."""

    last = 0.0

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        (ours,) = [callback for callback in trainer.callbacks if isinstance(callback, PostHocEMACallback)]
        Times.last = ours.ema.t


def everything(kind: str, folder: Path) -> list[dict[str, float]]:
    """Train without a break; go on from the middle of a copy of that; and fail in validation."""
    gc.collect()  # what earlier trainings left
    before = networks()
    found = [fitted(kind, folder / "whole", {})]
    assert found[0].pop("networks") <= before + 1, "a second model was made"
    if dist.get_rank() == 0:
        copytree(folder / "whole", folder / "resumed")
        rmtree(folder / "resumed" / "ema-exports")
    dist.barrier()
    found.append(fitted(kind, folder / "resumed", {"ckpt_path": str(folder / "resumed" / f"step={STEPS // 2}.ckpt")}))
    with pytest.raises(ArithmeticError):
        fitted(kind, folder / "failing", {}, failing=True)
    return found


def fitted(kind: str, folder: Path, fit: dict[str, Any], *, failing: bool = False) -> dict[str, float]:
    ours = PostHocEMACallback(folder / "ema", snapshot_every=3, evaluate_with=0.10, export=TARGETS)
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1)
    probe = Probe(kind, ours)
    # Ours undoes its swap before the probe, which comes after it, looks.
    trainer = trainer_of(kind, folder, [ours, probe, saving])
    trainer.fit(Module(fully=kind == "fsdp2", failing=failing), batches(), batches(), **fit)
    assert probe.seen and all(probe.seen)
    return {name: float(value) for name, value in trainer.callback_metrics.items()} | {"networks": probe.networks}


def by_hand(root: Path, divisor: int = 2) -> None:
    """The same training, as anyone would write it; the loss of each of two batches counts half."""
    net = torch.nn.Module()
    torch.manual_seed(7)
    net.net = Awkward()
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    ema = PostHocEMA(net, root / "ema", snapshot_every=3)
    for step in range(STEPS):
        for batch in (2 * step, 2 * step + 1):
            (loss_of(net.net, inputs(batch % BATCHES + 1)) / divisor).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    ema.close()
    reconstruct(root / "ema", TARGETS, out=root / "ema-exports")


def exported(root: Path) -> dict[str, dict[str, Tensor]]:
    return {path.parent.name: load_file(path) for path in sorted((root / "ema-exports").glob("*/model.safetensors"))}


def check_same(found: Path, expected: Path, atol: float = 0.0) -> None:
    """What two runs exported, bit for bit unless said otherwise."""
    ours, theirs = exported(found), exported(expected)
    assert ours.keys() == theirs.keys() and len(ours) == len(TARGETS)
    for slug, tensors in theirs.items():
        assert ours[slug].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(ours[slug][name], tensor, rtol=0, atol=atol, msg=f"{slug} {name}")


@pytest.fixture(scope="module", params=WORLDS, ids=" ".join)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Where the strategies of a world have trained, each in its folder, and what they found."""
    folder = tmp_path_factory.mktemp("world")
    # DeepSpeed divides by the number of batches what Lightning has divided by it.
    by_hand(folder / "hand", 4 if "zero1" in request.param else 2)
    return folder, run_ranks(2, in_turn, request.param, folder, timeout=280)[0]


def test_each_strategy_averages_resumes_and_swaps_as_a_loop_written_by_hand(world) -> None:
    folder, metrics = world
    # The last validation was that of the average which is exported under the same name.
    module = Module()
    # Of tied weights one is stored, and loaded into both.
    assert module.load_state_dict(exported(folder / "hand")["0.1"], strict=False).missing_keys == ["net.again.weight"]
    expected = loss_of(module.net, inputs(1)).item()
    for kind in [kind for kind in metrics if kind != "times"]:
        # Adam's root and quotient round by one unit otherwise where ZeRO lays all parameters end to end.
        check_same(folder / kind / "whole", folder / "hand", 5e-7 if "zero" in kind else 0.0)
        check_same(folder / kind / "resumed", folder / kind / "whole")
        assert [each["loss"] for each in metrics[kind]] == pytest.approx([expected, expected], rel=1e-5)


def test_time_in_samples_and_tokens_is_that_of_all_ranks_and_one_rank_goes_on_with_two(world, tmp_path) -> None:
    folder, metrics = world
    if "times" not in metrics:
        pytest.skip("DDP is of the other world")
    assert metrics["times"] == [2 * 2 * (3 + 4), 2 * 2 * (3 + 4) * 5]
    copytree(folder / "ddp" / "whole", tmp_path / "alone")
    rmtree(tmp_path / "alone" / "ema-exports")
    fitted("single", tmp_path / "alone", {"ckpt_path": str(tmp_path / "alone" / f"step={STEPS // 2}.ckpt")})
    check_same(tmp_path / "alone", folder / "hand")


def alone(folder: Path, module: pl.LightningModule, ours: PostHocEMACallback, *more: Any, **options: Any) -> pl.Trainer:
    """Train in this process, every batch a step."""
    trainer = trainer_of("single", folder, [ours, Times(), *more], accumulate_grad_batches=1, max_epochs=1, **options)
    trainer.fit(module, batches(), batches())
    return trainer


class Overflowing(Module):
    """The gradients of its third batch are infinite."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 2 else 1.0)


def test_steps_that_the_scaler_of_float16_leaves_out_do_not_count(tmp_path) -> None:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    trainer = alone(tmp_path, Overflowing(), PostHocEMACallback(tmp_path / "ema"), plugins=[precision])
    assert precision.scaler.get_scale() == 2.0, "no step was left out"
    assert (trainer.global_step, Times.last) == (BATCHES, BATCHES - 1)


class Adversaries(Module):
    """Two optimizers take turns by hand: two steps in every other batch, none in the others."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(loss_of(self.net, batch))
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        first, *rest = self.net.parameters()
        return [torch.optim.SGD([first], lr=LR), torch.optim.SGD(rest, lr=LR)]


def test_each_step_of_several_optimizers_counts(tmp_path) -> None:
    class Updates(pl.Callback):
        times: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, *rest: Any) -> None:
            self.times.append(ours.ema.t)

    ours = PostHocEMACallback(tmp_path / "ema")
    alone(tmp_path, Adversaries(), ours, Updates())
    assert Updates.times == [0, 2, 2, 4, 4, 6, 6, 8]


def test_the_run_lies_beside_the_logs_and_goes_on_from_a_checkpoint(tmp_path) -> None:
    for version in (0, 1):
        ours = PostHocEMACallback(snapshot_every=4)
        logger = CSVLogger(tmp_path, "logs", version)
        saving = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        trainer = trainer_of("single", tmp_path, [ours, Times(), saving], max_epochs=version + 1, logger=logger)
        trainer.fit(Module(), batches(), ckpt_path=str(tmp_path / "last.ckpt") if version else None)
    assert [path.parent.name for path in tmp_path.glob("logs/*/ema")] == ["version_0"]
    assert Times.last == 8
    assert [snapshot.t for snapshot in open_run(tmp_path / "logs" / "version_0" / "ema").snapshots] == [4, 8]


def test_the_last_states_stay_and_a_snapshot_of_the_same_time_serves_in_their_place(tmp_path) -> None:
    def again(run_dir: Path, step: int) -> None:
        ours = PostHocEMACallback(run_dir, snapshot_every=3)
        trainer = trainer_of("single", tmp_path, [ours, Times()], accumulate_grad_batches=1, max_epochs=1)
        trainer.fit(Module(), batches(), ckpt_path=str(tmp_path / f"step={step}.ckpt"))

    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    alone(tmp_path, Module(), PostHocEMACallback(tmp_path / "ema", snapshot_every=3), saving)
    states = sorted(path.name.partition("-")[0] for path in (tmp_path / "ema-checkpoints").iterdir())
    assert states == ["7", "8"]
    with pytest.raises(StoreError, match=r"expected their state 5-.*found neither(.|\n)*hint: .*keep=-1"):
        again(tmp_path / "ema", 5)
    again(tmp_path / "ema", 6)  # by its snapshot
    assert Times.last == 8
    again(tmp_path / "other", 7)  # by the state beside the run that it was saved with
    assert Times.last == 8


def test_what_would_end_in_wrong_averages_is_refused(tmp_path) -> None:
    class Early(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, *rest: Any) -> None:
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    with pytest.raises(OrderError, match="instead of the weights"):
        alone(tmp_path, Module(), PostHocEMACallback(tmp_path / "ema", evaluate_with="0.05"), Early())
    assert not (tmp_path / "early.ckpt").exists()
    alone(tmp_path, Module(), PostHocEMACallback(tmp_path / "ema"))
    with pytest.raises(OrderError, match=r"holds a run up to 8(.|\n)*ckpt_path"):
        alone(tmp_path, Module(), PostHocEMACallback(tmp_path / "ema"))
    for wrong in ({"unit": "epochs"}, {"keep": 0}, {"evaluate_with": "0.9"}, {"export": ["0.1", "0.10"]}):
        with pytest.raises(TargetError):
            PostHocEMACallback(tmp_path / "ema", **wrong)
    with pytest.raises(TargetError, match="input_ids"):
        alone(tmp_path, Module(), PostHocEMACallback(tmp_path / "tokens", unit="tokens"))
    with pytest.raises(OrderError, match="only while"):
        _ = PostHocEMACallback(tmp_path / "ema").ema


def test_the_example_trains_sharded_on_two_ranks_and_opens_what_it_exported(tmp_path) -> None:
    words = ["--out", str(tmp_path), "--strategy", "fsdp2", "--steps", "4", "--width", "16", "--layers", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, ROOT / "examples" / "train_lightning.py", *words],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("opens in the module") == 3
    whole = load_file(tmp_path / "ema-exports" / "0.1" / "model.safetensors")
    assert whole["gpt.blocks.0.qkv.weight"].shape == (48, 16)
    assert list((tmp_path / "ema").rglob("rank-00001.safetensors")), "the ranks did not share the averages"
