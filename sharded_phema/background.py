"""Background: one job at a time beside the training, whose failure reaches the training at its next call."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Protocol, TypeVar

__all__ = ["Background", "Foreground", "Jobs", "on_thread"]

EXIT_WAIT_S = 600.0
"""Longest time that the exit of the interpreter is held up for a job, in seconds."""

NOTICED_S = 0.1
"""Waits of training that are shorter than this are not spoken of, in seconds."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Jobs(Protocol):
    """Who runs jobs, one after the other. A job that failed raises once, in whichever call comes next."""

    def submit(self, job: Callable[[], object]) -> None:
        """Run a job once the one before is over; where that one failed, raise its failure and start nothing."""

    def wait(self) -> None:
        """Return when no job runs; raise the failure of the last."""

    def check(self) -> None:
        """Raise the failure of a job that is over; never waits."""

    def close(self) -> None:
        """Wait for the last job, as one does at an end, and raise its failure. Closing twice is harmless."""


class Foreground:
    """Runs each job at once, where it is submitted."""

    def submit(self, job: Callable[[], object]) -> None:
        """Run the job and raise its failure."""
        job()

    def wait(self) -> None:
        """Nothing runs."""

    def check(self) -> None:
        """Nothing can have failed since."""

    def close(self) -> None:
        """Nothing runs."""


class Background:
    """Runs one job at a time on a thread of its own, which begins and ends with the job.

    A failure is the very exception that the job raised, with its traceback. An interrupt while training waits
    leaves the job running, and the next call waits for it again. Calls come from one thread.

    Where nobody closes, the exit of the interpreter waits for the job up to ``EXIT_WAIT_S`` and logs its failure.
    Then the job is cut off in the middle, as by a kill, rather than keep a finished program alive for good.

    Args:
        what: Name of a job, for messages.
    """

    def __init__(self, what: str = "snapshot") -> None:
        self._what = what
        self._job: Future[object] = _finished()

    def submit(self, job: Callable[[], object]) -> None:
        """Start a job; waits for the one before, and says so.

        Raises:
            BaseException: The failure of the job before; this one is not started then.
        """
        self.wait()
        atexit.unregister(self._leave)
        atexit.register(self._leave)
        self._job = on_thread(job, f"sharded-phema {self._what}")

    def wait(self) -> None:
        """Wait until no job runs, and say so. What a job still reads may be overwritten afterwards.

        Raises:
            BaseException: The failure of the job before.
        """
        if not self._job.done():
            began = time.monotonic()
            futures.wait([self._job])
            if (waited := time.monotonic() - began) >= NOTICED_S:
                _log.warning(
                    "training waited %.1f s for the %s before; take them less often, or write them to faster storage",
                    waited,
                    self._what,
                )
        self.check()

    def check(self) -> None:
        """Raise the failure of a job that is over; never waits.

        Raises:
            BaseException: That failure, once.
        """
        if self._job.done():
            job, self._job = self._job, _finished()
            job.result()

    def close(self) -> None:
        """Wait for the last job, and say nothing. A later one begins anew.

        Raises:
            BaseException: Its failure, once.
        """
        futures.wait([self._job])
        atexit.unregister(self._leave)
        self.check()

    def _leave(self) -> None:
        futures.wait([self._job], timeout=EXIT_WAIT_S)
        if not self._job.done():
            _log.error("the program ends before its last %s is written, which is cut off", self._what)
        elif failure := self._job.exception():
            _log.error("the last %s failed, and nobody closed or asked: %s", self._what, failure, exc_info=failure)


def on_thread(call: Callable[[], T], name: str) -> Future[T]:
    """Start a call on a new thread that does not keep the interpreter from its exit.

    Where no thread can be made, as from Python 3.12 on while a program exits, the call is over when this returns.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            value = call()
        except BaseException as failure:  # whatever it is, the one who waits must learn of it
            future.set_exception(failure)
        else:
            future.set_result(value)

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError:
        run()
    return future


def _finished() -> Future[object]:
    future: Future[object] = Future()
    future.set_result(None)
    return future
