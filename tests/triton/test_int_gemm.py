"""Weight-only INT8 and INT4 products, dense and of a mixture of experts, and what their weights stand for."""

import pytest
import torch

from kernels import int_gemm, int_moe_gemm, int_weight, moe_sort, reference

KINDS = pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 128), (8, 128), (4, None)])


def weights(draw, bits, group, *shape):
    """`(values, scale)` of one weight [N, K], or of a stack of them."""
    stack = [draw.normal(*shape[-2:]) for _ in range(shape[0] if len(shape) == 3 else 1)]
    made = [int_weight.group_scaled(*int_weight.quantize_int(w, bits, group), bits, w.device) for w in stack]
    values, scale = torch.stack([w.values for w in made]), torch.stack([w.scale for w in made])
    return (values, scale) if len(shape) == 3 else (values[0], scale[0])


def assert_near(out, expected, terms):
    """BF16 products of integers up to 127 are exact in float32; sums round by 2^-24 each; one BF16 rounding."""
    assert ((out.double() - expected).abs() <= 2**-8 * expected.abs() + 2**-19 * terms).all()


def test_packing_is_inverted(draw):
    q = draw.integers(-8, 8, 5, 384, dtype=torch.int8)
    assert torch.equal(int_weight.unpack_int4(int_weight.pack_int4(q)), q)


@KINDS
@pytest.mark.parametrize("width", [1, 100, 128, 300])
def test_no_weight_is_off_by_more_than_half_a_scale(draw, bits, group, width):
    weight = draw.mixed(9, width)
    weight[3] = 0
    weight[4] *= 1e-38  # denormal
    weight[5] = 1e38
    q, scale = int_weight.quantize_int(weight, bits, group)
    assert scale.shape == (9, 1 if group is None else -(-width // group))
    assert torch.equal(scale, scale.bfloat16().float())
    stored = int_weight.group_scaled(q, scale, bits, weight.device)
    got = int_weight.dequantize_groups(stored.values, stored.scale, width, torch.float64)
    step = scale.double().repeat_interleave(group or width, 1)[:, :width]
    assert ((got - weight.double()).abs() <= step * 0.500001).all()
    assert (got[3] == 0).all()
    least = weight.abs().amax(1).double() / (2 ** (bits - 1) - 0.5)
    normal = torch.arange(9, device=weight.device) % 9 < 3  # rows that are neither zeros nor denormal
    assert (scale.double().amax(1) <= least * (1 + 2**-7))[normal].all()


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize(("m", "n", "k"), [(1, 96, 256), (63, 64, 1152), (129, 72, 100), (17, 40, 330)])
def test_gemm(draw, bits, group, m, n, k):
    x = draw.mixed(m, k + 8, dtype=torch.bfloat16)
    x[:, k:] = float("nan")  # what lies behind a row's width is nobody's
    x = x[:, :k]
    values, scale = weights(draw, bits, group, n, k)
    expected = reference.gemm_int(x.double(), values, scale)
    terms = x.double().abs() @ int_weight.dequantize_groups(values, scale, k, torch.float64).abs().T
    for deterministic in (False, True):
        out = int_gemm.gemm_int(x, values, scale, deterministic=deterministic)
        assert_near(out, expected, terms)
    alone = int_gemm.gemm_int(x[m // 2 :][:1].clone(), values, scale, deterministic=True)
    assert torch.equal(out[m // 2], alone[0])


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "n", "k"), [(1, 6, 72, 100), (40, 3, 128, 256)])
def test_grouped(draw, bits, group, num_tokens, num_experts, n, k, deterministic):
    """Each slot fetches its token; then slots in their order. The last expert has no token."""
    order = moe_sort.sort_rows(draw.integers(0, num_experts - 1, num_tokens, 2), num_experts, 16)
    x = draw.normal(num_tokens, k, dtype=torch.bfloat16)
    values, scale = weights(draw, bits, group, num_experts, n, k)
    sorted_x = x[order.row_of_slot.clamp(min=0).long() // 2]
    expected = reference.grouped_int(sorted_x.double(), values, scale, order.expert_of_block)
    exact = int_weight.dequantize_groups(values, scale, k, torch.float64)
    terms = reference.grouped_plain(sorted_x.double().abs(), exact.abs(), order.expert_of_block)
    used = order.row_of_slot >= 0
    kind = {"num_slots": order.row_of_slot.numel(), "deterministic": deterministic}
    index = order.expert_of_block
    for out in (
        int_moe_gemm.grouped_int(x, values, scale, index, order.row_of_slot, rows_per_source=2, **kind),
        int_moe_gemm.grouped_int(sorted_x, values, scale, index, **kind),
    ):
        assert_near(out[used], expected[used], terms[used])


def test_deterministic_rows_of_experts_do_not_depend_on_the_batch(draw):
    values, scale = weights(draw, 4, 128, 3, 64, 200)
    a = draw.normal(48, 200, dtype=torch.bfloat16)
    index = torch.tensor([2, 0, 1], dtype=torch.int32, device=a.device)
    together = int_moe_gemm.grouped_int(a, values, scale, index, num_slots=48, deterministic=True)
    first = a[16:32].clone()
    first[1:] = 0
    alone = int_moe_gemm.grouped_int(
        first, values, scale, index[1:2].clone(), num_slots=16, deterministic=True
    )
    assert torch.equal(alone[0], together[16])
