"""An engine over spawned processes, on the CPU and on a GPU alike: what the tests of both ask of it."""

import random

from small_model import KERNEL_SHAPE, config_values, write_checkpoint

from benchmarks.processes import LocalEngine, Settings
from r1_cluster.config import LayoutConfig
from r1_cluster.records import Request, SamplingParams

COLOCATED = LayoutConfig(kind="colocated")


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


def assert_texts_survive(settings, layout, victim, count=8, max_tokens=40):
    """Over processes of their own the texts are those of one process, also when one is killed in the middle."""
    asked = requests(count, max_tokens)
    with LocalEngine(settings, COLOCATED) as engine:
        together, _ = engine.run(asked)
        alone, _ = engine.run(asked[:1])
    assert alone["r0"] == together["r0"]
    assert all(len(text) == max_tokens for text in together.values())
    with LocalEngine(settings, layout) as engine:
        assert len(engine.processes) == len(engine.layout.workers) > 2
        apart, _ = engine.run(asked)
        assert apart == together
        killed = []

        def kill(num_tokens):
            if not killed and num_tokens >= count * max_tokens // 3:
                killed.append(engine.processes[victim])
                killed[0].kill()  # SIGKILL

        survived, _ = engine.run(asked, kill)
        assert killed[0].exitcode == -9
        assert engine.processes[victim] is not killed[0]
        assert engine.core.recovery.num_recoveries >= 1
        assert survived == together
        assert engine.scheduler.num_pages_used == 0
