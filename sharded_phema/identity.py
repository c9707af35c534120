"""What makes a model, its ranks and its run folder belong together, and the proof that they do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from sharded_phema.errors import ModelMismatch, TargetError, UnsupportedModel
from sharded_phema.layout import ParamShard, ShardLayout
from sharded_phema.manifest import Parameter, RawTensor, RunRecord
from sharded_phema.tensorfile import CODES, dtype_name
from sharded_phema.world import gather

__all__ = ["check_same_layout", "check_same_model", "live_shards", "run_record"]


def run_record(
    run: str,
    unit: str,
    averages: Sequence[str],
    layout: ShardLayout,
    copied: ShardLayout = (),
    frozen: ShardLayout = (),
    *,
    dtype: str,
) -> RunRecord:
    """The record that a run of this model, in this unit, with these averages stored in this dtype must have.

    Raises:
        TargetError: The unit is no name.
        UnsupportedModel: A copied or frozen tensor is of a dtype that cannot be stored.
    """
    if not (isinstance(unit, str) and unit.strip()):
        raise TargetError(
            f"unit: expected a name of what training time counts, found {unit!r}", hint='try unit="steps"'
        )
    parameters = tuple(Parameter(shard.name, shard.global_shape) for shard in layout)
    raw, once = (tuple(_raw(shard) for shard in part) for part in (copied, frozen))
    return RunRecord(run, unit, tuple(averages), parameters, raw, once, dtype=dtype)


def _raw(shard: ParamShard) -> RawTensor:
    name, kind = dtype_name(shard.local.dtype), "buffer" if shard.kind == "buffer" else "parameter"
    if name not in CODES or shard.local.layout != torch.strided:
        raise UnsupportedModel(
            f"{shard.name}: a {kind} of dtype {name} and layout {shard.local.layout} cannot be stored; expected a "
            f"dense tensor of {', '.join(CODES)}",
            hint='leave it out of the state dict (persistent=False), or all buffers with buffers="omit"'
            if kind == "buffer"
            else "keep it as a tensor of one of these dtypes; complex numbers of double precision as pairs of float64",
        )
    return RawTensor(shard.name, shard.global_shape, name, kind)


def live_shards(layout: ShardLayout, tensors: Sequence[RawTensor]) -> ShardLayout:
    """The shards as the model holds them now, which may be in other storage than when the layout was made.

    Raises:
        ModelMismatch: A tensor has another shape or dtype than the run's record says.
    """
    found = tuple(replace(shard, local=shard.current()) for shard in layout)
    for now, shard, tensor in zip(found, layout, tensors, strict=True):
        if (now.local.shape, dtype_name(now.local.dtype)) != (shard.local.shape, tensor.dtype):
            raise ModelMismatch(
                f"{tensor.name}: this rank held {tuple(shard.local.shape)} of it in {tensor.dtype} when PostHocEMA was "
                f"made, now {tuple(now.local.shape)} in {dtype_name(now.local.dtype)}",
                hint="make PostHocEMA after the last model.to(...) or change of a buffer's shape",
            )
    return found


def check_same_layout(layout: ShardLayout) -> None:
    """Prove that the ranks hold the same parameters and buffers, in the same order. Collective.

    Raises:
        ModelMismatch: They do not; says in what.
    """
    names = [(shard.name, shard.global_shape, shard.kind) for shard in layout]
    # Names are many; unless ranks differ, what travels is a digest of them.
    if len(set(gather(hashlib.sha256(repr(names).encode()).digest()))) == 1:
        return
    everyone = gather(names)
    rank, other = next((rank, other) for rank, other in enumerate(everyone) if other != everyone[0])
    raise ModelMismatch(
        f"rank {rank} holds other parameters than rank 0: {_difference(everyone[0], other)}",
        hint="build and shard the same model on every rank",
    )


def check_same_model(where: str, found: RunRecord, expected: RunRecord) -> None:
    """Prove that a run folder is of this model, tracks the same averages and stores them alike.

    Raises:
        ModelMismatch: It is not; says in what.
    """
    pairs: dict[str, tuple[Sequence[object], Sequence[object]]] = {
        "parameters": ([(p.name, p.shape) for p in found.parameters], [(p.name, p.shape) for p in expected.parameters]),
        "copied tensors": (_facts(found.copied), _facts(expected.copied)),
        "frozen tensors": (_facts(found.frozen), _facts(expected.frozen)),
        "averages": (list(found.averages), list(expected.averages)),
        "unit": ([found.unit], [expected.unit]),
        "dtype": ([found.dtype], [expected.dtype]),
    }
    for what, (stored, wanted) in pairs.items():
        if stored != wanted:
            raise ModelMismatch(
                f"{where} holds a run with other {what}: {_difference(wanted, stored)}",
                hint="give this run its own folder, or construct it as the run in this folder was",
            )


def _facts(tensors: Sequence[RawTensor]) -> list[tuple[object, ...]]:
    return [(tensor.name, tensor.shape, tensor.dtype, tensor.kind) for tensor in tensors]


def _difference(expected: Sequence[object], found: Sequence[object]) -> str:
    """The first place where two lists part."""
    for index, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return f"expected {_plain(one)} at position {index}, found {_plain(other)}"
    return f"expected {len(expected)} of them, found {len(found)}"


def _plain(item: object) -> str:
    return " ".join([f"{item[0]} of shape {item[1]}", *item[2:]]) if isinstance(item, tuple) else str(item)
