"""Stages that tensor parallelism divides among ranks: the same texts, and one rank's death is the stage's."""

import pytest
from thread_cluster import Cluster, outlive, requests, texts_of

RANKS = {
    "two ranks": {"kind": "colocated", "tensor_parallel": 2},
    "four ranks": {"kind": "colocated", "tensor_parallel": 4},
    "two stages of two": {
        "kind": "disaggregated", "stages": 2, "expert_shards": 2, "tensor_parallel": 2,
    },
}  # fmt: skip
PLAIN = {"kind": "colocated"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_texts_are_as_if_alone_and_those_of_one_process(checkpoint, name):
    """Sums are added in another order, within 1e-6 of the logits: of these texts none is so near to another."""
    asked = requests(10)
    assert texts_of(checkpoint, RANKS[name], asked) == texts_of(checkpoint, PLAIN, asked)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_dense_texts_after_preemption(dense, model_type):
    asked = requests(10)
    scarce = {"num_pages": 30, "micro_batches": 2, "max_batch_tokens": 24}
    layout = {"kind": "disaggregated", "stages": 2, "tensor_parallel": 2}
    assert texts_of(dense(model_type), layout, asked, **scarce) == texts_of(dense(model_type), PLAIN, asked)


@pytest.mark.slow
@pytest.mark.parametrize("spares", [0, 1])
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("two ranks", "stage-0-rank-0"),
        ("two ranks", "stage-0-rank-1"),
        ("four ranks", "stage-0-rank-2"),
        ("two stages of two", "stage-1-rank-0"),
        ("two stages of two", "stage-0-rank-1"),
        ("two stages of two", "router-1"),
        ("two stages of two", "experts-1"),
    ],
)
def test_texts_go_on_when_a_rank_dies(checkpoint, layout, name, spares):
    outlive(Cluster(checkpoint, RANKS[layout] | {"spares": spares}), name)
