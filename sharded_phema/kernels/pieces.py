"""Pieces: parameters and their averages cut alike, and put together again into groups of a bounded length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

__all__ = ["Piece", "groups_of", "pieces_of"]

Piece = tuple[Tensor, tuple[Tensor, ...]]
"""Part of a parameter, and the same part of its averages: aliases."""


def pieces_of(param: Tensor, averages: tuple[Tensor, ...], most: int) -> Iterator[Piece]:
    """A parameter, of any strides, and its contiguous averages in pieces of at most ``most`` elements each."""
    if param.numel() <= most:
        yield param, averages
        return
    if param.is_contiguous():
        param, averages = param.view(-1), tuple(average.view(-1) for average in averages)
    row = param.numel() // param.shape[0]
    for index in range(0, param.shape[0], max(1, most // row)):
        # A single row loses its dimension, so that rows that are still too long are cut along the next one.
        rows = index if row > most else slice(index, index + most // row)
        yield from pieces_of(param[rows], tuple(average[rows] for average in averages), most)


def groups_of(pieces: Sequence[Piece], most: int) -> list[list[Piece]]:
    """The pieces in order, cut where a group would grow beyond ``most`` elements."""
    groups: list[list[Piece]] = []
    room = -1
    for piece in pieces:
        room -= piece[0].numel()
        if room < 0:
            groups.append([])
            room = most - piece[0].numel()
        groups[-1].append(piece)
    return groups
