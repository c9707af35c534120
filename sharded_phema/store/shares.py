"""Shares: which rank writes which piece of averages that ``dcp.save`` was given, from the plans of all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from sharded_phema.errors import ModelMismatch, StoreError, UnsupportedModel
from sharded_phema.layout import Box, tally, whole
from sharded_phema.manifest import Parameter

__all__ = ["Piece", "Shares", "pieces_of_plan", "share_out"]

_FORM = (
    "save {label: {name: tensor}}, tensors of real numbers only, with no planner of your own or DefaultSavePlanner()"
)

Holders = Mapping[int, Mapping[str, "Piece"]]
"""Of one box the ranks that hold it, and what each has of every average."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a rank holds of one parameter of one average.

    Attributes:
        average: As the state dict spells it.
        name: Of the parameter.
        shape: Of the whole parameter.
        box: Where the piece lies.
        item: By which a planner finds it.
    """

    average: str
    name: str
    shape: tuple[int, ...]
    box: Box
    item: WriteItem


@dataclass(frozen=True, slots=True)
class Shares:
    """What all ranks write together: every element of every average once.

    Attributes:
        averages: As the state dict spells them, in its order.
        parameters: Of each, in its order.
        ranks: Of each rank what it writes, one average after another; the boxes of a parameter alike in all averages.
    """

    averages: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    ranks: tuple[tuple[Piece, ...], ...]

    def boxes(self, rank: int) -> dict[str, tuple[Box, ...]]:
        """What a rank writes of each parameter, by name."""
        found: dict[str, list[Box]] = {}
        for piece in self.ranks[rank]:
            if piece.average == self.averages[0]:
                found.setdefault(piece.name, []).append(piece.box)
        return {name: tuple(boxes) for name, boxes in found.items()}


def pieces_of_plan(plan: SavePlan) -> tuple[Piece, ...]:
    """What a rank holds, from its local plan; pieces without elements among it.

    Raises:
        StoreError: Something in it is no tensor of real numbers under a label and a name, or the plan is no
            DefaultSavePlanner's.
    """
    paths = plan.planner_data
    if not isinstance(paths, Mapping) or not getattr(plan, "usable", True):
        raise StoreError("a plan that tells no labels of its tensors, or is left out because it was seen", hint=_FORM)
    return tuple(_piece(item, paths[item.index.fqn]) for item in plan.items)


def _piece(item: WriteItem, path: Sequence[object]) -> Piece:
    average, *name = path
    data = item.tensor_data
    if data is None or not (name and all(isinstance(part, str) for part in path)):
        raise StoreError(f"{item.index.fqn}: no tensor that has a label and a name", hint=_FORM)
    if not data.properties.dtype.is_floating_point:
        raise StoreError(f"{item.index.fqn}: a tensor of {data.properties.dtype} is no average", hint=_FORM)
    box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    return Piece(str(average), ".".join(map(str, name)), tuple(data.size), box, item)


def share_out(ranks: Sequence[Sequence[Piece]]) -> Shares:
    """Decide who writes what. What several ranks hold is written by the one that has least to write so far.

    Args:
        ranks: What each holds.

    Raises:
        ModelMismatch: Averages are not of the same parameters.
        UnsupportedModel: They are cut differently, or elements are missing or held in two ways.
    """
    averages = tuple(dict.fromkeys(piece.average for pieces in ranks for piece in pieces))
    parameters, held = _parameters(ranks, averages), _held(ranks)
    shares: list[list[Piece]] = [[] for _ in ranks]
    sizes = [0] * len(ranks)
    for parameter in parameters:
        boxes = held.get(parameter.name, {})
        _check_cover(parameter, list(boxes))
        for box in sorted(boxes, key=lambda box: box.offsets):
            rank = min(_able(parameter, boxes[box], averages), key=lambda rank: (sizes[rank], rank))
            sizes[rank] += box.numel
            shares[rank] += boxes[box][rank].values()
    places = {average: place for place, average in enumerate(averages)}
    ordered = [tuple(sorted(share, key=lambda piece: places[piece.average])) for share in shares]
    return Shares(averages, parameters, tuple(ordered))


def _parameters(ranks: Sequence[Sequence[Piece]], averages: Sequence[str]) -> tuple[Parameter, ...]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for piece in (piece for pieces in ranks for piece in pieces):
        found.setdefault(piece.name, {}).setdefault(piece.average, piece.shape)
    for name, shapes in found.items():
        if len(shapes) != len(averages) or len({*shapes.values()}) > 1:
            raise ModelMismatch(
                f"{name}: expected one shape in each of the averages {', '.join(averages)}, found {shapes}",
                hint="give every average the same parameters",
            )
    return tuple(Parameter(name, next(iter(shapes.values()))) for name, shapes in found.items())


def _held(ranks: Sequence[Sequence[Piece]]) -> dict[str, dict[Box, dict[int, dict[str, Piece]]]]:
    """Of each parameter its boxes, and who holds them."""
    held: dict[str, dict[Box, dict[int, dict[str, Piece]]]] = {}
    for rank, pieces in enumerate(ranks):
        for piece in pieces:
            if piece.box.numel:
                boxes = held.setdefault(piece.name, {})
                boxes.setdefault(piece.box, {}).setdefault(rank, {})[piece.average] = piece
    return held


def _able(parameter: Parameter, holders: Holders, averages: Sequence[str]) -> list[int]:
    able = [rank for rank, found in holders.items() if len(found) == len(averages)]
    if not able:
        raise UnsupportedModel(
            f"{parameter.name}: no rank holds the same part of it in all of the averages {', '.join(averages)}",
            hint="shard all averages alike",
        )
    return able


def _check_cover(parameter: Parameter, boxes: Sequence[Box]) -> None:
    # Boxes can overlap and yet add up, with a gap elsewhere.
    held, expected = sum(box.numel for box in boxes), math.prod(parameter.shape)
    if held != expected or tally(boxes) != tally([whole(parameter.shape)]):
        raise UnsupportedModel(
            f"{parameter.name}: the ranks hold {held} elements in {len(boxes)} boxes, which are not each of the "
            f"{expected} elements of shape {parameter.shape} once",
            hint="give tensors whose pieces on all ranks, replicas apart, make up the whole",
        )
