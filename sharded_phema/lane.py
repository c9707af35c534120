"""Lane: where the update of averages runs: at once, or beside the training, which waits before weights change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from sharded_phema.errors import TargetError

__all__ = ["AtOnce", "Lane", "OnStream", "OnThread", "lane_of", "steps_wait"]

Act = Callable[[], object]


class Lane(Protocol):
    """Runs one act after the other."""

    def run(self, act: Act) -> None:
        """Do something that sees all that was done or queued here so far. Waits for the act before, if it must."""

    def wait(self) -> None:
        """Have all that is done or queued here from now on come after what was run. Raises its failure, once.

        Raises:
            BaseException: What an act raised on a thread.
        """

    def close(self) -> None:
        """Wait, and end. Closing twice is harmless."""


class AtOnce:
    """Here and now."""

    def run(self, act: Act) -> None:
        """Do it."""
        act()

    def wait(self) -> None:
        """It is over."""

    def close(self) -> None:
        """Nothing to end."""


class OnStream:
    """On a CUDA stream of its own. Neither ``run`` nor ``wait`` holds up the host.

    Args:
        device: Of the stream.
        api: What has streams: ``torch.cuda``, or something that looks like it.
    """

    def __init__(self, device: torch.device, api: Any = torch.cuda) -> None:
        self._api, self._device = api, device
        self._stream = api.Stream(device)
        self._done = self._stream.record_event()

    def run(self, act: Act) -> None:
        """Queue it after all that the current stream has been given."""
        self._stream.wait_stream(self._api.current_stream(self._device))
        with self._api.stream(self._stream):
            act()
        self._done = self._stream.record_event()

    def wait(self) -> None:
        """Have the current stream wait for it."""
        self._api.current_stream(self._device).wait_event(self._done)

    def close(self) -> None:
        """Wait, as whoever frees or reuses the memory does on the current stream."""
        self.wait()


class OnThread:
    """On a thread of its own; one act at a time, so that nothing piles up.

    Args:
        ready: Called in ``run``; what it gives is called on the thread before the act, to wait for what was queued.
    """

    def __init__(self, ready: Callable[[], Act] = lambda: lambda: None) -> None:
        self._worker = ThreadPoolExecutor(1, "sharded-phema update")
        self._job, self._ready = _nothing(), ready

    def run(self, act: Act) -> None:
        """Wait for the act before, and begin this one."""
        self.wait()
        ready = self._ready()
        self._job = self._worker.submit(lambda: (ready(), act()))

    def wait(self) -> None:
        """Hold up the caller until it is over."""
        futures.wait([self._job])  # an interrupt meanwhile loses nothing
        job, self._job = self._job, _nothing()
        job.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()


def lane_of(devices: Sequence[torch.device], *, overlap: bool, offload: bool) -> Lane:
    """Where updates of parameters on some devices run.

    Args:
        devices: Without repetition.
        overlap: Beside the training.
        offload: The averages are in host memory, whatever the devices: beside the training, too.

    Raises:
        TargetError: What runs beside the training needs parameters on one device.
    """
    if not (overlap or offload) or not devices:
        return AtOnce()
    if len(devices) > 1:
        raise TargetError(
            f"overlap and offload need all parameters on one device, found {', '.join(map(str, devices))}",
            hint="leave both out, or exclude=... what is elsewhere",
        )
    if devices[0].type != "cuda":
        return OnThread()
    return OnThread(partial(_reached, devices[0])) if offload else OnStream(devices[0])


def _reached(device: torch.device) -> Act:
    """What waits until the current stream has done what it was given so far."""
    wait: Act = torch.cuda.current_stream(device).record_event().synchronize
    return wait


def steps_wait(lane: Lane) -> Callable[[], None]:
    """Have every step of every torch optimizer wait for a lane, whoever makes the optimizer, and whenever.

    Returns:
        What ends that. It ends by itself where the lane is no more.
    """
    known = weakref.ref(lane)
    handle = register_optimizer_step_pre_hook(partial(_before_step, known))
    weakref.finalize(lane, handle.remove).atexit = False
    return handle.remove


def _before_step(known: weakref.ref[Lane], optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if (lane := known()) is not None:
        lane.wait()


def _nothing() -> Future[object]:
    done: Future[object] = Future()
    done.set_result(None)
    return done
