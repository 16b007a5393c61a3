"""Real deaths under real streams: SIGKILL to actors of a running service, and every text as if undisturbed."""

import concurrent.futures
import os
import signal
import threading
import time

import openai
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

LAYOUT = {"kind": "disaggregated", "stages": 2, "expert_shards": 3, "cpus_per_worker": 0.2}


@pytest.fixture(scope="module")
def service(start):
    running = start("faults", LAYOUT, engine={"lease_s": 20.0, "step_timeout_s": 3.0}).wait_ready()
    yield running
    code, _ = running.interrupt()
    assert code == 0, running.log.read_text()


@pytest.fixture(scope="module")
def client(service):
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120)


LOAD = [
    {
        "messages": [{"role": "user", "content": f"question {i} " + "word " * (11 * i % 70)}],
        "max_tokens": 150 + 10 * i,
        "extra_body": {"ignore_eos": True},
        **({"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": i}),
    }
    for i in range(16)
]


def stream(client, options, started=None):
    """(text, longest pause between chunks in s)."""
    text, pause, last = "", 0.0, time.monotonic()
    for chunk in client.chat.completions.create(model="tiny", stream=True, **options):
        if started is not None:
            started.set()
        now = time.monotonic()
        pause, last = max(pause, now - last), now
        for choice in chunk.choices:
            text += (getattr(choice.delta, "reasoning_content", None) or "") + (choice.delta.content or "")
    return text, pause


@pytest.fixture(scope="module")
def undisturbed(client):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return [text for text, _ in pool.map(lambda options: stream(client, options), LOAD)]


def pid_of(service, name):
    (engine,) = service.status()["engines"]
    if name == "engine":
        return engine["pid"]
    return next(worker["pid"] for worker in engine["workers"] if worker["name"] == name)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize("name", ["experts-1", "router-0", "stage-0", "stage-1", "engine"])
def test_no_stream_ends_when_a_part_dies(service, client, undisturbed, name, how, record_property):
    if name == "engine" and how is signal.SIGSTOP:
        pytest.skip("a stopped engine is found by Serve's health check alone, after 30 s: not done yet")
    pid = pid_of(service, name)
    started = threading.Event()

    def kill():
        started.wait(60)
        os.kill(pid, how)

    thread = threading.Thread(target=kill)
    thread.start()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda options: stream(client, options, started), LOAD))
    thread.join()
    assert [text for text, _ in results] == undisturbed
    record_property("longest_stall_s", max(pause for _, pause in results))
    print(f"{name} {how.name}: longest stall {max(pause for _, pause in results):.2f} s")
    (engine,) = service.status()["engines"]
    assert (engine["running"], engine["pages_used"], engine["missing"]) == (0, 0, [])
    assert len(engine["workers"]) == 7
