"""Lets one thread end another's `links.wait_any`."""

from __future__ import annotations

import contextlib
import os
import threading


class Wakeup:
    """Readable from `set` until `clear`. `set` may come from any thread, also after `close`, and does nothing
    then; the waiter clears and closes."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # a number that was closed may be another's descriptor by now

    def fileno(self) -> int:
        """For `wait_any`; -1 once closed."""
        return self._fd

    def set(self) -> None:
        """Makes the descriptor readable."""
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Makes it unreadable again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        """Gives the descriptor back."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
