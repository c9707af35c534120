"""Running averages of one rank's local shards: float32, updated in place by the rank alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sharded_phema.errors import OrderError
from sharded_phema.kernels.foreach import ForeachLerp
from sharded_phema.layout import ParamShard, ShardLayout

__all__ = ["Averages"]


class Averages:
    """K running averages beside the parameters of a layout.

    Holds ``K * 4`` bytes for each local element, on the device of that element,
    and nothing else that grows with the model. No collectives, no files.

    Args:
        layout: Live local shards of the parameters.
        count: Number of averages, K.
    """

    def __init__(self, layout: ShardLayout, count: int) -> None:
        self._layout = layout
        self._values = [[_zeros_beside(shard.local) for shard in layout] for _ in range(count)]
        self._kernel = ForeachLerp(self._values, [shard.local for shard in layout])

    def update_(self, weights: Sequence[float]) -> None:
        """Move average k by ``weights[k]`` of the way to the live parameters; weight 1 copies them."""
        self._kernel(weights)

    def layout(self, index: int) -> ShardLayout:
        """Average ``index`` as a layout: the same names and boxes, ``local`` being the float32 average itself."""
        pairs = zip(self._layout, self._values[index], strict=True)
        return tuple(_with_local(shard, value) for shard, value in pairs)

    @torch.no_grad()
    def copy_to_params_(self, index: int) -> None:
        """Write average ``index`` into the live parameters, rounded to their dtype."""
        for shard, value in zip(self._layout, self._values[index], strict=True):
            shard.local.copy_(value)

    def check_live(self) -> None:
        """Prove that the averages still watch the storage that the model trains.

        Raises:
            OrderError: A parameter's storage was replaced (``model.to``, ``load_state_dict(assign=True)``)
                after the averages were made.
        """
        for shard in self._layout:
            if shard.local.numel() and shard.current().data_ptr() != shard.local.data_ptr():
                raise OrderError(
                    f"{shard.name}: the model's storage was replaced after the averages were made, "
                    "so that they no longer see its weights",
                    hint="make PostHocEMA after the last model.to(...), model.half() or load_state_dict(assign=True)",
                )


def _zeros_beside(local: Tensor) -> Tensor:
    return torch.zeros(local.shape, dtype=torch.float32, device=local.device)


def _with_local(shard: ParamShard, value: Tensor) -> ParamShard:
    return replace(shard, local=value, current=lambda: value)
