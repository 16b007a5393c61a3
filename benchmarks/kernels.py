"""Times every kernel on one GPU at R1's shapes, against the floor of bytes and operations and against torch.

    python -m benchmarks.kernels [--only gemm] [--seconds 120] [--write] [--write-tuned kernels/tuned]

Each figure is the median of many replays of a CUDA graph that rotates through inputs larger than the L2
cache. The floor is the larger of bytes over the bandwidth of a large copy, and operations over the rate of a
large BF16 product (twice that for FP8), both measured here first. Kernels are tuned before they are timed;
`--write-tuned` keeps what was chosen as the table of this device and Triton version.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from kernels import (
    fp8,
    gemm_fp8,
    gqa,
    int_gemm,
    int_moe_gemm,
    mla_decode,
    moe_combine,
    moe_gate,
    moe_gemm,
    moe_sort,
    norm,
    sampler,
    tuned,
)

Run = Callable[[], object]

DENSE = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384)]
DENSE += [(36864, 7168), (7168, 18432), (4096, 7168), (7168, 2048)]
ROWS = (1, 8, 64, 128, 256, 1024, 4096, 16384)
EXPERTS = (256, 32, 16, 8)
CONTEXTS = (1024, 4096, 16384, 65536)
BATCHES = (1, 8, 64, 128, 256)
WIDTH, EXPERT_WIDTH, TOP_K = 7168, 2048, 8
LATENT, ROTATED, PAGE, HEADS = 512, 64, 64, 128
REPLAYS = 25


@dataclass(frozen=True)
class Work:
    """One shape of one kernel: how to make a run on fresh inputs, and what the run must move and compute."""

    name: str
    shape: str
    make: Callable[[], Run]
    num_bytes: float
    operations: float = 0.0
    fp8: bool = True
    peers: tuple[tuple[str, Callable[[], Run]], ...] = ()


@dataclass(frozen=True)
class Ceilings:
    """Rates of this device, measured."""

    bytes_per_s: float
    bf16_per_s: float

    def floor_s(self, work: Work) -> float:
        """The least time the work can take."""
        rate = self.bf16_per_s * (2 if work.fp8 else 1)
        return max(work.num_bytes / self.bytes_per_s, work.operations / rate)


def median_s(make: Callable[[], Run], num_bytes: float) -> float:
    """Median time of one run, over graph replays that rotate enough input sets to leave the L2 cache cold."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    free = torch.cuda.mem_get_info()[0]
    copies = max(1, min(int(3 * cache / max(num_bytes, 1)) + 1, 32, int(free * 0.6 / max(num_bytes, 1))))
    runs = [make() for _ in range(copies)]
    for run in runs:
        run()
    torch.cuda.synchronize()
    rounds = max(1, 16 // copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / (rounds * copies))
    return statistics.median(times)


@triton.jit
def copy_kernel(source_ptr: tl.tensor, target_ptr: tl.tensor, size: int, BLOCK: tl.constexpr) -> None:
    """Copies `size` elements, BLOCK by each program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.load(source_ptr + at, mask=at < size), mask=at < size)


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """By a kernel: a captured `copy_` becomes a node of its own, which moves two thirds as much a second."""
    size = source.numel()
    copy_kernel[(triton.cdiv(size, 4096),)](source, target, size, BLOCK=4096, num_warps=8)


def measure_ceilings() -> Ceilings:
    """A copy of 2 GiB, bytes read and written, and a BF16 product of 8,192 cubed."""

    def copies() -> Run:
        source = torch.randint(0, 2**31, (2**29,), dtype=torch.int32, device="cuda")
        target = torch.empty_like(source)
        return lambda: copy(source, target)

    def product() -> Run:
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        return lambda: a @ b

    return Ceilings(2**32 / median_s(copies, 2**32), 2 * 8192**3 / median_s(product, 3 * 2**27))


def random_fp8(*shape: int) -> torch.Tensor:
    """FP8 values of ordinary size; never zeros, on which some units run faster."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)


def random_scales(*shape: int) -> torch.Tensor:
    """Positive scales."""
    return torch.rand(shape, device="cuda") * 1e-2 + 1e-3


def dense_gemm(m: int, n: int, k: int) -> Work:
    """One block-scaled product, beside torch's BF16 and row-scaled FP8 products."""

    def ours() -> Run:
        a, b = random_fp8(m, k), random_fp8(n, k)
        scales = random_scales(m, k // 128), random_scales(-(-n // 128), k // 128)
        return lambda: gemm_fp8.gemm_fp8(a, scales[0], b, scales[1])

    def bf16() -> Run:
        a, b = (torch.randn(rows, k, dtype=torch.bfloat16, device="cuda") for rows in (m, n))
        return lambda: a @ b.T

    def scaled() -> Run:
        a, b = random_fp8(m, k), random_fp8(n, k)
        one = torch.ones((), device="cuda")
        return lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)

    size = m * k + n * k + 2 * m * n
    peers = (("torch BF16", bf16), ("torch._scaled_mm", scaled))
    return Work("gemm", f"{m}×{n}×{k}", ours, size, 2.0 * m * n * k, peers=peers if m >= 16 else peers[:1])


def grouped(num_experts: int, tokens: int, gate_up: bool) -> Work:
    """Top-8 rows of `tokens` tokens over so many experts, all local, in blocks that fit their share."""
    n, k = (2 * EXPERT_WIDTH, WIDTH) if gate_up else (WIDTH, EXPERT_WIDTH)
    rows_per_expert = tokens * TOP_K / num_experts
    block = 128 if rows_per_expert >= 64 else 16

    def ours() -> Run:
        ids = torch.stack([torch.randperm(num_experts, device="cuda")[:TOP_K] for _ in range(tokens)]).int()
        order = moe_sort.sort_rows(ids, num_experts, block)
        m = order.row_of_slot.numel()
        a, a_scale = random_fp8(m, k), random_scales(m, k // 128)
        b, b_scale = random_fp8(num_experts, n, k), random_scales(num_experts, n // 128, k // 128)
        call = moe_gemm.grouped_gate_up if gate_up else moe_gemm.grouped_gemm
        return lambda: call(a, a_scale, b, b_scale, order.expert_of_block)

    hit = num_experts * (1 - (1 - TOP_K / num_experts) ** tokens)
    rows = tokens * TOP_K
    size = hit * n * k + rows * (k + (n / 2 if gate_up else 2 * n))
    name = "grouped gate-up" if gate_up else "grouped down"
    return Work(name, f"{num_experts} experts, T={tokens}", ours, size, 2.0 * rows * n * k)


def random_integers(bits: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of a weight [..., N, K], as `kernels.ops.GroupScaled` has them: INT8 by rows, INT4 by
    groups of 128."""
    *rows, k = shape
    if bits == 8:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda"), random_scales(*rows, 1)
    packed = torch.randint(0, 256, (*rows, k // 2), dtype=torch.uint8, device="cuda")
    return packed, random_scales(*rows, k // 128)


def weight_only(bits: int, m: int, n: int, k: int) -> Work:
    """One product of BF16 rows with an INT8 or INT4 weight, beside torch's of a BF16 weight."""

    def ours() -> Run:
        x, weight = torch.randn(m, k, dtype=torch.bfloat16, device="cuda"), random_integers(bits, n, k)
        return lambda: int_gemm.gemm_int(x, *weight)

    def bf16() -> Run:
        a, b = (torch.randn(rows, k, dtype=torch.bfloat16, device="cuda") for rows in (m, n))
        return lambda: a @ b.T

    size = 2 * m * k + n * k * bits / 8 + 2 * m * n
    peers = (("torch BF16", bf16),)
    return Work(f"int{bits} gemm", f"{m}×{n}×{k}", ours, size, 2.0 * m * n * k, fp8=False, peers=peers)


def grouped_weight_only(bits: int, num_experts: int, tokens: int) -> Work:
    """The gate-up product of `grouped`, with INT8 or INT4 weights; it fetches its rows itself."""
    n, k = 2 * EXPERT_WIDTH, WIDTH
    block = 128 if tokens * TOP_K / num_experts >= 64 else 16

    def ours() -> Run:
        ids = torch.stack([torch.randperm(num_experts, device="cuda")[:TOP_K] for _ in range(tokens)]).int()
        order = moe_sort.sort_rows(ids, num_experts, block)
        x = torch.randn(tokens, k, dtype=torch.bfloat16, device="cuda")
        weight = random_integers(bits, num_experts, n, k)
        return lambda: int_moe_gemm.grouped_int(
            x,
            *weight,
            order.expert_of_block,
            order.row_of_slot,
            rows_per_source=TOP_K,
            num_slots=order.row_of_slot.numel(),
        )

    hit = num_experts * (1 - (1 - TOP_K / num_experts) ** tokens)
    rows = tokens * TOP_K
    size = hit * n * k * bits / 8 + 2 * tokens * k + 2 * rows * n
    shape = f"{num_experts} experts, T={tokens}"
    return Work(f"int{bits} grouped", shape, ours, size, 2.0 * rows * n * k, fp8=False)


def pages_of(batch: int, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Page table, contexts and query starts of sequences that bring one query each, on scattered pages."""
    pages = context // PAGE
    table = torch.randperm(batch * pages, device="cuda").int().view(batch, pages)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    return table, lengths, torch.arange(batch + 1, dtype=torch.int32, device="cuda")


def mla(batch: int, context: int) -> Work:
    """One decode step of 128 heads, BF16 cache."""
    pages = context // PAGE

    def ours() -> Run:
        cache = torch.randn(batch * pages, PAGE, LATENT + ROTATED, dtype=torch.bfloat16, device="cuda")
        paging = pages_of(batch, context)
        q = torch.randn(batch, HEADS, LATENT, dtype=torch.bfloat16, device="cuda")
        q_rope = torch.randn(batch, HEADS, ROTATED, dtype=torch.bfloat16, device="cuda")
        return lambda: mla_decode.mla_decode(
            q, q_rope, cache, *paging, 0.07, max_query_len=1, max_context_len=context
        )

    size = batch * (context * (LATENT + ROTATED) + HEADS * (2 * LATENT + ROTATED)) * 2.0
    operations = 2.0 * batch * context * HEADS * (2 * LATENT + ROTATED)
    return Work("mla decode", f"B={batch}, {context}", ours, size, operations, fp8=False)


def mla_fp8(batch: int, context: int) -> Work:
    """The same over an FP8 cache."""
    pages = context // PAGE

    def ours() -> Run:
        cache, scale = (
            random_fp8(batch * pages, PAGE, LATENT + ROTATED),
            random_scales(batch * pages, PAGE, 2),
        )
        q, q_rope = (
            torch.randn(batch, HEADS, width, dtype=torch.bfloat16, device="cuda")
            for width in (LATENT, ROTATED)
        )
        paging = pages_of(batch, context)
        return lambda: mla_decode.mla_decode(
            q, q_rope, cache, *paging, 0.07, scale, max_query_len=1, max_context_len=context
        )

    size = batch * (context * (LATENT + ROTATED + 8.0) + HEADS * (2 * LATENT + ROTATED) * 2)
    operations = 2.0 * batch * context * HEADS * (2 * LATENT + ROTATED)
    return Work("mla decode, FP8 cache", f"B={batch}, {context}", ours, size, operations, fp8=False)


def grouped_query(batch: int, context: int, *, fp8_cache: bool) -> Work:
    """One decode step of 32 heads on 8 key heads of 128, as the distilled 8B models have them."""
    heads, key_heads, width = 32, 8, 128
    slots = (batch * (context // PAGE), PAGE, 2, key_heads)

    def ours() -> Run:
        if fp8_cache:
            cache, scales = random_fp8(*slots, width), random_scales(*slots).unbind(2)
        else:
            cache, scales = torch.randn(*slots, width, dtype=torch.bfloat16, device="cuda"), None
        q = torch.randn(batch, heads, width, dtype=torch.bfloat16, device="cuda")
        paging = pages_of(batch, context)
        return lambda: gqa.paged_attention(
            q, *cache.unbind(2), *paging, 0.09, scales, max_query_len=1, max_context_len=context
        )

    slot_bytes = 2.0 * key_heads * (width + 4 if fp8_cache else 2 * width)
    size = batch * (context * slot_bytes + heads * width * 4)
    name = "gqa decode, FP8 cache" if fp8_cache else "gqa decode"
    operations = 4.0 * batch * context * heads * width
    return Work(name, f"B={batch}, {context}", ours, size, operations, fp8=False)


def row_kernels(tokens: int) -> Iterator[Work]:
    """Norm, quantize, gate, sort, combine and sample for so many tokens."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    def normed() -> Run:
        x, residual, weight = tensor(tokens, WIDTH), tensor(tokens, WIDTH), tensor(WIDTH)
        return lambda: norm.add_rms_norm(x, residual, weight, 1e-6)

    def quantized() -> Run:
        x = tensor(tokens, WIDTH)
        return lambda: fp8.quantize(x)

    def gated() -> Run:
        logits, bias = torch.randn(tokens, 256, device="cuda"), torch.randn(256, device="cuda") / 16
        return lambda: moe_gate.gate(
            logits, bias, num_groups=8, top_groups=4, top_k=TOP_K, normalize=True, scaling=2.5
        )

    def ids() -> torch.Tensor:
        return torch.stack([torch.randperm(256, device="cuda")[:TOP_K] for _ in range(tokens)]).int()

    def sorted_rows() -> Run:
        expert_ids = ids()
        return lambda: moe_sort.sort_rows(expert_ids, 256, 16)

    def combined() -> Run:
        rows = tensor(tokens * TOP_K, WIDTH)
        slots = torch.randperm(tokens * TOP_K, device="cuda").int()
        weights, shared = torch.rand(tokens, TOP_K, device="cuda"), tensor(tokens, WIDTH)
        return lambda: moe_combine.combine(rows, slots, weights, shared)

    shape, words = f"T={tokens}", tokens * WIDTH
    yield Work("add + norm", shape, normed, words * 8.0)
    yield Work("quantize", shape, quantized, words * (2 + 1 + 4 / 128))
    yield Work("gate", shape, gated, tokens * (256 * 4 + TOP_K * 8.0))
    yield Work("sort", shape, sorted_rows, tokens * TOP_K * 12.0)
    yield Work("combine", shape, combined, words * (TOP_K + 2) * 2.0)
    if tokens <= 256:
        yield Work("sample", shape, lambda: sampling(tokens), tokens * 129280 * 4.0)


def sampling(sequences: int) -> Run:
    """Temperature 0.6 and top-p 0.95, what R1 recommends."""
    logits = torch.randn(sequences, 129280, device="cuda") * 4
    temperature, top_p, min_p = (torch.full((sequences,), v, device="cuda") for v in (0.6, 0.95, 0.0))
    top_k = torch.zeros(sequences, dtype=torch.int32, device="cuda")
    seeds = torch.arange(sequences, device="cuda")
    return lambda: sampler.sample(logits, temperature, top_k, top_p, min_p, seeds, seeds)


def all_work() -> Iterator[Work]:
    """Every shape of the anchors, kernel beside kernel, so that a run cut short has some of each."""
    for tokens in ROWS:
        yield from row_kernels(tokens)
        yield from (dense_gemm(tokens, n, k) for n, k in DENSE)
        if tokens in BATCHES:
            yield from (mla(tokens, context) for context in CONTEXTS)
        for num_experts in EXPERTS:
            yield from (grouped(num_experts, tokens, gate_up) for gate_up in (True, False))
        for bits in (8, 4):
            yield from (weight_only(bits, tokens, n, k) for n, k in DENSE[:4])
            yield from (grouped_weight_only(bits, num_experts, tokens) for num_experts in EXPERTS[:2])
        if tokens in BATCHES:
            for context in CONTEXTS[1::2]:  # last: each of the three has kernels of its own to compile
                yield mla_fp8(tokens, context)
                yield from (grouped_query(tokens, context, fp8_cache=kept) for kept in (False, True))


def line(work: Work, ceilings: Ceilings) -> str:
    """One row of the table."""
    seconds = median_s(work.make, work.num_bytes)
    floor = ceilings.floor_s(work)
    peers = " · ".join(f"{name} {median_s(make, work.num_bytes) * 1e6:.1f}" for name, make in work.peers)
    return (
        f"| {work.name} | {work.shape} | {seconds * 1e6:.1f} | {work.num_bytes / seconds / 1e9:.0f} | "
        f"{work.operations / seconds / 1e12:.0f} | {floor * 1e6:.1f} | {floor / seconds:.0%} | {peers} |"
    )


def table(only: str, seconds: float) -> list[str]:
    """The lines of the table, printed as they come; what would begin after so many seconds is left out."""
    started = time.monotonic()
    ceilings = measure_ceilings()
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    say(f"# Kernels on one {torch.cuda.get_device_name()}")
    say(f"torch {torch.__version__}, Triton {triton.__version__}")
    rates = ceilings.bytes_per_s / 1e9, ceilings.bf16_per_s / 1e12
    say(f"Copy {rates[0]:.0f} GB/s, BF16 product {rates[1]:.0f} TFLOP/s.\n")
    say("| kernel | shape | µs | GB/s | TFLOP/s | floor µs | of the floor | peers, µs |")
    say("| --- | --- | --- | --- | --- | --- | --- | --- |")
    left = 0
    for work in all_work():
        if only not in work.name:
            continue
        if time.monotonic() - started > seconds:
            left += 1
        elif work.num_bytes > torch.cuda.mem_get_info()[0] * 0.8:
            say(f"| {work.name} | {work.shape} | does not fit | | | | | |")
        else:
            say(line(work, ceilings))
            torch.cuda.empty_cache()
    if left:
        say(f"\n{left} further shapes were left out: {seconds:g} s were over.")
    return lines


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape after so long")
    parser.add_argument("--write", action="store_true", help="also to benchmarks/results/kernels_gpu.md")
    parser.add_argument("--write-tuned", type=Path, metavar="FOLDER", help="keep what was tuned")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.kernels needs a GPU, and torch sees none on this machine.", file=sys.stderr)
        return 1
    lines = table(options.only, options.seconds)
    if options.write:
        Path("benchmarks/results/kernels_gpu.md").write_text("\n".join(lines) + "\n")
    if options.write_tuned:
        print(f"tuned: {tuned.write(options.write_tuned)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
