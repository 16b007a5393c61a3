"""Decode steps recorded and replayed, and what a decode step launches. There is no CUDA graph here: a recorder of
the same interface keeps every operation and kernel launch with its arguments, and does them again in place."""

import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
from small_model import (
    DENSE_KERNEL_SHAPE,
    FP8_SHAPE,
    GREEDY,
    KERNEL_SHAPE,
    config_values,
    dense_values,
    to_fp8,
    write_checkpoint,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kernels import ops
from r1_cluster.comm.device_dispatch import DeviceDispatcher
from r1_cluster.engine.boot import StepLimits
from r1_cluster.engine.roles import RouterRole, StageRole, local_dispatcher
from r1_cluster.models.family import load_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.moe import ExpertModel, RouterModel
from r1_cluster.models.network import StageModel
from r1_cluster.records import SampleSpec, StepPlan, pack_int32
from r1_cluster.weights.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for what CUDA does itself")

PAGE_SIZE, NUM_PAGES = 16, 24


class Recording(TorchDispatchMode):
    """`operations` by torch and `launches` of kernels, in order."""

    def __init__(self):
        super().__init__()
        self.steps = []
        self.operations = []
        self.launches = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket.__name__)
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            # Views and in-place results are the same memory already; a fresh result goes where the old one lies.
            if isinstance(again, torch.Tensor) and again.data_ptr() != result.data_ptr() and again.numel():
                result.copy_(again)


@pytest.fixture
def recordings(monkeypatch):
    """Every recording made by the recorder that comes with it."""
    from triton.runtime.interpreter import InterpretedFunction

    made, active = [], []
    plain_run = InterpretedFunction.run

    def run(self, *args, **kwargs):
        def launch(*args, **kwargs):
            with _disable_current_modes():
                return plain_run(self, *args, **kwargs)

        if active:
            active[-1].launches.append(self.__name__)
            active[-1].steps.append((launch, args, kwargs, None))
        return launch(*args, **kwargs)

    @contextlib.contextmanager
    def recording(made_one):
        active.append(made_one)
        try:
            with made_one:
                yield
        finally:
            active.pop()

    def record():
        made.append(Recording())
        return made[-1], recording(made[-1])

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return made, record


class Stage:
    """A stage with its router and, where `local`, its experts; else they are asked as over a link."""

    def __init__(self, folder, local, dtype=torch.float32, deterministic=False, fp8_cache=False):
        config = load_config(folder)
        shard = Shard(torch.device("cpu"), dtype, deterministic, fp8_cache)
        with Checkpoint(folder, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
            loader = Loader(checkpoint, shard)
            model = StageModel(config, loader, range(config.num_hidden_layers))
            router = None
            if config.moe is not None:
                router = RouterRole(RouterModel(config, loader, config.moe_layers))
                every = range(config.moe.n_routed_experts)
                router.dispatcher = local_dispatcher(ExpertModel(config, loader, config.moe_layers, every))
                assert isinstance(router.dispatcher, DeviceDispatcher)
        self.calls = 0
        self.idle_s = self.waited_s = 0.0
        self.router = router
        self.role = StageRole(model, router if local else self, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
        self.cached = {}

    def forward(self, tag, x_TD, num_tokens):
        self.calls += 1
        return self.router.forward(tag, x_TD.clone(), num_tokens)

    def take_lost(self):
        return []

    def step(self, chunks):
        """`chunks`: (sequence, tokens) → a token of each."""
        return self.role.forward(self.plan(chunks), None)[1]

    def plan(self, chunks):
        """The next step of these sequences."""
        cached = [self.cached.get(s, 0) for s, _ in chunks]
        ends = [start + len(tokens) for start, (_, tokens) in zip(cached, chunks)]
        pages = [[1 + 6 * s + i for i in range(-(-end // PAGE_SIZE))] for (s, _), end in zip(chunks, ends)]
        self.cached.update({s: end for (s, _), end in zip(chunks, ends)})
        return StepPlan(
            epoch=0,
            step=0,
            micro_batch=0,
            seq_ids=[str(s) for s, _ in chunks],
            num_cached=cached,
            num_new=[len(tokens) for _, tokens in chunks],
            tokens=pack_int32(np.concatenate([tokens for _, tokens in chunks])),
            num_pages=[len(table) for table in pages],
            pages=pack_int32(np.concatenate(pages)),
            samples=[SampleSpec(i, end, GREEDY) for i, end in enumerate(ends)],
        )


@pytest.fixture
def folder(monkeypatch, tmp_path):
    write_checkpoint(tmp_path, config_values(**KERNEL_SHAPE))
    monkeypatch.setattr(ops, "_MODULES", {"cpu": "kernels.triton_ops"})
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("local", "deterministic", "num_buckets"),
    [  # buckets of 1, 2 and 3 sequences, or of one tile of rows
        pytest.param(True, False, 3, marks=pytest.mark.system),
        (False, False, 3),
        pytest.param(True, True, 1, marks=pytest.mark.system),
    ],
    ids=["experts here", "experts over links", "deterministic"],
)
def test_replayed_steps_are_those_of_the_model(folder, recordings, local, deterministic, num_buckets):
    made, record = recordings
    eager, replayed = (Stage(folder, local, deterministic=deterministic) for _ in range(2))
    replayed.role.prepare(StepLimits(3, 1, 64), record)
    assert len(made) == num_buckets * (1 if local else 2)  # one layer has experts
    replayed.calls = 0
    replays_as_eager(eager, replayed)
    assert replayed.calls == (0 if local else 5)


def replays_as_eager(eager, replayed):
    """Prefill, then decode steps of all buckets, in other orders."""
    rng = np.random.default_rng(0)
    for sizes in [[(0, 7), (1, 3), (2, 18)], [(0, 1), (1, 1), (2, 1)], [(2, 1), (0, 1)], [(1, 1)], [(1, 1)]]:
        chunks = [(s, rng.integers(0, 96, n)) for s, n in sizes]
        expected, got = eager.step(chunks), replayed.step(chunks)
        assert got == expected
    for caches in zip(replayed.role.caches, eager.role.caches):
        for mine, theirs in zip(*(parts(cache) for cache in caches), strict=True):
            torch.testing.assert_close(mine[1:], theirs[1:], atol=1e-5, rtol=0)


def parts(cache):
    """A cache's tensors, float32."""
    both = (cache,) if isinstance(cache, torch.Tensor) else (cache.values, cache.scale)
    return [part.float() for part in both]


@pytest.mark.slow
@torch.inference_mode()
def test_a_step_that_takes_turns_with_a_replayed_one_leaves_its_memory_alone(folder, recordings):
    """All graphs share their memory: while one step waits between two of them, another is not replayed."""
    _, record = recordings
    eager, replayed = (Stage(folder, False) for _ in range(2))
    replayed.role.prepare(StepLimits(3, 1, 64), record)
    rng = np.random.default_rng(0)
    prompts = [(s, rng.integers(0, 96, 3 + s)) for s in range(3)]
    assert replayed.step(prompts) == eager.step(prompts)
    both = [(0, [5])], [(2, [7])]
    expected = [eager.step(chunks) for chunks in both]
    first = replayed.role.begin(replayed.plan(both[0]), None)
    assert replayed.role.graphs.in_use
    second = replayed.role.begin(replayed.plan(both[1]), None)
    for step in (second, first):
        step.go_on(replayed.forward(*step.asked), 0.0)
    assert [first.tokens, second.tokens] == expected
    assert not replayed.role.graphs.in_use
    given_up = replayed.role.begin(replayed.plan([(0, [3])]), None)
    assert replayed.role.graphs.in_use
    given_up.close()
    assert not replayed.role.graphs.in_use


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.system)])
def test_replayed_steps_of_a_dense_model_are_those_of_the_model(folder, recordings, deterministic):
    made, record = recordings
    write_checkpoint(folder, dense_values("Qwen2ForCausalLM", **DENSE_KERNEL_SHAPE))
    options = {"deterministic": deterministic, "fp8_cache": deterministic}  # each once
    eager, replayed = (Stage(folder, True, **options) for _ in range(2))
    replayed.role.prepare(StepLimits(3, 1, 64), record)
    assert len(made) == (1 if deterministic else 3)  # a whole step each: no experts are asked
    replays_as_eager(eager, replayed)


# What a decode step may ask of torch: views, memory, the products that are a library's (linear, bmm), the lookup
# of embeddings, angles and sampled rows, sums and copies of rows. No softmax, sort, top-k or index of anything.
ALLOWED = {
    *(
        "view",
        "_unsafe_view",
        "transpose",
        "t",
        "slice",
        "select",
        "unsqueeze",
        "unbind",
        "split",
        "split_with_sizes",
        "alias",
    ),
    *("expand", "detach", "flatten", "contiguous", "to", "_to_copy", "clone", "copy_", "lift_fresh"),
    *("empty", "empty_like", "new_empty", "zeros", "zero_", "arange", "fill_", "add_"),
    *("linear", "bmm", "index_select"),
    *("constant_pad_nd", "pad"),  # the page table's, on the host
    *("detach_", "resolve_conj", "resolve_neg"),  # what inference mode lists of views and of numpy's arrays
}


SAMPLER = {f"{step}_kernel" for step in ("largest", "weigh", "coarse", "refine", "fine", "keep", "locate")}


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
def test_a_decode_step_is_our_kernels_and_the_products_of_a_library(folder, recordings, fp8):
    _, record = recordings
    if fp8:
        write_checkpoint(folder, config_values(**FP8_SHAPE))
        to_fp8(folder)
    stage = Stage(folder, True, torch.bfloat16)
    stage.step([(0, [1, 2, 3, 4, 5]), (1, [3])])
    recording, context = record()
    with context:
        stage.step([(0, [5]), (1, [9])])
    assert set(recording.operations) - ALLOWED == set()
    launched = set(recording.launches)
    always = {"_rms_norm_kernel", "_rope_kernel", "write_latent_kernel", "mla_decode_kernel", "_gate_kernel"}
    always |= {"_place_kernel", "_combine_kernel"}
    always |= SAMPLER
    scaled = {"_quantize_kernel", "plain_gemm_kernel", "gate_up_kernel", "grouped_gemm_kernel"}
    plain = {"grouped_plain_kernel", "silu_mul_kernel"}
    assert always <= launched
    assert (scaled if fp8 else plain) <= launched
    assert not (plain if fp8 else scaled) & launched
    # Absorbed: two products a layer; the head, and the gate of the one layer that has experts. In BF16 four
    # more for attention's projections, two for the dense MLP and two for the shared expert.
    layers = 2
    products = recording.operations.count("linear") + recording.operations.count("bmm")
    assert products == 2 * layers + 2 + (0 if fp8 else 3 * layers + 2 + 2)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_dense_decode_step_is_our_kernels_and_the_products_of_a_library(folder, recordings, architecture):
    _, record = recordings
    write_checkpoint(folder, dense_values(architecture, **DENSE_KERNEL_SHAPE))
    stage = Stage(folder, True, torch.bfloat16)
    stage.step([(0, [1, 2, 3, 4, 5]), (1, [3])])
    recording, context = record()
    with context:
        stage.step([(0, [5]), (1, [9])])
    assert set(recording.operations) - ALLOWED == set()
    launches = Counter(name for name in recording.launches if name not in SAMPLER)
    layers, norms = 2, 2 if architecture == "Qwen3ForCausalLM" else 0
    assert launches == {
        "_rms_norm_kernel": (2 + norms) * layers + 1,
        "_rope_kernel": layers,
        "write_kv_kernel": layers,
        "paged_attention_kernel": layers,
        "silu_mul_kernel": layers,
    }
    # A library's product adds Qwen2's biases itself; only residuals are added by torch, once, at the end.
    assert recording.operations.count("linear") == 4 * layers + 1
    assert recording.operations.count("add_") == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("mla", marks=pytest.mark.system), "gqa"])
def test_a_decode_step_over_an_fp8_cache_asks_and_launches_the_same(folder, recordings, family):
    """Scales are read and written by the kernels that read and write what they belong to."""
    _, record = recordings
    if family == "gqa":
        write_checkpoint(folder, dense_values("Qwen2ForCausalLM", **DENSE_KERNEL_SHAPE))
    seen = []
    for fp8_cache in (False, True):
        stage = Stage(folder, True, torch.bfloat16, fp8_cache=fp8_cache)
        stage.step([(0, [1, 2, 3, 4, 5]), (1, [3])])
        recording, context = record()
        with context:
            stage.step([(0, [5]), (1, [9])])
        assert set(recording.operations) - ALLOWED == set()
        seen.append(recording.launches)
    assert seen[0] == seen[1]


@pytest.mark.slow
def test_shares_of_shards_add_up_to_the_mixture(folder):
    config = load_config(folder)
    shard = Shard(torch.device("cpu"), torch.float32, deterministic=False)
    layer, num_experts = config.moe_layers[0], config.moe.n_routed_experts
    spans = [range(num_experts // 2), range(num_experts // 2, num_experts)]
    with Checkpoint(folder, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
        loader = Loader(checkpoint, shard)
        whole, *shards = [
            ExpertModel(config, loader, config.moe_layers, span) for span in (range(num_experts), *spans)
        ]
    x, weights = torch.randn(5, config.hidden_size), torch.rand(5, 2)
    ids = torch.arange(10).view(5, 2) % num_experts
    shares = [shard.share(layer, x, weights, ids) for shard in shards]
    torch.testing.assert_close(sum(shares), whole.mixture(layer, x, weights, ids), atol=1e-5, rtol=1e-5)
    # Of a shard's experts, only those that it is asked for.
    asked = [i % 2 == 0 for i in range(len(spans[1]))]
    parts = [shards[1].share(layer, x, weights, ids, mask) for mask in (asked, [not a for a in asked])]
    torch.testing.assert_close(sum(parts), shares[1], atol=1e-5, rtol=1e-5)
    assert all(part.any() for part in parts)
    shards[1].warm_up_shares(2, 2)
