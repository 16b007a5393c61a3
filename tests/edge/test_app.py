"""Transport: what clients rely on of status lines and headers, over real sockets."""

import asyncio
import json
import socket
import time

import pytest

from r1_cluster.api.errors import overloaded, unavailable

CHAT = "/v1/chat/completions"


def check_error(reply, status, code=None):
    assert reply.status == status
    assert reply.headers["content-type"] == ["application/json"]
    error = json.loads(reply.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error["message"]


def get(path, *headers, method="GET", version="1.1", host="test"):
    lines = [f"{method} {path} HTTP/{version}", *([f"Host: {host}"] if host is not None else []), *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def test_an_answer(post, backend):
    reply = post(b'{"a": 1}')
    assert (reply.status, json.loads(reply.body)) == (200, {"bytes": 8})
    assert backend.bodies == [b'{"a": 1}']


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
    ],
)
def test_json_is_taken(post, content_type):
    assert post(b"{}", content_type=content_type).status == 200


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data",
     "text/json", "application/jsonp", "application/xml; application/json", "*/*"],
)  # fmt: skip
def test_anything_else_is_415(post, backend, content_type):
    check_error(post(b"{}", content_type=content_type), 415)
    assert backend.bodies == []


def test_two_content_types_are_415(post):
    check_error(post(b"{}", "Content-Type: text/plain"), 415)


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip", "GZIP", "deflate", "unknown"])
def test_a_compressed_body_is_415(post, backend, coding):
    reply = post(b"\x1f\x8b" * 10, f"Content-Encoding: {coding}")
    check_error(reply, 415)
    assert reply.headers["accept-encoding"] == ["identity"]
    assert backend.bodies == []


def test_identity_is_no_coding(post):
    assert post(b"{}", "Content-Encoding: identity").status == 200


@pytest.mark.parametrize(
    ("method", "allow"), [("GET", "POST"), ("PUT", "POST"), ("DELETE", "POST"), ("HEAD", "POST")]
)
def test_wrong_methods_say_which_are_right(raw, method, allow):
    reply = raw(get(CHAT, method=method, version="1.0"))
    assert (reply.status, reply.headers["allow"]) == (405, [allow])
    if method != "HEAD":
        assert method in check_error(reply, 405)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/org/tiny"])
def test_head_where_get_is(raw, path):
    full, head = raw(get(path, version="1.0")), raw(get(path, method="HEAD", version="1.0"))
    assert (full.status, head.status) == (200, 200)
    assert head.headers["content-length"] == full.headers["content-length"] == [str(len(full.body))]
    assert head.body == b""
    reply = raw(get(path, "Content-Length: 0", method="POST"))
    assert check_error(reply, 405)
    assert set(reply.headers["allow"][0].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/", "/health/", "/v1/models/", f"{CHAT}/", "/docs", "/openapi.json", "/%ff", "/v1/../etc",
             "/v1/models/..%2f..%2fetc%2fpasswd", "/%00", "/\u20ac".encode().decode("latin-1"), "/" + "x" * 10_000],
)  # fmt: skip
def test_unknown_paths_are_404_and_never_redirected(raw, path):
    reply = raw(get(path))
    # httptools itself refuses paths that are no ASCII.
    if reply.headers["content-type"] == ["application/json"]:
        message = check_error(reply, 404, "model_not_found" if path.startswith("/v1/models/") else None)
        assert len(message) < 300
    else:
        assert reply.status == 400
    assert "location" not in reply.headers


@pytest.mark.parametrize(
    "host", [None, "", "evil.example", "[::1", "a b", "\xff\xfe", "x" * 5000, "user@host:99999"]
)
@pytest.mark.parametrize("path", ["/health", "/v1/models/", "/nothing"])
def test_no_host_header_does_harm(raw, host, path):
    reply = raw(get(path, host=host, version="1.0"))
    assert reply.status == (200 if path == "/health" else 404)
    assert b"evil" not in reply.data


def test_health_is_503_while_nobody_can_answer(raw, backend):
    for status, expected in (("ready", 200), ("recovering", 200), ("draining", 503), ("unavailable", 503)):
        backend.status = status
        assert raw(get("/health", version="1.0")).status == expected


def test_a_full_or_draining_service_refuses_before_it_reads(raw, backend):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: 50000\r\n\r\n"
    backend.closed = overloaded(retry_after_s=1)
    reply = raw(head.encode())
    check_error(reply, 429, "rate_limit_exceeded")
    assert reply.headers["retry-after"] == ["1"]
    backend.closed = unavailable("draining")
    check_error(raw(head.encode()), 503, "service_unavailable")


@pytest.mark.parametrize("length", [100_001, 10_000_000_000, 10**30])
def test_a_long_body_is_413_before_it_comes(raw, backend, length):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    start = time.monotonic()
    reply = raw(head.encode())
    assert time.monotonic() - start < 0.9
    # httptools itself refuses what 64 bits do not hold.
    if length < 2**64:
        check_error(reply, 413)
    else:
        assert reply.status == 400
    assert backend.bodies == []


def test_a_client_that_waits_for_100_continue_is_refused_without_it(raw):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    assert raw(f"{head}Content-Length: 200000\r\n\r\n".encode()).status == 413


def test_a_body_of_the_longest_length_is_taken(post, backend):
    assert post(b"x" * 100_000).status == 200
    assert len(backend.bodies[0]) == 100_000


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


CHUNKED = (
    f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
).encode()


def test_a_chunked_body_is_taken(raw, backend):
    assert raw(CHUNKED + chunk(b'{"a"') + chunk(b": 1}") + b"0\r\n\r\n").status == 200
    assert backend.bodies == [b'{"a": 1}']


def test_a_chunked_body_is_counted_while_it_comes(raw, backend):
    # It never ends: the answer comes at the first byte too many.
    check_error(raw(CHUNKED + chunk(b"x" * 60_000) + chunk(b"x" * 40_001)), 413)
    assert backend.bodies == []


@pytest.mark.parametrize(
    "unfinished",
    [
        CHUNKED,
        CHUNKED + chunk(b"{"),
        CHUNKED.replace(b"Transfer-Encoding: chunked", b"Content-Length: 10") + b"{}",
    ],
)
def test_a_body_that_does_not_end_is_408_and_its_connection_is_closed(raw, backend, unfinished):
    reply = raw(unfinished)
    check_error(reply, 408)
    assert reply.headers["connection"] == ["close"]
    assert backend.bodies == []


@pytest.mark.parametrize(
    "lines",
    ["Content-Length: 2\r\nContent-Length: 3", "Content-Length: 2\r\nTransfer-Encoding: chunked", "Content-Length: -1",
     "Content-Length: 2x", "Content-Length: 0x2", "Transfer-Encoding: gzip"],
)  # fmt: skip
def test_lengths_that_contradict_are_400(raw, backend, lines):
    reply = raw(
        f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n{lines}\r\n\r\n{{}}".encode()
    )
    assert reply.status == 400
    assert backend.bodies == []


def test_a_client_that_leaves_amid_its_body_leaves_nothing(port, reader, backend):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(CHUNKED + chunk(b"x" * 5000))
        wait_for(lambda: reader._held == 5000)
    wait_for(lambda: reader._held == 0)
    assert backend.bodies == []


def test_bodies_together_are_bounded(port, post, reader):
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    for connection in connections:
        connection.sendall(CHUNKED + chunk(b"x" * 90_000))
    wait_for(lambda: reader._held == 270_000)
    check_error(post(b"x" * 90_000), 429, "rate_limit_exceeded")
    for connection in connections:
        connection.close()
    wait_for(lambda: reader._held == 0)
    assert post(b"x" * 90_000).status == 200


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("body", [b"", b"\xef\xbb\xbf{}"])
def test_what_is_in_a_body_is_the_backends_business(post, backend, body):
    assert post(body).status == 200
    assert backend.bodies == [body]


def stream_of(*frames):
    async def script(_):
        async def answer():
            for frame in frames:
                await asyncio.sleep(0)
                yield frame

        return answer()

    return script


def test_the_headers_of_a_stream(post, backend):
    backend.script = stream_of(b"data: 1\n\n", b"data: [DONE]\n\n")
    reply = post(b"{}", "Connection: close")
    assert reply.status == 200
    assert reply.headers["content-type"] == ["text/event-stream; charset=utf-8"]
    assert reply.headers["cache-control"] == ["no-cache"]
    assert reply.headers["x-accel-buffering"] == ["no"]
    assert reply.headers["transfer-encoding"] == ["chunked"]
    assert reply.headers["x-r1-places"] == ["320"]


def test_http_1_0_gets_a_stream_whole(post, backend):
    backend.script = stream_of(b"data: 1\n\n", b"data: [DONE]\n\n")
    reply = post(b"{}", version="1.0")
    assert "transfer-encoding" not in reply.headers
    assert reply.body == b"data: 1\n\ndata: [DONE]\n\n"
    backend.script = None
    assert json.loads(post(b"{}", version="1.0").body) == {"bytes": 2}


def test_what_should_not_happen_has_an_id_and_no_class_name(post, backend, caplog):
    async def script(_):
        raise KeyError("secret")

    backend.script = script
    reply = post(b"{}", "Connection: close")
    message = check_error(reply, 500, "internal_error")
    assert b"KeyError" not in reply.data
    assert b"secret" not in reply.data
    assert any(f"error {message.split()[-1].rstrip('.')}" in record.getMessage() for record in caplog.records)


def test_cors_for_the_origins_of_the_config_alone(raw, post):
    ask = (
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: authorization, content-type",
    )
    allowed = raw(get(CHAT, "Origin: https://chat.example", *ask, method="OPTIONS"))
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == ["https://chat.example"]
    refused = raw(get(CHAT, "Origin: https://evil.example", *ask, method="OPTIONS"))
    assert refused.status == 400
    assert "access-control-allow-origin" not in refused.headers
    error = post(b"{}", "Origin: https://chat.example", "Content-Encoding: gzip")
    assert (error.status, error.headers["access-control-allow-origin"]) == (415, ["https://chat.example"])
