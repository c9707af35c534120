"""Modules inside FullyShardedDataParallel (FSDP1): each unit keeps one flat parameter, cut into equal runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import HandleTrainingState, _no_dispatch_record_stream
from torch.distributed.tensor import DTensor
from torch.distributed.utils import _free_storage

from sharded_phema.backends.contract import Backend, held_whole, kind_of, persistent_buffers
from sharded_phema.errors import OrderError, UnsupportedModel
from sharded_phema.layout import ParamShard, ShardLayout, TensorKind, boxes_of_flat_range, canonical_name, whole

__all__ = ["BACKEND"]

# What stands here of torch's private attributes was tested with torch 2.13; they are those of 2.1 and later.


@dataclass(frozen=True, slots=True)
class _Part:
    """What this rank holds of one parameter of a unit.

    Attributes:
        handle: torch's FlatParamHandle of the unit.
        module: The module that had the parameter before it was flattened.
        name: Its name there.
        shape: Its shape there.
        row_major: Whether it is flattened in the order of its elements.
        start: First element that this rank holds, of the flattened parameter.
        stop: One past the last.
        offset: Place of the first element in the unit's local shard.
        kind: What the parameter is to the training.
    """

    handle: Any
    module: nn.Module
    name: str
    shape: tuple[int, ...]
    row_major: bool
    start: int
    stop: int
    offset: int
    kind: TensorKind


def _knows(model: object, optimizer: object) -> bool:
    return isinstance(model, nn.Module) and (bool(_units(model)) or any(_strays(model)))


def shard_layout(model: nn.Module, optimizer: object) -> ShardLayout:
    """The runs of each unit's flat parameter that this rank keeps; what FSDP ignores is held whole by every rank.

    Raises:
        UnsupportedModel: A parameter lies in a flat parameter that the model does not show, or in another order.
        OrderError: The model is inside ``summon_full_params``.
    """
    for path, tensor in _strays(model):
        raise _unmapped(model, path, tensor)
    # What FSDP leaves to the first forward moves shards that are kept on the CPU and casts buffers:
    # asking for the roots has it done now, without communication.
    FullyShardedDataParallel.fsdp_modules(model, root_only=True)
    publish(model, optimizer)
    return (*_parameters(model), *(_whole(model, path, "buffer") for path, _ in persistent_buffers(model)))


@torch.no_grad()  # else a unit whose forward was broken off goes on showing gathered weights
def publish(model: nn.Module, optimizer: object) -> None:
    """Drop gathered weights, so that the next forward gathers the shards again."""
    for handle in _units(model):
        if handle._training_state is HandleTrainingState.SUMMON_FULL_PARAMS:
            raise OrderError(
                "the model is inside summon_full_params, whose gathered weights would be written over the shards",
                hint="make PostHocEMA and swap weights outside of summon_full_params",
            )
        _reshard(handle)


def _reshard(handle: Any) -> None:
    """Free the gathered weights of a unit: all of them may outlive a forward without backward."""
    flat = handle.flat_param
    # Only then: showing the shards anew would undo what somebody put in their place.
    if handle._skipped_use_sharded_views or flat.data_ptr() != flat._local_shard.data_ptr():
        handle.reshard(False)
    for name in ("_full_param_padded", "_full_prec_full_param_padded"):
        if (gathered := getattr(flat, name, None)) is not None:
            _no_dispatch_record_stream(gathered, handle._device_handle.current_stream())
            _free_storage(gathered)
    handle._prefetched = False  # left by a backward that was broken off


def _units(model: nn.Module) -> list[Any]:
    """The handles of all units that have parameters."""
    units = (module for module in model.modules() if isinstance(module, FullyShardedDataParallel))
    return [unit._handle for unit in units if unit._handle is not None]


def _names(handle: Any) -> Iterator[tuple[nn.Module, str]]:
    """Where the parameters of a unit were, ties included."""
    flat = handle.flat_param
    for info in (*flat._param_infos, *flat._shared_param_infos):
        yield info.module, info.param_name


def _strays(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Paths and tensors of parameters that lie in a flat parameter but in no unit's list of names."""
    named = {place for handle in _units(model) for place in _names(handle)}
    for prefix, module in model.named_modules():
        # Where torch kept a parameter that it flattened, it marked it; else there is a view in its place.
        marked = {name: one for name, one in module._parameters.items() if hasattr(one, "_fsdp_flattened")}
        views = {name: one for name, one in vars(module).items() if isinstance(one, Tensor) and _is_flat(one._base)}
        for name, tensor in (views | marked).items():
            if tensor is not None and (module, name) not in named and not _is_flat(tensor):
                yield _path(prefix, name), tensor


def _unmapped(model: nn.Module, path: str, tensor: Tensor) -> UnsupportedModel:
    units = [(prefix, unit) for prefix, unit in model.named_modules() if isinstance(unit, FullyShardedDataParallel)]
    flats = [(prefix, unit._handle.flat_param) for prefix, unit in units if unit._handle is not None]
    known = {id(p): _path(prefix, flat._fqns[i]) for prefix, flat in flats for i, p in enumerate(flat._params or ())}
    if (other := known.get(id(tensor))) is not None:
        return UnsupportedModel(
            f"{canonical_name(path)}: it is the same parameter as {canonical_name(other)} of another FSDP unit",
            hint="let modules that share a weight be in one FSDP unit",
        )
    return UnsupportedModel(
        f"{canonical_name(path)}: it lies in the flat parameter of an FSDP unit that is not part of the given model",
        hint="pass the outermost FullyShardedDataParallel module, not what it wraps",
    )


def _path(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _is_flat(tensor: Tensor | None) -> bool:
    return getattr(tensor, "_is_flat_param", False)


def _parts(handle: Any) -> list[_Part]:
    """Read a unit's map of its flat parameter."""
    flat, parts = handle.flat_param, []
    records = (flat._param_infos, flat._shapes, flat._strides, flat._param_extensions, flat._shard_param_infos)
    for index, (owner, shape, stride, extension, found) in enumerate(zip(*records, strict=True)):
        if extension is not None:
            raise UnsupportedModel(
                f"{flat._fqns[index]}: FSDP1 cuts it after tensor parallelism did",
                hint="tensor parallelism under FullyShardedDataParallel is not supported; use fully_shard",
            )
        start, offset, length = 0, 0, 0
        if found.in_shard:
            start, offset, length = found.intra_param_start_idx, found.offset_in_shard, found.numel_in_shard
        kind = kind_of(flat if flat._params is None else flat._params[index])
        place = (handle, owner.module, owner.param_name, tuple(shape), _row_major(shape, stride))
        parts.append(_Part(*place, start, start + length, offset, kind))
    return parts


def _row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length > 1 and step != expected:
            return 0 in shape
        expected *= length
    return True


def _parameters(model: nn.Module) -> Iterator[ParamShard]:
    """All parameters in the order of the unwrapped model's modules."""
    handles = _units(model)
    named = {place for handle in handles for place in _names(handle)}
    parts: dict[nn.Module, list[_Part]] = {}
    for part in (part for handle in handles for part in _parts(handle)):
        parts.setdefault(part.module, []).append(part)
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for part in parts.get(module, ()):
            yield _shard(_path(prefix, part.name), part)
        for name, param in module._parameters.items():
            if param is None or (module, name) in named or _is_flat(param) or id(param) in seen:
                continue
            seen.add(id(param))
            yield _ignored(model, _path(prefix, name), param)


def _shard(path: str, part: _Part) -> ParamShard:
    name = canonical_name(path)
    if not part.row_major:
        raise UnsupportedModel(
            f"{name}: a parameter of shape {part.shape} is flattened in another order than that of its elements",
            hint="call model.to(memory_format=torch.contiguous_format) before the model is wrapped",
        )
    boxes = boxes_of_flat_range(part.shape, part.start, part.stop) if 0 not in part.shape else (whole(part.shape),)
    return ParamShard(name, part.shape, boxes, _local(part), lambda: _current(part), part.kind)


def _local(part: _Part) -> Tensor:
    shard: Tensor = part.handle.flat_param._local_shard
    return shard.detach()[part.offset : part.offset + part.stop - part.start]


def _current(part: _Part) -> Tensor:
    """The local shard, unless somebody put other storage in its place."""
    local, flat, shown = _local(part), part.handle.flat_param, part.module._parameters.get(part.name)
    # Between forward and backward units show gathered weights; those are no parameters.
    if part.handle._training_state is not HandleTrainingState.IDLE or part.start == part.stop:
        return local
    if flat._params is not None and isinstance(shown, nn.Parameter) and shown.data_ptr() != local.data_ptr():
        return shown.detach()
    return local if flat.data_ptr() == flat._local_shard.data_ptr() else flat.detach()


def _ignored(model: nn.Module, path: str, param: nn.Parameter) -> ParamShard:
    if isinstance(param, DTensor):
        raise UnsupportedModel(
            f"{canonical_name(path)}: placements {param.placements} inside FullyShardedDataParallel cannot be mapped",
            hint="shard the whole model with fully_shard",
        )
    return _whole(model, path, kind_of(param))


def _whole(model: nn.Module, path: str, kind: TensorKind) -> ParamShard:
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)

    def current() -> Tensor:
        found: Tensor = getattr(module, name)
        return found.detach()

    return held_whole(path, kind, current)


BACKEND = Backend("fsdp1", _knows, shard_layout, publish)
