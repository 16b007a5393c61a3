"""What stands before Serve in each of its proxies, by `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`.

Serve obeys headers of its own, whoever sends them: one keeps an answer going when its client has left,
another gives the client's request id back, however long it is. And where no ingress can be asked it answers
by itself, in plain text.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

import msgspec
from ray.serve._private.constants import (
    SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
    SERVE_HTTP_REQUEST_ID_HEADER,
    SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
    SERVE_MULTIPLEXED_MODEL_ID,
    SERVE_SESSION_ID,
)
from starlette.middleware import Middleware

from r1_cluster.api.errors import ApiError, overloaded
from r1_cluster.edge.app import PLACES

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_ID_LENGTH = 128
_PLACES = PLACES.encode()
_SERVES_OWN = {
    name.replace("_", "-").encode()
    for name in (
        SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        SERVE_HTTP_REQUEST_ID_HEADER,
        SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        SERVE_MULTIPLEXED_MODEL_ID,
        SERVE_SESSION_ID.lower(),
    )
}


def middlewares() -> list[Middleware]:
    """What Serve's proxies put before themselves."""
    return [Middleware(Gate)]


class Gate:
    """An ASGI app in front of another. It keeps Serve's own headers from it, but for a sane request id, which
    Serve gives back; puts Serve's own errors into the API's form; and refuses by itself what would find no
    place on any engine, since Serve needs some ms to bring a request to where that is known."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._places: dict[str, int] = {}
        self._in_flight: Counter[str] = Counter()
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, request_id = scope["path"], _replace_headers(scope)
        if path.startswith("/-/"):  # Serve's own probes keep its words
            await self._app(scope, receive, send)
            return
        if path not in self._places:
            await self._app(scope, receive, self._outgoing(path, send))
            return
        if self._in_flight[path] >= self._places[path]:
            await _refuse(overloaded(retry_after_s=1), request_id, send)
            return
        self._in_flight[path] += 1
        try:
            # Serve computes some ms to get a request under way. One at a time, so that those that come
            # meanwhile are read, and refused, in between.
            async with self._turn:
                await asyncio.sleep(0)
            await self._app(scope, receive, self._outgoing(path, send))
        finally:
            self._in_flight[path] -= 1

    def _outgoing(self, path: str, send: Send) -> Send:
        """A `send` that learns from the ingress's answers how many places there are, and turns errors in
        plain text, which are Serve's, into the API's."""
        failed: Message | None = None

        async def translate(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start":
                headers = message.get("headers", [])
                for name, value in headers:
                    if name == _PLACES:
                        self._places[path] = int(value)
                message["headers"] = [header for header in headers if header[0] != _PLACES]
                if message["status"] >= 400 and _is_plain_text(headers):
                    failed = message
                    return
            elif failed is not None:
                if not message.get("more_body", False):
                    await _send_instead(failed, send)
                return
            await send(message)

        return translate


def _replace_headers(scope: Message) -> bytes:
    """Takes Serve's own headers out of a request's, and puts the request id, which is returned, in."""
    headers = scope["headers"]
    request_id = _request_id([value for name, value in headers if name == b"x-request-id"])
    kept = [header for header in headers if header[0].replace(b"_", b"-") not in _SERVES_OWN]
    scope["headers"] = [*kept, (b"x-request-id", request_id)]
    return request_id


def _request_id(sent: list[bytes]) -> bytes:
    """The client's, where it sent one that can be shown; else ours."""
    if len(sent) == 1 and 0 < len(sent[0]) <= MAX_ID_LENGTH and all(0x20 <= byte < 0x7F for byte in sent[0]):
        return sent[0]
    return uuid.uuid4().hex.encode()


def _is_plain_text(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/plain") for name, value in headers)


async def _refuse(error: ApiError, request_id: bytes, send: Send) -> None:
    """Answers in Serve's place, which would have given the request id back."""
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await _send(error, [*headers, (b"x-request-id", request_id)], send)


async def _send_instead(start: Message, send: Send) -> None:
    """An error of Serve's own, without its words: they name classes and replicas."""
    status = start["status"]
    error = ApiError(
        status,
        f"The service cannot answer: {HTTPStatus(status).phrase.lower()}.",
        type_="server_error" if status >= 500 else "invalid_request_error",
        code="service_unavailable" if status == 503 else None,
    )
    own = (b"content-type", b"content-length")
    await _send(error, [header for header in start["headers"] if header[0].lower() not in own], send)


async def _send(error: ApiError, headers: list[tuple[bytes, bytes]], send: Send) -> None:
    body = msgspec.json.encode(error.body())
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
