"""Which workers share a node, and what is refused because no nodes could hold it: without a cluster."""

from functools import partial
from types import SimpleNamespace

import pytest

from r1_cluster.config import Cluster, ConfigError, Engine, LayoutConfig, Service
from r1_cluster.models.config import GqaShape
from r1_cluster.planning.layout import build_layout
from r1_cluster.planning.placement import check_placement, groups_of, nearest_layout

MODEL = SimpleNamespace(
    num_hidden_layers=4,
    moe_layers=range(1, 4),
    moe=SimpleNamespace(n_routed_experts=16, shared_intermediate_size=64),
    attention=GqaShape(12, 12, head_dim=16, qkv_bias=False, qk_norm=False),
    intermediate_size=64,
    vocab_size=96,
)
APART = {"kind": "disaggregated", "stages": 2, "expert_shards": 3}


def service(engine=None, address="auto", **layout):
    return Service(
        name="placed",
        model={"path": "model"},
        layout=LayoutConfig(**layout),
        engine=Engine(**engine or {}),
        cluster=Cluster(address=address),
    )


def check(asked, nodes):
    build = partial(build_layout, model=MODEL)
    check_placement(asked, build(asked.layout), nodes, build)


def refusal(asked, nodes):
    with pytest.raises(ConfigError) as caught:
        check(asked, nodes)
    return str(caught.value)


def test_a_stage_shares_a_bundle_with_its_router_and_experts_are_a_group_of_their_own():
    asked = service(**APART, spares=1, cpus_per_worker=0.5)
    groups, seats = groups_of(asked, build_layout(asked.layout, MODEL))
    assert {domain: (len(bundles), strategy) for domain, (bundles, strategy) in groups.items()} == {
        "stages": (2, "PACK"), "experts": (3, "PACK"), "spares": (1, "PACK"),
    }  # fmt: skip
    assert groups["stages"].bundles == [{"CPU": 1.0}, {"CPU": 1.0}]
    assert seats["router-1"] == seats["stage-1"] == ("stages", 1)


@pytest.mark.parametrize(("device", "name"), [("cuda", "GPU"), ("npu", "NPU")])
def test_each_worker_has_a_device_to_itself(device, name):
    asked = service(**APART, device=device, spread=True)
    groups, _ = groups_of(asked, build_layout(asked.layout, MODEL))
    assert groups["stages"] == ([{"CPU": 2.0, name: 2.0}] * 2, "STRICT_SPREAD")
    assert groups["experts"].bundles == [{"CPU": 1.0, name: 1.0}] * 3


@pytest.mark.parametrize(
    ("asked", "nodes"),
    [
        (service(cpus_per_worker=0.8), [{"CPU": 1}]),
        (service(tensor_parallel=4, cpus_per_worker=0), [{"CPU": 1}]),
        (service(**APART, spread=True), [{"CPU": 3}] * 3),
        (service(**APART, device="npu"), [{"CPU": 16, "NPU": 8}]),
        (service(tensor_parallel=2, spread=True, device="cuda"), [{"CPU": 4}, {"CPU": 4, "GPU": 1}] * 2),
    ],
)
def test_what_fits_is_not_refused(asked, nodes):
    check(asked, nodes)


@pytest.mark.parametrize(
    ("asked", "nodes", "words"),
    [
        (
            service(address=None, tensor_parallel=4),
            [{"CPU": 2}],
            "layout: 4 workers of 1 CPU each, with the engine and the ingress, need 4.2 CPUs, this machine has 2; "
            "what fits is layout.tensor_parallel: 1, or layout.cpus_per_worker: 0.45",
        ),
        (
            service(address=None, tensor_parallel=12, device="cuda", cpus_per_worker=0.1),
            [{"CPU": 16, "GPU": 8}],
            "layout: 12 workers of 1 GPU each need 12 GPUs, this machine has 8; what fits is layout.tensor_parallel: 6",
        ),
        (
            service(**APART | {"expert_shards": 16}, device="npu", cpus_per_worker=0.1),
            [{"CPU": 16, "NPU": 8}] * 2,
            "layout: 20 workers of 1 NPU each need 20 NPUs, the Ray cluster has 16; "
            "what fits is layout.expert_shards: 12",
        ),
        (
            service(device="cuda"),
            [{"CPU": 16}],
            "layout: 1 worker of 1 GPU needs 1 GPU, the Ray cluster has 0; no smaller one of its kind fits",
        ),
        (
            service(engine={"replicas": 2, "standby": True}, **APART, spares=1),
            [{"CPU": 15}],
            "layout: 16 workers of 1 CPU each, with the engine and the ingress, need 16.4 CPUs, the Ray cluster has "
            "15; what fits is layout.spares: 0, or layout.cpus_per_worker: 0.91",
        ),
        (
            service(**APART | {"stages": ["0-0", "1-2", "3-3"]}, spares=2, redundant_experts=1, tensor_parallel=2),
            [{"CPU": 9}],
            "layout: 16 workers of 1 CPU each, with the engine and the ingress, need 16.2 CPUs, the Ray cluster has "
            "9; what fits is layout.spares: 0 with layout.redundant_experts: 0 with layout.expert_shards: 2 with "
            "layout.stages: 2, or layout.cpus_per_worker: 0.55",
        ),
        (
            service(kind="expert-parallel", data_parallel=16, redundant_experts=2, device="cuda"),
            [{"CPU": 32, "GPU": 8}],
            "layout: 16 workers of 1 GPU each need 16 GPUs, the Ray cluster has 8; what fits is layout.data_parallel: 8",
        ),
        (
            service(kind="expert-parallel", data_parallel=4, tensor_parallel=2, device="npu"),
            [{"CPU": 32, "NPU": 3}],
            "what fits is layout.data_parallel: 3 with layout.tensor_parallel: 1",
        ),
        (
            service(kind="expert-parallel", data_parallel=2, device="npu"),
            [{"CPU": 32, "NPU": 1}],
            "layout: 2 workers of 1 NPU each need 2 NPUs, the Ray cluster has 1; no smaller one of its kind fits",
        ),
        (
            service(tensor_parallel=3, cpus_per_worker=2.5),
            [{"CPU": 4}] * 2,
            "layout: 3 times 2.5 CPUs are needed, each on one node, the Ray cluster has room for 2 on its 2 nodes of "
            "up to 4 CPUs; what fits is layout.tensor_parallel: 2, or layout.cpus_per_worker: 2",
        ),
        (
            service(cpus_per_worker=6),
            [{"CPU": 4}] * 2,
            "layout: 1 times 6 CPUs are needed, each on one node, the Ray cluster has room for 0 on its 2 nodes of up "
            "to 4 CPUs; what fits is layout.cpus_per_worker: 4",
        ),
        (
            service(**APART, device="cuda", cpus_per_worker=0),
            [{"CPU": 8, "GPU": 1}] * 8,
            "layout: 2 times 0 CPUs and 2 GPUs are needed, each on one node, the Ray cluster has room for 0 on its 8 "
            "nodes of up to 8 CPUs and 1 GPU; no smaller one of its kind fits",
        ),
        (
            service(**APART, spread=True),
            [{"CPU": 8}] * 2,
            "layout.spread: 3 nodes with 1 CPU are needed, one for each worker of a stage or expert shard, the Ray "
            "cluster has 2; what fits is layout.expert_shards: 2, or layout.spread: false",
        ),
        (
            service(tensor_parallel=4, spread=True, device="cuda"),
            [{"CPU": 16}, {"CPU": 16, "GPU": 8}],
            "layout.spread: 4 nodes with 1 CPU and 1 GPU are needed, one for each worker of a stage or expert shard, "
            "the Ray cluster has 1; what fits is layout.tensor_parallel: 1, or layout.spread: false",
        ),
    ],
)  # fmt: skip
def test_what_no_node_could_hold_is_refused_with_the_numbers_and_the_nearest_that_fits(asked, nodes, words):
    said = refusal(asked, nodes)
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("asked", "most", "nearest"),
    [
        ({"spares": 3}, 5, {"spares": 2}),
        ({"tensor_parallel": 4, "spares": 1}, 5, {"tensor_parallel": 3, "spares": 0}),
        ({"stages": 4, "expert_shards": 8}, 7, {"stages": 4, "expert_shards": 2}),
        ({"stages": ["0-0", "1-3"], "expert_shards": 8}, 5, {"stages": ["0-0", "1-3"], "expert_shards": 2}),
        ({"stages": 8, "expert_shards": 8}, 5, {"stages": 3, "expert_shards": 1}),
        ({"stages": ["0-0", "1-1", "2-3"]}, 4, {"stages": 2}),
        ({"stages": 2}, 2, None),
    ],
)
def test_the_nearest_layout_lowers_as_little_as_it_must(asked, most, nearest):
    """Of those whose numbers add up to so many."""

    def number(value):
        return value if isinstance(value, int) else len(value)

    def fits(config):
        stages, shards = number(config.stages), number(config.expert_shards)
        return stages + shards + config.tensor_parallel + config.spares <= most

    config = LayoutConfig(kind="disaggregated", **asked)
    found = nearest_layout(config, fits)
    assert found == (None if nearest is None else config.model_copy(update=nearest))
