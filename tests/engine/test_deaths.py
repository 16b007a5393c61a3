"""Workers that die, as threads: texts go on as if nothing had happened."""

import pytest
from small_model import quantize
from thread_cluster import DENSE_LAYOUTS, GROUPS, LAYOUTS, Cluster, outlive, requests

from r1_cluster.weights.tensors import INT8


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"spares": 1}, {"redundant_experts": 1}], ids=["cold", "spare", "copies"]
)
@pytest.mark.parametrize("name", ["stage-0", "stage-1", "router-0", "router-1", "experts-1"])
def test_texts_go_on_when_a_worker_dies(checkpoint, name, more):
    outlive(Cluster(checkpoint, LAYOUTS["disaggregated"] | more), name)


@pytest.mark.slow
@pytest.mark.parametrize("transport", GROUPS)
@pytest.mark.parametrize("name", ["stage-0", "stage-1", "router-1", "experts-1"])
def test_texts_go_on_when_a_member_of_process_groups_dies(checkpoint, name, transport):
    outlive(Cluster(checkpoint, LAYOUTS["disaggregated"] | {"spares": 1}, transport=transport), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage-1", "experts-1"])
def test_texts_go_on_with_int8_weights(checkpoint, tmp_path, name):
    """The successor reads the same integers; texts are those of one process, and not those of floats."""
    folder = tmp_path / "int8"
    quantize(checkpoint, folder, INT8)
    outlive(Cluster(folder, LAYOUTS["disaggregated"] | {"spares": 1}), name)
    texts = []
    for layout, weights in (("disaggregated", folder), ("colocated", folder), ("colocated", checkpoint)):
        cluster = Cluster(weights, LAYOUTS[layout])
        texts.append(cluster.run(requests(8, ignore_eos=True)))
        cluster.close()
    assert texts[0] == texts[1]
    assert texts[1] != texts[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "layout", "name", "spares"),
    [
        ("llama", "colocated", "stage-0", 0),
        ("qwen3", "colocated", "stage-0", 1),
        ("qwen3", "two stages", "stage-0", 0),
        ("llama", "two stages", "stage-0", 1),
        ("qwen2", "two stages", "stage-1", 0),
        ("qwen3", "two stages", "stage-1", 1),
    ],
)
def test_dense_texts_go_on_when_a_stage_dies(dense, model_type, layout, name, spares):
    outlive(Cluster(dense(model_type), DENSE_LAYOUTS[layout] | {"spares": spares}), name)
