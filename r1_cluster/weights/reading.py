"""Reads parts of files straight into memory that is there already, several pieces at a time.

One positioned read after the other leaves a disk idle between them, and a memory map reads what it is asked
for page by page; neither comes near what a disk can do.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

PIECE_BYTES = 4 << 20
"""What one read asks for: enough that a read costs more than its call, few enough for several to share a
tensor."""
NUM_READERS = 8
AHEAD_BYTES = 256 << 20
"""How much is brought from disk before it is asked for, to the end of the tensor that makes it so much."""

Place = tuple[str, int, int]
"""A file, where in it, and how many bytes."""

Identity = tuple[int, int, int, int]


def identity(status: os.stat_result) -> Identity:
    """What changes when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class FilesReader:
    """Files of one folder, opened when they are first read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, int] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._expected: deque[Place] = deque()
        self._ahead = 0  # bytes that the kernel was told of and nobody has asked for
        self.num_bytes = 0  # read so far

    def identity(self, file: str) -> Identity:
        """Of a file as it is read here, whatever has taken its name since. Raises OSError."""
        return identity(os.fstat(self._descriptor(file)))

    def expect(self, places: Iterable[Place]) -> None:
        """Says what will be read, in which order: the kernel brings it from disk some way ahead, by the order
        of the files, while what is there already is worked on. A hint: other reads are as good."""
        self._expected.extend(places)

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Fills `into`, which is of bytes, from a place in a file. Raises OSError; EOFError where the file
        ends before."""
        if self._expected and self._ahead < AHEAD_BYTES // 2:
            self._announce()
        descriptor = self._descriptor(file)
        pieces = range(0, len(into), PIECE_BYTES)
        if len(pieces) > 1:
            parts = [(descriptor, offset + at, into[at : at + PIECE_BYTES]) for at in pieces]
            list(self._readers().map(lambda part: _fill(*part), parts))
        else:
            _fill(descriptor, offset, into)
        self.num_bytes += len(into)
        self._ahead -= len(into)

    def _readers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_READERS, "reader")
        return self._pool

    def _announce(self) -> None:
        taken: list[Place] = []
        while self._expected and self._ahead < AHEAD_BYTES:
            taken.append(self._expected.popleft())
            self._ahead += taken[-1][2]
        places = []
        for file, offset, size in sorted(taken):
            with suppress(OSError):  # which reading it will raise
                places.append((self._descriptor(file), offset, size))
        self._readers().submit(_announce, places)  # for the call may last as long as the disk takes

    def close(self) -> None:
        """Lets go of the files; they may be read again."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            self._open[file] = os.open(self._folder / file, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[file]


def _announce(places: list[tuple[int, int, int]]) -> None:
    for place in places:
        os.posix_fadvise(*place, os.POSIX_FADV_WILLNEED)


def _fill(descriptor: int, offset: int, into: memoryview) -> None:
    filled = 0
    while filled < len(into):
        count = os.preadv(descriptor, [into[filled:]], offset + filled)
        if not count:
            raise EOFError
        filled += count
