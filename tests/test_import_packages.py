"""Packages: what they really write comes out of a run folder as what they really keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from builders import no_flush, same_bits
from foreign import trained
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sharded_phema.errors import StoreError
from sharded_phema.importers.bringing import import_run
from sharded_phema.importers.contract import Reading
from sharded_phema.importers.direct import open_foreign
from sharded_phema.rebuild import reconstruct
from sharded_phema.store import Run
from sharded_phema.target import parse_target


def brought(source: Path, root: Path, format: str, **reading: Any) -> Run:
    with no_flush():
        return import_run(source, root, format=format, reading=Reading(**reading))


def stored(run: Run, snapshot: int = -1, average: int = 0) -> dict[str, Tensor]:
    """An average of a run, whole."""
    found = {}
    for index, parameter in enumerate(run.record.parameters):
        numbers = run.snapshots[snapshot].read_flat(average, index, 0, math.prod(parameter.shape))
        found[parameter.name] = torch.from_numpy(numbers).view(parameter.shape)
    return found


def check_in_place(source: Path, run: Run, folder: Path, format: str, **reading: Any) -> None:
    """What is rebuilt of the files where they lie is what is rebuilt of the import."""
    opened = open_foreign(source, format=format, reading=Reading(**reading))
    with no_flush():
        for name, root in (("one", opened), ("two", run)):
            reconstruct(root, ["window:0.6", "checkpoint"], out=folder / name, tolerance="exact")
    for slug in ("window-0.6", "checkpoint"):
        one, two = ((folder / name / slug / "model.safetensors").read_bytes() for name in ("one", "two"))
        assert one == two


class Clock(nn.Module):
    """A model whose numbers are functions of time, so that an average of it tells its own profile."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.line = nn.Parameter(torch.zeros(3))
        self.once = nn.Parameter(torch.zeros(steps + 1))

    @torch.no_grad()
    def at(self, step: int) -> None:
        """Time itself, and 1 at this step alone."""
        self.line.fill_(float(step))
        self.once.zero_()[step] = 1.0


@pytest.mark.parametrize(("name", "every"), [("ema-pytorch", 1), ("ema-pytorch", 10), ("posthoc-ema", 7)])
def test_the_profile_of_other_packages_is_that_of_the_files_that_they_write(name, every, tmp_path) -> None:
    # Oracle: the package itself, fed weights that are 1 at one step each: the average is its own profile.
    steps, after, folder = 300, 1, tmp_path / "files"
    model = Clock(steps)
    if name == "ema-pytorch":
        package = pytest.importorskip("ema_pytorch")
        keeper = package.PostHocEMA(
            model,
            sigma_rels=(0.05, 0.28),
            update_every=every,
            checkpoint_every_num_steps=100,
            checkpoint_folder=str(folder),
            checkpoint_dtype=torch.float32,
        )
        update: Callable[[], None] = keeper.update
    else:
        package, after = pytest.importorskip("posthoc_ema"), 40
        how: dict[str, Any] = {"update_every": every, "checkpoint_every": 100, "update_after_step": after}
        keeper = package.PostHocEMA.from_model(model, checkpoint_dir=folder, sigma_rels=(0.05, 0.28), **how)
        update = lambda: keeper.update_(model)  # noqa: E731
    for step in range(1, steps + 1):
        model.at(step)
        update()
    run = brought(folder, tmp_path / "run", name, profiles=("0.05", "0.28"), update_every=every)
    assert [(s.t, s.start) for s in run.snapshots] == [(100.0, after), (200.0, after), (300.0, after)]
    for snapshot in range(3):
        for k, label in enumerate(run.record.averages):
            t = 100.0 * (snapshot + 1)
            profile = parse_target(label).profile(t, float(after))
            share = np.diff(profile.cumulative(np.arange(steps + 1.0)), prepend=0.0)
            share[int(t) + 1 :] = 0.0
            found = stored(run, snapshot, k)
            np.testing.assert_allclose(found["once"].double().numpy(), share, atol=2e-6)
            np.testing.assert_allclose(found["line"].numpy(), share @ np.arange(steps + 1.0), rtol=1e-5)


def test_ema_pytorchs_own_half_precision_files_of_a_training_rebuild_what_was_kept_by_hand(tmp_path) -> None:
    # Oracle: a power average by hand. The package stores float16, and asked for 0.05 keeps 0.2.
    package = pytest.importorskip("ema_pytorch")
    keepers: list[Any] = []
    averages: list[dict[str, Tensor]] = []

    def each(step: int, model: nn.Module) -> None:
        if not keepers:
            folder = str(tmp_path / "files")
            how = {"update_every": 4, "checkpoint_every_num_steps": 40, "checkpoint_folder": folder}
            keepers.append(package.PostHocEMA(model, sigma_rels=(0.05, 0.15), **how))
            averages.append({k: v.detach().double() for k, v in model.named_parameters()})
        keepers[0].update()
        keep = (1.0 - 1.0 / step) ** 8.0  # gamma = 7
        for name, value in model.named_parameters():
            averages[0][name].lerp_(value.detach().double(), 1.0 - keep)
        averages[1:] = [{k: v.detach().double() for k, v in model.named_parameters()}]

    trained(each, 400)
    run = brought(tmp_path / "files", tmp_path / "run", "ema-pytorch", profiles=("0.05", "0.15"), update_every=4)
    assert run.record.dtype == "float16" and [t.name for t in run.record.copied] == ["1.num_batches_tracked"]
    plan = reconstruct(run.root.url, ["power:gamma=7"], out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "power-gamma-7" / "model.safetensors")
    gone = math.sqrt(sum(float((found[n].double() - v).square().sum()) for n, v in averages[0].items()))
    whole = math.sqrt(sum(float((averages[1][n] - v).square().sum()) for n, v in averages[0].items()))
    assert gone / whole <= 2.0 * plan.targets[0].fit.forecast + 0.03


def test_checkpoints_of_lightning_are_read_with_its_own_averages(tmp_path) -> None:
    # Oracle: what the callback holds when it saves.
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)
            self.save_hyperparameters({"rate": 0.1, "nested": {"a": [1, 2]}})

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    data = torch.utils.data.DataLoader(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), batch_size=1)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / "files", every_n_train_steps=2, save_top_k=-1)
    average = EMAWeightAveraging(decay=0.9)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[average, saver], **options)
    module = Net()
    trainer.fit(module, data)
    files = sorted((tmp_path / "files").glob("*.ckpt"))
    assert len(files) == 3
    with pytest.raises(StoreError, match="WeightAveraging"):
        brought(tmp_path / "files", tmp_path / "no", "lightning")
    run = brought(tmp_path / "files", tmp_path / "run", "lightning", profiles=("exponential:decay=0.9",))
    assert [snapshot.t for snapshot in run.snapshots] == [2.0, 4.0, 6.0]
    for index, path in enumerate(files):
        held = torch.load(path, weights_only=False)
        assert all(same_bits(v, held["state_dict"][k]) for k, v in stored(run, index).items())
    raw = brought(tmp_path / "files", tmp_path / "raw", "lightning", key="current_model_state")
    assert raw.record.averages == ("checkpoint",)
    assert same_bits(stored(raw)["net.weight"], held["current_model_state"]["net.weight"])


def test_checkpoints_that_transformers_trainer_saves_are_read(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")

    class Net(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)
            self.post_init()

    model = Net(transformers.PretrainedConfig())
    for step in (5, 10):
        model.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size="1KB" if step == 10 else "5GB")
    assert len(list((tmp_path / "checkpoint-10").glob("*.safetensors"))) > 1
    run = brought(tmp_path, tmp_path / "run", "hf")
    for snapshot in range(2):
        found = stored(run, snapshot)
        assert all(same_bits(found[name], tensor) for name, tensor in model.state_dict().items())


def sharded_body(folder: Path) -> None:
    """Two ranks save a model of uneven rows and its optimizer, as FSDP2 shards it."""
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(12, 7), nn.BatchNorm1d(7), nn.Linear(7, 1))
    for step in (3, 6):
        if step == 3:
            fully_shard(model)
            optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(4, 12)).sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        dcp.save(state, checkpoint_id=folder / f"step-{step}")
        whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"whole-{step}.pt")


ZERO = ("1-bf16-fp32-grads", "2-round-robin", "3-bf16-sub-groups")


def zero_body(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Two ranks train and save under each recipe; gives the weights that the next forward uses."""
    from test_zero import RECIPES
    from zero_engines import engine_of, module_weights, train_step

    weights = {}
    for name in ZERO:
        with engine_of(RECIPES[name]) as engine:
            for _ in range(2):
                train_step(engine, RECIPES[name].dtype)
                engine.save_checkpoint(str(folder / name))
            weights[name] = module_weights(engine)
    return weights


def ranks_body(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Everything that needs two ranks: they are started once."""
    sharded_body(folder / "dcp")
    return zero_body(folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """Checkpoints that two ranks saved, and weights of DeepSpeed's live engines."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "dcp").mkdir()
    return folder, run_ranks(2, ranks_body, folder, timeout=500)[0]


@pytest.mark.timeout(600)
def test_checkpoints_that_two_ranks_of_fsdp_save_are_put_together(ranks, tmp_path) -> None:
    # Oracle: the model gathered by the ranks themselves.
    folder = ranks[0] / "dcp"
    run = brought(folder, tmp_path / "run", "dcp", key="model")
    assert [tensor.name for tensor in run.record.raw] == ["1.num_batches_tracked"]
    for snapshot, step in enumerate((3, 6)):
        whole = torch.load(folder / f"whole-{step}.pt")
        found = stored(run, snapshot)
        assert len(found) == 8 and all(same_bits(tensor, whole[name]) for name, tensor in found.items())
    check_in_place(folder, run, tmp_path, "dcp", key="model")


@pytest.mark.timeout(600)
def test_zero_checkpoints_are_put_together_from_what_the_ranks_keep(ranks, tmp_path) -> None:
    # Oracles: the weights of the live engine, which masters round to; DeepSpeed's own zero_to_fp32, bit for bit,
    # where it works: it refuses the masters of float32 gradients.
    folder, weights = ranks
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for name in ZERO:
        run = brought(folder / name, tmp_path / f"run-{name}", "deepspeed")
        assert [snapshot.t for snapshot in run.snapshots] == [1.0, 2.0]
        check_in_place(folder / name, run, tmp_path / name, "deepspeed")
        found = stored(run)
        if name.startswith("3"):
            del weights[name]["loose"]  # trained by no optimizer: stage 3 does not save it
        assert found.keys() >= weights[name].keys() and "seen" in found
        for key, value in weights[name].items():
            assert same_bits(found[key].to(value.dtype), value), f"{name}: {key}"
        if name != "1-bf16-fp32-grads":
            theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder / name))
            assert all(same_bits(found[key], value.float()) for key, value in theirs.items()), name
    some = next((folder / "3-bf16-sub-groups" / "global_step2").glob("*rank_1*optim_states.pt"))
    some.unlink()
    with pytest.raises(StoreError, match="optimizer states"):
        brought(folder / "3-bf16-sub-groups", tmp_path / "missing", "deepspeed")
