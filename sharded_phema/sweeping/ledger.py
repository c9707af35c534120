"""Ledger: the file of scores of one sweep, by which it goes on where it stopped."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sharded_phema.errors import ModelMismatch, OrderError, OutputError
from sharded_phema.folder.disk import flush
from sharded_phema.manifest import RunRecord
from sharded_phema.scores import Score, append_score, read_scores
from sharded_phema.sweeping.points import Point, sigma_rel_in
from sharded_phema.world import from_first, rank_and_size

__all__ = ["Ledger", "opened_ledger"]


class Ledger:
    """What was measured so far, the same on every process; rank 0 keeps the file.

    Args:
        path: The file.
        record: Of the run.
        metric: What the metric is called.
        known: What the file holds.
    """

    def __init__(self, path: Path, record: RunRecord, metric: str, known: Sequence[Score]) -> None:
        self._path, self._record, self._metric = path, record, metric
        self._known: dict[tuple[object, ...], Score] = {}
        for score in known:
            self._known.setdefault(score.key, score)

    def find(self, point: Point, repeat: int) -> Score | None:
        """Score of a point, if it was measured."""
        return self._known.get(self.score(point, repeat, 0.0, 0.0, 0.0).key)

    def score(self, point: Point, repeat: int, score: float, forecast: float, seconds: float) -> Score:
        """The record of a point."""
        line = point.line
        return Score(
            self._record.run,
            self._record.unit,
            self._metric,
            point.target.text,
            line.t,
            score,
            forecast,
            seconds,
            sigma_rel=sigma_rel_in(point.target),
            group=line.group,
            base=line.base_text,
            second=line.second,
            repeat=repeat,
        )

    def add(self, scores: Sequence[Score]) -> None:
        """Have scores on the disk. Collective; all processes give the same.

        Raises:
            OutputError: The file cannot be written.
        """
        from_first(lambda: self._append(scores))
        self._known |= {score.key: score for score in scores}

    def _append(self, scores: Sequence[Score]) -> None:
        for score in scores:
            append_score(self._path, score)


@contextmanager
def opened_ledger(path: Path, record: RunRecord, metric: str) -> Iterator[Ledger]:
    """The file of scores, made if missing; no other process may write it meanwhile. Collective.

    Args:
        path: The file, not in the run folder. Rank 0 reads and writes it.
        record: Of the run.
        metric: What the metric is called.

    Raises:
        ModelMismatch: It holds scores of another run or metric.
        StoreError: A line of it is damaged; a last one that was cut short is left out.
        OrderError: Another sweep is writing it.
        OutputError: It cannot be written.
    """
    held: list[int] = []
    try:
        known = from_first(lambda: _opened(path, record, metric, held))
        yield Ledger(path, record, metric, known)
    finally:
        for descriptor in held:
            os.close(descriptor)


def _opened(path: Path, record: RunRecord, metric: str, held: list[int]) -> tuple[Score, ...]:
    assert rank_and_size()[0] == 0
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        held.append(descriptor)
        flush(str(path.absolute().parent))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}", hint="check the folder and its permissions") from error
    _lock(path, descriptor)
    known = read_scores(path)
    for score in known:
        for what, found, expected in (("run", score.run, record.run), ("metric", score.metric, metric)):
            if found != expected:
                raise ModelMismatch(
                    f"{path} holds scores of another {what}: expected {expected!r}, found {found!r}",
                    hint="give this sweep a file of its own with --scores",
                )
    return known


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OrderError(
            f"{path}: another sweep is writing it", hint="wait for it, or give this one a file of its own"
        ) from None
    except OSError:
        logging.getLogger(__name__).info("%s: this file system has no locks: run one sweep at a time", path)
