"""diffusers: its training loop with its EMAModel and, by one other import, with ours; saved, loaded, sharded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders import tensors_of
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

pytest.importorskip("diffusers")

import diffusers
from diffusers.training_utils import EMAModel as Theirs

from sharded_phema.errors import ModelMismatch, OrderError, TargetError, UnsupportedModel
from sharded_phema.integrations.diffusers import EMAModel as Ours
from sharded_phema.rebuild import reconstruct
from sharded_phema.target import parse_target
from sharded_phema.world import rank_and_size

CONFIG = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (4, 6),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 2,
}


def make_unet() -> Any:
    torch.manual_seed(5)
    return diffusers.UNet2DModel(**CONFIG)


class Script:
    """What a training script of diffusers does, whichever EMAModel it imports."""

    def __init__(self, kind: Any, unet: Any, **options: Any) -> None:
        self.kind, self.unet = kind, unet
        # As the scripts do: from a model of its own, before anything is moved or wrapped.
        source = make_unet()
        self.ema = kind(
            source.parameters(),
            decay=0.9,
            use_ema_warmup=False,
            inv_gamma=1.0,
            power=3 / 4,
            model_cls=type(source),
            model_config=source.config,
            **options,
        )
        self.optimizer = torch.optim.SGD(unet.parameters(), lr=0.05)
        self.ema.to("cpu")

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            chance = torch.Generator().manual_seed(step)
            clean, noise = (torch.randn(2, 1, 8, 8, generator=chance) for _ in range(2))
            loss = (self.unet(clean + noise, torch.tensor([3, 7])).sample - noise).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.step(self.unet.parameters())

    def validate(self) -> dict[str, torch.Tensor]:
        """The weights that a validation sees."""
        self.ema.store(self.unet.parameters())
        self.ema.copy_to(self.unet.parameters())
        with torch.no_grad():
            self.unet(torch.ones(1, 1, 8, 8), 1)
        seen = weights(self.unet)
        self.ema.restore(self.unet.parameters())
        return seen


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    if hasattr(model, "reshard"):
        model.reshard()  # a forward alone leaves the root gathered
    found = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: param.detach().clone() for name, param in found.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **({"rtol": 0, "atol": 0} | tolerance))


def ours(unet: Any, root: Path, **options: Any) -> Script:
    return Script(Ours, unet, **({"run_dir": root / "ema", "snapshot_every": 1e9} | options))


def test_the_loop_runs_with_one_import_changed_and_the_average_is_theirs(tmp_path: Path) -> None:
    theirs, mine = Script(Theirs, make_unet()), ours(make_unet(), tmp_path)
    for script in (theirs, mine):
        script.train(0, 60)
    before = weights(mine.unet)
    assert_same(before, weights(theirs.unet))
    found, expected = mine.validate(), theirs.validate()
    assert_same(weights(mine.unet), before)
    # A tenth of what averaging does to the weights: the ramps differ most in the first dozens of steps.
    apart = sum((found[name] - expected[name]).square().sum() for name in found).sqrt()
    lag = sum((before[name] - expected[name]).square().sum() for name in found).sqrt()
    assert apart < 0.1 * lag
    assert mine.ema.cur_decay_value == pytest.approx(theirs.ema.cur_decay_value, abs=0.02)
    assert mine.ema.get_decay(200) == pytest.approx(theirs.ema.get_decay(200), abs=1e-9)  # no ramp any more
    assert {"decay", "optimization_step", "power"} < mine.ema.state_dict().keys() & theirs.ema.state_dict().keys()
    for name in ("decay", "min_decay", "update_after_step", "use_ema_warmup", "inv_gamma", "power"):
        assert getattr(mine.ema, name) == getattr(theirs.ema, name)


def test_a_power_average_is_that_of_a_loop_by_hand(tmp_path: Path) -> None:
    script = ours(make_unet(), tmp_path, target=0.10, update_after_step=2)
    by_hand: dict[str, torch.Tensor] = {}
    gamma = parse_target("0.10").profile(1.0).gamma
    for step in range(1, 9):
        script.train(step, step + 1)
        if step <= 2:
            assert_same(script.validate(), weights(script.unet))  # nothing is averaged yet
            continue
        keep = 0.0 if step == 3 else (1 - 1 / step) ** (gamma + 1)
        assert script.ema.get_decay(step) == pytest.approx(keep)
        for name, value in weights(script.unet).items():
            by_hand[name] = value.double() if step == 3 else by_hand[name] * keep + value.double() * (1 - keep)
    # Rounding of float32 at each update.
    assert_same(script.validate(), {name: value.float() for name, value in by_hand.items()}, rtol=1e-5, atol=1e-7)
    assert len(script.ema.shadow_params) == len(by_hand)


def test_saved_and_loaded_as_accelerates_hooks_do_the_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    script = ours(make_unet(), tmp_path)
    script.train(0, 5)
    average = script.validate()
    script.ema.save_pretrained(tmp_path / "checkpoint" / "unet_ema")
    # Diffusers itself opens it, as a model and as the EMAModel that it is for it.
    assert_same(weights(diffusers.UNet2DModel.from_pretrained(tmp_path / "checkpoint" / "unet_ema")), average)
    theirs = Theirs.from_pretrained(tmp_path / "checkpoint" / "unet_ema", diffusers.UNet2DModel)
    assert theirs.optimization_step == 5 and theirs.decay == 0.9

    again = make_unet()
    again.load_state_dict(script.unet.state_dict())
    resumed = ours(again, tmp_path, run_dir=tmp_path / "resumed")
    loaded = Ours.from_pretrained(tmp_path / "checkpoint" / "unet_ema", diffusers.UNet2DModel, foreach=True)
    blank = make_unet()
    loaded.copy_to(blank.parameters())
    assert_same(weights(blank), average)
    resumed.ema.load_state_dict(loaded.state_dict())
    for one in (script, resumed):
        one.train(5, 8)
    assert resumed.ema.optimization_step == 8
    assert_same(resumed.validate(), script.validate())
    # A state in memory, too.
    third = ours(again, tmp_path, run_dir=tmp_path / "third")
    third.ema.load_state_dict(script.ema.state_dict())
    third.ema.step(script.unet.parameters())
    script.ema.step(script.unet.parameters())
    assert_same(third.validate(), script.validate())


def test_other_averages_come_from_the_run_folder_under_the_models_own_names(tmp_path: Path) -> None:
    script = ours(make_unet(), tmp_path, sigma_rels=(0.05,))
    script.train(0, 6)
    script.ema.close()
    reconstruct(tmp_path / "ema", ["0.05"], out=tmp_path / "out")
    assert tensors_of(tmp_path / "out" / "0.05").keys() == weights(script.unet).keys()


def test_frozen_parameters_offloading_and_unknown_models(tmp_path: Path) -> None:
    unet = make_unet()
    unet.conv_in.requires_grad_(False)
    kept = unet.conv_in.weight.clone()
    script = ours(unet, tmp_path)
    script.ema.pin_memory()
    script.train(0, 3)
    assert torch.equal(script.validate()["conv_in.weight"], kept)
    script.ema.save_pretrained(tmp_path / "saved")
    assert torch.equal(diffusers.UNet2DModel.from_pretrained(tmp_path / "saved").conv_in.weight, kept)
    bare = nn.Linear(3, 2)
    ema = Ours(bare.parameters(), run_dir=tmp_path / "bare")
    ema.step(bare.parameters())
    ema.copy_to(bare.parameters())
    with pytest.raises(OrderError, match="of what model is not known"):
        ema.save_pretrained(tmp_path / "nothing")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    unet = make_unet()
    with pytest.raises(TargetError, match=r"target=0.12 is not tracked; tracked are 0.05, 0.1, exponential"):
        Ours(unet.parameters(), target=0.12)
    with pytest.raises(TargetError, match=r"unknown arguments \['sigma'\]"):
        Ours(unet.parameters(), sigma=0.1)
    ema = Ours(unet.parameters(), model_cls=type(unet), model_config=unet.config, run_dir=tmp_path)
    with pytest.raises(OrderError, match="no weights were stored"):
        ema.restore(unet.parameters())
    with pytest.raises(OrderError, match="nothing was averaged yet"):
        ema.save_pretrained(tmp_path / "saved")
    with pytest.raises(ModelMismatch, match=r"expected the \d+ parameters of UNet2DModel, found 2"):
        ema.step(list(unet.parameters())[:2])
    with pytest.raises(ModelMismatch, match=r"conv_in.weight: expected shape \(4, 1, 3, 3\)"):
        ema.step(nn.Linear(3, 2).parameters())
    Theirs(unet.parameters(), model_cls=type(unet), model_config=unet.config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(OrderError, match="not the state of averages that can be continued"):
        Ours.from_pretrained(tmp_path / "theirs", type(unet))


def ranks_body(root: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    os.chdir(root)
    # Whole on each rank: the first one validates and saves alone, as the scripts do.
    unet = make_unet()
    script = ours(nn.parallel.DistributedDataParallel(unet), root, target=0.10)
    script.unet = unet
    script.unet, wrapped = nn.parallel.DistributedDataParallel(unet), unet
    script.train(0, 4)
    script.unet = wrapped
    replicated = weights(wrapped)
    if rank_and_size()[0] == 0:
        replicated = script.validate()
        script.ema.save_pretrained(root / "replicated")
    dist.barrier()
    loaded = Ours.from_pretrained(root / "replicated", diffusers.UNet2DModel)
    script.ema.load_state_dict(loaded.state_dict()) if rank_and_size()[0] else None

    # In shards: every rank calls everything.
    unet = make_unet()
    fully_shard(unet.mid_block)
    fully_shard(unet)
    assert all(isinstance(param, DTensor) for param in unet.parameters())
    with pytest.raises(UnsupportedModel, match=r"the parameters are sharded.*\nhint: .*model=unet"):
        ours(unet, root, run_dir=root / "none").ema.step(unet.parameters())
    script = ours(unet, root, run_dir=root / "sharded-run", target=0.10, model=unet)
    script.train(0, 2)
    script.validate()  # leaves no trace in the training
    script.train(2, 4)
    sharded, after = script.validate(), weights(unet)
    script.ema.save_pretrained(root / "sharded")
    resumed = ours(unet, root, run_dir=root / "resumed-run", target=0.10, model=unet)
    resumed.ema.load_state_dict(Ours.from_pretrained(root / "sharded", diffusers.UNet2DModel).state_dict())
    for one in (script, resumed):
        one.ema.step(unet.parameters())
    assert_same(resumed.validate(), script.validate())
    script.train(4, 5)
    assert not all(torch.equal(value, after[name]) for name, value in weights(unet).items())
    script.ema.close()
    return replicated, sharded


def test_on_two_ranks_whole_and_in_shards(tmp_path: Path) -> None:
    alone = ours(make_unet(), tmp_path, run_dir=tmp_path / "alone", target=0.10)
    alone.train(0, 4)
    expected = alone.validate()
    (replicated, sharded), (trained, other) = run_ranks(2, ranks_body, tmp_path, timeout=60.0)
    # Gradients are averaged over two ranks that had the same batch.
    assert_same(replicated, expected)
    assert_same(trained, weights(alone.unet))
    # FSDP sums gradients in another order.
    assert_same(sharded, expected, rtol=1e-4, atol=1e-6)
    assert_same(sharded, other)
    assert_same(weights(diffusers.UNet2DModel.from_pretrained(tmp_path / "replicated")), replicated)
    assert_same(weights(diffusers.UNet2DModel.from_pretrained(tmp_path / "sharded")), sharded)
