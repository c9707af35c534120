"""Masters: which part of each parameter's master a DeepSpeed optimizer keeps on this rank, and how it is published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sharded_phema.errors import UnsupportedModel

__all__ = ["KEEPERS", "OWN_WEIGHTS", "Held", "Keeper", "Masters", "as_it_is", "shape_of", "weights_of"]


@dataclass(frozen=True, slots=True)
class Held:
    """The elements ``[start, stop)`` of a flattened parameter, and what gives the storage that holds them now."""

    start: int
    stop: int
    current: Callable[[], Tensor]


Masters = Iterator[tuple[nn.Parameter, Held]]
"""The parameters that an optimizer trains, each with this rank's part of its master."""


@dataclass(frozen=True, slots=True)
class Keeper:
    """One of DeepSpeed's ways to keep masters.

    Attributes:
        masters: Reads them from an optimizer. No collective.
        publish: Brings the masters of an optimizer into the weights that the forward of a module uses. Collective.
    """

    masters: Callable[[Any], Masters]
    publish: Callable[[Any, nn.Module], None]


def shape_of(param: Any) -> tuple[int, ...]:
    """Global shape; the parameter itself is empty while stage 3 has it partitioned."""
    return tuple(param.ds_shape if hasattr(param, "ds_id") else param.shape)


def weights_of(param: Any, held: Held) -> Tensor:
    """The elements that ``held`` names, flat, as the forward uses them."""
    if hasattr(param, "ds_id"):
        weights: Tensor = param.ds_tensor[: held.stop - held.start]
        return weights
    return param.detach().flatten()[held.start : held.stop]  # type: ignore[no-any-return]


def as_it_is(param: Any) -> Held:
    """What the module itself holds of a parameter: all, or the partition of stage 3."""
    if not hasattr(param, "ds_id"):
        return Held(0, param.numel(), param.detach)
    start, stop = _partition(param)
    return Held(start, stop, lambda: param.ds_tensor.detach()[: stop - start])


def _partition(param: Any) -> tuple[int, int]:
    """This rank's elements of a parameter that stage 3 partitioned; the last rank's partition is padded."""
    size, rank = param.partition_numel(), dist.get_rank(param.ds_process_group)
    return min(rank * size, param.ds_numel), min((rank + 1) * size, param.ds_numel)


def _slice_of(masters: Sequence[Tensor], index: int, begin: int, start: int, stop: int) -> Held:
    """Elements ``[start, stop)`` of a parameter, which lie at ``begin`` of one of the masters."""
    # Looked up each time, so that masters that were moved or replaced are noticed.
    return Held(start, stop, lambda: masters[index].detach().view(-1)[begin : begin + stop - start])


def _own(optimizer: Any) -> Masters:
    for group in optimizer.param_groups:
        yield from ((param, as_it_is(param)) for param in group["params"])


def _nothing_to_publish(optimizer: Any, module: nn.Module) -> None:
    """The masters are the weights."""


def _apart(zero: Any) -> Masters:
    """FP16_UnfusedOptimizer: every rank has the whole master of each parameter."""
    for group, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
        for index, param in enumerate(group):
            yield param, _slice_of(masters, index, 0, 0, param.numel())


def _end_to_end(zero: Any) -> Masters:
    """FP16_Optimizer: every rank has the masters of a group whole, in one buffer."""
    for index, group in enumerate(zero.fp16_groups):
        for param, end in zip(group, accumulate(param.numel() for param in group), strict=True):
            yield param, _slice_of(zero.fp32_groups_flat, index, end - param.numel(), 0, param.numel())


def _round(masters: Masters) -> None:
    for param, held in masters:
        param.copy_(held.current().view_as(param))


def _cut_from_buffers(groups: Any, buffers: Any, masters: Any, process_groups: Any) -> Masters:
    """Stages 1 and 2: a group's weights lie in one buffer, of which each rank keeps the master of an equal part."""
    for index, (group, buffer) in enumerate(zip(groups, buffers, strict=True)):
        size = masters[index].numel()
        first = dist.get_rank(process_groups[index]) * size
        for param in group:
            place = _place_in(buffer, param, index)
            start = max(first - place, 0)
            stop = max(min(first + size - place, param.numel()), start)
            yield param, _slice_of(masters, index, place + start - first, start, stop)


def _place_in(buffer: Tensor, param: Tensor, index: int) -> int:
    # By address: with round_robin_gradients the buffer has an order of its own, which DeepSpeed's _hp_mapping ignores.
    place = (param.data_ptr() - buffer.data_ptr()) // buffer.element_size()
    if not 0 <= place <= buffer.numel() - param.numel():
        raise UnsupportedModel(
            f"a parameter of shape {tuple(param.shape)} in optimizer group {index} lies outside of the group's "
            "buffer, whose master DeepSpeed trains",
            hint="do not move or cast the module after deepspeed.initialize",
        )
    return place


def _gather_buffers(zero: Any, module: nn.Module) -> None:
    zero.update_lp_params()


def _of_partitions(zero: Any) -> Masters:
    """Stage 3: each parameter is cut on its own, and a rank's parts lie end to end, group by group."""
    for index, group in enumerate(zero.fp16_groups):
        sizes = [param.partition_numel() for param in group]
        for param, size, end in zip(group, sizes, accumulate(sizes), strict=True):
            yield param, _slice_of(zero.fp32_partitioned_groups_flat, index, end - size, *_partition(param))


def _drop_gathered(zero: Any, module: Any) -> None:
    zero.checkpoint_event_prologue()  # frees what is gathered
    for weights, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
        weights.copy_(master)
    for param in module.parameters():
        if getattr(param, "ds_secondary_tensor", None) is not None:
            param.ds_secondary_tensor = None  # hpZ: another partition, within a node, of the old weights
    zero.checkpoint_event_epilogue()  # gathers the small parameters that stay gathered


OWN_WEIGHTS = Keeper(_own, _nothing_to_publish)
"""An optimizer whose groups hold the module's own parameters."""

KEEPERS = {
    "FP16_UnfusedOptimizer": Keeper(_apart, lambda zero, module: _round(_apart(zero))),
    "FP16_Optimizer": Keeper(_end_to_end, lambda zero, module: _round(_end_to_end(zero))),
    "BF16_Optimizer": Keeper(
        lambda zero: _cut_from_buffers(
            zero.bf16_groups, zero.bf16_groups_flat, zero.fp32_groups_flat_partition, zero.real_dp_process_group
        ),
        _gather_buffers,
    ),
    "DeepSpeedZeroOptimizer": Keeper(
        lambda zero: _cut_from_buffers(
            zero.bit16_groups, zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, zero.real_dp_process_group
        ),
        _gather_buffers,
    ),
    "DeepSpeedZeroOptimizer_Stage3": Keeper(_of_partitions, _drop_gathered),
}
"""By the class of the optimizer. The first two are those of stage 0 in a 16 bit dtype."""
