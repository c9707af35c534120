"""Claims: which process goes on with a run, so that two never write into one folder unseen."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass

from sharded_phema.errors import OrderError, StoreError
from sharded_phema.folder import Folder
from sharded_phema.folder.temporary import Writer, place_here
from sharded_phema.manifest import ClaimRecord, RunRecord
from sharded_phema.store import names
from sharded_phema.store.records import read_record, write_record

__all__ = ["Claim", "check_unclaimed", "claim_run"]


@dataclass(frozen=True, slots=True)
class Claim:
    """This process's claim to a run; made by ``claim_run``.

    Attributes:
        folder: The run folder.
        number: The highest when it was made; a process that claims the run meanwhile has a higher one.
    """

    folder: Folder
    number: int

    def check(self) -> None:
        """Prove that no other process has claimed the run since.

        Raises:
            OrderError: One has; this one must not write any more.
        """
        newest = _numbers(self.folder)[-1:]
        if newest != [self.number]:
            owner = f"claim {newest[0]}" if newest else "no claim, not even this one"
            raise OrderError(
                f"{self.folder.url}: another process goes on with this run since (found {owner}, this process holds "
                f"claim {self.number}); nothing was written",
                hint="stop one of the two; to train both, give each a run folder of its own",
            )

    def release(self) -> None:
        """Give the run up; harmless when repeated."""
        self.folder.remove(names.claim_file(self.number))


def claim_run(folder: Folder, run: RunRecord) -> Claim:
    """Claim a run for this process. Called by one rank, as soon as it opens the run.

    A process that still runs, as far as can be told from here, is not taken over. One that runs elsewhere, or
    ran before this machine was started, is: should it be alive, its next snapshot is refused.

    Raises:
        OrderError: Another process of this machine is training into the folder.
        StoreError: The claim cannot be written.
    """
    numbers = _numbers(folder)
    for number in numbers:
        _refuse_living(folder, run, names.claim_file(number))
    # A number that was released may be another's who only seems dead: none begins where the last one did.
    mine = (numbers[-1] if numbers else secrets.randbelow(10**8)) + 1
    record = ClaimRecord(run.run, mine, socket.gethostname(), os.getpid(), place_here())
    try:
        write_record(folder, names.claim_file(mine), record)
    except StoreError:
        _refuse_living(folder, run, names.claim_file(mine))  # another was faster
        raise
    for number in numbers:
        folder.remove(names.claim_file(number))
    return Claim(folder, mine)


def check_unclaimed(folder: Folder, run: RunRecord) -> None:
    """Prove that nobody goes on with a run, wherever; this process counts as all others do.

    Raises:
        OrderError: A process may.
    """
    for number in _numbers(folder):
        name = names.claim_file(number)
        for record in _claims(folder, run, name):
            if not Writer(record.place, record.pid).is_dead:
                raise OrderError(
                    f"{folder.url}: process {record.pid} on {record.host} may be training into this folder",
                    hint="wait until it closes, or stop it; if it is gone for certain, as after its machine was "
                    f"restarted, remove {folder.url}/{name}",
                )


def _refuse_living(folder: Folder, run: RunRecord, name: str) -> None:
    for record in _claims(folder, run, name):
        free = record.place != place_here() or record.pid == os.getpid()
        if not free and not Writer(record.place, record.pid).is_dead:
            raise OrderError(
                f"{folder.url}: process {record.pid} on {record.host} is training into this folder",
                hint="stop it first, or give this run its own folder",
            )


def _claims(folder: Folder, run: RunRecord, name: str) -> list[ClaimRecord]:
    """The claim in a file, if it is one to this run; one that cannot be read protects nobody."""
    try:
        record = read_record(ClaimRecord, folder, name)
    except StoreError:
        return []
    return [record] if record.run == run.run else []


def _numbers(folder: Folder) -> list[int]:
    """Numbers of all claims, in order."""
    stems = [entry.name.removesuffix(".json") for entry in folder.list(names.CLAIMS) if not entry.is_folder]
    return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())
