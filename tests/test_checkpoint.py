"""Checkpoints: what comes back is what went in, on any number of ranks; a save that dies loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import listing
from models import Trainer, gathered, make_model, shard
from ranks import run_ranks
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from sharded_phema import checkpoint
from sharded_phema.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from sharded_phema.errors import ModelMismatch, StoreError
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct

WIDTHS = (0.05, 0.10)


def ema_of(model: torch.nn.Module, root: Path, **options: object) -> PostHocEMA:
    return PostHocEMA(model, root, WIDTHS, 1e9, update_every=2, **options)  # type: ignore[arg-type]


def train(ema: PostHocEMA, trainer: Trainer, steps: int) -> None:
    while trainer.done < steps:
        trainer.step()
        ema.update(trainer.done)


def averages(ema: PostHocEMA) -> dict[str, dict[str, torch.Tensor]]:
    state = ema.state_dict()
    return {label: {name: x.clone() for name, x in tensors.items()} for label, tensors in state.items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for label in expected:
        assert found[label].keys() == expected[label].keys()
        assert all(torch.equal(found[label][name], value) for name, value in expected[label].items())


def test_comes_back_bit_for_bit_between_two_updates(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    with ema_of(trainer.model, tmp_path / "a") as whole:
        train(whole, trainer, 7)  # the last update was at 6
        save_checkpoint(whole, tmp_path / "checkpoint")
        at_seven = averages(whole)
        fresh = ema_of(trainer.model, tmp_path / "b")
        assert load_checkpoint(fresh, tmp_path / "checkpoint") == 7
        assert_same(averages(fresh), at_seven)
        while trainer.done < 12:
            trainer.step()
            whole.update(trainer.done)
            fresh.update(trainer.done)
        assert_same(averages(fresh), averages(whole))


def test_before_the_first_update_there_is_a_clock_alone(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    ema = ema_of(trainer.model, tmp_path / "a", start=5)
    train(ema, trainer, 3)
    save_checkpoint(ema, tmp_path / "checkpoint")
    fresh = ema_of(trainer.model, tmp_path / "b", start=5)
    assert load_checkpoint(fresh, tmp_path / "checkpoint") == 3
    trainer.step()
    fresh.update()
    assert fresh.t == 4


def test_a_later_save_replaces_the_earlier_one(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    ema = ema_of(trainer.model, tmp_path / "a")
    for steps in (4, 8):
        train(ema, trainer, steps)
        save_checkpoint(ema, tmp_path / "checkpoint")
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["000002", "000002.json"]
    fresh = ema_of(trainer.model, tmp_path / "b")
    assert load_checkpoint(fresh, tmp_path / "checkpoint") == 8
    assert_same(averages(fresh), averages(ema))


@pytest.mark.parametrize("dies_in", ["save", "sealed", "_remove"])
def test_a_save_that_dies_leaves_a_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str) -> None:
    trainer = Trainer(make_model())
    ema = ema_of(trainer.model, tmp_path / "a")
    train(ema, trainer, 4)
    save_checkpoint(ema, tmp_path / "checkpoint")
    before = averages(ema)
    train(ema, trainer, 6)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, dies_in, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_checkpoint(ema, tmp_path / "checkpoint")
    fresh = ema_of(trainer.model, tmp_path / "b")
    found = load_checkpoint(fresh, tmp_path / "checkpoint")
    assert found == (6 if dies_in == "_remove" else 4)
    assert_same(averages(fresh), averages(ema) if dies_in == "_remove" else before)
    save_checkpoint(ema, tmp_path / "checkpoint")
    assert len(listing(tmp_path / "checkpoint")) and len(list((tmp_path / "checkpoint").iterdir())) == 2


def test_what_does_not_belong_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    ema = ema_of(trainer.model, tmp_path / "a")
    train(ema, trainer, 4)
    save_checkpoint(ema, tmp_path / "checkpoint")
    with pytest.raises(StoreError, match="found none"):
        load_checkpoint(ema_of(trainer.model, tmp_path / "b"), tmp_path / "elsewhere")
    with pytest.raises(ModelMismatch, match="expected time in tokens, found steps"):
        load_checkpoint(ema_of(trainer.model, tmp_path / "c", unit="tokens"), tmp_path / "checkpoint")
    with pytest.raises(ModelMismatch, match=r"only on one side: \['bias', 'conv.bias'"):
        load_checkpoint(ema_of(torch.nn.Linear(5, 7), tmp_path / "d"), tmp_path / "checkpoint")
    with pytest.raises(ModelMismatch, match=r"expected the averages \['power:gamma=1.826"):
        load_checkpoint(PostHocEMA(trainer.model, tmp_path / "e", (0.2,)), tmp_path / "checkpoint")
    assert has_checkpoint(tmp_path / "checkpoint") and not has_checkpoint(tmp_path / "elsewhere")


def test_damage_is_told(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    ema = ema_of(trainer.model, tmp_path / "a")
    train(ema, trainer, 4)
    save_checkpoint(ema, tmp_path / "checkpoint")
    file = next((tmp_path / "checkpoint").rglob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.chmod(0o644)
    file.write_bytes(raw)
    with pytest.raises(StoreError, match="damaged"):
        load_checkpoint(ema_of(trainer.model, tmp_path / "b"), tmp_path / "checkpoint")


def save_body(root: Path) -> dict[str, torch.Tensor]:
    model = shard(make_model())
    assert all(isinstance(param, DTensor) for param in model.parameters())
    ema = ema_of(model, root / "a")
    train(ema, Trainer(model), 5)
    save_checkpoint(ema, root / "checkpoint")
    with ema.swapped(sigma_rel=0.10):
        return gathered(model)


def load_body(root: Path) -> dict[str, torch.Tensor]:
    model = shard(make_model())
    ema = ema_of(model, root / "b")
    assert load_checkpoint(ema, root / "checkpoint") == 5
    with ema.swapped(sigma_rel=0.10):
        return gathered(model)


@pytest.mark.parametrize(("writers", "readers"), [(2, 3), (3, 1)])
def test_on_another_number_of_ranks(tmp_path: Path, writers: int, readers: int) -> None:
    saved = run_ranks(writers, save_body, tmp_path)[0]
    loaded = run_ranks(readers, load_body, tmp_path)
    for found in loaded:
        assert_same({"": found}, {"": saved})
    # It is an ordinary run folder besides, for whoever looks into it.
    reconstruct(tmp_path / "checkpoint" / "000001", ["0.1"], out=tmp_path / "out")
    rebuilt = load_file(next((tmp_path / "out").rglob("*.safetensors")))
    assert_same({"": {name: rebuilt[name] for name in saved}}, {"": saved})
