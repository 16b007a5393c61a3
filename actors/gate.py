"""What stands before Serve in each of its proxies, by `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`.

Serve obeys headers of its own, whoever sends them: one keeps an answer going when its client has left,
another gives the client's request id back, however long it is. And where no ingress can be asked it answers
by itself, in plain text.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from functools import partial
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
from r1_cluster.edge.app import MAX_BODY_BYTES, PLACES

Message = MutableMapping[str, Any]
Headers = Sequence[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_ID_LENGTH = 128
LINGER_S = 5.0
_TOLD = _PLACES, _MAX_BODY_BYTES = PLACES.encode(), MAX_BODY_BYTES.encode()
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
    Serve gives back; puts Serve's own errors into the API's form; refuses by itself what would find no place
    on any engine, since Serve needs some ms to bring a request to where that is known; and stops reading a
    body once it is too long, since Serve would queue whatever comes until the refusal does."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._told: dict[str, dict[bytes, int]] = {}  # by an ingress, of each path
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
        elif _PLACES not in (told := self._told.get(path, {})):
            await self._pass(scope, receive, send)
        elif self._in_flight[path] >= told[_PLACES]:
            for message in _refusal(request_id):
                await send(message)
        else:
            exchange = self._exchange(scope, receive, send)
            self._in_flight[path] += 1
            try:
                # Serve computes some ms to get a request under way. One at a time, so that those that come
                # meanwhile are read, and refused, in between.
                async with self._turn:
                    await asyncio.sleep(0)
                await self._app(scope, exchange.receive, exchange.send)
            finally:
                self._in_flight[path] -= 1
            # Its place is free again: who lingers holds nobody up.
            await exchange.linger()

    def _exchange(self, scope: Message, receive: Receive, send: Send) -> _Exchange:
        path = scope["path"]
        max_body_bytes = self._told.get(path, {}).get(_MAX_BODY_BYTES)
        return _Exchange(receive, send, partial(self._told.__setitem__, path), max_body_bytes)

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        exchange = self._exchange(scope, receive, send)
        await self._app(scope, exchange.receive, exchange.send)
        await exchange.linger()


class _Exchange:
    """A request and its answer on their way through the gate. `learn` gets what the ingress tells."""

    def __init__(
        self,
        receive: Receive,
        send: Send,
        learn: Callable[[dict[bytes, int]], None],
        max_body_bytes: int | None,
    ) -> None:
        self._learn = learn
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self._received_bytes = 0
        self._body_ended = False
        self._failed: Message | None = None
        self._lingers = False

    async def receive(self) -> Message:
        """See ASGI. Of a body that is too long, nothing beyond its first bytes too many: who asks waits until
        it is cancelled."""
        if self._max_body_bytes is not None and self._received_bytes > self._max_body_bytes:
            await asyncio.Event().wait()
        return await self._receive_any()

    async def send(self, message: Message) -> None:
        """Turns errors in plain text, which are Serve's, into the API's; and keeps back the end of an answer
        that came before the end of its request."""
        if message["type"] == "http.response.start":
            told = {name: int(value) for name, value in message["headers"] if name in _TOLD}
            if told:
                self._learn(told)
            headers = [header for header in message["headers"] if header[0] not in told]
            if message["status"] >= 400:
                self._lingers = not self._body_ended and not _has(headers, b"connection", b"close")
                headers += [(b"connection", b"close")] * self._lingers
            message = {**message, "headers": headers}
            if message["status"] >= 400 and _has(headers, b"content-type", b"text/plain"):
                self._failed = message
                return
        elif self._failed is not None:
            if message.get("more_body", False):
                return
            start, message = _instead(self._failed)
            self._failed = None
            await self._send(start)
        if self._lingers and message["type"] == "http.response.body":
            message = {**message, "more_body": True}
        await self._send(message)

    async def linger(self) -> None:
        """A connection that is closed while its client sends is reset, and the client may never see why: what
        still comes is thrown away, for a while."""
        if not self._lingers:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self._body_ended:
                    await self._receive_any()
        await self._send({"type": "http.response.body", "body": b""})

    async def _receive_any(self) -> Message:
        message = await self._receive()
        self._received_bytes += len(message.get("body", b""))
        self._body_ended = self._body_ended or not message.get("more_body", False)
        return message


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


def _has(headers: Headers, name: bytes, value: bytes) -> bool:
    return any(key.lower() == name and found.lower().startswith(value) for key, found in headers)


def _refusal(request_id: bytes) -> tuple[Message, Message]:
    """In Serve's place, which would have given the request id back."""
    error = overloaded(retry_after_s=1)
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    return _answer(error, [*headers, (b"x-request-id", request_id)])


def _instead(start: Message) -> tuple[Message, Message]:
    """An error of Serve's own, without its words: they name classes and replicas."""
    status = start["status"]
    error = ApiError(
        status,
        f"The service cannot answer: {HTTPStatus(status).phrase.lower()}.",
        type_="server_error" if status >= 500 else "invalid_request_error",
        code="service_unavailable" if status == 503 else None,
    )
    own = (b"content-type", b"content-length")
    return _answer(error, [header for header in start["headers"] if header[0].lower() not in own])


def _answer(error: ApiError, headers: Headers) -> tuple[Message, Message]:
    body = msgspec.json.encode(error.body())
    headers = [*headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    start = {"type": "http.response.start", "status": error.status, "headers": headers}
    return start, {"type": "http.response.body", "body": body}
