from types import SimpleNamespace

import pytest

from r1_cluster.config import ConfigError, LayoutConfig
from r1_cluster.models.config import GqaShape
from r1_cluster.planning.layout import build_layout

MODEL = SimpleNamespace(num_hidden_layers=4, moe_layers=range(1, 4), moe=SimpleNamespace(n_routed_experts=8))


DENSE = SimpleNamespace(num_hidden_layers=4, moe_layers=range(4, 4), moe=None)


def build(model=MODEL, **layout):
    return build_layout(LayoutConfig(**layout), model)


def test_colocated_is_one_worker_with_every_role():
    (worker,) = build(kind="colocated").workers
    assert worker.roles == ("stage", "router", "experts")
    assert (worker.stage, worker.router, worker.experts) == ((0, 4), (0, 4), (0, 8))
    assert build(kind="colocated").connects_to(worker) == ()


def test_disaggregated_links():
    layout = build(kind="disaggregated", stages=2, expert_shards=3)
    assert [w.name for w in layout.workers] == [
        "stage-0", "stage-1", "router-0", "router-1", "experts-0", "experts-1", "experts-2",
    ]  # fmt: skip
    by_name = {worker.name: worker for worker in layout.workers}
    assert layout.connects_to(by_name["stage-0"]) == ("stage-1", "router-0")
    assert layout.connects_to(by_name["stage-1"]) == ("router-1",)
    assert layout.connects_to(by_name["router-1"]) == ("experts-0", "experts-1", "experts-2")
    assert layout.connects_to(by_name["experts-2"]) == ()
    assert [shard.experts for shard in layout.shards] == [(0, 2), (2, 5), (5, 8)]


def test_a_stage_of_dense_layers_has_no_router():
    layout = build(kind="disaggregated", stages=["0-0", "1-3"])
    assert [w.name for w in layout.workers if w.router] == ["router-1"]
    assert layout.router_of(layout.stages[0][0]) is None


@pytest.mark.parametrize(
    ("layout", "on_cpu", "on_cuda"),
    [
        ({"kind": "colocated"}, 1, 1),
        ({"kind": "disaggregated", "stages": 1}, 2, 1),
        ({"kind": "disaggregated", "stages": 3, "expert_shards": 2}, 3, 1),
    ],
)
def test_steps_in_flight_are_as_many_as_stages_and_two_where_they_can_take_turns(layout, on_cpu, on_cuda):
    assert build(**layout).micro_batches("cpu") == on_cpu
    assert build(**layout).micro_batches("cuda") == on_cuda


def test_steps_in_flight_of_a_dense_model_are_as_many_as_stages():
    for stages in (1, 3):
        layout = build(DENSE, kind="disaggregated", stages=stages)
        assert layout.micro_batches("cpu") == layout.micro_batches("cuda") == stages


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"stages": 5}, "layout.stages: 5 parts are asked for, but the model has only 4 layers"),
        (
            {"expert_shards": 9},
            "layout.expert_shards: 9 parts are asked for, but the model has only 8 experts",
        ),
        ({"stages": ["0-1"]}, "layout.stages: the ranges cover 2 layers, but the model has 4"),
        ({"stages": ["0-1", "3-3"]}, "layout.stages: '3-3' should start at 2"),
        ({"stages": ["0-2", "2-3"]}, "layout.stages: '2-3' should start at 3"),
        ({"stages": ["0-9"]}, "layout.stages: the ranges cover 10 layers, but the model has 4"),
        ({"expert_shards": ["0-3", "5-7"]}, "layout.expert_shards: '5-7' should start at 4"),
        ({"expert_shards": ["all"]}, "layout.expert_shards: 'all' is no range"),
        ({"kind": "colocated", "stages": 2}, "layout.kind: colocated puts everything in one worker"),
    ],
)
def test_what_does_not_cover_the_model_is_refused_with_the_numbers(layout, message):
    with pytest.raises(ConfigError) as caught:
        build(**{"kind": "disaggregated", **layout})
    assert message in str(caught.value)


def test_a_dense_model_has_stages_alone():
    (worker,) = build(DENSE, kind="colocated").workers
    assert worker.roles == ("stage",)
    layout = build(DENSE, kind="disaggregated", stages=2, spares=1)
    assert [(w.name, w.roles) for w in layout.workers] == [("stage-0", ("stage",)), ("stage-1", ("stage",))]
    assert layout.connects_to(layout.workers[0]) == ("stage-1",)
    assert layout.shards == ()
    assert not layout.can_do_without(["stage-0"])
    assert [spare.name for spare in layout.spares] == ["spare-0"]


@pytest.mark.parametrize("kind", ["colocated", "disaggregated"])
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"expert_shards": 2}, "layout.expert_shards: 2, but the model has no experts: leave it out"),
        ({"expert_shards": ["0-7"]}, "layout.expert_shards: ['0-7'], but"),
        ({"redundant_experts": 1}, "layout.redundant_experts: 1, but"),
        ({"expert_shards": 2, "redundant_experts": 1}, "shards: 2 and layout.redundant_experts: 1, but"),
    ],
)
def test_experts_of_a_dense_model_are_refused_by_name(kind, more, words):
    with pytest.raises(ConfigError) as caught:
        build(DENSE, kind=kind, **more)
    assert words in str(caught.value)


def dense(heads=12, kv_heads=2, inner=8960):
    shape = GqaShape(heads, kv_heads, head_dim=128, qkv_bias=True, qk_norm=False)
    return SimpleNamespace(
        num_hidden_layers=4, moe_layers=range(4, 4), moe=None, attention=shape, intermediate_size=inner,
        vocab_size=1000,
    )  # fmt: skip


def test_ranks_of_stages_are_linked_with_each_other_and_their_successors():
    layout = build(dense(), kind="disaggregated", stages=2, tensor_parallel=2)
    assert [[rank.name for rank in stage] for stage in layout.stages] == [
        ["stage-0-rank-0", "stage-0-rank-1"],
        ["stage-1-rank-0", "stage-1-rank-1"],
    ]
    assert [(w.stage, w.rank, w.ranks) for w in layout.workers] == [
        ((0, 2), 0, 2), ((0, 2), 1, 2), ((2, 4), 0, 2), ((2, 4), 1, 2),
    ]  # fmt: skip
    links = [layout.connects_to(worker) for worker in layout.workers]
    assert links == [("stage-0-rank-1", "stage-1-rank-0"), ("stage-1-rank-1",), ("stage-1-rank-1",), ()]
    assert not layout.can_do_without(["stage-0-rank-1"])


def test_colocated_ranks_divide_the_experts():
    moe = SimpleNamespace(n_routed_experts=7, shared_intermediate_size=64)
    model = SimpleNamespace(**vars(dense()) | {"moe": moe, "moe_layers": range(1, 4)})
    layout = build(model, kind="colocated", tensor_parallel=2)
    assert [(w.experts, w.router) for w in layout.workers] == [((0, 3), (0, 4)), ((3, 7), (0, 4))]
    assert [layout.connects_to(worker) for worker in layout.workers] == [("stage-0-rank-1",), ()]
    assert all(map(layout.has_its_experts, layout.workers))
    apart = build(model, kind="disaggregated", tensor_parallel=2, expert_shards=2)
    by_name = {worker.name: worker for worker in apart.workers}
    # The first rank asks the router for all of them.
    assert apart.connects_to(by_name["stage-0-rank-0"]) == ("stage-0-rank-1", "router-0")
    assert apart.connects_to(by_name["stage-0-rank-1"]) == ()
    assert apart.connects_to(by_name["router-0"]) == ("experts-0", "experts-1")


def experts_model(num_experts=8):
    moe = SimpleNamespace(n_routed_experts=num_experts, shared_intermediate_size=64)
    return SimpleNamespace(**vars(dense()) | {"moe": moe, "moe_layers": range(1, 4)})


def parallel(model=None, **more):
    return build(model or experts_model(), **{"kind": "expert-parallel", "data_parallel": 3, **more})


def test_every_data_rank_has_all_layers_and_its_part_of_the_experts():
    layout = parallel(redundant_experts=1, spares=1)
    assert [(w.name, w.experts, w.copies, w.data_rank) for w in layout.workers] == [
        ("dp-0", (0, 2), ((2, 5),), 0),
        ("dp-1", (2, 5), ((5, 8),), 1),
        ("dp-2", (5, 8), ((0, 2),), 2),
    ]
    assert all(w.roles == ("stage", "router", "experts") and w.stage == (0, 4) for w in layout.workers)
    assert [layout.connects_to(worker) for worker in layout.workers] == [("dp-1", "dp-2"), ("dp-2",), ()]
    assert [ranks[0].name for ranks in layout.first_stages] == ["dp-0", "dp-1", "dp-2"]
    assert all(layout.following(worker) is None for worker in layout.workers)
    assert not any(map(layout.has_its_experts, layout.workers))
    assert layout.micro_batches("cpu") == layout.micro_batches("cuda") == 1  # they go through a step together
    assert layout.whole_data_ranks({"dp-1"}) == [0, 2]
    assert layout.can_do_without({"dp-1"})
    assert not layout.can_do_without({"dp-0", "dp-2"})  # both hosts of dp-0's experts
    assert not parallel().can_do_without({"dp-1"})


def test_data_ranks_of_several_ranks():
    layout = parallel(data_parallel=2, tensor_parallel=2, redundant_experts=1)
    by_name = {worker.name: worker for worker in layout.workers}
    # Each rank of tensor parallelism has its half of the experts, which its data ranks divide.
    assert {name: (w.experts, w.copies) for name, w in by_name.items()} == {
        "dp-0-rank-0": ((0, 2), ((2, 4),)),
        "dp-0-rank-1": ((4, 6), ((6, 8),)),
        "dp-1-rank-0": ((2, 4), ((0, 2),)),
        "dp-1-rank-1": ((6, 8), ((4, 6),)),
    }
    assert layout.connects_to(by_name["dp-0-rank-0"]) == ("dp-0-rank-1", "dp-1-rank-0")
    assert layout.connects_to(by_name["dp-0-rank-1"]) == ("dp-1-rank-1",)
    assert [w.name for w in layout.exchange_of(by_name["dp-1-rank-1"])] == ["dp-0-rank-1", "dp-1-rank-1"]
    # Without one of its ranks a data rank takes no part, and all its experts have their copies elsewhere.
    assert [w.name for w in layout.takes_part({"dp-1-rank-0"})] == ["dp-0-rank-0", "dp-0-rank-1"]
    assert layout.can_do_without({"dp-1-rank-0"})
    assert not layout.can_do_without({"dp-1-rank-0", "dp-0-rank-1"})


@pytest.mark.parametrize(
    ("model", "layout", "words"),
    [
        (DENSE, {}, "layout.kind: expert-parallel divides experts, and the model has none: use colocated"),
        (None, {"data_parallel": 1}, "1 data ranks of 1 workers are asked for; kind: expert-parallel has at least"
         " 2 data ranks, and at most 8 for 8 experts"),
        (None, {"data_parallel": 9}, "and at most 8 for 8 experts"),
        (None, {"data_parallel": 5, "tensor_parallel": 2}, "5 data ranks of 2 workers are asked for; kind:"
         " expert-parallel has at least 2 data ranks, and at most 4 for 8 experts"),
        (None, {"tensor_parallel": 5}, "layout.tensor_parallel: 5 ranks cannot divide 12 attention heads"),
        (None, {"redundant_experts": 3}, "3 further hosts of each part of the experts are asked for, but there are"
         " only 2 other data ranks"),
        (None, {"stages": 2}, "layout.stages and layout.expert_shards: in kind: expert-parallel"),
        (None, {"expert_shards": 2}, "leave them out"),
        (None, {"kind": "disaggregated"}, "layout.data_parallel: 3 data ranks are those of kind: expert-parallel;"
         " for engines side by side, which share nothing, use engine.replicas: 3"),
        (DENSE, {"kind": "colocated"}, "use engine.replicas: 3"),
    ],
)  # fmt: skip
def test_expert_parallel_that_cannot_be_is_refused_with_what_can(model, layout, words):
    with pytest.raises(ConfigError) as caught:
        parallel(model, **layout)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("model", "ranks", "words"),
    [
        (dense(), 5, "5 ranks cannot divide 12 attention heads and 2 heads of keys, with 8960 hidden units; the"
         " next smaller number that can is 4"),
        (dense(heads=12, kv_heads=4), 6, "that can is 4"),
        (dense(heads=7, kv_heads=7), 6, "6 ranks cannot divide 7 attention heads, with 8960 hidden units; the next"
         " smaller number that can is 1"),
        (dense(heads=64, kv_heads=8, inner=20), 32, "that can is 16"),
    ],
)  # fmt: skip
def test_ranks_that_cannot_divide_a_model_are_refused_with_the_nearest_that_can(model, ranks, words):
    with pytest.raises(ConfigError) as caught:
        build(model, tensor_parallel=ranks)
    assert words in str(caught.value)
