"""What workers are sent, cannot send or do not understand, and the memory that they ask for."""

import time
from types import SimpleNamespace

import msgspec
import pytest
from thread_cluster import DENSE_LAYOUTS, LAYOUTS, PAGE_SIZE, SECRET, Cluster, requests

from r1_cluster.comm import wire
from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import Traffic
from r1_cluster.comm.listener import connect
from r1_cluster.comm.wire import Header, Kind, LinkClosed
from r1_cluster.config import LayoutConfig
from r1_cluster.engine import loading
from r1_cluster.engine.boot import StepLimits
from r1_cluster.engine.worker import Worker
from r1_cluster.models.family import load_config
from r1_cluster.planning.layout import build_layout
from r1_cluster.planning.memory import OutOfDeviceMemory, worker_bytes


def test_a_step_whose_rows_fit_no_message_gives_the_same_text(checkpoint, monkeypatch):
    """Hidden states of a whole step fit, its rows for experts do not."""
    config = load_config(checkpoint)
    asked = requests(6)
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"])
    try:
        texts = cluster.run(asked)
        assert config.moe.num_experts_per_tok > 1
        monkeypatch.setattr(wire, "MAX_PAYLOAD_BYTES", 64 * config.hidden_size * 4)
        assert cluster.run(asked) == texts
        assert cluster.core.recovery.num_recoveries == 0
    finally:
        cluster.close()


@pytest.mark.slow
def test_traffic_and_waits_are_counted_over_all_links_to_a_place(checkpoint):
    """An expert shard dies between steps: its router goes on counting, its successor begins."""
    asked = requests(4)
    # Nobody else may be taken for dead, however busy the machine is.
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"], lease_s=60, step_timeout_s=30)

    def seen_by(worker):
        traffic = worker.peers.traffic["router-1"]
        return Traffic(
            traffic.received_messages, traffic.received_bytes, traffic.sent_messages, traffic.sent_bytes
        )

    try:
        cluster.run(asked)
        router, former = cluster.workers["router-1"], cluster.workers["experts-1"]
        soon(lambda: router.peers.traffic["experts-1"] == seen_by(former))
        total, waited_s = seen_by(former), router.waited_s
        former.stop()
        soon(lambda: cluster.core.recovery.num_recoveries == 1)
        cluster.run(asked)
        assert 0 < total.sent_messages < router.peers.traffic["experts-1"].sent_messages

        def seen_by_both():
            both = seen_by(cluster.workers["experts-1"])
            both.add(total)
            return both

        soon(lambda: router.peers.traffic["experts-1"] == seen_by_both())
        assert router.waited_s > waited_s > 0
        assert cluster.workers["stage-1"].peers.traffic.keys() == {"engine", "stage-0", "router-1"}
    finally:
        cluster.close()


def soon(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("layout", ["disaggregated", "two stages without experts between"])
def test_what_cannot_be_sent_ends_the_engine_and_no_worker(checkpoint, monkeypatch, layout):
    """A message that does not fit would not fit on its way to a new worker either."""
    config = load_config(checkpoint)
    stages = {"kind": "disaggregated", "stages": ["0-0", "1-3"]}  # the first has no router to refuse
    cluster = Cluster(checkpoint, stages if "two" in layout else LAYOUTS[layout])
    try:
        workers = dict(cluster.workers)
        (request,) = requests(1)
        cluster.run([request])
        monkeypatch.setattr(wire, "MAX_PAYLOAD_BYTES", 40 * config.hidden_size * 4)
        too_long = msgspec.structs.replace(request, request_id="long", prompt=list(range(5, 65)))
        cluster.core.submit(too_long)
        cluster.core.join()
        assert "at most" in cluster.core.failure
        assert "stage-0" in cluster.core.failure
        name, refusal = cluster.ends.get(timeout=10)
        assert (name, refusal.text) == ("long", cluster.core.failure)
        assert cluster.workers == workers
        assert all(thread.is_alive() for thread in cluster.threads)
    finally:
        cluster.close()


def test_a_plan_that_cannot_be_sent_ends_the_engine_and_no_worker(cluster, monkeypatch):
    workers = dict(cluster.workers)
    cluster.run(requests(1))
    monkeypatch.setattr(wire, "MAX_BODY_BYTES", 150)
    cluster.core.submit(requests(1)[0])
    cluster.core.join()
    first = cluster.layout.workers[0].name
    assert f"what {first} is to be told does not fit" in cluster.core.failure
    assert cluster.workers == workers


def test_nonsense_costs_its_sender_the_link_and_nobody_else(checkpoint):
    """A peer that passed the handshake and speaks another language."""
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"])
    try:
        for worker in cluster.workers.values():
            for kind in set(Kind) - {Kind.HEARTBEAT}:  # which has nothing to read
                link = connect(worker.listener.address, Hello("stranger", "x", 1, "tensor"), SECRET)
                link.send(Header(kind, 1), (), b"\xc1nonsense")
                with pytest.raises(LinkClosed):
                    link.recv(10.0)
        assert all(thread.is_alive() for thread in cluster.threads)
        cluster.run(requests(1))
    finally:
        cluster.close()


@pytest.mark.parametrize("name", ["stage-0", "stage-1", "router-0", "experts-1"])
def test_every_role_asks_for_the_memory_that_it_needs(checkpoint, monkeypatch, name):
    asks_for_what_it_needs(checkpoint, LAYOUTS["disaggregated"], name, monkeypatch)


def test_a_dense_stage_asks_for_the_memory_that_it_needs(dense, monkeypatch):
    asks_for_what_it_needs(dense("qwen2"), DENSE_LAYOUTS["two stages"], "stage-1", monkeypatch)


def asks_for_what_it_needs(checkpoint, layout, name, monkeypatch):
    """By a stand-in for a device's free memory, which counts once the weights are there."""
    config = load_config(checkpoint)
    layout = build_layout(LayoutConfig(**layout), config)
    (spec,) = [worker for worker in layout.workers if worker.name == name]
    limits = StepLimits(16, 64, 200)
    parts = worker_bytes(
        config,
        layout,
        spec,
        num_pages=256,
        page_size=PAGE_SIZE,
        max_num_seqs=16,
        max_batch_tokens=64,
        max_context_len=200,
    )
    cluster = SimpleNamespace(layout=layout, transport="sockets", dtype="float32")
    boot = msgspec.structs.replace(Cluster.boot(cluster, checkpoint, name, 256, 5.0, 2.0), limits=limits)
    free = sum(parts.values())
    monkeypatch.setattr(loading, "free_bytes", lambda device: free)
    Worker(boot).close()
    free -= 1
    with pytest.raises(OutOfDeviceMemory, match=next(iter(parts))):
        Worker(boot)
