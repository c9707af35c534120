"""Mapping: a model as this rank's pieces of what is averaged, copied and stored once, agreed with all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sharded_phema.backends import Backend, backend_of
from sharded_phema.identity import check_same_layout
from sharded_phema.layout import ShardLayout
from sharded_phema.replicas import Shared, settled, shared_out
from sharded_phema.scope import scope_of
from sharded_phema.world import agree

__all__ = ["MappedModel", "held_by", "map_model"]


@dataclass(frozen=True, slots=True)
class MappedModel:
    """A live model; made by ``map_model``.

    Attributes:
        averaged: Live shards of what is averaged; of what every rank holds, this rank's part.
        copied: The same of what is copied into each snapshot.
        frozen: The same of what is stored once.
        shared: The averaged tensors that every rank holds whole.
    """

    averaged: ShardLayout
    copied: ShardLayout
    frozen: ShardLayout
    shared: tuple[Shared, ...]
    _backend: Backend
    _model: Any
    _optimizer: Any

    def publish(self) -> None:
        """Have the next forward use what was written into the shards. Called by every rank; may communicate."""
        self._backend.publish(self._model, self._optimizer)

    def steps(self) -> int | None:
        """How many optimizer steps changed the weights so far; None where the model does not count them."""
        return self._backend.steps(self._model, self._optimizer)


def map_model(
    model: Any, optimizer: Any, *, include: Sequence[str], exclude: Sequence[str], buffers: str
) -> MappedModel:
    """Map a model, as ``PostHocEMA`` is given it. Collective.

    Raises:
        UnsupportedModel: A parameter cannot be mapped, or its replicas have different values.
        ModelMismatch: The ranks hold different models.
        TargetError: A pattern matches nothing, or ``buffers`` is not known.
    """
    backend, layout = held_by(model, optimizer)
    scope = agree(lambda: scope_of(layout, include, exclude, buffers))
    averaged, shared = shared_out(scope.averaged)
    copied, frozen = shared_out(scope.copied)[0], shared_out(scope.frozen)[0]
    return MappedModel(averaged, copied, frozen, shared, backend, model, optimizer)


def held_by(model: Any, optimizer: Any, *, alike: bool = True) -> tuple[Backend, ShardLayout]:
    """Who shards a model, and this rank's pieces of all its tensors. Collective.

    Args:
        model: As ``PostHocEMA`` takes it.
        optimizer: The same.
        alike: Whether replicas must hold the same values.

    Raises:
        UnsupportedModel: A parameter cannot be mapped, or its replicas have different values.
        ModelMismatch: The ranks hold different models.
    """
    backend, layout = agree(lambda: _held(model, optimizer))
    check_same_layout(layout)
    return backend, settled(layout, alike=alike)


def _held(model: Any, optimizer: Any) -> tuple[Backend, ShardLayout]:
    backend = backend_of(model, optimizer)
    return backend, backend.shard_layout(model, optimizer)
