"""Assembly: the parts that keep a run's averages, made one after the other on every rank at once."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sharded_phema.averages import Averages
from sharded_phema.background import Background, Foreground
from sharded_phema.course import Course
from sharded_phema.folder import open_folder
from sharded_phema.identity import run_record
from sharded_phema.manifest import RunRecord
from sharded_phema.mapping import MappedModel, map_model
from sharded_phema.pruning import remover
from sharded_phema.retention import Retention
from sharded_phema.rounding import check_dtype
from sharded_phema.schedule import Schedule
from sharded_phema.session import Session, StoredLayouts
from sharded_phema.staging import LazyCopies, alive
from sharded_phema.tracked import TrackedSet, asked_for, tracked_set
from sharded_phema.world import agree

__all__ = ["Parts", "assembled"]

Parts = tuple[TrackedSet, MappedModel, Averages, Session, Course]
"""What is tracked, the live model, its averages, the stretch of training in the run folder, and time as it goes on."""


def assembled(
    model: Any,
    optimizer: Any,
    root: str | Path,
    wanted: tuple[Sequence[float] | None, Sequence[str | float]],
    unit: str,
    dtype: str,
    rhythm: tuple[float, float, float],
    scope: Mapping[str, Any],
    updates: Mapping[str, Any],
    storing: Mapping[str, Any],
) -> Parts:
    """Map a model, make its averages, and open the run folder or make it. Collective.

    Args:
        model: As of ``PostHocEMA``, like all others.
        optimizer: Beside the model.
        root: Run folder.
        wanted: ``sigma_rels`` and ``profiles``.
        unit: Of training time.
        dtype: Of snapshots.
        rhythm: ``update_every``, ``snapshot_every`` and ``start``.
        scope: ``include``, ``exclude`` and ``buffers``.
        updates: How averages are updated: ``kernel``, ``non_finite``, ``overlap`` and ``offload``.
        storing: How snapshots are: ``asynchronous``, ``retention`` and ``timeout_s``.

    Raises:
        PhemaError: As of ``PostHocEMA``.
    """
    check_dtype(dtype)
    schedule = Schedule(*map(float, rhythm))
    tracked = tracked_set(asked_for(*wanted), schedule.start)
    mapped = map_model(model, optimizer, **scope)
    live = (mapped.averaged, mapped.copied, mapped.frozen)
    expected = agree(lambda: run_record(uuid.uuid4().hex, unit, tracked.labels, *live, dtype=dtype))
    averages = agree(partial(Averages, mapped.averaged, len(tracked.targets), **updates))
    session = _session(root, expected, live, **storing)
    return tracked, mapped, averages, session, Course(averages, schedule, tracked, mapped.steps)


def _session(
    root: str | Path,
    expected: RunRecord,
    live: StoredLayouts,
    *,
    asynchronous: bool,
    retention: Retention | str | None,
    timeout_s: float,
) -> Session:
    jobs, stage = (Background(), LazyCopies()) if asynchronous else (Foreground(), alive)
    retain = remover(retention)
    return Session(open_folder(root), expected, live, jobs=jobs, stage=stage, timeout_s=timeout_s, retain=retain)
