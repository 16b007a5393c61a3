"""What stands before Serve: its part of the stack that Serve's proxies run, without Ray."""

import asyncio
import contextlib

import msgspec
import pytest
from ray.serve._private.http_util import _apply_middlewares

from actors import gate as gate_module
from actors.gate import Gate, middlewares


def call(app, *headers, path="/v1/models"):
    """(headers that the app saw, status, headers, body) of a request through the gate and Serve's middleware."""
    seen, sent = {}, []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def watched(scope, receive, send):
        seen["headers"] = scope["headers"]
        await receive()
        await app(scope, receive, send)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": list(headers)}
    asyncio.run(_apply_middlewares(watched, middlewares())(scope, receive, send))
    start, *rest = sent
    return seen["headers"], start["status"], start["headers"], b"".join(message["body"] for message in rest)


def answering(status, content_type, *bodies):
    async def app(scope, receive, send):
        headers = [(b"content-type", content_type), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for i, body in enumerate(bodies, 1):
            await send({"type": "http.response.body", "body": body, "more_body": i < len(bodies)})

    return app


OK = answering(200, b"application/json", b"{}")


def ids(headers):
    return [value for name, value in headers if name.lower() == b"x-request-id"]


@pytest.mark.parametrize("sent", [b"abc-123", b"x" * 128, b"a b/c=~!"])
def test_a_sane_request_id_is_given_back_once(sent):
    seen, _, headers, _ = call(OK, (b"x-request-id", sent))
    assert ids(seen) == ids([(n.encode() if isinstance(n, str) else n, v) for n, v in headers]) == [sent]


@pytest.mark.parametrize(
    "sent", [[], [b""], [b"x" * 129], [b"\xff"], [b"a\x7f"], [b"a\tb"], [b"a", b"b"], [b"a", b"a"]]
)
def test_any_other_request_id_is_replaced_by_ours(sent):
    first = call(OK, *((b"x-request-id", value) for value in sent))
    second = call(OK, *((b"x-request-id", value) for value in sent))
    (one,), (other,) = ids(first[2]), ids(second[2])
    assert one not in sent
    assert len(one) == 32
    assert one != other
    assert ids(first[0]) == [one]


@pytest.mark.parametrize(
    "name",
    [b"x-request-disconnect-disabled", b"x-request-timeout-seconds", b"serve_multiplexed_model_id",
     b"serve-multiplexed-model-id", b"x-session-id", b"x_session_id"],
)  # fmt: skip
def test_no_client_steers_serve(name):
    seen, *_ = call(OK, (name, b"?1"), (b"accept", b"*/*"))
    assert [header for header, _ in seen] == [b"accept", b"x-request-id"]


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (404, "invalid_request_error", None),
        (503, "server_error", "service_unavailable"),
        (500, "server_error", None),
    ],
)
def test_serves_own_errors_get_the_apis_form(status, kind, code):
    _, seen, headers, body = call(answering(status, b"text/plain", b"RayTaskError(", b"KeyError)"))
    error = msgspec.json.decode(body)["error"]
    assert (seen, error["type"], error["code"], error["param"]) == (status, kind, code, None)
    assert b"Error)" not in body
    found = dict(headers)
    assert found[b"content-type"] == b"application/json"
    assert found[b"content-length"] == b"%d" % len(body)
    assert found[b"retry-after"] == b"1"
    assert len(ids(headers)) == 1


def test_what_is_no_error_and_what_is_json_passes_as_it_is():
    assert call(answering(200, b"text/plain", b"a", b"b"))[3] == b"ab"
    assert call(answering(400, b"application/json", b'{"error":', b"1}"))[3] == b'{"error":1}'
    assert call(answering(503, b"text/plain", b"starting"), path="/-/healthz")[3] == b"starting"


async def post(gate, count):
    """(status, headers) of so many requests at once, and the statuses in the order in which they came."""
    order = []

    async def one():
        sent = []

        async def send(message):
            if message["type"] == "http.response.start":
                order.append(message["status"])
            sent.append(message)

        await gate(
            {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}, None, send
        )
        return sent[0]["status"], dict(sent[0]["headers"])

    return await asyncio.gather(*(one() for _ in range(count))), order


def test_what_finds_no_place_is_refused_before_serve_hears_of_it():
    served = 0

    async def app(scope, receive, send):
        nonlocal served
        served += 1
        headers = [(b"content-type", b"application/json"), (b"x-r1-places", b"3")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"{}"})

    async def scenario():
        gate = Gate(app)
        # How many places there are is known from the first answer on.
        ((status, headers),), _ = await post(gate, 1)
        assert (status, set(headers)) == (200, {b"content-type"})
        answers, order = await post(gate, 8)
        assert [status for status, _ in answers] == [200] * 3 + [429] * 5
        assert order == [429] * 5 + [200] * 3
        refused = answers[-1][1]
        assert refused[b"retry-after"] == b"1"
        assert len(refused[b"x-request-id"]) == 32
        assert served == 4
        # Whoever has been answered has left its place.
        assert [status for status, _ in (await post(gate, 3))[0]] == [200] * 3

    asyncio.run(scenario())


def refused_amid_its_body(status, *headers, chunks, stalls=False):
    """What was sent of an answer that comes before the end of its body, and how many chunks were then read."""
    sent, left = [], list(chunks)

    async def receive():
        if not left and stalls:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or stalls}

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": b"{}"})
        sent.append("the app has ended")

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(_apply_middlewares(app, middlewares())(scope, receive, send))
    return sent, len(left)


def test_a_refused_client_may_send_its_body_to_the_end_before_its_connection_closes():
    (start, body, ended, end), left = refused_amid_its_body(413, chunks=[b"x"] * 5)
    assert (b"connection", b"close") in start["headers"]
    assert (body["body"], body["more_body"], ended) == (b"{}", True, "the app has ended")
    assert (end["body"], end.get("more_body", False), left) == (b"", False, 0)


def test_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(gate_module, "LINGER_S", 0.05)
    sent, _ = refused_amid_its_body(413, chunks=[b"x"] * 2, stalls=True)
    assert not sent[-1].get("more_body", False)


def test_one_that_was_too_slow_is_not_waited_for():
    sent, left = refused_amid_its_body(408, (b"connection", b"close"), chunks=[b"x"] * 5)
    assert (len(sent), left) == (3, 4)
    assert not sent[1].get("more_body", False)


def test_serve_hears_no_more_of_a_body_than_its_first_bytes_too_many():
    """It queues all that it hears until the refusal comes."""
    limits = [(b"x-r1-places", b"3"), (b"x-r1-max-body-bytes", b"1000")]
    heard = []

    async def app(scope, receive, send):
        async def hear():
            while True:
                heard.append(len((await receive())["body"]))

        hearing = asyncio.create_task(hear())
        await asyncio.sleep(0.01)
        hearing.cancel()
        headers = [(b"content-type", b"application/json"), *limits]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    async def scenario():
        gate, sent = Gate(app), []
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        for count in (3, 100):  # the first answer tells how long a body may be
            left = [b"x" * 300] * count

            async def receive(left=left):
                await asyncio.sleep(0)
                return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

            async def send(message):
                sent.append(message)

            heard.clear()
            with contextlib.suppress(IndexError):
                await gate(dict(scope), receive, send)
            assert left == []  # what lingers was read to its end
        assert heard == [300] * 4
        assert not {b"x-r1-places", b"x-r1-max-body-bytes"} & {name for name, _ in sent[0]["headers"]}

    asyncio.run(scenario())


def test_who_lingers_holds_no_place():
    """Clients whose bodies never end would else keep all others out, at no cost."""

    async def app(scope, receive, send):
        headers = [(b"content-type", b"application/json"), (b"x-r1-places", b"1")]
        await send({"type": "http.response.start", "status": scope["status"], "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(gate, status):
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            await asyncio.sleep(60)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        task = asyncio.create_task(gate(scope | {"status": status}, receive, send))
        while not sent:
            await asyncio.sleep(0)
        return sent[0]["status"], task

    async def scenario():
        gate = Gate(app)
        await (await ask(gate, 200))[1]
        lingering = [(await ask(gate, 413))[1] for _ in range(5)]
        status, task = await ask(gate, 200)
        assert status == 200
        assert not any(other.done() for other in lingering)
        for each in (task, *lingering):
            each.cancel()
        await asyncio.gather(task, *lingering, return_exceptions=True)

    asyncio.run(scenario())
