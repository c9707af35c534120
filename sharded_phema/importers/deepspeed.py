"""ZeRO checkpoints of DeepSpeed, ``global_stepN``: the float32 weights that ranks keep parts of, put together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sharded_phema.errors import PhemaError, StoreError
from sharded_phema.importers.contract import Foreign, Lazy, Reading, Tensors, single_label, within
from sharded_phema.importers.extent import Extent, joined
from sharded_phema.importers.naming import files_in, sizes_of, time_of
from sharded_phema.importers.torchfile import load, tensors_of

__all__ = ["find_deepspeed"]

_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_(optim|model)_states\.pt")
_MODEL = "mp_rank_00_model_states.pt"
_ELSE = "make one file of it with the zero_to_fp32.py that lies beside, and import that with --from torch"

Groups = Sequence[Sequence[Lazy]]
"""Flat tensors of each group, of each rank."""


def find_deepspeed(source: Path, reading: Reading) -> Sequence[Foreign]:
    """Folders ``global_stepN`` in a folder, or one.

    Raises:
        StoreError: There are none, or one was written by ranks that share tensors in other ways than ZeRO's.
    """
    label = single_label(reading)
    alone = any(source.glob("*model_states.pt"))
    folders = [source] if alone else [p for p in files_in(source, ["*/"], "folders global_stepN") if _is_one(p)]
    if not folders:
        raise StoreError(f"{source}: expected folders global_stepN, found none", hint="give the folder above them")
    return [_found(folder, reading, label) for folder in folders]


def _is_one(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*model_states.pt"))


def _found(folder: Path, reading: Reading, label: str) -> Foreign:
    files = sorted(folder.glob("*.pt"))
    odd = [path.name for path in files if not _RANK.fullmatch(path.name) and path.name != _MODEL]
    odd += [path.name for path in files if (name := _RANK.fullmatch(path.name)) and int(name[2])]
    if odd:
        raise StoreError(f"{folder}: {odd[0]} is of ranks that share tensors, layers or experts among them", hint=_ELSE)
    t = time_of(folder.name, reading.time_pattern, str(folder))
    return Foreign(str(folder), t, reading.start or 0.0, partial(_open, folder, reading, label), sizes_of(files))


def _open(folder: Path, reading: Reading, label: str) -> dict[str, Tensors]:
    models, optimizers = _by_rank(folder, "model"), _by_rank(folder, "optim")
    states = [_loaded(path) for path in models] or [_loaded(folder / _MODEL)]
    try:
        tensors = dict(_tensors(states, [_loaded(path) for path in optimizers]))
    except PhemaError:
        raise
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise StoreError(f"{folder}: is no ZeRO checkpoint: {type(error).__name__}: {error}", hint=_ELSE) from error
    return {label: within(tensors, reading.prefix, str(folder))}


def _by_rank(folder: Path, kind: str) -> list[Path]:
    """Files of one kind in the order of their ranks."""
    named = [(name, path) for path in folder.glob("*.pt") if (name := _RANK.fullmatch(path.name))]
    found = {int(name[1]): path for name, path in named if name[3] == kind}
    if sorted(found) != list(range(len(found))):
        raise StoreError(f"{folder}: found the {kind} states of ranks {sorted(found)}", hint="copy the others there")
    return [found[rank] for rank in sorted(found)]


def _loaded(path: Path) -> dict[str, Any]:
    value = load(Extent.whole(path), known=_is_plain)
    if not isinstance(value, dict):
        raise StoreError(f"{path}: is no file of a ZeRO checkpoint", hint=_ELSE)
    return value


def _is_plain(module: str, name: str) -> bool:
    """Settings and states of the optimizer, which are kept as what they hold and never looked at."""
    plain = [("argparse", "Namespace"), ("pathlib", "PosixPath")]
    return module.partition(".")[0] == "deepspeed" or (module, name) in plain


def _tensors(states: Sequence[dict[str, Any]], files: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Lazy]]:
    """Buffers, frozen parameters, trained ones in float32, and those that share another's numbers."""
    first = states[0]
    module = tensors_of({name: tensor for name, tensor in first["module"].items()})
    if not files:
        yield from module.items()
        return
    optimizers = [file["optimizer_state_dict"] for file in files]
    count = optimizers[0].get("partition_count", len(optimizers))
    if (ranks := max(count) if isinstance(count, list) else count) != len(optimizers):
        raise StoreError(f"{len(optimizers)} of {ranks} optimizer states are there", hint="copy the others there")
    found = {name: module[name] for name in first["buffer_names"] if name in module}
    shapes = [dict(group) for group in first["param_shapes"]]
    # By what is there: not every optimizer of DeepSpeed says its stage.
    if "fp32_flat_groups" in optimizers[0]:
        found |= {n: _gathered(s, n, [r["frozen_param_fragments"] for r in states]) for n, s in _frozen(first).items()}
        found |= _of_stage_3(shapes, [list(_lazies(one["fp32_flat_groups"])) for one in optimizers])
    else:
        # The module has all, in low precision; what no optimizer has is nowhere else.
        found = {**module, **{name: first["frozen_param_fragments"][name] for name in _frozen(first)}}
        groups = [list(_lazies(one["single_partition_of_fp32_groups"])) for one in optimizers]
        found |= _of_stage_2(shapes, groups, optimizers[0].get("param_alignment_paddings"))
    shared = first.get("shared_params") or {}
    yield from {**found, **{alias: found[name] for alias, name in shared.items() if name in found}}.items()


def _frozen(state: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    return state.get("frozen_param_shapes") or {}


def _lazies(groups: Any) -> Iterator[Lazy]:
    for group in groups:
        if not isinstance(group, Lazy):
            raise StoreError("the float32 weights are stored in pieces of another form", hint=_ELSE)
        yield group


def _gathered(shape: tuple[int, ...], name: str, fragments: Sequence[Mapping[str, Lazy]]) -> Lazy:
    """A parameter of which each rank has an equal part, the last one padded."""
    numel, part = math.prod(shape), -(-math.prod(shape) // len(fragments))
    counts = [min(part, max(numel - rank * part, 0)) for rank in range(len(fragments))]
    return joined(shape, [(one[name], 0, count) for one, count in zip(fragments, counts, strict=True)])


def _of_stage_3(shapes: Sequence[Mapping[str, tuple[int, ...]]], groups: Groups) -> dict[str, Lazy]:
    """Each rank has an equal part of each parameter, one after another through its groups."""
    flat = [joined((sum(lazy.shape[0] for lazy in own),), [(lazy, 0, lazy.shape[0]) for lazy in own]) for own in groups]
    found, offset = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        numel, part = math.prod(shape), -(-math.prod(shape) // len(flat))
        counts = [min(part, max(numel - rank * part, 0)) for rank in range(len(flat))]
        found[name] = joined(shape, [(own, offset, count) for own, count in zip(flat, counts, strict=True)])
        offset += part
    if any(own.shape[0] != offset for own in flat):
        raise StoreError(f"parameters of {offset} elements a rank, found {flat[0].shape[0]}", hint=_ELSE)
    return found


def _of_stage_2(shapes: Sequence[Mapping[str, tuple[int, ...]]], groups: Groups, paddings: Any) -> dict[str, Lazy]:
    """Each group lies end to end in the order of its shapes, cut into parts, with padding at its end.

    What ``param_slice_mappings`` says is not used: under ``round_robin_gradients`` it is of another order.
    """
    found: dict[str, Lazy] = {}
    if any(len(own) != len(shapes) for own in groups):
        raise StoreError(f"{len(shapes)} groups of parameters, found {len(groups[0])} of weights", hint=_ELSE)
    for index, group in enumerate(shapes):
        parts = [(own[index], 0, own[index].shape[0]) for own in groups]
        total, offset = sum(count for _, _, count in parts), 0
        flat = joined((total,), parts)
        for place, (name, shape) in enumerate(group.items()):
            found[name] = joined(shape, [(flat, offset, math.prod(shape))])
            offset += math.prod(shape) + (int(paddings[index][place]) if paddings else 0)
        if not 0 <= total - offset < 4 * len(groups):
            raise StoreError(f"parameters of {offset} elements in a group, found {total}", hint=_ELSE)
    return found
