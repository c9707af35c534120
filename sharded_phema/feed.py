"""Feed: the same pieces of many stored averages, read from front to back and checked as they pass."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from numpy.typing import NDArray

from sharded_phema.folder import of_each
from sharded_phema.folder.contract import bytes_of
from sharded_phema.losses import Losses
from sharded_phema.source import Source
from sharded_phema.store import Piece, Span, Spans
from sharded_phema.stream import Passing, Stream
from sharded_phema.tensorfile import DTYPES

__all__ = ["Feed"]

Row = NDArray[Any]


class Feed:
    """Reads pieces of averages for one process. What it gave is proven only once ``finish`` returns.

    Args:
        losses: Told which snapshot cannot be read.
    """

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self._readers: dict[int, _Reader] = {}  # by the identity of their sources, which they hold
        self._spans: dict[int, Spans] = {}  # the same by layouts
        self._pieces: Sequence[Piece] | None = None
        self._routes: dict[int, tuple[Span, ...]] = {}  # of these pieces, by the identity of layouts
        self._checking = Lock()
        self._files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    @property
    def bytes_read(self) -> int:
        """Bytes of the averages' files that were read so far."""
        return sum(reader.bytes_read for reader in self._readers.values())

    def fill(self, sources: Sequence[Source], pieces: Sequence[Piece], rows: Sequence[Row]) -> None:
        """Fill memory with the pieces of each source, end to end, in the dtype in which they are stored.

        Args:
            sources: What to read; the same objects at every call, since each goes on where it was.
            pieces: Which elements of them.
            rows: A contiguous array for each source, of as many bytes, to be left alone until ``check``.

        Raises:
            StoreError: A file is missing or cannot be read.
        """
        if pieces is not self._pieces:
            self._pieces, self._routes = pieces, {}
            self._hold_few()
        routes = self._routes
        shelves: dict[str, list[tuple[_Reader, Row]]] = {}
        for source, row in zip(sources, rows, strict=True):
            reader = self._readers.get(id(source)) or self._begin(source)
            shelves.setdefault(source.snapshot.name, []).append((reader, row))
            if reader.layout not in routes:
                with self._losses.reading(source.snapshot):
                    routes[reader.layout] = reader.spans.of(pieces)

        def read(shelf: Sequence[tuple[_Reader, Row]]) -> None:
            with self._losses.reading(shelf[0][0].snapshot):
                for reader, row in shelf:
                    reader.fill(routes[reader.layout], row)

        # One thread a snapshot where storage is remote: its averages lie in the same files.
        if sources:
            of_each(sources[0].snapshot.root, read, [*shelves.values()])

    def check(self, sources: Sequence[Source]) -> None:
        """Hash what ``fill`` gave of some sources since the last time. May run while ``fill`` does, in any thread.

        Raises:
            StoreError: Something that was given before is damaged.
        """
        with self._checking:
            for source in sources:
                with self._losses.reading(source.snapshot):
                    self._readers[id(source)].check()

    def finish(self) -> None:
        """Prove all that was given so far, and close the files.

        Raises:
            StoreError: Something is damaged.
        """
        self._each(_Reader.finish)

    def close(self) -> None:
        """Close the files, whether or not what was given is proven."""
        self._each(_Reader.close)

    def _hold_few(self) -> None:
        if sum(reader.held_open for reader in self._readers.values()) > self._files:
            self._each(_Reader.let_go)

    def _each(self, act: Callable[[_Reader], None]) -> None:
        for reader in self._readers.values():
            with self._losses.reading(reader.snapshot):
                act(reader)

    def _begin(self, source: Source) -> _Reader:
        layout = source.snapshot.layout
        self._readers[id(source)] = _Reader(source, self._spans.setdefault(id(layout), Spans(layout)))
        return self._readers[id(source)]


class _Reader:
    """One stored average: a stream in each rank's file that is asked for something."""

    def __init__(self, source: Source, spans: Spans) -> None:
        self.source, self.snapshot, self.layout = source, source.snapshot, id(source.snapshot.layout)
        self.spans = spans
        self._dtype = DTYPES[self.snapshot.record.dtype][1]
        self._width = self._dtype.itemsize
        self._read_before = 0
        self._streams: dict[int, tuple[Passing, int]] = {}

    @property
    def bytes_read(self) -> int:
        """Bytes that were read so far."""
        return self._read_before + sum(stream.bytes_read for stream, _ in self._streams.values())

    @property
    def held_open(self) -> int:
        """Files that may be open."""
        return len(self._streams)

    def fill(self, route: Sequence[Span], row: Row) -> None:
        raw, width = bytes_of(row), self._width
        for span in route:
            stream, origin = self._streams.get(span.rank) or self._begin(span.rank)
            begin = origin + span.first * width
            if span.strides is None:
                stream.fill(begin, raw[span.begin * width : (span.begin + span.count) * width])
            else:
                read = torch.empty(span.count, dtype=self._dtype)
                stream.fill(begin, bytes_of(read.view(torch.uint8).numpy()))
                sizes, there, here = span.strides
                wanted = torch.frombuffer(raw, dtype=self._dtype).as_strided(sizes, here, span.begin)
                wanted.copy_(read.as_strided(sizes, there))

    def check(self) -> None:
        for stream, _ in tuple(self._streams.values()):
            stream.check()

    def finish(self) -> None:
        for stream, _ in self._streams.values():
            stream.finish()
        self.close()

    def close(self) -> None:
        self._read_before = self.bytes_read
        self.let_go()
        self._streams.clear()

    def let_go(self) -> None:
        """Close the files; streams go on where they were."""
        for stream, _ in self._streams.values():
            stream.close()

    def _begin(self, rank: int) -> tuple[Passing, int]:
        """A stream of a rank's file, and the byte at which this average begins there."""
        if self.snapshot.elsewhere is not None:
            self._streams[rank] = self.snapshot.elsewhere.stream(self.source.average), 0
            return self._streams[rank]
        file, begin = self.snapshot.averages_of(rank)
        held = int(self.spans.firsts(rank)[-1]) * self._width
        self._streams[rank] = Stream(file), begin + self.source.average * held
        return self._streams[rank]
