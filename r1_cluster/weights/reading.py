"""Reads parts of files straight into memory that is there already, several pieces at a time.

One positioned read after the other leaves a disk idle between them, and a memory map reads what it is asked
for page by page; neither comes near what a disk can do.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE_BYTES = 4 << 20
"""What one read asks for: enough that a read costs more than its call, few enough for several to share a
tensor."""
NUM_READERS = 8

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
        self.num_bytes = 0  # read so far

    def identity(self, file: str) -> Identity:
        """Of a file as it is read here, whatever has taken its name since. Raises OSError."""
        return identity(os.fstat(self._descriptor(file)))

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Fills `into`, which is of bytes, from a place in a file. Raises OSError; EOFError where the file
        ends before."""
        descriptor = self._descriptor(file)
        pieces = range(0, len(into), PIECE_BYTES)
        if len(pieces) > 1:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(NUM_READERS, "reader")
            parts = [(descriptor, offset + at, into[at : at + PIECE_BYTES]) for at in pieces]
            list(self._pool.map(lambda part: _fill(*part), parts))
        else:
            _fill(descriptor, offset, into)
        self.num_bytes += len(into)

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


def _fill(descriptor: int, offset: int, into: memoryview) -> None:
    filled = 0
    while filled < len(into):
        count = os.preadv(descriptor, [into[filled:]], offset + filled)
        if not count:
            raise EOFError
        filled += count
