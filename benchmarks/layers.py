"""Times whole steps of a stage of a published model on one GPU: real layers, random weights (R1's in FP8, the
dense models' in BF16), the engine's roles.

    python -m benchmarks.layers [--layers 3] [--experts 256] [--batches 1 8 64 256] [--profile]
    python -m benchmarks.layers --model DeepSeek-R1-Distill-Llama-8B [--layers 3]

What is timed is `StageRole.forward` from plan to sampled tokens, in recorded graphs as in service: as many
layers as are asked for, R1's first of them dense, with embedding and head. A layer's own time is the
difference between two numbers of layers. Beside it stands the floor: each part's bytes over the bandwidth of
a large copy or its operations over the rate of a large product, whichever is longer, added up. `--profile`
adds where the last step's time goes, by kernel; `--write-tuned` keeps what the start tuned, as in
benchmarks.kernels. Its model and its floors are tested on the CPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.kernels import Ceilings, Run, Work, measure_ceilings
from kernels import tuned
from r1_cluster.engine.boot import StepLimits
from r1_cluster.engine.roles import RouterRole, StageRole, local_dispatcher
from r1_cluster.models.config import GqaShape, ModelConfig
from r1_cluster.models.family import parse_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.moe import ExpertModel, RouterModel
from r1_cluster.models.network import StageModel
from r1_cluster.models.presets import presets
from r1_cluster.records import SampleSpec, SamplingParams, StepPlan, pack_int32
from r1_cluster.weights.tensors import Part, Slices, TensorSpec

PAGE = 64
STEPS = 20
SAMPLING = SamplingParams(temperature=0.6, top_p=0.95, top_k=0, seed=1)


class RandomSource:
    """A `TensorSource` with random values for any tensor of a model, made where they are needed.

    FP8 wherever R1 has it, which is in all matrices but embedding, head and gates; dense models have none.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._shapes = {spec.name: spec.shape for spec in tensor_table(config)}
        self._device = device
        self._has_fp8 = config.fp8_block is not None
        self.fp8_block = (128, 128)
        self.int_group = None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def is_fp8(self, name: str) -> bool:
        return self._has_fp8 and "_proj" in name

    def get(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        slices: Slices | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert slices is None, "there is one rank"
        if out is not None:
            return out.copy_(self.get(name, dtype, device))
        shape = self.shape(name)
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device).mul_(shape[1] ** -0.5)

    def int_bits(self, name: str) -> int | None:
        return None

    def get_int(self, name: str, slices: Slices | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError(f"{name} is no integer tensor")

    def get_scaled(
        self, name: str, slices: Slices | None = None, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = self.shape(name)
        values = torch.randn(rows, columns, device=self._device, dtype=torch.bfloat16)
        blocks = (-(-rows // 128), -(-columns // 128))
        scale = torch.full(blocks, columns**-0.5, dtype=torch.float32, device=self._device)
        if out is not None:
            return out.copy_(values), scale
        return values.to(torch.float8_e4m3fn), scale


def published(model: str, num_layers: int, num_experts: int) -> ModelConfig:
    """A published model's shape with another number of layers; R1's first alone is dense, and it has so many
    experts."""
    values = {**presets()[model], "num_hidden_layers": num_layers}
    if "n_routed_experts" in values:
        values |= {"first_k_dense_replace": 1, "n_routed_experts": num_experts, "num_nextn_predict_layers": 0}
    return parse_config(values)


def build(config: ModelConfig, device: torch.device, dtype: torch.dtype, num_pages: int) -> StageRole:
    """All layers of a model in one stage, with its router and experts beside it, if it has any."""
    loader = Loader(RandomSource(config, device), Shard(device, dtype, deterministic=False))
    router = None
    if config.moe is not None:
        router = RouterRole(RouterModel(config, loader, config.moe_layers))
        experts = ExpertModel(config, loader, config.moe_layers, range(config.moe.n_routed_experts))
        router.dispatcher = local_dispatcher(experts)
    stage = StageModel(config, loader, range(config.num_hidden_layers))
    return StageRole(stage, router, num_pages=num_pages, page_size=PAGE)


def decode_plan(batch: int, context: int, vocab: int, seed: int) -> StepPlan:
    """One new token for each of so many sequences of so long a context, which share no page."""
    pages = -(-context // PAGE)
    tokens = np.random.default_rng(seed).integers(0, vocab, batch).astype(np.int32)
    return StepPlan(
        epoch=0,
        step=seed,
        micro_batch=0,
        seq_ids=[str(i) for i in range(batch)],
        num_cached=[context - 1] * batch,
        num_new=[1] * batch,
        tokens=pack_int32(tokens),
        num_pages=[pages] * batch,
        pages=pack_int32(np.arange(batch * pages, dtype=np.int32)),
        samples=[SampleSpec(i, context, SAMPLING) for i in range(batch)],
    )


def median_step_s(stage: StageRole, batch: int, context: int) -> float:
    """Median of some steps; each ends when its tokens are on the host."""
    times = []
    for seed in range(STEPS + 3):
        plan = decode_plan(batch, context, stage.model.config.vocab_size, seed)
        started = time.perf_counter()
        stage.forward(plan, None)
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def step_work(config: ModelConfig, batch: int, context: int) -> list[Work]:
    """What a decode step must move and compute, by part. Routing is taken as even: of E experts, batch · K
    draws reach E (1 - (1 - K/E)^batch)."""
    table = [
        spec for spec in tensor_table(config) if len(spec.shape) == 2
    ]  # without norms and the gates' biases
    item_bytes = 2 if config.fp8_block is None else 1

    def weights(
        name: str, specs: list[TensorSpec], item_bytes: int, read: float = 1.0, used: float = 1.0
    ) -> Work:
        size = sum(math.prod(spec.shape) for spec in specs)
        return _work(name, size * item_bytes * read, 2 * batch * size * used, fp8=item_bytes == 1)

    def of(*parts: Part) -> list[TensorSpec]:
        return [spec for spec in table if spec.part in parts]

    absorbed = [spec for spec in of("attention") if "kv_b" in spec.name]
    rows = batch * context * config.num_hidden_layers
    shape = config.attention
    if isinstance(shape, GqaShape):
        scores = 2 * shape.num_attention_heads * 2 * shape.head_dim
    else:
        scores = 2 * shape.num_attention_heads * (shape.cache_width + shape.kv_lora_rank)
    parts = [
        weights(
            "attention's products", [spec for spec in of("attention") if spec not in absorbed], item_bytes
        ),
        weights("keys and values absorbed", absorbed, 2),
        _work("attention over the cache", rows * shape.cache_width * 2, rows * scores, fp8=False),
        weights("dense MLP and shared experts", of("mlp", "shared_experts"), item_bytes),
        weights("gates", of("gate"), 4),
        weights("head", of("head"), 2),
    ]
    if config.moe is not None:
        experts, top_k = config.moe.n_routed_experts, config.moe.num_experts_per_tok
        reached = 1 - (1 - top_k / experts) ** batch
        parts.append(weights("routed experts", of("experts"), item_bytes, reached, top_k / experts))
    return parts


def _work(part: str, num_bytes: float, operations: float, *, fp8: bool) -> Work:
    return Work(part, "", _nothing, num_bytes, operations, fp8)


def _nothing() -> Run:
    raise AssertionError("a part of a step is not run alone")


def floor_s(ceilings: Ceilings, config: ModelConfig, batch: int, context: int) -> float:
    """The least time of a decode step on a device of these rates."""
    return sum(ceilings.floor_s(work) for work in step_work(config, batch, context))


def profile(stage: StageRole, batch: int, context: int) -> list[str]:
    """Where a step's time on the device goes: a table row per kernel, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for seed in range(STEPS):
            stage.forward(decode_plan(batch, context, stage.model.config.vocab_size, seed), None)
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    lines = ["| kernel | launches a step | µs a step | share |", "| --- | ---: | ---: | ---: |"]
    for row in rows[:30]:
        per_step = row.self_device_time_total / STEPS
        share = row.self_device_time_total / total
        lines.append(f"| {row.key[:60]} | {row.count / STEPS:g} | {per_step:.1f} | {share:.1%} |")
    return lines


def main() -> int:
    """Prints a row per batch and context."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", choices=presets(), default="DeepSeek-R1", help="whose shape it is")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096])
    parser.add_argument("--profile", action="store_true", help="of the last step, by kernel")
    parser.add_argument("--write-tuned", type=Path, metavar="FOLDER", help="keep what was tuned")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.layers needs a GPU, and torch sees none on this machine.", file=sys.stderr)
        return 1
    config = published(options.model, options.layers, options.experts)
    ceilings = measure_ceilings()
    num_pages = max(options.batches) * -(-max(options.contexts) // PAGE)
    stage = build(config, torch.device("cuda"), torch.bfloat16, num_pages)
    started = time.monotonic()
    stage.prepare(StepLimits(max(options.batches), 64, max(options.contexts)))
    print(f"compiled, tuned and recorded in {time.monotonic() - started:.1f} s")
    experts = f", {config.moe.n_routed_experts} experts" if config.moe is not None else ""
    print(f"{torch.cuda.get_device_name()}: {options.model}, {options.layers} layers{experts}")
    print("| sequences | context | ms a step | floor | ratio |\n| --- | --- | --- | --- | --- |")
    for batch in options.batches:
        for context in options.contexts:
            step, floor = median_step_s(stage, batch, context), floor_s(ceilings, config, batch, context)
            print(f"| {batch} | {context} | {step * 1e3:.3f} | {floor * 1e3:.3f} | {step / floor:.2f} |")
    if options.write_tuned:
        print(f"tuned: {tuned.write(options.write_tuned)}")
    if options.profile:
        print("\n".join(["", *profile(stage, options.batches[-1], options.contexts[-1])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
