"""The host of Ray's head dies under real streams, with and without Redis; every text as if undisturbed."""

import shutil
import socket
import subprocess
import time

import httpx
import pytest
from faults.hosted import PORT, Service, all_streams
from faults.hosts import Hosts, wait_until, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.system,  # a cluster of five hosts for each test
    pytest.mark.timeout(600),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


def free_port(address):
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def listens(address, port):
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


@pytest.fixture
def redis(tmp_path, request):
    """start(address) → HOST:PORT of a Redis server, which outlives all hosts."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server on the PATH (apt-get install redis-server)")
    processes = []

    def start(address):
        port = free_port(address)
        options = [
            "--bind",
            address,
            "--port",
            str(port),
            "--protected-mode",
            "no",
            "--save",
            "",
            "--dir",
            tmp_path,
        ]
        with (tmp_path / "redis.txt").open("w") as log:
            processes.append(subprocess.Popen(["redis-server", *options], stdout=log, stderr=log))
        wait_until(lambda: listens(address, port), 20, "Redis")
        return f"{address}:{port}"

    yield start
    for process in processes:
        process.terminate()
        process.wait(20)


HEAD_AWAY = {"RAY_gcs_rpc_server_reconnect_timeout_s": "300"}


def test_streams_outlive_the_head_host_and_healing_comes_back(tmp_path, checkpoint, redis):
    hosts = Hosts(tmp_path, 5, HEAD_AWAY)
    try:
        hosts.head_environment["RAY_REDIS_ADDRESS"] = redis(hosts.outside)
        hosts.head_environment["RAY_external_storage_namespace"] = "r1-cluster-tests"
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
