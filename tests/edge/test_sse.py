import asyncio
import json

import pytest

from r1_cluster.api.chat import ChatStream
from r1_cluster.api.errors import unavailable
from r1_cluster.api.protocol import parse_chat_request
from r1_cluster.api.streaming import DONE, KEEP_ALIVE
from r1_cluster.edge import sse
from r1_cluster.records import TokenDelta
from r1_cluster.text.reasoning import Thought
from r1_cluster.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(options):
    return Tokenizer.from_folder(options.model_path)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)


@pytest.fixture
def stream(tokenizer):
    chat = parse_chat_request(b'{"model":"m","messages":[{"role":"user","content":"x"}],"stream":true}')
    return ChatStream(chat, tokenizer, thought=Thought.OPEN, prompt_tokens=1, request_id="r")


def delta(tokenizer, position, reason=None):
    return TokenDelta("r", position, tokenizer.encode("a"), reason)


def collect(stream, steps):
    """The frames of an answer that is told what to do: sleep so long, yield a delta, or raise. And whether the
    answer was closed at the end."""
    ended = []

    async def answer():
        try:
            for step in steps:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            ended.append(True)

    async def gather():
        return [frame async for frame in sse.frames(stream, [], answer())]

    frames = asyncio.run(gather())
    assert ended
    return frames


def payload(frame):
    return json.loads(frame.removeprefix(b"data: "))


def test_comments_come_while_nothing_else_does(stream, tokenizer):
    frames = collect(stream, [0.24, delta(tokenizer, 0), 0.12, delta(tokenizer, 1, "length")])
    comments = [frame == KEEP_ALIVE for frame in frames]
    assert comments[:3] == [True] * 3
    assert 5 <= sum(comments) <= 7
    assert frames[-1].endswith(DONE)
    assert b"".join(frame for frame in frames if frame != KEEP_ALIVE).count(b'"role"') == 1


def test_an_answer_that_comes_at_once_has_no_comments(stream, tokenizer):
    assert KEEP_ALIVE not in collect(stream, [delta(tokenizer, 0), delta(tokenizer, 1, "length")])


def test_a_failure_is_the_last_frame_but_one(stream, tokenizer):
    frames = collect(stream, [delta(tokenizer, 0), unavailable("The engine is gone.")])
    error, end = frames[-1].split(b"\n\n", 1)
    assert payload(error)["error"]["message"] == "The engine is gone."
    assert end == DONE


@pytest.mark.parametrize("steps", [[KeyError("secret")], []])
def test_what_should_not_happen_ends_a_stream_as_properly(stream, steps, caplog):
    frames = collect(stream, steps)
    error, end = frames[-1].split(b"\n\n", 1)
    shown = payload(error)["error"]
    assert (shown["code"], end) == ("internal_error", DONE)
    assert "secret" not in shown["message"]
    assert any(shown["message"].split()[-1].rstrip(".") in record.getMessage() for record in caplog.records)


def test_a_client_that_leaves_closes_the_answer(stream, tokenizer):
    ended = []

    async def answer():
        try:
            yield delta(tokenizer, 0)
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def leave():
        frames = sse.frames(stream, [], answer())
        await anext(frames)
        waiting = asyncio.create_task(anext(frames))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert ended

    asyncio.run(leave())
