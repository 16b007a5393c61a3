import asyncio
import json
import os
import signal
import time
from concurrent.futures import Executor, Future

import pytest

from r1_cluster.api.errors import ApiError
from r1_cluster.edge import pool as module
from r1_cluster.edge.pool import INLINE_BYTES, PreparePool


@pytest.fixture(scope="module")
def pool(options):
    made = PreparePool(options, children=2)
    yield made
    made.close()


def body(size, **fields):
    """A request of `size` bytes that asks for little: what is ignored makes it long."""
    fields = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "seed": 1,
        "user": "",
        **fields,
    }
    fields["user"] = "x" * (size - len(json.dumps(fields)))
    return json.dumps(fields).encode()


def children(pool):
    return [child._process.pid for child in pool._idle]


def test_small_and_large_bodies_are_prepared_alike(pool):
    async def ask():
        return await pool.prepare(body(INLINE_BYTES)), await pool.prepare(body(INLINE_BYTES + 1))

    small, large = asyncio.run(ask())
    assert small == large
    assert len(children(pool)) == 1  # one that is idle is asked again


def test_errors_come_back_whole(pool):
    async def ask(data):
        with pytest.raises(ApiError) as caught:
            await pool.prepare(data)
        return caught.value

    error = asyncio.run(ask(body(5000, temperature=3)))
    assert (error.status, error.param, error.type) == (400, "temperature", "invalid_request_error")
    assert asyncio.run(ask(b"[" * 100_000)).status == 400
    error = asyncio.run(ask(body(5000, max_tokens=1000)))
    assert error.body()["error"]["code"] == "context_length_exceeded"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (body(0, messages=[{"role": "user", "content": "word " * 800_000}]), 400),
        (b"{" + b",".join(b'"k%d":1' % i for i in range(150_000)) + b',"k149999":1}', 400),
        (body(0, messages=[{"role": "user", "content": ""}] * 16_384), 400),
        (b'{"a": [' + b"[],{}," * 60_000 + b"0]}", 400),
    ],
    ids=["4 MB of text", "150,000 keys", "16,384 messages", "brackets"],
)
def test_next_to_nothing_is_done_where_streams_run(pool, data, status):
    async def ask():
        start = time.process_time()
        (outcome,) = await asyncio.gather(pool.prepare(data), return_exceptions=True)
        return outcome.status, time.process_time() - start

    asyncio.run(pool.prepare(body(5000)))  # a child is there
    outcome, cpu_s = asyncio.run(ask())
    assert outcome == status
    # What this process computes bounds what its streams wait for, however busy the machine is.
    assert cpu_s < 0.05


def test_who_dies_of_a_body_takes_no_other_along(pool, monkeypatch):
    def killed(child, body, timeout_s):
        os.kill(child._process.pid, signal.SIGKILL)
        return ask_child(child, body, timeout_s)

    async def ask():
        await pool.prepare(body(5000))
        with monkeypatch.context() as patched:
            patched.setattr(module._Child, "ask", killed)
            with pytest.raises(ApiError) as caught:
                await pool.prepare(body(500_000))
        await pool.prepare(body(5000))
        return caught.value

    ask_child = module._Child.ask
    error = asyncio.run(ask())
    assert (error.status, error.headers["x-should-retry"]) == (500, "false")


def test_who_dies_idle_is_replaced_and_nobody_blamed(pool):
    asyncio.run(pool.prepare(body(5000)))
    for child in pool._idle:
        os.kill(child._process.pid, signal.SIGKILL)
        child._process.wait()
    asyncio.run(pool.prepare(body(5000)))


def test_a_child_that_takes_too_long_is_ended(options):
    pool = PreparePool(options, timeout_s=0.0)

    async def ask():
        with pytest.raises(ApiError) as caught:
            await pool.prepare(body(5000))
        return caught.value.status

    assert asyncio.run(ask()) == 500
    assert children(pool) == []
    pool.close()


def test_what_waits_is_bounded(pool, monkeypatch):
    monkeypatch.setattr(module, "MAX_HELD_BYTES", 25_000)

    async def ask():
        return await asyncio.gather(*(pool.prepare(body(10_000)) for _ in range(5)), return_exceptions=True)

    outcomes = asyncio.run(ask())
    assert [getattr(outcome, "status", 200) for outcome in outcomes] == [200, 200, 429, 429, 429]
    assert getattr(asyncio.run(ask())[0], "status", 200) == 200


class Busy(Executor):
    """All of its threads are busy, and it keeps what it was given, as those that pools have do."""

    def submit(self, work, *arguments):
        self.arguments = arguments
        return Future()


def test_a_body_whose_client_left_is_let_go(options):
    """Its turn may be long in coming, and others may have been sent since."""
    pool = PreparePool(options)
    pool._threads = busy = Busy()

    async def leave():
        task = asyncio.create_task(pool.prepare(body(10_000)))
        await asyncio.sleep(0)
        assert [len(each) for each in busy.arguments[0]] == [10_000]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert busy.arguments == ([],)


def test_children_end_with_their_parent(pool):
    asyncio.run(pool.prepare(body(5000)))
    child = pool._idle.pop()
    child._connection.close()  # as the parent's death would
    assert child._process.wait(10) == 0
