"""Data ranks with requests of their own, that exchange tokens with each other's experts: the texts of one
process, and one rank's death costs nothing but time."""

import threading

import pytest
from thread_cluster import Cluster, outlive, requests, texts_of

PLAIN = {"kind": "colocated"}
TWO = {"kind": "expert-parallel", "data_parallel": 2}
LAYOUTS = {
    "two": TWO,
    "three with copies": {"kind": "expert-parallel", "data_parallel": 3, "redundant_experts": 1},
    "two of two ranks": TWO | {"tensor_parallel": 2},
    "two of two ranks with copies": TWO | {"tensor_parallel": 2, "redundant_experts": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_texts_are_those_of_one_process(checkpoint, name):
    """Bit by bit but for ranks of tensor parallelism, whose sums have another order."""
    asked = requests(10)
    assert texts_of(checkpoint, LAYOUTS[name], asked) == texts_of(checkpoint, PLAIN, asked)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["host memory", pytest.param("gloo", marks=pytest.mark.system)])
def test_texts_over_a_devices_links(checkpoint, transport):
    asked = requests(6)
    assert texts_of(checkpoint, TWO, asked, transport=transport) == texts_of(checkpoint, PLAIN, asked)


@pytest.mark.slow
def test_texts_after_preemption_on_either_rank(checkpoint):
    """Whoever lost its pages on one rank may go on at the other one."""
    asked = requests(12)
    scarce = {"num_pages": 16, "max_batch_tokens": 24, "max_model_len": 128}
    cluster = Cluster(checkpoint, TWO, micro_batches=2, **scarce)
    try:
        texts = cluster.run(asked)
        assert cluster.scheduler.num_preempted > 0
        cluster.scheduler.check()
    finally:
        cluster.close()
    assert texts == texts_of(checkpoint, PLAIN, asked, max_model_len=128)


@pytest.mark.slow
def test_requests_are_balanced_and_a_rank_without_any_takes_part(checkpoint):
    cluster = Cluster(checkpoint, LAYOUTS["three with copies"])
    most = [0, 0, 0]
    send = cluster.pipeline.send

    def watch(plan):
        most[plan.data_rank] = max(most[plan.data_rank], len(plan.seq_ids))
        send(plan)

    cluster.pipeline.send = watch
    try:
        cluster.run(requests(1))
        assert most == [1, 0, 0]
        cluster.run(requests(9, ignore_eos=True))
        assert most == [3, 3, 3]
    finally:
        cluster.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "name", "spares"),
    [
        ("two", "dp-0", 0),
        pytest.param("two", "dp-1", 1, marks=pytest.mark.system),
        ("three with copies", "dp-1", 1),
        pytest.param("two of two ranks", "dp-1-rank-0", 0, marks=pytest.mark.system),
        ("two of two ranks with copies", "dp-0-rank-1", 0),
    ],
)
def test_texts_go_on_when_a_rank_dies(checkpoint, layout, name, spares):
    outlive(Cluster(checkpoint, LAYOUTS[layout] | {"spares": spares}), name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [pytest.param("three with copies", marks=pytest.mark.system), "two of two ranks with copies"],
)
def test_with_copies_the_others_go_on_while_nobody_comes_back(checkpoint, layout):
    asked = requests(8, ignore_eos=True)
    cluster = Cluster(checkpoint, LAYOUTS[layout])
    name = cluster.layout.workers[-1].name
    never = threading.Event()
    replace, cluster.core.recovery._replace = cluster.replace, lambda *lost: never.set()
    try:
        undisturbed = cluster.run(asked)
        steps = cluster.core.num_steps

        def kill():
            while cluster.core.num_steps < steps + 5:
                threading.Event().wait(0.001)
            cluster.workers[name].stop()

        thread = threading.Thread(target=kill)
        thread.start()
        assert cluster.run(asked) == undisturbed
        thread.join()
        assert never.is_set()
        assert cluster.core.recovery.missing == {name}
        present = [rank.present for rank in cluster.scheduler.data_ranks]
        assert present == [True] * (len(present) - 1) + [False]
        cluster.scheduler.check()
        replace(name, None, 0.0)  # it comes back at last, and has its part again
        while not cluster.scheduler.data_ranks[-1].present:
            threading.Event().wait(0.01)
        assert cluster.run(asked) == undisturbed
    finally:
        cluster.close()


@pytest.mark.slow
def test_experts_that_fail_end_the_step_for_all_and_nobodys_answer(checkpoint):
    asked = requests(6, ignore_eos=True)
    cluster = Cluster(checkpoint, TWO)
    try:
        undisturbed = cluster.run(asked)
        span = cluster.workers["dp-1"].router.exchange._own[0]
        failed = threading.Event()

        def fail_once(layer, x_ND, counts):
            if not failed.is_set():
                failed.set()
                raise RuntimeError("of this test")
            return span.forward(layer, x_ND, counts)

        cluster.workers["dp-1"].router.exchange._own[0] = span._replace(forward=fail_once)
        assert cluster.run(asked) == undisturbed
        assert failed.is_set()
        assert cluster.core.recovery.num_recoveries == 1
        assert cluster.core.failure is None
    finally:
        cluster.close()
