"""The whole path by HTTP, in both layouts."""

import concurrent.futures
import json

import httpx
import openai
import pytest

from r1_cluster.engine.core import CANARY_S

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

# What one layout answered, for the other to be compared with.
ANSWERS: list[list[object]] = []


@pytest.fixture
def client(service):
    url = f"{service.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client, text, **options):
    """(reasoning, content, finish reason, usage) of a whole answer."""
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": text}], **{"max_tokens": 24, **options}
    )
    (choice,) = answer.choices
    return (
        choice.message.reasoning_content,
        choice.message.content,
        choice.finish_reason,
        answer.usage.completion_tokens,
    )


def ask_streamed(client, text, **options):
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": text}],
        stream=True,
        stream_options={"include_usage": True},
        **{"max_tokens": 24, **options},
    )
    reasoning = content = ""
    finish = usage = None
    for chunk in stream:
        if chunk.usage is not None:
            assert chunk.choices == []
            usage = chunk.usage.completion_tokens
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return reasoning, content, finish, usage


def test_health_and_models(service):
    with httpx.Client(base_url=service.url) as http:
        health = http.get("/health")
        assert health.status_code == 200
        state = health.json()
        assert (state["status"], state["missing"]) == ("ready", [])
        # An idle engine computes a token now and then, so that this is true.
        assert state["last_step_s"] < 2 * CANARY_S
        (model,) = http.get("/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("tiny", 2048)
        assert http.get("/v1/models/tiny").json() == model
        missing = http.get("/v1/models/../../etc/passwd")
        assert missing.status_code == 404


def test_streamed_equals_whole(client):
    for options in (
        {"temperature": 0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "top_p": 0.5, "seed": 1},
    ):
        whole = ask(client, "What is 12 + 30?", **options)
        assert ask_streamed(client, "What is 12 + 30?", **options) == whole
        assert whole[0] + whole[1]


def test_a_stream_on_the_wire(service):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "max_tokens": 5,
        "temperature": 0,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_usage_counts_what_was_asked_for(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "count"}],
        max_tokens=17,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert usage.completion_tokens == 17
    assert usage.total_tokens == usage.prompt_tokens + 17
    assert 0 <= usage.completion_tokens_details.reasoning_tokens <= 17


def test_a_seed_decides_and_defaults_sample(client):
    first = ask(client, "tell me", seed=11, max_tokens=48)
    assert ask(client, "tell me", seed=11, max_tokens=48) == first
    others = {ask(client, "tell me", max_tokens=48)[:2] for _ in range(4)}
    assert len(others) > 1


LOAD = [
    (
        f"question {i}: " + "word " * (7 * i % 90),
        {
            "max_tokens": 8 + 5 * i % 60,
            "extra_body": {"ignore_eos": i % 2 == 0},
            **({"temperature": 0} if i % 2 else {"temperature": 1.0, "top_p": 0.95, "seed": i}),
        },
    )
    for i in range(64)
]


def test_64_streams_together_each_as_if_alone_and_as_in_the_other_layout(service, client):
    alone = {i: ask_streamed(client, LOAD[i][0], **LOAD[i][1]) for i in range(0, 64, 8)}
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda item: ask_streamed(client, item[0], **item[1]), LOAD))
    for i, answer in alone.items():
        assert together[i] == answer, f"request {i}"
    again = [ask(client, text, **options) for text, options in LOAD[1:64:8]]
    assert again == together[1:64:8]
    ANSWERS.append(together)
    assert together == ANSWERS[0]
    (engine,) = service.status()["engines"]
    assert (engine["running"], engine["waiting"], engine["pages_used"]) == (0, 0, 0)


def test_a_client_that_leaves_frees_its_pages(service):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "go on"}],
        "stream": True,
        "max_tokens": 1900,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    for _ in range(50):
        (engine,) = service.status()["engines"]
        if engine["running"] == engine["pages_used"] == 0:
            return
    raise AssertionError(f"still held after the client left: {engine}")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[]", 400, None),
        (b'{"model": "tiny"}', 400, "messages"),
        (b'{"model": "tiny", "messages": []}', 400, "messages"),
        (b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', 404, "model"),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 3}',
            400,
            "temperature",
        ),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "colour": 3}', 400, "colour"),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 99999}',
            400,
            "messages",
        ),
    ],
)
def test_malformed_requests_get_openais_error_body(service, body, status, param):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{service.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param


def test_unknown_paths_and_methods(service):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        response = httpx.request(method, service.url + path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_status_shows_who_runs_where(service, client):
    ask(client, "hello", max_tokens=4)
    (engine,) = service.status()["engines"]
    workers = {worker["name"]: worker for worker in engine["workers"]}
    assert all(worker["state"] == "alive" for worker in workers.values())
    assert len({worker["pid"] for worker in workers.values()}) == len(workers)
    assert all(worker["node"] for worker in workers.values())
    if engine["layout"] == "disaggregated":
        assert set(workers["router-1"]["traffic"]) == {
            "engine",
            "stage-1",
            "experts-0",
            "experts-1",
            "experts-2",
        }
        assert workers["stage-1"]["traffic"]["router-1"]["sent_bytes"] > 1000
        assert workers["router-1"]["waited_s"] > 0
        assert sorted(workers) == [
            "experts-0", "experts-1", "experts-2", "router-0", "router-1", "stage-0", "stage-1",
        ]  # fmt: skip
    else:
        assert workers["stage-0"]["roles"] == ["stage", "router", "experts"]
    text = service.command("status")
    assert all(name in text for name in workers)
    links = [line.split() for line in text[text.index("links of") :].splitlines()[1:]]
    assert {worker for worker, peer, *_ in links if peer == "engine"} == set(workers)
