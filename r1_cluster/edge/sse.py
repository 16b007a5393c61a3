"""An answer's deltas → the frames of its stream, with signs of life where there are none."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator

from r1_cluster.api.chat import ChatStream
from r1_cluster.api.errors import ApiError, internal
from r1_cluster.api.streaming import KEEP_ALIVE
from r1_cluster.records import TokenDelta

logger = logging.getLogger("r1_cluster.edge")

KEEP_ALIVE_S = 10.0
"""Proxies cut connections that are silent for a minute; a queue, a prefill or a recovery may be longer."""


async def frames(
    stream: ChatStream, begun: list[bytes], answer: AsyncGenerator[TokenDelta, None]
) -> AsyncGenerator[bytes, None]:
    """The frames of a streamed answer: those that it has `begun` with, and those that come of `answer`, which
    is closed at the end. What fails meanwhile is the last frame but one."""
    try:
        if begun:
            yield b"".join(begun)
        while not stream.finished:
            coming = asyncio.ensure_future(anext(answer))
            try:
                while not (await asyncio.wait({coming}, timeout=KEEP_ALIVE_S))[0]:
                    yield KEEP_ALIVE
                delta = coming.result()
            finally:
                await _cancelled(coming)
            if joined := b"".join(stream.feed(delta)):
                yield joined
    except ApiError as error:
        yield b"".join(stream.fail(error))
    except Exception as error:
        error_id = uuid.uuid4().hex
        logger.error("error %s in %s", error_id, stream.id, exc_info=error)
        yield b"".join(stream.fail(internal(error_id)))
    finally:
        await answer.aclose()


async def _cancelled(task: asyncio.Future[TokenDelta]) -> None:
    """Returns once the task has ended: a generator that still runs cannot be closed."""
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
