"""How the ingress takes an answer up again: its `_generate` over an engine that says what a test tells it to."""

import asyncio
import json
from types import SimpleNamespace
from unittest.mock import AsyncMock

import msgspec
import pytest
from make_tokenizer import make_tokenizer

from actors import ingress as module
from r1_cluster.api.errors import ApiError
from r1_cluster.config import Sampling
from r1_cluster.edge.prepare import PrepareOptions, Preparer
from r1_cluster.records import Refusal, Request, SamplingParams, TokenDelta
from r1_cluster.text.tokenizer import Piece

RECORD = Request("r", [5, 6], SamplingParams(0.0, 1.0, 0, 0), 3, [], "sink")


class Edge:
    """What of an ingress has to do with engines; the whole would be a Serve replica."""

    chat = module.Ingress.chat
    _generate = module.Ingress._generate
    _attempt = module.Ingress._attempt
    _distribute = module.Ingress._distribute
    _engine_lost = module.Ingress._engine_lost
    enter = module.Ingress.enter

    def __init__(self, *script):
        self._streams, self._endpoint = {}, b""
        self._in_hand, self.places, self._draining = set(), 2, False
        self._sink = SimpleNamespace(name="sink")
        self._engine = Engine(self, *script)


class Engine:
    """In place of Serve's handle. Each call does the next thing of the script, which is given the deltas' way to
    the ingress and the call. Deltas are of the attempt that is being made, unless they say otherwise."""

    def __init__(self, ingress, *script):
        self.asked, self.records = [], []
        self._ingress, self._script = ingress, list(script)
        self.generate = self

    def remote(self, request, endpoint):
        record = msgspec.msgpack.decode(request, type=Request)
        self.asked.append(list(record.generated))
        self.records.append(record)
        call = asyncio.get_running_loop().create_future()

        def send(*deltas):
            marked = [
                msgspec.structs.replace(d, attempt=d.attempt or record.attempt, request_id=record.request_id)
                for d in deltas
            ]
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


def test_that_an_engine_has_taken_a_request_is_said_once_and_before_its_tokens():
    async def collect():
        taken = TokenDelta("r", 0, [])
        edge = Edge(say(taken, token(0)), say(taken, token(1), token(2, "length"), end=True))
        answer = edge._generate(RECORD)
        first = await anext(answer)
        assert (first.tokens, first.finish_reason) == ([], None)
        assert (await anext(answer)).tokens == [100]
        edge._engine_lost("replica", False)
        assert [delta.tokens async for delta in answer] == [[101], [102]]

    asyncio.run(asyncio.wait_for(collect(), 20))


@pytest.fixture(scope="module")
def undecided(tmp_path_factory):
    """Prepares requests for a model whose template opens no thought."""
    folder = tmp_path_factory.mktemp("r1-0528")
    make_tokenizer(folder, "qwen3")
    return Preparer(PrepareOptions(str(folder), "tiny", Sampling(), 128, 512))


@pytest.mark.parametrize(
    ("text", "thought", "content"),
    [
        ("\n<think>\nab END\n</think>\n\ncd 世 END", "ab END", "cd 世 "),
        ("ab 世 END", "", "ab 世 "),
        ("</think>\nab END", "", "ab "),
    ],
)
def test_a_thought_goes_on_where_another_engine_takes_it_up(undecided, text, thought, content):
    """Whatever the model had written when its engine died, `<think>` or a part of a character, say."""
    tokenizer = undecided.tokenizer
    ids = tokenizer.encode_pieces([Piece(text, True)])

    def lose(known):
        def act(send, call):
            send(TokenDelta("", 0, []), *(TokenDelta("", i, [ids[i]]) for i in range(known)))
            call.set_exception(RuntimeError("the replica died"))

        return act

    def go_on(known):
        return say(*(TokenDelta("", i, [ids[i]]) for i in range(known, len(ids))))

    async def ask(known):
        edge = Edge(lose(known), go_on(known))
        edge._pool = SimpleNamespace(tokenizer=tokenizer, prepare=AsyncMock(side_effect=undecided.prepare))
        fields = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stop": "END"}
        whole = await edge.chat(json.dumps(fields).encode())
        return whole, edge._engine.records

    for known in range(len(ids)):
        whole, records = asyncio.run(asyncio.wait_for(ask(known), 20))
        (choice,) = whole["choices"]
        assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == (thought, content)
        assert choice["finish_reason"] == "stop"
        counted = whole["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert counted == (len(tokenizer.encode("\nab END\n")) if thought else 0)
        assert [record.generated for record in records] == [[], ids[:known]]
        for record in records:
            assert record.sleeping_from == tokenizer.think_start_id
            assert record.sleeping_until == tokenizer.think_end_id


def test_an_ingress_takes_no_more_than_the_engines_hold_until_somebody_has_ended():
    async def enter_all():
        edge, ends = Edge(), [asyncio.Event() for _ in range(3)]

        async def request(end):
            edge.enter()
            await end.wait()

        first, second = (asyncio.create_task(request(end)) for end in ends[:2])
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as full:
            edge.enter()
        first.cancel()
        await asyncio.wait([first])
        await asyncio.sleep(0)
        third = asyncio.create_task(request(ends[2]))
        for end in ends:
            end.set()
        await asyncio.gather(second, third)
        await asyncio.sleep(0)
        edge._draining = True
        with pytest.raises(ApiError) as draining:
            edge.enter()
        return full.value, draining.value, edge._in_hand

    full, draining, left = asyncio.run(enter_all())
    assert (full.status, full.headers["Retry-After"], draining.status, left) == (429, "1", 503, set())


def test_an_answer_that_has_begun_waits_for_a_full_engine():
    """The engine that would go on with it has no place at the moment; others may still be refused."""

    def lose(send, call):
        send(token(0))
        call.set_exception(RuntimeError("the replica died"))

    def full(send, call):
        call.set_result(Refusal("overloaded"))

    tokens, asked = answer(lose, full, full, say(token(1), token(2, "length"), end=True))
    assert tokens == [100, 101, 102]
    assert asked == [[], [100], [100], [100]]
    with pytest.raises(ApiError) as refused:
        answer(full)
    assert refused.value.status == 429
