"""Scope: which tensors of a model are averaged, which are copied into each snapshot, and which are stored once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from sharded_phema.errors import TargetError, UnsupportedModel
from sharded_phema.layout import ParamShard, ShardLayout

__all__ = ["Buffers", "Scope", "scope_of"]

Buffers = Literal["copy", "average", "omit"]
"""What becomes of persistent buffers."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The tensors of a model by what a run does with them; each in the order of the layout.

    Attributes:
        averaged: Trained parameters, and float buffers where asked for.
        copied: Raw in every snapshot: parameters that train but are not averaged, buffers.
        frozen: Parameters that do not train: stored raw once, and again only where they change.
    """

    averaged: ShardLayout
    copied: ShardLayout
    frozen: ShardLayout


def scope_of(layout: ShardLayout, include: Sequence[str], exclude: Sequence[str], buffers: str) -> Scope:
    """Sort the tensors of a model.

    Args:
        layout: All of them.
        include: Patterns, as of file names, of the parameters that are averaged.
        exclude: Patterns of those that are not though they are included: they are copied instead.
        buffers: ``average`` averages those of a floating dtype and copies the others; ``omit`` leaves all out.

    Raises:
        TargetError: A pattern matches nothing, or ``buffers`` is none of the three.
        UnsupportedModel: Nothing is left to average, or what is left cannot be averaged.
    """
    if buffers not in get_args(Buffers):
        raise TargetError(f"buffers: expected one of {get_args(Buffers)}, found {buffers!r}", hint='try buffers="copy"')
    _check_patterns(layout, "include", include)
    _check_patterns(layout, "exclude", exclude)
    sorted_: dict[str, list[ParamShard]] = {"averaged": [], "copied": [], "frozen": [], "omitted": []}
    for shard in layout:
        sorted_[_fate(shard, _any(include, shard), _any(exclude, shard), buffers)].append(shard)
    if not sorted_["averaged"]:
        raise UnsupportedModel(
            f"none of the model's {len(layout)} tensors is averaged: all are frozen, buffers or excluded",
            hint="make PostHocEMA after requires_grad is set as it will be in training, or look at include and exclude",
        )
    return Scope(*(tuple(sorted_[fate]) for fate in ("averaged", "copied", "frozen")))


def _fate(shard: ParamShard, included: bool, excluded: bool, buffers: str) -> str:
    if shard.kind == "buffer":
        averaged = buffers == "average" and shard.local.is_floating_point() and included and not excluded
        return "omitted" if buffers == "omit" else "averaged" if averaged else "copied"
    if shard.kind == "frozen":
        return "copied" if excluded else "frozen"
    if excluded or not included:
        return "copied"
    if not shard.local.is_floating_point():
        raise UnsupportedModel(
            f"{shard.name}: a {shard.local.dtype} parameter cannot be averaged; expected a real floating dtype",
            hint=f"leave it out with exclude=[{shard.name!r}]: it is then copied into each snapshot",
        )
    return "averaged"


def _any(patterns: Sequence[str], shard: ParamShard) -> bool:
    return any(fnmatchcase(shard.name, pattern) for pattern in patterns)


def _check_patterns(layout: ShardLayout, name: str, patterns: Sequence[str]) -> None:
    if isinstance(patterns, str):
        raise TargetError(f"{name}={patterns!r}: a list is expected", hint=f"write {name}=[{patterns!r}]")
    for pattern in patterns:
        if layout and not any(fnmatchcase(shard.name, pattern) for shard in layout):
            raise TargetError(
                f"{name}: pattern {pattern!r} matches none of {len(layout)} tensors, such as {layout[0].name}",
                hint="patterns are those of file names, such as *.attn.*; leave it out if it is not meant",
            )
