"""Prepares what is not tiny in processes of its own, so that no stream waits for somebody's megabytes.

Threads would not do: parsing, validating and rendering hold the GIL, for half a second where a request has
16,384 messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from r1_cluster.api.errors import ApiError, internal, overloaded, unprepared
from r1_cluster.edge.prepare import Prepared, PrepareOptions, Preparer

logger = logging.getLogger("r1_cluster.edge")

INLINE_BYTES = 2048
"""A body of so many bytes is prepared in a few ms."""
MAX_HELD_BYTES = 2**26
"""Bodies that wait for a process, together."""
TIMEOUT_S = 60.0
NICENESS = 10


class PreparePool:
    """Some child processes, started when they are first needed; each prepares one body at a time."""

    def __init__(self, options: PrepareOptions, *, children: int = 2, timeout_s: float = TIMEOUT_S) -> None:
        """`timeout_s`: a child that takes longer over a body is ended, and the body refused."""
        self._options = options
        self._timeout_s = timeout_s
        self._preparer = Preparer(options)
        self.tokenizer = self._preparer.tokenizer
        self._threads = ThreadPoolExecutor(children, thread_name_prefix="prepare")
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._closed = False
        self._held = 0

    def warm(self) -> None:
        """Starts the first child before it is needed; returns at once."""
        self._threads.submit(self._ask, b"")

    async def prepare(self, body: bytes) -> Prepared:
        """See `Preparer.prepare`; raises ApiError: 429 too where much waits, 500 where a child dies of it."""
        if len(body) <= INLINE_BYTES:
            return self._preparer.prepare(body)
        if self._held and self._held + len(body) > MAX_HELD_BYTES:
            raise overloaded(retry_after_s=1)
        self._held += len(body)
        # Emptied when its client leaves: the executor keeps what is cancelled until its turn comes.
        job = [body]
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._threads, self._work, job)
        finally:
            self._held -= len(body)
            job.clear()
        if isinstance(answer, ApiError):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the children; what they are working on is lost."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _work(self, job: list[bytes]) -> Prepared | ApiError:
        return self._ask(job.pop()) if job else unprepared()

    def _ask(self, body: bytes) -> Prepared | ApiError:
        child = self._take_idle() or _Child(self._options)
        try:
            answer = child.ask(body, self._timeout_s)
        except (EOFError, OSError) as error:
            logger.error("a body of %d bytes ended its preparer: %r", len(body), error)
            child.end()
            return unprepared()
        with self._lock:
            if not self._closed:
                self._idle.append(child)
                return answer
        child.end()
        return answer

    def _take_idle(self) -> _Child | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                child = self._idle.pop()
            if child.alive:
                return child
            child.end()  # it died of nothing that was sent to it


class _Child:
    """One process, and the connection to it. It ends when the connection does, whoever closes it."""

    def __init__(self, options: PrepareOptions) -> None:
        self._connection, theirs = Pipe()
        with contextlib.closing(theirs):
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from r1_cluster.edge.pool import run; run({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._connection.send(options)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, body: bytes, timeout_s: float) -> Prepared | ApiError:
        """Raises OSError or EOFError where the child is gone or takes too long."""
        self._connection.send_bytes(body)
        if not self._connection.poll(timeout_s):
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        answer: Prepared | ApiError = self._connection.recv()
        return answer

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


def run(descriptor: int) -> None:
    """The child: prepares what its parent sends, until it sends no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    os.nice(NICENESS)  # streams come first
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):
        preparer = Preparer(connection.recv())
        while True:
            connection.send(_outcome(preparer, connection.recv_bytes()))


def _outcome(preparer: Preparer, body: bytes) -> Prepared | ApiError:
    try:
        return preparer.prepare(body)
    except ApiError as error:
        return error
    except Exception:
        error_id = uuid.uuid4().hex
        logger.exception("error %s", error_id)
        return internal(error_id)
