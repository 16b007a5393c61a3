"""Lets one thread end another's `links.wait_any`."""

from __future__ import annotations

import contextlib
import os


class Wakeup:
    """Readable from `set` until `clear`. `set` may come from any thread; the waiter clears and closes."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        """Makes the descriptor readable."""
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Makes it unreadable again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self._fd)
