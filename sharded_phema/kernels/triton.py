"""The update on CUDA in one launch, however many tensors there are: a table tells each block what it works on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharded_phema.kernels.contract import Tensors, Weights
from sharded_phema.kernels.foreach import ForeachLerp

__all__ = ["TritonUpdate"]

BLOCK = 4096
"""Elements of a tensor that a block of threads takes."""

ALIGNED = 16
"""Bytes; where all addresses of a tensor and its averages are multiples, a thread reads and writes as many at once."""

KINDS: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


# Triton compiles what stands in these functions: arguments have no types, and those in capitals are constants.


@triton.jit
def _pointers(table, row, offsets, KIND: tl.constexpr, STEP: tl.constexpr):
    """Addresses of elements of the tensor whose own address stands in a row of the table."""
    found = tl.load(table + row).to(tl.pointer_type(KIND)) + offsets
    if STEP > 1:
        found = tl.multiple_of(found, STEP)
    return found


@triton.jit
def _move(table, tensor, count, offsets, inside, weights, KIND: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """Some elements of one tensor into all its averages."""
    value = tl.load(_pointers(table, tensor, offsets, KIND, STEP), mask=inside).to(tl.float32)
    for k in tl.static_range(WIDTH):
        weight = tl.load(weights + k)
        if weight != 0.0:
            average = _pointers(table, (k + 1) * count + tensor, offsets, tl.float32, STEP)
            old = tl.load(average, mask=inside)
            large = weight >= 0.5
            new = tl.fma(tl.where(large, weight - 1.0, weight), value - old, tl.where(large, value, old))
            tl.store(average, new, mask=inside)


@triton.jit
def update_kernel(
    tensors,
    firsts,
    lengths,
    table,
    weights,
    count,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Each block of threads does a block of a tensor: it looks up which, and where that begins."""
    tensor, first = tl.load(tensors + tl.program_id(0)), tl.load(firsts + tl.program_id(0))
    length = tl.load(lengths + tensor)
    offsets = first + tl.arange(0, SIZE)
    # A mask would have each thread read element by element.
    if first + SIZE <= length:
        _move(table, tensor, count, offsets, None, weights, KIND, WIDTH, STEP)
    else:
        _move(table, tensor, count, offsets, offsets < length, weights, KIND, WIDTH, STEP)


@triton.jit
def _look(table, tensor, offsets, inside, other, flag, KIND: tl.constexpr, STEP: tl.constexpr):
    """Set the flag to 0 where one of some elements of a tensor is NaN or infinite."""
    value = tl.load(_pointers(table, tensor, offsets, KIND, STEP), mask=inside, other=other).to(tl.float32)
    exponent = value.to(tl.int32, bitcast=True) & 0x7F800000
    tl.store(flag + offsets * 0, 0, mask=exponent == 0x7F800000)


@triton.jit
def finite_kernel(tensors, firsts, lengths, table, flag, KIND: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Set the flag to 0 where an element is NaN or infinite."""
    tensor, first = tl.load(tensors + tl.program_id(0)), tl.load(firsts + tl.program_id(0))
    length = tl.load(lengths + tensor)
    offsets = first + tl.arange(0, SIZE)
    if first + SIZE <= length:
        _look(table, tensor, offsets, None, None, flag, KIND, STEP)
    else:
        _look(table, tensor, offsets, offsets < length, 0.0, flag, KIND, STEP)


class TritonUpdate:
    """Launches once for each dtype and alignment among the parameters. Compiled when it is made.

    What no flat view reaches, and other dtypes, are left to ``ForeachLerp``, which waits for weights that the device
    decides.

    Args:
        averages: As of ``Kernel``, on a CUDA device; anywhere under ``TRITON_INTERPRET=1``.
        params: As of ``Kernel``, on the same device.
    """

    def __init__(self, averages: Sequence[Tensors], params: Tensors) -> None:
        groups: dict[tuple[torch.dtype, bool], list[list[Tensor]]] = {}
        others = []
        for index, param in enumerate(params):
            row = [param, *(average[index] for average in averages)]
            if param.dtype not in KINDS or not param.is_contiguous():
                others.append(row)
            elif param.numel():
                groups.setdefault((param.dtype, _aligned(row)), []).append(row)
        self._others = ForeachLerp(
            [list(c) for c in zip(*(r[1:] for r in others), strict=True)], [r[0] for r in others]
        )
        device = params[0].device if len(params) else torch.device("cpu")
        self._launches = [_Launch(rows, dtype, aligned, device) for (dtype, aligned), rows in groups.items()]
        self._weights = torch.zeros(len(averages), device=device)
        self._each = list(self._weights)
        self._flag = torch.ones((), dtype=torch.int32, device=device)
        self((0.0,) * len(averages))  # compiles, and moves nothing

    @torch.no_grad()
    def __call__(self, weights: Weights) -> None:
        """Update every average in place."""
        if isinstance(weights, Tensor):
            self._weights.copy_(weights)
        else:  # numbers travel as arguments of a launch, which nobody waits for
            for place, weight in zip(self._each, weights, strict=True):
                place.fill_(weight)
        with torch.cuda.device_of(self._weights):  # Triton launches on the current device
            for launch in self._launches:
                launch.update(self._weights)
        self._others(weights)

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Whether all parameters are finite."""
        self._flag.fill_(1)
        with torch.cuda.device_of(self._flag):
            for launch in self._launches:
                launch.look(self._flag)
        return self._flag.bool() & self._others.finite()


class _Launch:
    """The table of tensors of one dtype.

    Args:
        rows: Each parameter and its averages.
        dtype: Of the parameters.
        aligned: Whether all addresses are.
        device: Where they are.
    """

    def __init__(
        self, rows: Sequence[Sequence[Tensor]], dtype: torch.dtype, aligned: bool, device: torch.device
    ) -> None:
        self._kept = rows  # the table holds addresses only
        lengths = torch.tensor([row[0].numel() for row in rows])
        blocks = (lengths + BLOCK - 1) // BLOCK
        tensors = torch.repeat_interleave(torch.arange(len(rows)), blocks)
        before = (blocks.cumsum(0) - blocks)[tensors]
        firsts = (torch.arange(len(tensors)) - before) * BLOCK
        table = torch.tensor([[tensor.data_ptr() for tensor in column] for column in zip(*rows, strict=True)])
        self._tables = [part.to(device) for part in (tensors.int(), firsts, lengths, table)]
        self._grid, self._count, self._width = (len(tensors),), len(rows), len(rows[0]) - 1
        self._how = {"KIND": KINDS[dtype], "SIZE": BLOCK, "STEP": ALIGNED if aligned else 1}

    def update(self, weights: Tensor) -> None:
        update_kernel[self._grid](*self._tables, weights, self._count, WIDTH=self._width, **self._how)

    def look(self, flag: Tensor) -> None:
        finite_kernel[self._grid](*self._tables, flag, **self._how)


def _aligned(row: Sequence[Tensor]) -> bool:
    return all(tensor.data_ptr() % ALIGNED == 0 for tensor in row)
