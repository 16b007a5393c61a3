"""An engine over spawned processes, on the CPU and on a GPU alike: what the tests of both ask of it."""

import random

import torch
from ranks import PROMPT, logits_of_rank
from small_model import KERNEL_SHAPE, SmallModel, config_values, write_checkpoint

from benchmarks.processes import LocalEngine, Settings
from benchmarks.ranks import in_processes
from r1_cluster.config import LayoutConfig
from r1_cluster.records import Request, SamplingParams

COLOCATED = LayoutConfig(kind="colocated")
# Layouts of processes that compute together, whose texts may be their own; who is killed in each.
OWN_TEXTS = {
    "two ranks": ({"tensor_parallel": 2}, "stage-0-rank-1"),
    "four ranks": ({"tensor_parallel": 4}, "stage-0-rank-2"),
    "four data ranks": ({"kind": "expert-parallel", "data_parallel": 4}, "dp-2"),
    "data ranks of ranks": (
        {"kind": "expert-parallel", "data_parallel": 2, "tensor_parallel": 2, "redundant_experts": 1},
        "dp-1-rank-0",
    ),
}
# Two heads for each of four ranks, which is the least that the kernels take.
RANK_SHAPE = KERNEL_SHAPE | {
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
}


def settings(folder, **changes):
    """Small, and of a shape that the kernels take."""
    write_checkpoint(folder, config_values(**KERNEL_SHAPE))
    limits = {"num_pages": 256, "max_num_seqs": 8, "max_batch_tokens": 64, "max_context_len": 128}
    return Settings(checkpoint=str(folder), **limits | changes)


def requests(count, max_tokens, seed=5):
    """Greedy and drawn ones, of prompts of various lengths."""
    rng = random.Random(seed)
    return [
        Request(
            f"r{i}",
            [rng.randrange(5, 96) for _ in range(rng.randrange(1, 40))],
            SamplingParams(0.0, 1.0, 0, 0) if i % 2 else SamplingParams(1.0, 0.95, 0, i),
            max_tokens=max_tokens,
            stop_token_ids=[],
            sink="sink",
            ignore_eos=True,
        )
        for i in range(count)
    ]


def texts_alone_and_together(engine, asked):
    """What an engine answers to all at once, of which the first is the same alone."""
    together, _ = engine.run(asked)
    alone, _ = engine.run(asked[:1])
    assert alone == {asked[0].request_id: together[asked[0].request_id]}
    assert all(len(together[request.request_id]) == request.max_tokens for request in asked)
    return together


def assert_texts_survive(settings, layout, victim, count=8, max_tokens=40, expected=None):
    """Over processes of their own the texts are `expected`, or those of one process, also when one is killed in
    the middle."""
    asked = requests(count, max_tokens)
    if expected is None:
        with LocalEngine(settings, COLOCATED) as engine:
            expected = texts_alone_and_together(engine, asked)
    with LocalEngine(settings, layout) as engine:
        assert len(engine.processes) == len(engine.layout.workers) > 2
        assert engine.run(asked)[0] == expected
        assert_killed_unnoticed(engine, victim, asked, expected)


def assert_killed_unnoticed(engine, victim, asked, expected):
    """A process is killed after a third of the tokens, and the texts are as expected."""
    killed = []

    def kill(num_tokens):
        if not killed and num_tokens >= sum(request.max_tokens for request in asked) // 3:
            killed.append(engine.processes[victim])
            killed[0].kill()  # SIGKILL

    survived, _ = engine.run(asked, kill)
    assert killed[0].exitcode == -9
    assert engine.processes[victim] is not killed[0]
    assert engine.core.recovery.num_recoveries >= 1
    assert survived == expected
    assert engine.scheduler.num_pages_used == 0


def assert_own_texts_survive(settings, layout, victim, count=8, max_tokens=40):
    """The texts of a layout are as if alone, and the same where a process is killed in the middle."""
    write_checkpoint(settings.checkpoint, config_values(**RANK_SHAPE))
    asked = requests(count, max_tokens)
    with LocalEngine(settings, layout) as engine:
        assert len(engine.processes) == len(engine.layout.workers) > 1
        expected = texts_alone_and_together(engine, asked)
        assert_killed_unnoticed(engine, victim, asked, expected)


def assert_logits_are_those_of_one_process(settings, count):
    """Within 1e-4 in float32; in BF16 as near to float32 as one process is. All ranks have the same bits. Every
    token goes to all experts, as rounding would else choose other ones."""
    folder = settings.checkpoint
    write_checkpoint(folder, config_values(**RANK_SHAPE | {"num_experts_per_tok": 8, "topk_group": 4}))
    dtype, device = getattr(torch, settings.dtype), torch.device(settings.device)
    exact = SmallModel(folder, deterministic=True).step([(0, PROMPT)])
    ranks = in_processes(count, settings.transport, logits_of_rank, folder, dtype, settings.device)
    logits = ranks[0][1]
    assert all(torch.equal(hidden, ranks[0][0]) for hidden, _ in ranks)
    assert logits.shape == exact.shape
    if dtype == torch.float32:
        assert (logits - exact).abs().max() <= 1e-4 * max(1.0, float(exact.abs().max()))
    else:
        plain = SmallModel(folder, deterministic=True, dtype=dtype, device=device).step([(0, PROMPT)]).cpu()
        assert (logits - exact).norm() <= 1.5 * (plain - exact).norm()
