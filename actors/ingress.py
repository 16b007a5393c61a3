"""The ingress deployment: HTTP in front, an engine behind. It owns its requests' token streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.cluster import is_draining, secret
from actors.engine import num_places
from actors.routing import avoid, trust
from r1_cluster.api.chat import ChatStream
from r1_cluster.api.errors import ApiError, convicted, failed_row, overloaded, unavailable
from r1_cluster.comm.listener import Listener
from r1_cluster.config import Service
from r1_cluster.edge.app import Answer, build_edge
from r1_cluster.edge.body import BodyReader
from r1_cluster.edge.pool import PreparePool
from r1_cluster.edge.prepare import PrepareOptions
from r1_cluster.edge.sse import frames
from r1_cluster.engine.streams import TokenSink
from r1_cluster.models.family import load_config
from r1_cluster.planning.limits import max_model_len
from r1_cluster.records import ENGINE_LOST, Refusal, Request, TokenDelta

logger = logging.getLogger("r1_cluster.ingress")

RESUME_S = 120.0
"""How long an answer waits for an engine that takes it up, after the last sign of one that had."""
RETRY_S = 0.05
"""Pause before an engine is asked again; doubles up to a second."""
LAST_TOKEN_S = 2.0
"""How long after a request has ended on its engine its last token may still be on the way."""
DRAIN_POLL_S = 0.5
HEALTH_TIMEOUT_S = 3.0
HEALTH_TRIES = 3


@serve.ingress()
class Ingress:
    """See the module. Created by Serve."""

    def __init__(self, service: Service, engine: DeploymentHandle) -> None:
        self._service = service
        self._engine = engine
        model = load_config(service.model.path)
        self._max_model_len = max_model_len(service, model)
        self.places = num_places(service) * service.engine.replicas
        self._pool = PreparePool(
            PrepareOptions(
                service.model.path,
                service.served_name,
                service.serve.defaults,
                self._max_model_len,
                model.vocab_size,
            )
        )
        self._pool.warm()
        self._loop = asyncio.get_event_loop()
        self._streams: dict[str, _Attempt] = {}
        self._in_hand: set[asyncio.Task[Any]] = set()
        self._draining = False
        self._sink = TokenSink(
            Listener(
                f"ingress-{secrets.token_hex(8)}",
                secret(),
                ray.util.get_node_ip_address(),
                service.cluster.link_ports,
            ),
            lambda replica, deltas: self._from_sink(self._distribute, replica, deltas),
            lambda replica, hangs: self._from_sink(self._engine_lost, replica, hangs),
        )
        self._endpoint = msgspec.msgpack.encode(self._sink.endpoint)
        self._watcher = self._loop.create_task(self._watch_for_drain())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the app in the replica: one that travels there pickled arrives without its
        annotations and error handlers."""
        edge = self._service.serve
        reader = BodyReader(edge.max_body_bytes, edge.body_timeout_s)
        return build_edge(self, reader, cors_origins=edge.cors_origins)

    async def health(self) -> dict[str, Any]:
        """The state of the engine that a request would be sent to; `status` is ready, recovering, draining
        or unavailable."""
        if self._draining:
            return {"status": "draining", "reason": "the service is being stopped"}
        for _ in range(HEALTH_TRIES):
            try:
                state: dict[str, Any] = await asyncio.wait_for(self._engine.health.remote(), HEALTH_TIMEOUT_S)
            except Exception as error:
                logger.warning("no engine says how it is: %s: %s", type(error).__name__, error)
                return {"status": "unavailable", "reason": "no engine answers"}
            if state["status"] != "standby":
                return state
            avoid(state["replica"])
        return {"status": "unavailable", "reason": "no engine is in charge"}

    async def _watch_for_drain(self) -> None:
        while not self._draining:
            await asyncio.sleep(DRAIN_POLL_S)
            with contextlib.suppress(Exception):  # Ray's head may be away
                self._draining = await asyncio.to_thread(is_draining, self._service.name)

    def model_card(self) -> dict[str, Any]:
        """The one served model, as /v1/models lists it."""
        return {
            "id": self._service.served_name,
            "object": "model",
            "created": 0,
            "owned_by": "r1-cluster",
            "max_model_len": self._max_model_len,
        }

    def enter(self) -> None:
        """Counts a request in until its task ends. Raises ApiError while the service drains, and where this
        ingress alone has as many in hand as the engines can hold: what an engine would refuse is not worth
        the work before it."""
        if self._draining:
            raise unavailable("the service is being stopped; it takes no new requests")
        if len(self._in_hand) >= self.places:
            raise overloaded(retry_after_s=1)
        task = asyncio.current_task()
        assert task is not None
        self._in_hand.add(task)
        task.add_done_callback(self._in_hand.discard)

    async def chat(self, body: bytes) -> Answer:
        """Answers a chat, streamed or whole; raises ApiError up to when an engine has taken it."""
        chat, record, thought = await self._pool.prepare(body)
        record = msgspec.structs.replace(record, request_id=uuid.uuid4().hex, sink=self._sink.name)
        stream = ChatStream(
            chat,
            self._pool.tokenizer,
            thought=thought,
            prompt_tokens=len(record.prompt),
            request_id=record.request_id,
        )
        answer = self._generate(record)
        # Until an engine has taken the request, an error is a status, and not a broken stream.
        first = await anext(answer)
        begun = stream.feed(first) if first.tokens or first.finish_reason else []
        if chat.stream:
            return frames(stream, begun, answer)
        while not stream.finished:
            stream.feed(await anext(answer))
        await answer.aclose()
        return stream.whole()

    async def _generate(self, record: Request) -> AsyncGenerator[TokenDelta, None]:
        """The deltas of one answer, the first as soon as an engine has taken the request, with or without
        tokens; raises ApiError where the engine refuses or fails. Closing it, or cancelling its task, aborts
        the request on the engine.

        When the engine dies, the request goes to the next one with the tokens that are known so far, and the
        answer goes on at the next token.
        """
        tokens: list[int] = []
        taken = False
        in_hand_at, pause_s = time.monotonic(), RETRY_S
        while True:
            engine_lost = False
            record = msgspec.structs.replace(record, generated=list(tokens), attempt=record.attempt + 1)
            # Closed before the next attempt begins: left to the garbage collector, its end would come after
            # that beginning, and take the new attempt's queue away.
            async with contextlib.aclosing(self._attempt(record)) as deltas:
                async for delta in deltas:
                    # Once an engine has taken it, a full one that is to go on with it is waited for.
                    again = ("engine_lost", "overloaded") if taken else ("engine_lost",)
                    if delta.error is not None and delta.error.kind in again:
                        engine_lost = True
                        break
                    if delta.error is not None:
                        raise _engine_error(delta.error)
                    in_hand_at, pause_s = time.monotonic(), RETRY_S
                    if delta.position > len(tokens):
                        # From before the engine read that this request was asked for again, with the tokens
                        # known here: it will send those in between, and this one once more, unless it was the
                        # last.
                        if delta.finish_reason is not None:
                            engine_lost = True
                            break
                        continue
                    new = delta.tokens[len(tokens) - delta.position :]
                    tokens += new
                    if new or delta.finish_reason is not None or not taken:
                        taken = True
                        yield delta
            if not engine_lost:
                return
            if time.monotonic() - in_hand_at > RESUME_S:
                raise _engine_error(Refusal("failed", f"no engine took it up within {RESUME_S:g} s"))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    async def _attempt(self, record: Request) -> AsyncGenerator[TokenDelta, None]:
        """What one engine says of a request, up to the end or an error."""
        attempt = self._streams[record.request_id] = _Attempt(record.attempt)
        call = self._engine.generate.remote(msgspec.msgpack.encode(record), self._endpoint)
        waiter = asyncio.ensure_future(call)
        waiter.add_done_callback(lambda done: _report_failure(record.request_id, done, attempt.queue))
        ended = False
        try:
            while not ended:
                delta = await attempt.queue.get()
                ended = delta.finish_reason is not None
                yield delta
        finally:
            del self._streams[record.request_id]
            if not ended:
                call.cancel()

    def _from_sink(self, handler: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(handler, *arguments)

    def _distribute(self, replica: str, deltas: list[TokenDelta]) -> None:
        trust(replica)
        for delta in deltas:
            attempt = self._streams.get(delta.request_id)
            # What a former engine still sends may differ from what the present one computes.
            if attempt is not None and attempt.number == delta.attempt:
                attempt.replica = replica
                attempt.queue.put_nowait(delta)

    def _engine_lost(self, replica: str, hangs: bool) -> None:
        """Its link closed or fell silent: its answers go on elsewhere, before Serve has noticed."""
        avoid(replica, hangs=hangs)
        for request_id, attempt in self._streams.items():
            if attempt.replica == replica:
                attempt.queue.put_nowait(TokenDelta(request_id, 0, [], "error", ENGINE_LOST))


@dataclass(eq=False)
class _Attempt:
    """One engine's go at a request; `replica` is known once it has said something."""

    number: int
    queue: asyncio.Queue[TokenDelta] = field(default_factory=asyncio.Queue)
    replica: str = ""


def _report_failure(
    request_id: str, done: asyncio.Future[Refusal | None], queue: asyncio.Queue[TokenDelta]
) -> None:
    """Puts a failed call into its stream. Of one that ended well the last token is on its way, or it was lost
    on it: then the answer is asked for again from where it is."""
    if done.cancelled():
        return
    failure = done.exception()
    if failure is not None:
        logger.warning("the engine's call ended: %s: %s", type(failure).__name__, failure)
    error = ENGINE_LOST if failure is not None else done.result()
    if error is not None and error.kind == "not_in_office":
        avoid(error.text)
        error = ENGINE_LOST
    if error is not None:
        queue.put_nowait(TokenDelta(request_id, 0, [], "error", error))
    else:
        # Nobody reads this after the last token.
        lost = TokenDelta(request_id, 0, [], "error", ENGINE_LOST)
        done.get_loop().call_later(LAST_TOKEN_S, queue.put_nowait, lost)


def _engine_error(refusal: Refusal) -> ApiError:
    if refusal.kind == "overloaded":
        return overloaded(retry_after_s=1)
    logger.error("an answer failed: %s %s", refusal.kind, refusal.text)
    if refusal.kind == "convicted":
        return convicted()
    if refusal.kind == "failed_row":
        return failed_row()
    return unavailable("the engine could not finish this answer; please ask again")
