"""Grouped products, contiguous and masked, alone and fused with SiLU·mul and quantization."""

import pytest
import torch

from kernels import moe_gemm, moe_gemm_plain, moe_sort, reference


def weights(draw, num_experts, n, k):
    return draw.fp8(num_experts, n, k), draw.scales(num_experts, -(-n // 128), k // 128) / 16


def rows(draw, count, k):
    return draw.fp8(count, k), draw.scales(count, k // 128) / 16


def assert_rows(out, a, a_scale, b, b_scale, index, fp8_sums):
    """As in test_gemm_fp8: sums are off by `fp8_sums` of Σ |a| |b| at most, then rounded to BF16."""
    expected = reference.grouped_gemm(a, a_scale.double(), b, b_scale.double(), index)
    terms = reference.grouped_gemm(
        a.float().abs(), a_scale.double(), b.float().abs(), b_scale.double(), index
    )
    bound = 2**-8 * expected.abs() + fp8_sums * terms
    used = (index >= 0).repeat_interleave(a.shape[0] // index.numel())
    assert ((out.double() - expected).abs() <= bound)[used].all()


def assert_gate_up(q, scale, a, a_scale, b, b_scale, index, fp8_sums):
    """Half a step of E4M3 around float64's values, widened by what rounding before the product of two allows."""
    product = reference.grouped_gemm(a, a_scale.double(), b, b_scale.double(), index)
    expected = reference.silu_mul(product)
    used = (index >= 0).repeat_interleave(a.shape[0] // index.numel())
    terms = reference.grouped_gemm(
        a.float().abs(), a_scale.double(), b.float().abs(), b_scale.double(), index
    )
    gate_terms, up_terms = terms.chunk(2, -1)
    gate, up = product.chunk(2, -1)
    epsilon = 2 * fp8_sums  # of both halves
    slack = (
        epsilon * (gate_terms * (up.abs() + 1) * 1.1 + up_terms * (gate.abs() + 1)) + 1e-5 * expected.abs()
    )
    amax = expected.unflatten(-1, (-1, 128)).abs().amax(-1)
    slack_amax = slack.unflatten(-1, (-1, 128)).amax(-1)
    assert ((scale.double() * 448 - amax).abs() <= slack_amax + 1e-5 * amax)[used].all()
    back = reference.dequantize(q, scale.double())
    step = scale.double().repeat_interleave(128, -1) * 2.0**-10
    bound = torch.maximum(expected.abs() * 2**-4, step) * 1.001 + slack * 2
    assert ((back - expected).abs() <= bound)[used].all()


@pytest.mark.slow
@pytest.mark.parametrize(("num_tokens", "num_experts", "block"), [(1, 8, 16), (63, 5, 16), (129, 3, 64)])
def test_contiguous(draw, fp8_sums, num_tokens, num_experts, block):
    ids = draw.integers(0, num_experts - 1, num_tokens, 2)  # the last expert has no token
    order = moe_sort.sort_rows(ids, num_experts, block)
    a, a_scale = rows(draw, order.row_of_slot.numel(), 256)
    b, b_scale = weights(draw, num_experts, 192, 256)
    out = moe_gemm.grouped_gemm(a, a_scale, b, b_scale, order.expert_of_block)
    assert_rows(out, a, a_scale, b, b_scale, order.expert_of_block, fp8_sums)
    b, b_scale = weights(draw, num_experts, 512, 256)
    q, scale = moe_gemm.grouped_gate_up(a, a_scale, b, b_scale, order.expert_of_block)
    assert_gate_up(q, scale, a, a_scale, b, b_scale, order.expert_of_block, fp8_sums)


@pytest.mark.parametrize("slots", [1, 9, 33])
def test_masked(draw, fp8_sums, slots):
    num_experts = 4
    count = draw.integers(0, slots + 1, num_experts)
    count[1], count[2] = 0, slots
    a, a_scale = rows(draw, num_experts * slots, 256)
    shaped = (a.view(num_experts, slots, 256), a_scale.view(num_experts, slots, 2))
    slot = torch.arange(slots, device=draw.device)
    expert = torch.arange(num_experts, device=draw.device)[:, None].expand(-1, slots)
    index = torch.where(slot < count[:, None], expert, -1).flatten()
    b, b_scale = weights(draw, num_experts, 192, 256)
    out = moe_gemm.grouped_gemm(*shaped, b, b_scale, count)
    assert_rows(out.view(-1, 192), a, a_scale, b, b_scale, index, fp8_sums)
    b, b_scale = weights(draw, num_experts, 256, 256)
    q, scale = moe_gemm.grouped_gate_up(*shaped, b, b_scale, count)
    assert_gate_up(q.view(-1, 128), scale.view(-1, 1), a, a_scale, b, b_scale, index, fp8_sums)
    assert torch.isnan(out[1].float()).all()  # nothing is computed for an expert without rows


def test_deterministic_rows_do_not_depend_on_the_batch(draw):
    a, a_scale = rows(draw, 48, 384)
    b, b_scale = weights(draw, 3, 256, 384)
    index = torch.tensor([2, 0, 1], dtype=torch.int32, device=draw.device)
    together = moe_gemm.grouped_gate_up(a, a_scale, b, b_scale, index, deterministic=True)
    first, first_scale = a[16:32].clone(), a_scale[16:32].clone()
    first[1:] = 0
    alone = moe_gemm.grouped_gate_up(first, first_scale, b, b_scale, index[1:2].clone(), deterministic=True)
    for mine, theirs in zip(alone, together, strict=True):
        assert torch.equal(mine[0].float(), theirs[16].float())
    out = moe_gemm.grouped_gemm(a, a_scale, b, b_scale, index, deterministic=True)
    mine = moe_gemm.grouped_gemm(first, first_scale, b, b_scale, index[1:2].clone(), deterministic=True)
    assert torch.equal(mine[0], out[16])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "n", "k"), [(1, 6, 72, 100), (40, 3, 128, 64)])
def test_plain(draw, num_tokens, num_experts, n, k, deterministic):
    """Each slot fetches its token; then slots in their order. BF16 rounds once, float32 sums add 2^-20."""
    order = moe_sort.sort_rows(draw.integers(0, num_experts - 1, num_tokens, 2), num_experts, 16)
    x = draw.normal(num_tokens, k, dtype=torch.bfloat16)
    weight = draw.normal(num_experts, n, k, dtype=torch.bfloat16)
    slots = order.row_of_slot.numel()
    sorted_x = x[order.row_of_slot.clamp(min=0).long() // 2]
    expected = reference.grouped_plain(sorted_x.double(), weight.double(), order.expert_of_block)
    terms = reference.grouped_plain(sorted_x.double().abs(), weight.double().abs(), order.expert_of_block)
    used = order.row_of_slot >= 0
    kind = {"num_slots": slots, "deterministic": deterministic}
    for out in (
        moe_gemm_plain.grouped_plain(
            x, weight, order.expert_of_block, order.row_of_slot, rows_per_source=2, **kind
        ),
        moe_gemm_plain.grouped_plain(sorted_x, weight, order.expert_of_block, **kind),
    ):
        assert ((out.double() - expected).abs() <= 2**-8 * expected.abs() + 2**-20 * terms)[used].all()
