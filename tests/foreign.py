"""Foreign checkpoints: a tiny training of which every average is known, and files as other packages write them."""

from __future__ import annotations

import pickle
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

from sharded_phema.profile import Profile

STEPS, TIMES = 480, tuple(range(30, 481, 30))
State = dict[str, Tensor]


def tiny() -> nn.Sequential:
    """The same weights at every call; a batch norm, so that there are buffers and a count."""
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 12))


def trained(each: Callable[[int, nn.Module], None], steps: int = STEPS) -> None:
    """Train at a constant rate on noise, and show the model after every step."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(5)
    for step in range(1, steps + 1):
        x = torch.randn(16, 12, generator=draw)
        loss = (model(x) - x.flip(1) + 0.5 * torch.randn(16, 12, generator=draw)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        each(step, model)


@cache
def states() -> tuple[State, ...]:
    """State dicts after every step."""
    found: list[State] = []
    trained(lambda step, model: found.append({k: v.detach().clone() for k, v in model.state_dict().items()}))
    return tuple(found)


@cache
def path() -> np.ndarray:
    """Everything that is averaged, float64, after every step: (steps, elements)."""
    return np.stack([flat(state) for state in states()])


def flat(state: Mapping[str, Tensor]) -> np.ndarray:
    """What is averaged of a state dict, in the order of the training."""
    names = [name for name in states()[0] if not name.endswith("num_batches_tracked")]
    return np.concatenate([state[name].double().numpy().ravel() for name in names])


def shaped(values: np.ndarray, step: int, dtype: torch.dtype = torch.float32) -> State:
    """Numbers as a state dict, with what is not averaged as of a step."""
    found, begin = {}, 0
    for name, like in states()[step - 1].items():
        if name.endswith("num_batches_tracked"):
            found[name] = like
        else:
            part = values[begin : begin + like.numel()]
            found[name], begin = torch.from_numpy(part.copy()).to(dtype).view(like.shape), begin + like.numel()
    return found


def average(profile: Profile) -> np.ndarray:
    """The average that a profile denotes, where weights change at whole steps and the first stand for time 0."""
    return np.diff(profile.cumulative(np.arange(STEPS + 1.0)), prepend=0.0) @ np.vstack([path()[:1], path()])


def error(rebuilt: Mapping[str, Tensor], profile: Profile) -> float:
    """|rebuilt - target| / |raw - target|."""
    target = average(profile)
    return float(np.linalg.norm(flat(rebuilt) - target) / np.linalg.norm(path()[int(profile.t) - 1] - target))


def kept(keep: Callable[[int], float], upto: Iterable[int], dtype: torch.dtype = torch.float32) -> dict[int, State]:
    """A running average by hand: at each step the old one keeps a share, with 1 where nothing is updated."""
    wanted, value, found = set(upto), path()[0].copy(), {}
    for step in range(1, STEPS + 1):
        share = keep(step) if step > 1 else 0.0
        value = share * value + (1.0 - share) * path()[step - 1]
        if step in wanted:
            found[step] = shaped(value, step, dtype)
    return found


def raw(dtype: torch.dtype = torch.float32) -> dict[int, State]:
    """The weights at the times of the checkpoints."""
    return {t: shaped(path()[t - 1], t, dtype) for t in TIMES}


def write_hf(root: Path, held: Mapping[int, State]) -> None:
    for t, state in held.items():
        (root / f"checkpoint-{t}").mkdir(parents=True)
        save_file(state, root / f"checkpoint-{t}" / "model.safetensors")


def write_torch(root: Path, held: Mapping[int, State]) -> None:
    root.mkdir(parents=True)
    for t, state in held.items():
        torch.save(state, root / f"step_{t}.pt", _use_new_zipfile_serialization=t % 20 == 0)  # both formats


def write_nested(root: Path, held: Mapping[int, State]) -> None:
    root.mkdir(parents=True)
    for t, state in held.items():
        both = {f"net.{k}": -v for k, v in state.items()} | {f"net_ema.{k}": v for k, v in state.items()}
        torch.save({"state": {"model": both}, "step": t, "lr": [0.1, None]}, root / f"iter_{t:09d}.pt")


def save_dcp(state: dict, folder: Path) -> None:
    """One process saves alone, and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        dcp.save(state, checkpoint_id=folder, no_dist=True)


def write_dcp(root: Path, held: Mapping[int, State]) -> None:
    for t, state in held.items():
        save_dcp({"model": state, "step": t, "more": {"x": [1, "a"]}}, root / f"step-{t}")


def write_torchtitan(root: Path, held: Mapping[int, State]) -> None:
    """The model's names at the top, the average as the state of an optimizer below ``ema``."""
    for t, state in held.items():
        ema = {f"state.{name}.ema_params": tensor for name, tensor in state.items()}
        whole = {**states()[t - 1], "ema": ema | {"param_groups.0.lr": 0.0}, "train_state": {"step": t}}
        save_dcp(whole, root / f"step-{t}")


def write_lightning(root: Path, held: Mapping[int, State]) -> None:
    root.mkdir(parents=True)
    for t, state in held.items():
        facts = {"epoch": 1, "global_step": t, "pytorch-lightning_version": "2.6.6", "callbacks": {}}
        torch.save(facts | {"state_dict": state, "optimizer_states": []}, root / f"epoch=1-step={t}.ckpt")


def write_karras(root: Path, several: Iterable[Mapping[int, State]], prefix: str, calls: Callable[[int], int]) -> None:
    root.mkdir(parents=True)
    for index, held in enumerate(several):
        for t, state in held.items():
            own = {f"{prefix}{name}": tensor for name, tensor in state.items()}
            torch.save(own | {"initted": torch.tensor(True), "step": torch.tensor(calls(t))}, root / f"{index}.{t}.pt")


class _Kept:
    """Stands for what EDM2's persistence makes of a module: code as text, and the module's own dictionary."""

    def __init__(self, state: dict) -> None:
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": "Net", "state": state}
        self.meta = meta

    def __reduce__(self) -> tuple:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class _EasyDict(dict):
    pass


def _reconstruct_persistent_obj(meta: dict) -> object:
    raise AssertionError("nobody may call this")


def as_edm2(module: nn.Module) -> _Kept:
    """A module, with its children, as EDM2 pickles it."""
    own = {name: value for name, value in vars(module).items() if name != "_modules"}
    return _Kept({**own, "_modules": {name: as_edm2(child) for name, child in module.named_children()}})


def write_pickle(file: Path, value: object) -> None:
    """Pickle with the names of EDM2's own modules."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    _reconstruct_persistent_obj.__module__, _EasyDict.__module__ = persistence.__name__, util.__name__
    _EasyDict.__qualname__ = _EasyDict.__name__ = "EasyDict"
    persistence._reconstruct_persistent_obj, util.EasyDict = _reconstruct_persistent_obj, _EasyDict  # type: ignore[attr-defined]
    names = {"torch_utils": types.ModuleType("torch_utils"), "dnnlib": types.ModuleType("dnnlib")}
    names |= {persistence.__name__: persistence, util.__name__: util}
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        file.write_bytes(pickle.dumps(_EasyDict(value), protocol=4))  # type: ignore[call-overload]
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def write_edm2(root: Path, widths: Mapping[str, Mapping[int, State]], *, kimg: Callable[[int], int]) -> None:
    root.mkdir(parents=True)
    for width, held in widths.items():
        for t, state in held.items():
            model = tiny().to(next(iter(state.values())).dtype)
            model.load_state_dict(state)
            kept = {"ema": as_edm2(model), "dataset_kwargs": {"path": "x"}, "encoder": None}
            write_pickle(root / f"network-snapshot-{kimg(t):07d}-{width}.pkl", kept)
