"""Whole hosts die, or lose their cable, under real streams; every text as if undisturbed."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from faults.hosted import Service, all_streams, noticed_after
from faults.hosts import Hosts, wait_until, why_not

# The kernel gives a silent host up after 4 s; where the cores are busy, reading that takes a while more.
NOTICED_S = 8.0
RANKS = {"kind": "colocated", "tensor_parallel": 2, "cpus_per_worker": 0.2, "spread": True}
REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.system,
    pytest.mark.timeout(600),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("hosts"), 5)
    yield made
    made.close()


@pytest.fixture(scope="module")
def service(hosts, checkpoint):
    hosts.start_ray()
    return Service(hosts, checkpoint, hosts[0])


@pytest.fixture(scope="module")
def ranks(service, checkpoint):
    """In place of the former one, for tests after its own: a stage whose two ranks are on two hosts."""
    service.stop()
    return Service(service.hosts, checkpoint, service.hosts[0], "ranks", RANKS)


@pytest.fixture
def whole(service):
    yield from restored(service)


@pytest.fixture
def whole_ranks(ranks):
    yield from restored(ranks)


def restored(service):
    """The service; hosts that a test has lost come back after it, empty, and join."""
    yield service
    print(service.engine_log().read_text(errors="replace"))  # shown where the test failed
    hosts = service.hosts
    for host in hosts.hosts[1:]:
        hosts.heal(host)
        if not host.up:
            host.boot()
        if not host.processes("raylet/raylet"):
            hosts.join(host)


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
        noticed.append(noticed_after(whole, lambda: whole.hosts.lose_power(victim)))

    texts, pause = all_streams(whole.edge, meanwhile)
    print(
        f"{victim.name} with {sorted(gone)} died: noticed in {noticed[0]:.2f} s, longest stall {pause:.2f} s"
    )
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
        cut_at = time.monotonic()
        noticed.append(noticed_after(whole, lambda: whole.hosts.cut(victim)))
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


def test_streams_outlive_the_engine_host(whole, record_property):
    victim = whole.host_of("Engine")
    if victim is whole.edge:
        pytest.skip("Serve put the ingress on the engine's host: its sockets die with it")
    texts, pause = all_streams(whole.edge, lambda: whole.hosts.lose_power(victim))
    print(f"{victim.name} with the engine died: longest stall {pause:.2f} s")
    record_property("longest_stall_s", pause)
    assert texts == whole.undisturbed
    whole.check_whole()


def test_streams_outlive_a_cut_between_two_ranks(whole_ranks, record_property):
    """Both can be reached by the engine, and neither by the other, for longer than links keep a silent peer."""
    homes = whole_ranks.workers()
    if whole_ranks.host_of("Engine") in homes.values():
        pytest.skip("the engine is on a rank's host: what cuts off the ranks cuts it off as well")
    noticed = []

    def meanwhile():
        cut = partial(whole_ranks.hosts.part, *homes.values())
        noticed.append(noticed_after(whole_ranks, cut, "broke; linking anew"))
        time.sleep(max(7 - noticed[0], 0))
        whole_ranks.hosts.unite(*homes.values())

    texts, pause = all_streams(whole_ranks.edge, meanwhile)
    print(
        f"two ranks cut off from each other for 7 s: noticed in {noticed[0]:.2f} s, longest stall {pause:.2f} s"
    )
    record_property("noticed_s", noticed[0])
    record_property("longest_stall_s", pause)
    assert texts == whole_ranks.undisturbed
    whole_ranks.check_whole()
    assert whole_ranks.workers() == homes
    assert noticed[0] < NOTICED_S


def test_streams_outlive_the_host_of_a_rank(whole_ranks, record_property):
    homes = whole_ranks.workers()
    assert sorted(homes) == ["stage-0-rank-0", "stage-0-rank-1"]
    assert len(set(homes.values())) == 2
    victim = whole_ranks.bystander()
    noticed = []

    def meanwhile():
        noticed.append(noticed_after(whole_ranks, lambda: whole_ranks.hosts.lose_power(victim)))

    texts, pause = all_streams(whole_ranks.edge, meanwhile)
    print(f"{victim.name} with a rank died: noticed in {noticed[0]:.2f} s, longest stall {pause:.2f} s")
    record_property("noticed_s", noticed[0])
    record_property("longest_stall_s", pause)
    assert texts == whole_ranks.undisturbed
    whole_ranks.check_whole()
    homes = set(whole_ranks.workers().values())
    assert victim not in homes
    assert len(homes) == 2
    assert noticed[0] < NOTICED_S
