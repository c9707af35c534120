"""Feed: the same pieces of many stored averages, read from front to back and checked as they pass."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from sharded_phema.folder import of_each
from sharded_phema.folder.contract import bytes_of
from sharded_phema.losses import Losses
from sharded_phema.source import Source
from sharded_phema.store import Piece, Snapshot, Span, Spans
from sharded_phema.stream import Stream
from sharded_phema.tensorfile import DTYPES, torch_dtype

__all__ = ["Feed"]

Row = NDArray[np.float32]


class Feed:
    """Reads pieces of averages for one process. What it gave is proven only once ``finish`` returns.

    Args:
        losses: Told which snapshot cannot be read.
    """

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self._readers: dict[tuple[str, int], _Reader] = {}
        self._spans: dict[int, Spans] = {}
        self._files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    @property
    def bytes_read(self) -> int:
        """Bytes of the averages' files that were read so far."""
        return sum(reader.bytes_read for reader in self._readers.values())

    def fill(self, sources: Sequence[Source], pieces: Sequence[Piece], rows: Sequence[Row]) -> None:
        """Fill an array with the pieces of each source, end to end, as float32.

        Args:
            sources: What to read.
            pieces: Which elements of them.
            rows: A contiguous array for each source, of as many elements.

        Raises:
            StoreError: A file is missing, cannot be read, or what was read of it before is damaged.
        """
        routes: dict[int, tuple[Span, ...]] = {}
        shelves: dict[str, list[int]] = {}
        for row, source in enumerate(sources):
            shelves.setdefault(source.snapshot.name, []).append(row)
            if id(source.snapshot.layout) not in routes:
                routes[id(source.snapshot.layout)] = self._route(source.snapshot, pieces)

        def read(shelf: Sequence[int]) -> None:
            with self._losses.reading(sources[shelf[0]].snapshot):
                for row in shelf:
                    self._reader(sources[row]).fill(routes[id(sources[row].snapshot.layout)], rows[row])

        # One thread a snapshot where storage is remote: its averages lie in the same files.
        if sources:
            of_each(sources[0].snapshot.root, read, [*shelves.values()])

    def finish(self) -> None:
        """Prove all that was given so far, and close the files.

        Raises:
            StoreError: Something is damaged.
        """
        self._each(_Reader.finish)

    def close(self) -> None:
        """Close the files, whether or not what was given is proven."""
        self._each(_Reader.close)

    def _each(self, act: Callable[[_Reader], None]) -> None:
        for reader in self._readers.values():
            with self._losses.reading(reader.snapshot):
                act(reader)

    def _route(self, snapshot: Snapshot, pieces: Sequence[Piece]) -> tuple[Span, ...]:
        with self._losses.reading(snapshot):
            return self._spans.setdefault(id(snapshot.layout), Spans(snapshot.layout)).of(pieces)

    def _reader(self, source: Source) -> _Reader:
        key = source.snapshot.name, source.average
        if key not in self._readers:
            spans = self._spans[id(source.snapshot.layout)]
            self._readers[key] = _Reader(source.snapshot, source.average, spans)
        reader = self._readers[key]
        reader.close_some(self._files // len(self._readers))
        return reader


@dataclass
class _Reader:
    """One stored average: a stream in each rank's file that is asked for something."""

    snapshot: Snapshot
    average: int
    spans: Spans
    bytes_read: int = 0
    _streams: dict[int, tuple[Stream, int]] = field(default_factory=dict)

    def fill(self, route: Sequence[Span], row: Row) -> None:
        dtype = self.snapshot.record.dtype
        width, raw = torch_dtype(dtype).itemsize, bytes_of(row)
        for span in route:
            stream, origin = self._streams.get(span.rank) or self._begin(span.rank)
            begin = origin + span.first * width
            if span.strides is None and dtype == "float32":
                stream.fill(begin, raw[span.begin * 4 : (span.begin + span.count) * 4])
            else:
                read = np.empty(span.count * width, np.uint8)
                stream.fill(begin, bytes_of(read))
                _lay(torch.from_numpy(read).view(DTYPES[dtype][1]), span, torch.from_numpy(row))

    def finish(self) -> None:
        for stream, _ in self._streams.values():
            stream.finish()
        self.close()

    def close(self) -> None:
        for stream, _ in self._streams.values():
            self.bytes_read += stream.bytes_read
            stream.close()
        self._streams.clear()

    def close_some(self, most: int) -> None:
        """Hold at most so many files open; a stream that is closed goes on where it was."""
        if len(self._streams) > most:
            for stream, _ in self._streams.values():
                stream.close()

    def _begin(self, rank: int) -> tuple[Stream, int]:
        """A stream of a rank's file, and the byte at which this average begins there."""
        file, begin = self.snapshot.averages_of(rank)
        held = int(self.spans.firsts(rank)[-1]) * torch_dtype(self.snapshot.record.dtype).itemsize
        self._streams[rank] = Stream(file), begin + self.average * held
        return self._streams[rank]


def _lay(read: torch.Tensor, span: Span, row: torch.Tensor) -> None:
    """Put what was read where it is wanted, widened to float32."""
    if span.strides is None:
        row[span.begin : span.begin + span.count].copy_(read)
    else:
        sizes, there, here = span.strides
        row.as_strided(sizes, here, span.begin).copy_(read.as_strided(sizes, there))
