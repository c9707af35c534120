"""Secretary: what rank 0 writes down for all ranks, so that a snapshot exists once every part of it does."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sharded_phema.folder import Folder
from sharded_phema.frozen import Marks, mark_of
from sharded_phema.manifest import Part, RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.store import Claim, Here, commit_snapshot, layout_id, layout_record, start_session

__all__ = ["Report", "Secretary"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank says of its part of a snapshot.

    Attributes:
        part: What it wrote.
        norms: Squared norm of its part of each average; empty where a number is not finite.
        gaps: The same of the difference of each pair.
        marks: Fingerprints of its frozen tensors; empty where they are those that it told last.
    """

    part: Part
    norms: tuple[float, ...]
    gaps: tuple[float, ...]
    marks: Marks


class Secretary:
    """Writes the session's records and commits snapshots. Made on rank 0 alone.

    Args:
        folder: Run folder.
        run: Its record.
        session: The session's record, but for the layout and the time that it resumed at.
        ranks: What each rank writes.
        claim: This process's claim to the run.
        retain: Called with the folder after each snapshot.
    """

    def __init__(
        self,
        folder: Folder,
        run: RunRecord,
        session: SessionRecord,
        ranks: Sequence[Here],
        claim: Claim,
        retain: Callable[[Folder], object],
    ) -> None:
        self._folder, self._claim, self._retain = folder, claim, retain
        self._layout = layout_record(run, ranks)
        self._session = replace(session, layout=layout_id(self._layout))
        self._marks: list[Marks] = [()] * len(ranks)
        self._started, self._stored_at = False, -math.inf

    def check(self) -> None:
        """Prove that the run is still this process's.

        Raises:
            OrderError: Another process claimed it.
        """
        self._claim.check()

    def commit(self, record: SnapshotRecord, reports: Sequence[Report], resumed_at: float) -> None:
        """Make a snapshot exist whose parts are all in storage.

        Args:
            record: What is known of it before.
            reports: Of all ranks, in order.
            resumed_at: Training time of the state that the session continued from.

        Raises:
            OrderError: Another process claimed the run.
            StoreError: A record cannot be written.
        """
        # First of all: ranks tell only once what they know of their frozen tensors, whatever fails below.
        self._marks = [report.marks or known for report, known in zip(reports, self._marks, strict=True)]
        self._claim.check()
        if self._stored_at == record.t:
            return  # the snapshot before exists, whatever the ranks were told, and a time has one only
        if not self._started:
            start_session(self._folder, replace(self._session, resumed_at=resumed_at), self._layout)
            self._started = True
        commit_snapshot(
            self._folder,
            replace(
                record,
                parts=tuple(report.part for report in reports),
                norms=_added([report.norms for report in reports]),
                gaps=_added([report.gaps for report in reports]),
                frozen_mark=mark_of(self._marks),
            ),
        )
        self._stored_at = record.t
        self._keep_what_is_needed()

    def close(self) -> None:
        """Give up the claim."""
        self._claim.release()

    def _keep_what_is_needed(self) -> None:
        try:
            self._retain(self._folder)
        except Exception as error:
            # The snapshot is stored, whatever happens here; too much is kept at worst.
            _log.warning("snapshots that are not needed any more were kept: %s", error)


def _added(ranks: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Sums over ranks; empty where a rank has none."""
    return tuple(math.fsum(values) for values in zip(*ranks, strict=True)) if all(ranks) else ()
