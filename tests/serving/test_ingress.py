"""How the ingress takes an answer up again: its `_generate` over an engine that says what a test tells it to."""

import asyncio

import msgspec
import pytest

from actors import ingress as module
from r1_cluster.records import Request, SamplingParams, TokenDelta

RECORD = Request("r", [5, 6], SamplingParams(0.0, 1.0, 0, 0), 3, [], "sink")


class Edge:
    """What of an ingress has to do with engines; the whole would be a Serve replica."""

    _generate = module.Ingress._generate
    _attempt = module.Ingress._attempt
    _distribute = module.Ingress._distribute

    def __init__(self, *script):
        self._streams, self._endpoint = {}, b""
        self._engine = Engine(self, *script)


class Engine:
    """In place of Serve's handle. Each call does the next thing of the script, which is given the deltas' way to
    the ingress and the call. Deltas are of the attempt that is being made, unless they say otherwise."""

    def __init__(self, ingress, *script):
        self.asked = []
        self._ingress, self._script = ingress, list(script)
        self.generate = self

    def remote(self, request, endpoint):
        record = msgspec.msgpack.decode(request, type=Request)
        self.asked.append(list(record.generated))
        call = asyncio.get_running_loop().create_future()

        def send(*deltas):
            marked = [msgspec.structs.replace(d, attempt=d.attempt or record.attempt) for d in deltas]
            self._ingress._distribute("replica", marked)

        self._script.pop(0)(send, call)
        return call


def token(position, reason=None):
    return TokenDelta("r", position, [100 + position], reason)


def answer(*script):
    """(tokens, what each call was asked to go on from)."""

    async def collect():
        edge = Edge(*script)
        tokens = []
        async for delta in edge._generate(RECORD):
            tokens += delta.tokens
        assert edge._streams == {}
        return tokens, edge._engine.asked

    return asyncio.run(asyncio.wait_for(collect(), 20))


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "LAST_TOKEN_S", 0.05)


def say(*deltas, end=False):
    def act(send, call):
        send(*deltas)
        if end:
            call.set_result(None)

    return act


def test_an_answer_ends_with_its_last_token():
    tokens, asked = answer(say(token(0), token(1), token(2, "length"), end=True))
    assert tokens == [100, 101, 102]
    assert asked == [[]]


def test_a_last_token_that_was_lost_is_asked_for_again():
    tokens, asked = answer(say(token(0), token(1), end=True), say(token(2, "length"), end=True))
    assert tokens == [100, 101, 102]
    assert asked == [[], [100, 101]]


def test_a_last_token_behind_a_gap_is_asked_for_again():
    tokens, asked = answer(say(token(0), token(2, "length")), say(token(1), token(2, "length"), end=True))
    assert tokens == [100, 101, 102]
    assert asked == [[], [100]]


def test_tokens_behind_a_gap_are_awaited_where_more_is_to_come():
    tokens, asked = answer(say(token(0), token(2), token(1), token(2, "length"), end=True))
    assert tokens == [100, 101, 102]
    assert asked == [[]]


def test_a_lost_engine_is_asked_again():
    def lose(send, call):
        send(token(0))
        call.set_exception(RuntimeError("the replica died"))

    tokens, asked = answer(lose, say(token(1), token(2, "length"), end=True))
    assert tokens == [100, 101, 102]
    assert asked == [[], [100]]


def test_a_token_of_a_former_engine_is_not_joined_to_the_continuation():
    """Where the engine is not deterministic it may be another one than the present engine computes."""
    late = TokenDelta("r", 1, [999], attempt=1)

    def lose(send, call):
        send(token(0))
        call.set_exception(RuntimeError("the replica died"))

    tokens, asked = answer(lose, say(late, token(1), token(2, "length"), end=True))
    assert tokens == [100, 101, 102]
    assert asked == [[], [100]]
