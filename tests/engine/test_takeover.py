"""Engines that come, go and are deposed: what their workers do, and what the next engine reads back."""

import time
from array import array

import msgspec
import pytest
from thread_cluster import LAYOUTS, PAGE_SIZE, SECRET, Cluster, requests

from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import wait_any
from r1_cluster.comm.listener import connect
from r1_cluster.comm.wire import LinkError
from r1_cluster.engine.boot import ENGINE
from r1_cluster.engine.held import common
from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.pipeline import Pipeline
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.records import HeldSequence


def test_an_engine_of_an_old_epoch_is_refused(cluster):
    cluster.run(requests(1))
    worker = next(iter(cluster.workers.values()))
    link = connect(worker.listener.address, Hello(ENGINE, "old", 1, "control"), SECRET)
    with pytest.raises(LinkError):
        link.recv(10.0)
    cluster.run(requests(1))


def leave_by_themselves(cluster):
    """The engine stops, and nobody stops its workers."""
    cluster.core.stop()
    for thread in cluster.threads:
        thread.join(10)
        assert not thread.is_alive()
    cluster.pulse.close()
    cluster.sink.close()


@pytest.mark.slow
def test_workers_leave_when_their_lease_ends(checkpoint):
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"], lease_s=2.0)
    cluster.run(requests(2))
    leave_by_themselves(cluster)


@pytest.mark.slow
def test_workers_wait_longer_for_their_first_engine(checkpoint):
    class SlowToLoad(Cluster):
        def begin(self, name, incarnation):
            super().begin(name, incarnation)
            time.sleep(0.2)  # seven of them: by far longer than the lease

    cluster = SlowToLoad(checkpoint, LAYOUTS["disaggregated"], lease_s=0.5)
    cluster.run(requests(1))
    leave_by_themselves(cluster)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["disaggregated", "expert-parallel"])
def test_an_engine_that_takes_over_reads_back_what_the_workers_hold(checkpoint, layout):
    (request,) = requests(1, ignore_eos=True)
    request = msgspec.structs.replace(request, max_tokens=100)
    cluster = Cluster(checkpoint, LAYOUTS[layout])
    (text,) = cluster.run([request]).values()
    cluster.core.submit(request)
    got = []
    while len(got) < 30:
        got += cluster.deltas.get(timeout=60).tokens
    cluster.core.stop()
    assert cluster.ends.get(timeout=10)[0] == request.request_id
    # The next engine, over the same workers.
    epoch = 1 + max(max(worker.epoch, worker.office) for worker in cluster.workers.values())
    members = {name: cluster.member(name, epoch) for name in cluster.workers}
    pipeline = Pipeline(cluster.layout, members, epoch, 2.0)
    pipeline.kv_eras = cluster.pipeline.kv_eras
    held = pipeline.link(epoch, read_back=True)
    num_known = len(request.prompt) + 30
    (sequence,) = [sequences[request.request_id] for sequences in held if sequences]
    assert sequence.committed >= num_known - 2
    allocators = [PageAllocator(256, PAGE_SIZE) for _ in cluster.layout.first_stages]
    scheduler = Scheduler(Limits(16, 64, 200), allocators, frozenset({1}))
    scheduler.adopt(held)
    scheduler.add(msgspec.structs.replace(request, generated=text[:30]))
    scheduler.check()
    plans = scheduler.schedule(epoch)
    assert sum(sum(plan.num_new) for plan in plans) <= 2
    for plan in plans:
        pipeline.send(plan)
    results = []
    while len(results) < len(plans):
        for link in wait_any([member.link for member in pipeline.members.values()], 30.0):
            results += filter(None, [pipeline.receive(link)])
    assert [token for result in results for token in result.tokens] == text[30:31]
    pipeline.close()
    cluster.close()


@pytest.mark.slow
def test_what_other_data_ranks_hold_is_offered_though_one_has_lost_its_kv(checkpoint):
    """The former engine had computed on all, and lost a rank before it ended."""
    asked = [msgspec.structs.replace(r, max_tokens=100) for r in requests(3, ignore_eos=True)]
    cluster = Cluster(checkpoint, LAYOUTS["expert-parallel"])
    try:
        for request in asked:
            cluster.core.submit(request)
        begun = set()
        while len(begun) < 3:
            begun.add(cluster.deltas.get(timeout=60).request_id)
        cluster.core.stop()
        epoch = 1 + max(max(worker.epoch, worker.office) for worker in cluster.workers.values())
        members = {name: cluster.member(name, epoch) for name in cluster.workers}
        pipeline = Pipeline(cluster.layout, members, epoch, 2.0)
        pipeline.kv_eras = [1, epoch, 1]
        held = pipeline.link(epoch, read_back=True)
        assert [len(sequences) for sequences in held] == [1, 0, 1]
        pipeline.close()
    finally:
        cluster.close()


def test_what_was_held_before_a_stage_lost_its_kv_is_offered_to_nobody(checkpoint):
    (request,) = requests(1, ignore_eos=True)
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"])
    try:
        cluster.core.submit(msgspec.structs.replace(request, max_tokens=100))
        while len(cluster.deltas.get(timeout=60).tokens) < 1:
            pass
        cluster.core.stop()
        epoch = 1 + max(max(worker.epoch, worker.office) for worker in cluster.workers.values())
        members = {name: cluster.member(name, epoch) for name in cluster.workers}
        pipeline = Pipeline(cluster.layout, members, epoch, 2.0)
        # The engine before had seen stage 1 replaced, and died before it planned anything anew.
        pipeline.kv_eras = [epoch]
        assert pipeline.link(epoch, read_back=True) == [{}]
        pipeline.close()
    finally:
        cluster.close()


def held(tokens, pages, committed):
    return HeldSequence(array("i", tokens).tobytes(), array("i", pages).tobytes(), committed)


def test_ranks_hold_together_what_all_of_them_hold():
    """One has had plans that another had not: there a sequence went on, ended, or lost its pages."""
    one = {
        "same": held([1, 2, 3], [4], 3),
        "goes on": held([1, 2, 3], [5], 2),
        "ended": held([1, 2], [6], 2),
        "anew": held([1, 2, 3], [7], 3),
        "anew, elsewhere": held([1, 2, 3], [8], 3),
    }
    other = {
        "same": held([1, 2, 3], [4], 3),
        "goes on": held([1, 2, 3, 9], [5, 6], 3),
        "anew": held([1, 2], [7], 0),
        "anew, elsewhere": held([1, 2], [9], 0),
    }
    expected = {
        "same": held([1, 2, 3], [4], 3),
        "goes on": held([1, 2], [5, 6], 2),
        "anew": held([], [7], 0),
    }
    assert common([one, other]) == common([other, one]) == expected
    assert common([one]) == one
    assert common([]) == {}
    assert common([one, {}]) == {}
