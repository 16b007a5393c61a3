"""Texts of whole clusters of threads: those of one request alone, in every layout."""

import pytest
from thread_cluster import DENSE_LAYOUTS, LAYOUTS, Cluster, requests

from r1_cluster.records import Request, SamplingParams

EXPECTED = {}


@pytest.mark.slow
def test_every_text_is_as_if_alone_and_the_same_in_every_layout(cluster):
    asked = requests(24)
    together = cluster.run(asked)
    for request in asked[::6]:
        assert cluster.run([request]) == {request.request_id: together[request.request_id]}
    assert cluster.scheduler.num_pages_used == 0
    assert together == EXPECTED.setdefault("texts", together)


@pytest.mark.slow
def test_preemption_and_micro_batches_change_no_text(checkpoint):
    asked = requests(12)
    plain = Cluster(checkpoint, LAYOUTS["disaggregated"])
    scarce = Cluster(checkpoint, LAYOUTS["disaggregated"], num_pages=30, micro_batches=2, max_batch_tokens=24)
    try:
        assert scarce.run(asked) == plain.run(asked)
        assert scarce.scheduler.num_preempted > 0
        scarce.scheduler.check()
    finally:
        scarce.close()
        plain.close()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_dense_texts_are_as_if_alone_after_preemption_and_in_every_layout(dense, model_type):
    asked = requests(12)
    plain = Cluster(dense(model_type), DENSE_LAYOUTS["colocated"])
    scarce = {"num_pages": 30, "micro_batches": 2, "max_batch_tokens": 24}
    other = Cluster(dense(model_type), DENSE_LAYOUTS["two stages"], **scarce)
    try:
        texts = plain.run(asked)
        assert len({tuple(text) for text in texts.values()}) > len(asked) // 2
        for request in asked[::5]:
            assert plain.run([request]) == {request.request_id: texts[request.request_id]}
        assert other.run(asked) == texts
        assert other.scheduler.num_preempted > 0
        other.scheduler.check()
    finally:
        other.close()
        plain.close()


def test_a_continued_request_goes_on_at_the_next_token(cluster):
    (request,) = requests(1, ignore_eos=True)
    (text,) = cluster.run([request]).values()
    half = len(text) // 2
    continued = Request(
        "again",
        request.prompt,
        request.sampling,
        request.max_tokens,
        [],
        "sink",
        text[:half],
        ignore_eos=True,
    )
    cluster.core.submit(continued)
    rest = []
    while len(rest) < len(text) - half:
        delta = cluster.deltas.get(timeout=60)
        assert delta.position == half + len(rest)
        rest += delta.tokens
    assert text[:half] + rest == text
    cluster.ends.get(timeout=10)


def test_abort_frees_the_pages(cluster):
    cluster.core.submit(
        Request("long", [7, 8, 9], SamplingParams(0.0, 1.0, 0, 0), 190, [], "sink", ignore_eos=True)
    )
    cluster.deltas.get(timeout=60)
    cluster.core.abort("long", 0)
    assert cluster.ends.get(timeout=10) == ("long", None)
    cluster.run(requests(1))
    assert cluster.scheduler.num_pages_used == 0
    cluster.scheduler.check()
