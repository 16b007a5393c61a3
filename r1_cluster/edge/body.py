"""A request's body, refused as early as its headers or its first bytes too many allow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from r1_cluster.api.errors import (
    body_too_large,
    body_too_slow,
    invalid_request,
    overloaded,
    unsupported_media_type,
)

Headers = Iterable[tuple[bytes, bytes]]
"""As ASGI gives them: names in lower case."""
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""ASGI's."""

MAX_HELD_BYTES = 2**26
"""What all bodies together may hold in one process while they come in."""


class BodyReader:
    """Reads the JSON bodies of one process. Each is bounded in bytes and time, all together in bytes."""

    def __init__(self, max_bytes: int, timeout_s: float, *, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self.max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._max_held_bytes = max(max_held_bytes, max_bytes)
        self._held = 0

    def check(self, headers: Headers) -> None:
        """Refuses what the headers alone condemn; raises ApiError (400, 413, 415)."""
        named: dict[bytes, list[str]] = {}
        for name, value in headers:
            named.setdefault(name, []).append(value.decode("latin-1"))
        _check_type(named.get(b"content-type", []))
        _check_encoding(named.get(b"content-encoding", []))
        for length in named.get(b"content-length", []):
            if not (length.isascii() and length.isdigit()):
                raise invalid_request(None, "Content-Length is no number")
            # A number of many digits is not even read.
            if len(length) > 18 or int(length) > self.max_bytes:
                raise body_too_large(self.max_bytes)

    async def read(self, receive: Receive) -> bytes:
        """The whole body; raises ApiError: 413 at the first byte too many, 408 when it takes too long, 429
        when too many come at once, 400 when the client leaves before its end."""
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise invalid_request(None, "the body ended early")
                    chunk = message.get("body", b"")
                    more = message.get("more_body", False)
                    size += len(chunk)
                    self._held += len(chunk)
                    if size > self.max_bytes:
                        raise body_too_large(self.max_bytes)
                    if self._held > self._max_held_bytes:
                        raise overloaded(retry_after_s=1)
                    chunks.append(chunk)
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        except TimeoutError:
            raise body_too_slow(self._timeout_s) from None
        finally:
            self._held -= size


def _check_type(values: list[str]) -> None:
    # Without a type too: a web page can post such a body to any port of its reader's machine.
    if len(values) != 1 or values[0].partition(";")[0].strip().lower() != "application/json":
        raise unsupported_media_type("the body must be sent as Content-Type: application/json")


def _check_encoding(values: list[str]) -> None:
    codings = [coding.strip().lower() for value in values for coding in value.split(",")]
    if any(coding not in ("", "identity") for coding in codings):
        raise unsupported_media_type(
            "the body must be sent without Content-Encoding", {"Accept-Encoding": "identity"}
        )
