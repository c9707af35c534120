"""A shared job as one of its processes sees it: what is done, what it has done, and the commit."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import OutputError
from sharded_phema.folder.temporary import temporary_name, writer_of
from sharded_phema.job.journals import append, look_afresh, marked
from sharded_phema.job.place import clear, failing, flush_tree, names, put, renamed
from sharded_phema.job.records import chain, parse

__all__ = ["Job"]

SILENCE_S, PULSE_S, POLL_S = 120.0, 5.0, 0.2
"""How long the process that finalizes may give no sign of life, how often it gives one, and how often others look."""


@dataclass(frozen=True)
class Job:
    """An output that is being made; from ``begin``. Every process has one of its own.

    Attributes:
        out: What the output becomes.
        files: Folder to fill meanwhile, laid out by ``create``. Once all blocks are marked it may go at any moment.
        blocks: Number of blocks of work.
        coefficients: Those that every process uses, whoever computed them first.
        inode: Of the folder that becomes ``out``.
        force: Whether an output of ours that stands there is replaced.
    """

    out: Path
    files: Path
    blocks: int
    coefficients: NDArray[np.float64] = field(repr=False, compare=False)
    inode: int = field(repr=False)
    force: bool
    _token: str = field(default_factory=lambda: secrets.token_hex(8), repr=False, compare=False)

    def done(self) -> NDArray[np.bool_]:
        """Whether each block was marked, by whichever process, of shape (blocks,).

        Raises:
            OutputError: A journal cannot be read.
        """
        with failing(self.out):
            done = marked(self._journals, self.blocks)
            # Looked at last: the journals go once the output is there.
            return np.ones_like(done) if self.is_placed() else done

    def mark(self, first: int, last: int) -> None:
        """Note that blocks from ``first`` to before ``last`` are verified and durable.

        Raises:
            OutputError: It cannot be noted, or the job was discarded or another one took its place.
        """
        assert 0 <= first <= last <= self.blocks, (first, last, self.blocks)
        with failing(self.out):
            try:
                append(self._journals, self._token, first, last)
            except FileNotFoundError:
                self._check_placed()

    def commit(self, finalize: Callable[[Path], None] = lambda files: None) -> bool:
        """Put the output in its place if all blocks are done; while another process does so, wait for it.

        One process at a time finalizes: the one that gave ``files`` a name of its own. Where that one died another
        takes over; on another machine it counts as dead after two minutes without a sign of life.

        Args:
            finalize: Turns the folder that it is given, filled, into the output. It may find what a process that was
                killed in its own call left, and goes on from there.

        Returns:
            Whether the output is there now, put there by whichever process; if not, blocks remain.

        Raises:
            OutputError: ``out`` was taken meanwhile, or cannot be made, or the job was discarded or another one took
                its place.
        """
        with failing(self.out):
            while (standing := self.standing()) and not self.is_placed():
                look_afresh(self._journals)
                if not self.done().all():
                    return False
                if standing != self.files:
                    self._wait_for(standing)
                mine = self._work / temporary_name("files")
                if renamed(standing, mine):
                    self._finish(mine, finalize)
            self._check_placed()
            # What cannot be removed does the output no harm, and the next start tries again.
            with suppress(OSError):
                self._remove()
            return True

    def discard(self) -> None:
        """Remove the partial folder, unless another job took its place.

        Raises:
            OutputError: It cannot be removed.
        """
        with failing(self.out):
            self._remove()

    def standing(self) -> Path | None:
        """The folder that becomes ``out``, where it stands now in the folder of work; None once it is out or gone."""
        # While it gets another name, one look may miss both; it gets one a few times at most.
        for _ in range(3):
            for name in names(self._work):
                if name == "files" or writer_of(name):
                    return self._work / name
        return None

    def take_back(self) -> None:
        """Give ``files`` their name again where the process that finalized them is dead for sure."""
        standing = self.standing()
        if standing and (writer := writer_of(standing.name)) and writer.is_dead:
            renamed(standing, self.files)

    def is_placed(self) -> bool:
        """Whether the output of this job is what stands at ``out``: a folder that is renamed keeps its inode."""
        try:
            return os.stat(self.out).st_ino == self.inode
        except FileNotFoundError:
            return False

    @property
    def _work(self) -> Path:
        return self.files.parent

    @property
    def _journals(self) -> Path:
        return self._work / "done"

    def _check_placed(self) -> None:
        if not self.is_placed():
            raise OutputError(
                f"{self.files} is gone: this job was discarded, or another one took its place",
                hint=f"see whether {self.out} is as wanted, or start again",
            )

    def _finish(self, mine: Path, finalize: Callable[[Path], None]) -> None:
        try:
            with _pulse(self._work / "pulse"):
                finalize(mine)
                flush_tree(mine)
                put(mine, self.out, force=self.force)
        except BaseException as error:
            if not isinstance(error, FileNotFoundError) or mine.exists():
                with suppress(OSError):  # or others wait for this process, until it ends
                    renamed(mine, self.files)
                raise
            # Another process took over while this one was suspended: the caller looks again.

    def _wait_for(self, standing: Path) -> None:
        """Return once the process that finalizes is through, or dead as far as can be told."""
        writer, pulse, since = writer_of(standing.name), b"", time.monotonic()
        while standing.exists() and not (writer and writer.is_dead) and time.monotonic() - since < SILENCE_S:
            time.sleep(POLL_S)
            # Opened anew, since network file systems may show old times for a minute, but not old contents.
            with suppress(FileNotFoundError):
                if (now := (self._work / "pulse").read_bytes()) != pulse:
                    pulse, since = now, time.monotonic()

    def _remove(self) -> None:
        partial = self._work.parent
        records = chain(partial)[1]
        with suppress(OutputError):  # a damaged record is none of this job
            if records and parse(records[-1], partial).work == self._work.name:
                clear(partial, self.out)


@contextmanager
def _pulse(path: Path) -> Iterator[None]:
    """Give signs of life meanwhile: a file whose contents change."""
    path.write_text(secrets.token_hex(8))
    over = threading.Event()

    def beat() -> None:
        while not over.wait(PULSE_S):
            # Written over in place, which a full disk does not keep from being done.
            with suppress(OSError), path.open("r+") as file:
                file.write(secrets.token_hex(8))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
