"""Whole hosts die, lose their cable, or lose Ray's head, under real streams; every text as if undisturbed."""

import concurrent.futures
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from faults.hosts import GCS_PORT, Hosts, wait_until, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.hosts,
    pytest.mark.timeout(600),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

LEASE_S = 6.0
NOTICED_S = 5.0
PORT = 8000
LAYOUT = {"kind": "disaggregated", "stages": 2, "expert_shards": 3, "cpus_per_worker": 0.2, "spread": True}
LOAD = [
    {
        "messages": [{"role": "user", "content": f"question {i} " + "word " * (11 * i % 70)}],
        "max_tokens": 200 + 10 * i,
        "extra_body": {"ignore_eos": True},
        **({"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": i}),
    }
    for i in range(16)
]


def stream(host, options, started):
    """(text, longest pause between chunks in s) of one answer, asked of the proxy on `host`."""
    client = openai.OpenAI(base_url=f"http://{host.address}:{PORT}/v1", api_key="none", max_retries=0, timeout=150)
    text, pause, last = "", 0.0, time.monotonic()
    for chunk in client.chat.completions.create(model="tiny", stream=True, **options):
        started.set()
        now = time.monotonic()
        pause, last = max(pause, now - last), now
        for choice in chunk.choices:
            text += (getattr(choice.delta, "reasoning_content", None) or "") + (choice.delta.content or "")
    return text, pause


def all_streams(host, meanwhile=lambda: None):
    """(texts, longest pause) of the load; `meanwhile` runs once half a second of it has been streamed."""
    started = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(17) as pool:
        answers = [pool.submit(stream, host, options, started) for options in LOAD]
        assert started.wait(60)
        time.sleep(0.5)
        done = pool.submit(meanwhile)
        results = [answer.result() for answer in answers]
        done.result()
    return [text for text, _ in results], max(pause for _, pause in results)


class Service:
    """A service that `r1-cluster serve --address` deployed on hosts."""

    def __init__(self, hosts, checkpoint, served_on):
        self.hosts = hosts
        file = hosts.folder / "service.yaml"
        file.write_text(
            yaml.safe_dump(
                {
                    "name": "hosts",
                    "model": {"path": str(checkpoint), "name": "tiny"},
                    "layout": LAYOUT,
                    "engine": {"lease_s": LEASE_S},
                    "serve": {"host": "0.0.0.0", "port": PORT},
                }
            )
        )
        address = f"{hosts[0].address}:{GCS_PORT}"
        log = hosts.folder / "serve.txt"
        command = hosts.begin(served_on, log, "r1-cluster", "serve", file, "--address", address)
        wait_until(lambda: "ready:" in log.read_text() or command.poll() is not None, 240, "ready")
        assert "ready:" in log.read_text(), log.read_text()
        self.undisturbed, _ = all_streams(self.edge)

    def host_of(self, deployment):
        """The host that runs the replica of a deployment."""
        title = f"ray::ServeReplica:hosts:{deployment}"
        return next(host for host in self.hosts.hosts if host.up and host.processes(title))

    @property
    def edge(self):
        """The host whose proxy and ingress carry the streams."""
        return self.host_of("Ingress")

    def engine(self):
        """What `r1-cluster status` says of the engine."""
        anywhere = next(host for host in self.hosts.hosts[1:] if host.up)
        (engine,) = json.loads(self.hosts.run(anywhere, "r1-cluster", "status", "--json"))["engines"]
        return engine

    def workers(self):
        """Worker → the host that it runs on."""
        return {worker["name"]: self.hosts.named(worker["host"]) for worker in self.engine()["workers"]}

    def bystander(self):
        """A host of workers that is neither the engine's nor the ingress's."""
        busy = {self.edge.name, self.host_of("Engine").name}
        return next(host for host in self.workers().values() if host.name not in busy)

    def engine_log(self):
        """What the engine's process wrote on its standard error: losses and recoveries, with Ray's clock."""
        host = self.host_of("Engine")
        (pid,) = host.processes("ray::ServeReplica:hosts:Engine")
        return Path(f"/proc/{pid}/fd/2").read_text(errors="replace")

    def check_whole(self):
        engine = self.engine()
        assert (engine["running"], engine["pages_used"], engine["missing"]) == (0, 0, [])
        assert [worker["state"] for worker in engine["workers"]] == ["alive"] * 7
        return engine


def wait_noticed(service, since):
    """Seconds until the engine says that it lost somebody, for the first time after `since` losses."""
    return wait_until(lambda: service.engine_log().count("lost ") > since, 60, "noticed", 0.02)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("hosts"), 5)
    yield made
    made.close()


@pytest.fixture(scope="module")
def service(hosts, checkpoint):
    hosts.start_ray()
    return Service(hosts, checkpoint, hosts[0])


@pytest.fixture
def whole(service):
    """The service; hosts that a test has lost come back after it, empty, and join."""
    yield service
    print(service.engine_log())  # shown where the test failed
    hosts = service.hosts
    joins = []
    for host in hosts.hosts[1:]:
        hosts.heal(host)
        if not host.up:
            host.boot()
        if not host.processes("raylet/raylet"):
            joins.append(hosts.join(host))
    assert [join.wait(180) for join in joins] == [0] * len(joins)


def test_links_notice_a_host_that_vanished(hosts, record_property):
    near, far = hosts[1], hosts[2]
    script = Path(__file__).with_name("link_ends.py")
    log = hosts.folder / "link.txt"
    hosts.begin(far, log, sys.executable, script, "serve", far.address)
    wait_until(lambda: log.read_text().endswith("\n"), 30, "listening")
    endpoint = json.loads(log.read_text())["endpoint"]
    command = hosts.argv(near, sys.executable, script, "connect", endpoint)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=hosts.environment, text=True, **pipes) as process:
        assert json.loads(process.stdout.readline()) == {"linked": True}
        hosts.cut(far)
        cut_at = time.monotonic()
        print("cut", file=process.stdin, flush=True)
        events = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.stdin.close()
    hosts.heal(far)
    for pid in far.processes("link_ends.py"):
        subprocess.run(["kill", str(pid)], check=True)
    took = {event["link"]: round(event["dead_at"] - cut_at, 2) for event in events if "link" in event}
    print(f"found dead after (s): {took}")
    record_property("noticed_s", took)
    assert sorted(took) == ["busy", "idle"]
    assert max(took.values()) < NOTICED_S


def test_streams_outlive_a_host_of_workers(whole, record_property):
    victim = whole.bystander()
    gone = {name for name, host in whole.workers().items() if host is victim}
    noticed = []

    def meanwhile():
        losses = whole.engine_log().count("lost ")
        whole.hosts.lose_power(victim)
        noticed.append(wait_noticed(whole, losses))

    texts, pause = all_streams(whole.edge, meanwhile)
    print(f"{victim.name} with {sorted(gone)} died: noticed in {noticed[0]:.2f} s, longest stall {pause:.2f} s")
    record_property("noticed_s", noticed[0])
    record_property("longest_stall_s", pause)
    assert texts == whole.undisturbed
    whole.check_whole()
    assert victim not in whole.workers().values()
    assert noticed[0] < NOTICED_S


def test_streams_outlive_a_partition(whole, record_property):
    victim = whole.bystander()
    old = victim.processes("ray::StageActor") + victim.processes("ray::RouterActor")
    old += victim.processes("ray::ExpertActor")
    noticed, fenced = [], []

    def meanwhile():
        losses = whole.engine_log().count("lost ")
        whole.hosts.cut(victim)
        cut_at = time.monotonic()
        noticed.append(wait_noticed(whole, losses))
        # Nobody can reach them: they end by themselves.
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old), 20, "the old workers' end")
        fenced.append(time.monotonic() - cut_at)
        time.sleep(max(20 - fenced[0], 0))
        whole.hosts.heal(victim)

    texts, pause = all_streams(whole.edge, meanwhile)
    print(
        f"{victim.name} cut off: noticed in {noticed[0]:.2f} s, its {len(old)} workers ended after "
        f"{fenced[0]:.2f} s, longest stall {pause:.2f} s"
    )
    record_property("noticed_s", noticed[0])
    record_property("longest_stall_s", pause)
    assert texts == whole.undisturbed
    # Ray has declared the node dead meanwhile: its raylet leaves when it hears of it, and all with it.
    took = wait_until(lambda: not victim.processes("ray::"), 60, "the end of the old raylet's processes")
    print(f"nothing was left on {victim.name} {took:.1f} s after it came back")
    assert all_streams(whole.edge)[0] == whole.undisturbed
    whole.check_whole()
    assert noticed[0] < NOTICED_S


@pytest.mark.matrix
def test_a_short_partition_changes_nothing(whole):
    victim = whole.bystander()
    epoch = whole.engine()["epoch"]

    def meanwhile():
        whole.hosts.cut(victim)
        time.sleep(1.5)
        whole.hosts.heal(victim)

    texts, pause = all_streams(whole.edge, meanwhile)
    print(f"cut off for 1.5 s: longest stall {pause:.2f} s")
    assert texts == whole.undisturbed
    assert whole.check_whole()["epoch"] == epoch


@pytest.mark.matrix
def test_streams_outlive_the_engine_host(whole, record_property):
    victim = whole.host_of("Engine")
    if victim is whole.edge:
        pytest.skip("Serve put the ingress on the engine's host: its sockets die with it")
    texts, pause = all_streams(whole.edge, lambda: whole.hosts.lose_power(victim))
    print(f"{victim.name} with the engine died: longest stall {pause:.2f} s")
    record_property("longest_stall_s", pause)
    assert texts == whole.undisturbed
    whole.check_whole()


def free_port(address):
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


@pytest.fixture
def redis(tmp_path, request):
    """start(address) → HOST:PORT of a Redis server, which outlives all hosts."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server on the PATH (apt-get install redis-server)")
    processes = []

    def start(address):
        port = free_port(address)
        options = ["--bind", address, "--port", str(port), "--protected-mode", "no", "--save", "", "--dir", tmp_path]
        with (tmp_path / "redis.txt").open("w") as log:
            processes.append(subprocess.Popen(["redis-server", *options], stdout=log, stderr=log))
        wait_until(lambda: socket.socket().connect_ex((address, port)) == 0, 20, "Redis")
        return f"{address}:{port}"

    yield start
    for process in processes:
        process.terminate()
        process.wait(20)


HEAD_AWAY = {"RAY_gcs_rpc_server_reconnect_timeout_s": "300"}


def test_streams_outlive_the_head_host_and_healing_comes_back(tmp_path, checkpoint, redis):
    hosts = Hosts(tmp_path, 5, HEAD_AWAY)
    try:
        hosts.environment["RAY_REDIS_ADDRESS"] = redis(hosts.outside)
        hosts.environment["RAY_external_storage_namespace"] = "r1-cluster-tests"
        hosts.start_ray()
        service = Service(hosts, checkpoint, hosts[1])
        head = hosts[0]
        texts, pause = all_streams(service.edge, lambda: hosts.lose_power(head))
        print(f"the head host died: longest stall {pause:.2f} s")
        assert texts == service.undisturbed
        assert all_streams(service.edge)[0] == service.undisturbed  # new requests, too
        hosts.heal(head)
        head.boot()
        hosts.start_head()
        back_at = time.monotonic()
        wait_until(lambda: len(service.engine()["workers"]) == 7, 60, "status", 1.0)
        print(f"status answers {time.monotonic() - back_at:.1f} s after the head's return")
        victim = service.bystander()
        texts, pause = all_streams(service.edge, lambda: hosts.lose_power(victim))
        print(f"{victim.name} died after the head's return: longest stall {pause:.2f} s")
        assert texts == service.undisturbed
        service.check_whole()
    finally:
        hosts.close()


@pytest.mark.matrix
def test_serving_goes_on_without_a_head(tmp_path, checkpoint):
    hosts = Hosts(tmp_path, 5, HEAD_AWAY)
    try:
        hosts.start_ray()
        service = Service(hosts, checkpoint, hosts[1])
        texts, pause = all_streams(service.edge, lambda: hosts.lose_power(hosts[0]))
        print(f"the head host died for good: longest stall {pause:.2f} s")
        assert texts == service.undisturbed
        for _ in range(3):
            assert all_streams(service.edge)[0] == service.undisturbed
        assert httpx.get(f"http://{service.edge.address}:{PORT}/health").status_code == 200
    finally:
        hosts.close()
