import pytest
import torch
from small_model import config_values, dense_values, write_checkpoint

from r1_cluster.config import LayoutConfig
from r1_cluster.models.family import parse_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.network import StageModel
from r1_cluster.planning.layout import build_layout
from r1_cluster.planning.memory import OutOfDeviceMemory, check_room, room, worker_bytes
from r1_cluster.weights.checkpoint import Checkpoint

CONFIG = parse_config(config_values())
LIMITS = {"num_pages": 10, "page_size": 16, "max_num_seqs": 8, "max_batch_tokens": 64, "max_context_len": 512}
COLOCATED = build_layout(LayoutConfig(kind="colocated"), CONFIG)
APART = build_layout(LayoutConfig(kind="disaggregated", stages=2, expert_shards=2), CONFIG)
MORE = {
    "max_num_seqs": 500,
    "max_batch_tokens": 5000,
    "max_context_len": 50000,
    "num_pages": 100,
    "page_size": 64,
}


def parts_of(name, layout=APART, config=CONFIG, **limits):
    (worker,) = [worker for worker in layout.workers if worker.name == name]
    return worker_bytes(config, layout, worker, **LIMITS | limits)


def test_pages_are_what_the_caches_take():
    (first, last) = APART.stages[0][0].stage
    assert parts_of("stage-0")["pages"] == (last - first) * 10 * 16 * (16 + 8) * 2
    assert parts_of("stage-0", COLOCATED)["pages"] == CONFIG.num_hidden_layers * 10 * 16 * (16 + 8) * 2


@pytest.mark.parametrize(
    ("values", "scales"), [(config_values(), 2), (dense_values(num_key_value_heads=2, head_dim=16), 2 * 2)]
)
@pytest.mark.parametrize("fp8_cache", [False, True])
def test_pages_are_what_a_stage_allocates(tmp_path, values, scales, fp8_cache):
    """In FP8 a byte a number, and four a scale."""
    config = write_checkpoint(tmp_path, values)
    shard = Shard(torch.device("cpu"), torch.bfloat16, False, fp8_cache)
    with Checkpoint(tmp_path, tensor_table(config)) as checkpoint:
        stage = StageModel(config, Loader(checkpoint, shard), range(1, 3))
    caches = stage.new_cache(LIMITS["num_pages"], LIMITS["page_size"])
    parts = [[c] if isinstance(c, torch.Tensor) else [c.values, c.scale] for c in caches]
    allocated = sum(part.nbytes for both in parts for part in both)
    layout = build_layout(LayoutConfig(kind="disaggregated", stages=["0-0", "1-2"]), config)
    assert parts_of("stage-1", layout, config, fp8_cache=fp8_cache)["pages"] == allocated
    width = config.attention.cache_width
    assert allocated == 2 * 10 * 16 * (width + 4 * scales if fp8_cache else 2 * width)


def test_a_worker_needs_what_its_roles_need():
    stage = {"pages", "expanded keys and values", "a stage's rows", "attention parts and graphs"}
    router, experts = {"a router's rows"}, {"experts' rows"}
    assert parts_of("stage-0").keys() == stage | {"links"}
    assert parts_of("stage-1").keys() == stage | {"logits", "links"}  # the last one has the head
    assert parts_of("router-1").keys() == router | {"rows to and from experts", "links"}
    assert parts_of("experts-0").keys() == experts | {"links"}
    assert parts_of("stage-0", COLOCATED).keys() == stage | {"logits"} | router | experts
    for worker in (*APART.workers, *COLOCATED.workers):
        layout = APART if worker in APART.workers else COLOCATED
        assert all(size > 0 for size in worker_bytes(CONFIG, layout, worker, **LIMITS).values())


def test_a_dense_stage_needs_pages_for_keys_and_values_and_nothing_to_expand():
    dense = parse_config(dense_values(num_attention_heads=4, num_key_value_heads=2, head_dim=16))
    layout = build_layout(LayoutConfig(kind="disaggregated", stages=["0-1", "2-2"]), dense)
    parts = parts_of("stage-0", layout, dense)
    assert parts.keys() == {"pages", "a stage's rows", "attention parts and graphs", "links"}
    assert parts["pages"] == 2 * 10 * 16 * (2 * 2 * 16) * 2
    assert parts_of("stage-1", layout, dense).keys() == parts.keys() | {"logits"}


def test_ranks_divide_what_is_divided():
    """Latents are each rank's own; of keys' heads a rank has at least one."""
    dense = parse_config(dense_values(num_attention_heads=4, num_key_value_heads=2, head_dim=16))
    for config, kept in ((CONFIG, 1), (dense, 0.5)):
        one = parts_of("stage-0", build_layout(LayoutConfig(), config), config)
        two, four = (
            parts_of("stage-0-rank-1", build_layout(LayoutConfig(tensor_parallel=ranks), config), config)
            for ranks in (2, 4)
        )
        assert two["pages"] == four["pages"] == kept * one["pages"]
        assert one["a stage's rows"] > two["a stage's rows"] > four["a stage's rows"]
        assert (two["sums of ranks"], four["sums of ranks"]) == (64 * 48 * 8, 64 * 48 * 12)
        assert four["links"] == 3 * two["links"] > 0


@pytest.mark.parametrize(
    ("name", "grows_with"),
    [
        ("stage-1", set(MORE)),
        ("router-1", {"max_num_seqs", "max_batch_tokens"}),
        ("experts-0", {"max_num_seqs", "max_batch_tokens"}),
    ],
)
def test_more_of_anything_needs_more_where_it_is_needed(name, grows_with):
    base = sum(parts_of(name).values())
    grown = {key for key, value in MORE.items() if sum(parts_of(name, **{key: value}).values()) > base}
    assert grown == grows_with


def test_links_are_counted_at_both_ends():
    links = {worker.name: parts_of(worker.name).get("links", 0) for worker in APART.workers}
    routers = [worker for worker in APART.workers if worker.router is not None]
    each = links["experts-0"] // len(routers)
    assert links["stage-0"] == each * (1 + (APART.router_of(APART.stages[0][0]) is not None))
    assert links["stage-1"] == each * 2  # the first stage, and its router
    assert links["router-1"] == each * 3  # its stage, and both shards


def test_rows_for_experts_are_at_most_a_message():
    """What goes in pieces is never here as a whole: R1 at 100,000 tokens a step needs no more than at 9,362."""
    values = {"hidden_size": 7168, "num_experts_per_tok": 8, "n_routed_experts": 256, "n_group": 8}
    r1 = parse_config(config_values(**values))
    layout = build_layout(LayoutConfig(kind="disaggregated", expert_shards=2), r1)
    for name, part in (("router-0", "rows to and from experts"), ("experts-0", "experts' rows")):
        fewer, most, more = (
            parts_of(name, layout, r1, max_batch_tokens=tokens)[part] for tokens in (4000, 9362, 100_000)
        )
        assert fewer < most == more


def test_experts_of_a_rank_have_room_for_the_rows_of_all():
    def of(data_ranks):
        layout = build_layout(LayoutConfig(kind="expert-parallel", data_parallel=data_ranks), CONFIG)
        return parts_of("dp-0", layout)

    two, four = of(2), of(4)
    moe = CONFIG.moe
    for data_ranks, parts in ((2, two), (4, four)):
        for_one = min(moe.num_experts_per_tok, moe.n_routed_experts // data_ranks)
        rows = data_ranks * LIMITS["max_batch_tokens"] * for_one
        assert parts["rows of all ranks"] == rows * 4 * CONFIG.hidden_size * 2
    assert four["links"] == 3 * two["links"]
    assert four["pages"] == two["pages"] == parts_of("stage-0", COLOCATED)["pages"]


def test_what_does_not_fit_is_said_with_numbers():
    parts = {"pages": 3 << 30, "logits": 1 << 29}
    check_room(parts, 7 << 29)
    with pytest.raises(
        OutOfDeviceMemory, match=r"has 3\.00 GiB .* 3\.50 GiB .*pages 3\.00, logits 0\.50.*num_pages"
    ):
        check_room(parts, 3 << 30)
    with pytest.raises(OutOfDeviceMemory, match=r"lower engine\.max_batch_tokens or max_num_seqs$"):
        check_room({"experts' rows": 1 << 30}, 0)


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_so_many_tokens_fit_and_not_one_more(fp8_cache):
    limits = {key: LIMITS[key] for key in ("max_num_seqs", "max_batch_tokens", "max_context_len")}
    for worker in APART.workers:
        plain = parts_of(worker.name)
        pages = plain.pop("pages", 0)
        device_bytes = 1000 + sum(plain.values()) + 12345
        found = room(
            CONFIG, APART, worker, weights=1000, device_bytes=device_bytes, fp8_cache=fp8_cache, **limits
        )
        assert (found.weights, found.workspace, found.rest) == (1000, sum(plain.values()), 12345)
        if not pages:
            assert (found.token_bytes, found.tokens) == (0, 0)
            continue
        for tokens, fits in ((found.tokens, True), (found.tokens + 1, False)):
            sizes = {"num_pages": tokens, "page_size": 1, "fp8_cache": fp8_cache}
            needed = sum(parts_of(worker.name, **sizes).values())
            assert (needed <= device_bytes - found.weights) is fits
    assert room(CONFIG, APART, APART.workers[0], weights=1 << 40, device_bytes=1 << 30, **limits).tokens == 0
