"""A quiet terminal while a service runs: of what Ray prints, one line of ours; the rest goes to a file.

Ray prints to the standard output of whoever started the cluster, from a thread of its own: a page of general
advice for each process that died, whatever we already do about it. What the main thread prints is ours, and
passes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import logging.handlers
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

REPEATS_S = 60.0
"""What happens again within so long is counted, and said in one line at the end of it."""
LOG_BYTES = 4 << 20
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(r"\([^()]*\) ")  # Ray's own: (raylet), (autoscaler +1s), …
_DEATH = re.compile(r"A worker died or was killed .*Worker PID: (\d+)")
_WORDS = 160


class _PrivateFile(logging.handlers.RotatingFileHandler):
    """A file of bounded size for its owner alone. A full disk ends no service."""

    def _open(self) -> io.TextIOWrapper:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return open(self.baseFilename, self.mode, encoding="utf-8", opener=private)  # type: ignore[return-value]

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """What cannot be written is lost: the terminal has the line that matters."""


class Digest(io.TextIOBase):
    """In place of standard output: passes on what the main thread writes, and digests what others do."""

    def __init__(self, terminal: IO[str], log: Path, name_of: Callable[[int], str | None]) -> None:
        """`log` takes everything that is digested; `name_of` a process's number, or None for one that it does
        not know."""
        self._terminal = terminal
        self._log = log
        self._name_of = name_of
        self._file = _PrivateFile(log, maxBytes=LOG_BYTES, backupCount=1)
        self._file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._pending: dict[int, str] = {}
        self._lock = threading.Lock()
        self._since: dict[str, float] = {}  # what was said lately, and when
        self._repeats: Counter[str] = Counter()
        self._timer: threading.Timer | None = None

    def write(self, text: str) -> int:
        if threading.current_thread() is threading.main_thread():
            return self._terminal.write(text)
        number = threading.get_ident()
        *lines, self._pending[number] = (self._pending.get(number, "") + text).split("\n")
        for line in lines:
            self._digest(_COLOURS.sub("", line))
        return len(text)

    def flush(self) -> None:
        self._terminal.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def close(self) -> None:
        """Says what was counted and is not said yet."""
        if self._timer is not None:
            self._timer.cancel()
        self._say_repeats()
        self._file.close()
        super().close()

    def _digest(self, line: str) -> None:
        if not line.strip():
            return
        self._file.emit(logging.makeLogRecord({"msg": line}))
        prefix = _PREFIX.match(line)
        if prefix is None:
            return  # more of what was said before
        death = _DEATH.search(line)
        if death is None:
            words = line[prefix.end() :]
            # Numbers differ where the matter is the same.
            what, said = (
                re.sub(r"\S*\d\S*", "…", words),
                f"Ray: {words[:_WORDS]}{'…' * (len(words) > _WORDS)}",
            )
        else:
            pid = int(death[1])
            what = f"{self._name_of(pid) or 'a worker of Ray'} died"
            said = f"{what} (process {pid}) and is being replaced"
        self._report(what, said)

    def _report(self, what: str, said: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._since = {said: at for said, at in self._since.items() if now - at < REPEATS_S}
            if what in self._since:
                self._repeats[what] += 1
                if self._timer is None:
                    self._timer = threading.Timer(REPEATS_S, self._say_repeats)
                    self._timer.daemon = True
                    self._timer.start()
                return
            self._since[what] = now
        self._say(f"{said}; details: {self._log}")

    def _say_repeats(self) -> None:
        with self._lock:
            repeats, self._repeats, self._timer = self._repeats, Counter(), None
        for what, count in repeats.items():
            times = "once more" if count == 1 else f"{count} more times"
            self._say(f"{what[:_WORDS]} {times} in the last {REPEATS_S:.0f} s; details: {self._log}")

    def _say(self, words: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody looks at the terminal any more
            self._terminal.write(f"{words}\n")
            self._terminal.flush()


@contextlib.contextmanager
def quiet(terminal: IO[str], log: Path, name_of: Callable[[int], str | None]) -> Iterator[None]:
    """Standard output through a `Digest` for the length of a `with` block."""
    log.unlink(missing_ok=True)  # a former service's
    digest = Digest(terminal, log, name_of)
    try:
        with contextlib.redirect_stdout(digest):
            yield
    finally:
        digest.close()
