"""The routes, as an ASGI app over whoever answers. Every error has OpenAI's body."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from r1_cluster.api.errors import ApiError, internal, model_not_found
from r1_cluster.api.streaming import HEADERS
from r1_cluster.edge.body import BodyReader

logger = logging.getLogger("r1_cluster.edge")

Answer = dict[str, object] | AsyncGenerator[bytes, None]
"""A whole answer, or the frames of a streamed one."""
PLACES = "x-r1-places"
"""By this header the proxies learn beyond how many requests none need come here."""
MAX_BODY_BYTES = "x-r1-max-body-bytes"
"""By this one, beyond how many bytes of a body none need."""
SHOWN_CHARACTERS = 100
"""Of a path or method, in an error's message."""


class Backend(Protocol):
    """Who answers. `places`: how many requests all engines together hold, running or queued."""

    places: int

    async def health(self) -> dict[str, Any]:
        """`status` is ready, recovering, draining or unavailable."""

    def model_card(self) -> dict[str, Any]:
        """The one served model, as /v1/models lists it."""

    def enter(self) -> None:
        """Called first of all, in the request's task; raises ApiError where a request is refused whatever is
        in it: draining, full."""

    async def chat(self, body: bytes) -> Answer:
        """Answers a chat; raises ApiError up to when an engine has taken it."""


def build_edge(backend: Backend, reader: BodyReader, *, cors_origins: Sequence[str] = ()) -> FastAPI:
    """The app over a backend."""
    # A redirect would be built from the Host header, which anybody may write.
    edge = FastAPI(openapi_url=None, redirect_slashes=False)

    @edge.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        state = await backend.health()
        return JSONResponse(state, 200 if state["status"] in ("ready", "recovering") else 503)

    @edge.api_route("/v1/models", methods=["GET", "HEAD"])
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [backend.model_card()]})

    @edge.api_route("/v1/models/{name:path}", methods=["GET", "HEAD"])
    async def model(name: str) -> Response:
        card = backend.model_card()
        if name != card["id"]:
            raise model_not_found(name)
        return JSONResponse(card)

    @edge.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        headers = {PLACES: str(backend.places), MAX_BODY_BYTES: str(reader.max_bytes)}
        try:
            reader.check(request.scope["headers"])
            backend.enter()
            # Not by `request.body()`, which has no bound and keeps what it read until the answer has ended.
            answer = await backend.chat(await reader.read(request.receive))
        except ApiError as error:
            return _error_response(error, headers)
        if isinstance(answer, dict):
            return JSONResponse(answer, headers=headers)
        return await _streamed(answer, headers | HEADERS, request.scope["http_version"])

    edge.add_exception_handler(ApiError, _api_error)
    edge.add_exception_handler(HTTPException, _http_error)
    edge.add_exception_handler(Exception, _unexpected)
    if cors_origins:
        edge.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-should-retry"],
        )
    return edge


async def _streamed(
    answer: AsyncGenerator[bytes, None], headers: Mapping[str, str], http_version: str
) -> Response:
    if http_version == "1.0":
        # It has no chunks: the answer goes out as one, with its length.
        return Response(b"".join([frame async for frame in answer]), 200, headers, "text/event-stream")
    return StreamingResponse(answer, 200, headers, "text/event-stream")


def _error_response(error: ApiError, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    return JSONResponse(error.body(), error.status, headers={**error.headers, **headers})


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # Not `request.url`, which is put together from the Host header and fails where that is malformed.
    path = request.scope["path"][:SHOWN_CHARACTERS]
    if error.status_code == 405:
        message = f"{request.method[:SHOWN_CHARACTERS]} is not allowed for {path}"
    else:
        message = f"there is nothing at {path}"
    failure = ApiError(error.status_code, message, headers=error.headers)
    return _error_response(failure)


async def _unexpected(_: Request, error: Exception) -> Response:
    error_id = uuid.uuid4().hex
    logger.error("error %s", error_id, exc_info=error)
    return _error_response(internal(error_id))
