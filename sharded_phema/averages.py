"""Running averages of one rank's local shards: float32, updated in place by the rank alone."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sharded_phema.errors import OrderError
from sharded_phema.kernels import guarded, kernels_for
from sharded_phema.lane import lane_of, steps_wait
from sharded_phema.layout import ParamShard, ShardLayout

__all__ = ["Averages"]

_log = logging.getLogger(__name__)

WATCHED = 4
"""Parameters whose storage is looked at with each update, in turn: a number, so that large models take no longer."""


class Averages:
    """K running averages beside the parameters of a layout.

    Holds ``K * 4`` bytes for each local element, on the device of that element or in host memory, and a few more for
    each tensor. No collectives, no files. Whatever is read here comes after the last update, wherever that runs.

    Args:
        layout: Live local shards of the parameters.
        count: Number of averages, K.
        kernel: What updates them, as ``kernels_for`` knows it. It may be compiled here, and never later.
        non_finite: What becomes of parameters that are NaN or infinite, as ``guarded`` knows it.
        overlap: Update beside the training, until the next step of an optimizer.
        offload: Keep the averages in host memory, and update them there, beside the training.

    Raises:
        TargetError: The kernel does not run here, ``non_finite`` is not known, or parameters are on several devices and
            what is asked for needs one.
    """

    def __init__(
        self,
        layout: ShardLayout,
        count: int,
        *,
        kernel: str = "auto",
        non_finite: str = "average",
        overlap: bool = False,
        offload: bool = False,
    ) -> None:
        self._layout = layout
        locals_ = [shard.local for shard in layout]
        self._lane = lane_of([*dict.fromkeys(one.device for one in locals_)], overlap=overlap, offload=offload)
        homes = [torch.device("cpu") if offload else one.device for one in locals_]
        self._values = [[_zeros(*pair) for pair in zip(locals_, homes, strict=True)] for _ in range(count)]
        self._move = guarded(non_finite, kernels_for(kernel, self._values, locals_, offload=offload), count)
        self._told = 0
        self._release = steps_wait(self._lane) if overlap or offload else self._lane.close
        watched = [shard for shard in layout if shard.local.numel()]
        self._turns = [itertools.cycle(watched[i::WATCHED]) for i in range(WATCHED) if watched[i::WATCHED]]

    def update_(self, weights: Sequence[float]) -> None:
        """Move average k by ``weights[k]`` of the way to the live parameters; weight 1 copies them.

        Takes no longer in Python for many tensors than for few, and waits for no device.

        Raises:
            OrderError: Storage was replaced: that of all parameters is noticed at the next update, that of a single
                one when its turn comes, or by ``check``.
        """
        for turn in self._turns:
            _check_live(next(turn))
        self._lane.run(partial(self._move, tuple(weights)))

    def wait(self) -> None:
        """Have whatever writes weights from now on come after the last update. Steps of optimizers do so themselves."""
        self._lane.wait()

    def close(self) -> None:
        """Wait for the last update, and hold up optimizers no longer. Closing twice is harmless."""
        self._release()
        self._lane.close()

    @property
    def skipped(self) -> int:
        """How many updates were left out because of parameters that are not finite. Waits for the device."""
        self.wait()
        return self._move.skipped()

    def layout(self, index: int) -> ShardLayout:
        """Average ``index`` as a layout: the same names and boxes, ``local`` being the float32 average itself."""
        self.wait()
        pairs = zip(self._layout, self._values[index], strict=True)
        return tuple(_with_local(shard, value) for shard, value in pairs)

    @torch.no_grad()
    def copy_to_params_(self, index: int) -> None:
        """Write average ``index`` into the live parameters, rounded to their dtype."""
        self.wait()
        for shard, value in zip(self._layout, self._values[index], strict=True):
            shard.local.copy_(value)

    def check(self) -> None:
        """Prove that the averages watch the storage that the model trains, and hold something of it.

        Raises:
            OrderError: A parameter's storage was replaced (``model.to``, ``load_state_dict(assign=True)``)
                after the averages were made, or all updates were left out.
        """
        for shard in self._layout:
            _check_live(shard)
        self.check_filled()

    def check_filled(self) -> None:
        """Prove that there are weights in the averages, if there was an update; warn of updates that were left out.

        Raises:
            OrderError: All were.
        """
        self.wait()
        self._move.check()
        told, self._told = self._told, self.skipped
        if self._told > told:
            _log.warning(
                "%d updates were skipped on this rank, whose parameters contained NaN or infinity; %d altogether",
                self._told - told,
                self._told,
            )


def _check_live(shard: ParamShard) -> None:
    if shard.local.numel() and shard.current().data_ptr() != shard.local.data_ptr():
        raise OrderError(
            f"{shard.name}: the model's storage was replaced after the averages were made, "
            "so that they no longer see its weights",
            hint="make PostHocEMA after the last model.to(...), model.half() or load_state_dict(assign=True)",
        )


def _zeros(local: Tensor, home: torch.device) -> Tensor:
    return torch.zeros(local.shape, dtype=torch.float32, device=home)


def _with_local(shard: ParamShard, value: Tensor) -> ParamShard:
    return replace(shard, local=value, current=lambda: value)
