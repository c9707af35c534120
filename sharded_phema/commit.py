"""Commits: what became of each rank's part of a snapshot, told to all ranks beside the training, with bounded waits."""

from __future__ import annotations

import base64
import io
import pickle
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as StillRunning
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from sharded_phema import errors
from sharded_phema.background import on_thread
from sharded_phema.errors import PhemaError, StoreError, check_number
from sharded_phema.world import from_first, grouped, rank_and_size, tried

__all__ = ["Commits"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Verdict:
    """How an exchange ended, for every rank alike.

    Attributes:
        missing: Ranks that did not answer.
        value: What was made of all values; None where ranks are missing.
    """

    missing: tuple[int, ...]
    value: Any


class Commits:
    """Exchanges of small objects between all ranks. Made on every rank at once: collective.

    Values travel through the key-value store by which the processes found each other, on a connection of its own.
    So an exchange may run on a thread while training runs its collectives, needs no backend (neither gloo nor NCCL),
    and a rank that is late spoils nothing: the timeout of a gloo group closes the group's connections for good.

    An exchange has one verdict, the first that any rank writes down: what all ranks said, or who did not answer. A
    late rank finds it and raises the same error as the others, so that ranks stay in step and the next exchange
    works. A rank that is gone is missed again each time. Only where the store itself fails are later exchanges refused
    at once: it ends with the launcher's agent that keeps it or, without one, with rank 0's process group.

    Every rank makes the same exchanges in the same order, from one thread at a time.

    Args:
        timeout_s: Seconds after a rank's own answer in which the others must have answered: more than the slowest
            rank needs longer for its part than the fastest.

    Raises:
        TargetError: That is no positive number.
    """

    def __init__(self, timeout_s: float) -> None:
        check_number(timeout_s, "timeout_s", "above 0", lambda s: s > 0, "give seconds, for example 600")
        self._timeout_s = float(timeout_s)
        self._rank, self._size = rank_and_size()
        name = from_first(lambda: uuid.uuid4().hex)
        self._store: Any = dist.PrefixStore(f"sharded_phema/{name}", _connection())  # type: ignore[attr-defined]
        self._number, self._decided = 0, 0
        self._refused = ""

    @property
    def lost(self) -> bool:
        """Whether this rank cannot reach the others any more."""
        return bool(self._refused)

    def exchange(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Values are numbers, texts, tuples, dataclasses of ours.

        Raises:
            StoreError: Ranks did not answer in time, and which; or the store cannot be reached.
        """
        values: list[T] = self._combined(value, list)
        return values

    def agree(self, attempt: Callable[[], T]) -> T:
        """Run ``attempt`` on every rank; where it fails on one, the first failure is raised on all.

        Raises:
            PhemaError: The failure of the first rank that failed, which the message names; a StoreError for an
                exception that is none.
            StoreError: Ranks did not answer in time, and which; or the store cannot be reached.
        """
        return self._reached(attempt, lambda value: None)

    def collect(self, attempt: Callable[[], T]) -> list[T]:
        """Run ``attempt`` on every rank and bring its results to rank 0; the others get nothing.

        Raises:
            PhemaError: As of ``agree``.
            StoreError: As of ``agree``.
        """
        self._reached(attempt, lambda value: value)
        # Answers stay in the store until the next exchange.
        number = self._number
        return [found for _, found in self._asked(lambda: self._answers(number))] if self._rank == 0 else []

    def close(self) -> None:
        """Leave. Rank 0 goes last, for the store may live in it; it waits as in an exchange. Harmless when repeated."""
        if not self._refused:
            self._refused = "the exchanges between ranks were closed"
            with suppress(StillRunning, RuntimeError):  # nobody is left to tell
                on_thread(self._depart, "sharded-phema exchange").result(timeout=2 * self._timeout_s)

    def _reached(self, attempt: Callable[[], T], sent: Callable[[T | None], object]) -> T:
        """Run ``attempt``, send what ``sent`` makes of its result, and raise the first failure of any rank."""
        value, error = tried(attempt)
        told = None if error is None else _told(error)
        try:
            failure: PhemaError | None = self._combined((told, sent(value)), _first_failure)
        except StoreError as unanswered:
            raise unanswered from error or unanswered.__cause__
        if failure is not None:
            raise failure from error
        return value  # type: ignore[return-value]

    def _combined(self, value: object, combine: Callable[[Sequence[Any]], Any]) -> Any:
        """What one function makes of all ranks' values: it is that, and not all the values, that every rank reads."""
        if self._refused:
            raise StoreError(self._refused, hint="earlier snapshots are intact; continue from them with new processes")
        # Counted first: whatever happens here, this rank's next exchange is the others' next one.
        self._number += 1
        text, number = _text(value), self._number
        verdict = self._asked(lambda: self._verdict(number, text, combine))
        if verdict.missing:
            raise StoreError(
                f"{_listed(verdict.missing)} of {self._size} did not answer within {self._timeout_s:g} s, "
                "and may not have written their part of the snapshot",
                hint="see the logs of these ranks; where they are only slow, allow more time. "
                "Earlier snapshots are intact",
            )
        return verdict.value

    def _asked(self, call: Callable[[], T]) -> T:
        """What the store answers. One whose host hangs answers never, and its client has no timeout."""
        running = on_thread(call, "sharded-phema exchange")
        try:
            return running.result(timeout=2 * self._timeout_s)
        except (StillRunning, RuntimeError) as error:
            self._refused = (
                f"rank {self._rank} lost the key-value store of the process group: {str(error) or 'it does not answer'}"
            )
            raise StoreError(
                self._refused,
                hint="see whether rank 0 is alive, and close the averages before the process group is destroyed; "
                "earlier snapshots are intact",
            ) from error

    def _verdict(self, number: int, text: str, combine: Callable[[Sequence[Any]], Any]) -> _Verdict:
        """Answer, then read the verdict or give it, whichever is possible first."""
        self._store.set(_key(number, self._rank), text)
        began = time.monotonic()
        while not self._store.check([_key(number, "verdict")]):
            waited = time.monotonic() - began
            missing = self._missing(number, late=waited >= self._timeout_s)
            if missing is not None:
                verdict = _Verdict(missing, None if missing else combine(self._answers(number)))
                # The first to write decides, also for ranks that saw it otherwise.
                self._store.compare_set(_key(number, "verdict"), "", _text(verdict))
            else:
                time.sleep(min(_pause(waited, self._size), self._timeout_s - waited))
        decided: _Verdict = _object(self._store.get(_key(number, "verdict")))
        self._forget(number, decided)
        return decided

    def _depart(self) -> None:
        began = time.monotonic()
        self._store.set(_key("end", self._rank), "")
        everyone = [_key("end", rank) for rank in range(self._size)]
        while self._rank == 0 and not self._store.check(everyone):
            waited = time.monotonic() - began
            if waited >= self._timeout_s:
                break
            time.sleep(_pause(waited, self._size))

    def _missing(self, number: int, *, late: bool) -> tuple[int, ...] | None:
        """Ranks that have not answered, once that can be told: before the time is up only rank 0 asks for all."""
        if not late and self._rank > 0:
            return None
        if self._store.check([_key(number, rank) for rank in range(self._size)]):
            return ()
        return tuple(r for r in range(self._size) if not self._store.check([_key(number, r)])) if late else None

    def _answers(self, number: int) -> list[Any]:
        return [_object(self._store.get(_key(number, rank))) for rank in range(self._size)]

    def _forget(self, number: int, verdict: _Verdict) -> None:
        """Delete what nobody can need any more."""
        self._store.delete_key(_key(number - 1, self._rank))
        if self._rank == 0 and not verdict.missing:  # all ranks are past the verdicts before this one
            for old in range(self._decided, number):
                self._store.delete_key(_key(old, "verdict"))
            self._decided = number


def _connection() -> Any:
    """The store of the default process group, on a connection of its own where this torch can make one.

    torch 2.13 has both calls, public ones. Where an older one lacks them, the connection that all threads share will
    do: no call on it here waits for another rank.
    """
    if not grouped():
        return dist.HashStore()  # type: ignore[attr-defined]
    group: Any = dist.group.WORLD
    public = hasattr(group, "get_group_store")
    store: Any = group.get_group_store() if public else dist.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def _told(error: Exception) -> PhemaError:
    """A failure in a form that reaches other processes."""
    if isinstance(error, PhemaError):
        # A class of somebody else's is none that the others read.
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return error if kind is type(error) else kind(error.message, hint=error.hint)
    return StoreError(f"{type(error).__name__}: {error}", hint="see the log of this rank for where it was raised")


def _first_failure(answers: Sequence[tuple[PhemaError | None, object]]) -> PhemaError | None:
    failures = {rank: error for rank, (error, _) in enumerate(answers) if error is not None}
    if not failures:
        return None
    (rank, first), *others = failures.items()
    also = f" ({_listed([other for other, _ in others])} failed too)" if others else ""
    return type(first)(f"rank {rank}: {first.message}{also}", hint=first.hint)


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _pause(waited: float, size: int) -> float:
    """Seconds between two looks: a tenth of the wait so far, and never so short that many ranks swamp the store."""
    return max(0.001, 20e-6 * size, min(waited / 10, 1.0))


def _key(number: int | str, who: int | str) -> str:
    return f"{number}/{who}"


def _text(value: object) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()


def _object(text: bytes) -> Any:
    try:
        return _Reader(io.BytesIO(base64.b64decode(text, validate=True))).load()
    except Exception as error:
        raise StoreError(
            f"another process wrote into the key-value store what no rank of this job sends: {error}",
            hint="see who else can reach the job's rendezvous port; earlier snapshots are intact",
        ) from error


class _Reader(pickle.Unpickler):
    """Reads what ranks send each other, and calls nothing else: who reaches the store cannot run code here."""

    def find_class(self, module: str, name: str) -> Any:
        """A dataclass or an error of this package, of a module that is loaded."""
        found = getattr(sys.modules.get(module), name, None) if module.startswith("sharded_phema.") else None
        ours = isinstance(found, type) and (is_dataclass(found) or issubclass(found, PhemaError))
        # Errors are made anew by that one function.
        if ours or (found is not None and found is errors._rebuild):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not sent between ranks")
