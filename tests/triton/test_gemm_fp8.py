"""Block-scaled FP8 product in its plain, split and persistent forms."""

import pytest
import torch

from kernels import gemm_fp8, reference


def operands(draw, m, n, k):
    groups = k // 128
    return draw.fp8(m, k), draw.scales(m, groups), draw.fp8(n, k), draw.scales(-(-n // 128), groups)


def assert_product(out, a, a_scale, b, b_scale, fp8_sums):
    """FP8 products are exact in float32, so only their sums are off, by `fp8_sums` of Σ |a| |b| at most: see
    conftest.py. Then one rounding to the output's format."""
    expected = reference.gemm_fp8(a, a_scale.double(), b, b_scale.double())
    terms = reference.gemm_fp8(a.float().abs(), a_scale.double(), b.float().abs(), b_scale.double())
    rounding = 2**-8 if out.dtype == torch.bfloat16 else 2**-23
    assert ((out.double() - expected).abs() <= rounding * expected.abs() + fp8_sums * terms).all()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 192, 256), (63, 64, 1152), (129, 200, 384)])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_gemm(draw, fp8_sums, m, n, k, out_dtype):
    a, a_scale, b, b_scale = operands(draw, m, n, k)
    out = gemm_fp8.gemm_fp8(a, a_scale, b, b_scale, out_dtype=out_dtype)
    assert_product(out, a, a_scale, b, b_scale, fp8_sums)


def test_split_widths(draw):
    """R1's shapes on 132 processors: q_a + kv_a is split at one row, o and every wide product at 4,096 are not."""
    assert gemm_fp8.num_splits(1, 2112, 56, 132) == 8
    assert gemm_fp8.num_splits(64, 7168, 128, 132) == 3
    assert gemm_fp8.num_splits(64, 24576, 12, 132) == 1
    assert gemm_fp8.num_splits(4096, 2112, 56, 132) == 1


@pytest.mark.parametrize(("m", "n", "k"), [(130, 272, 384), (1, 128, 128)])
def test_persistent(draw, fp8_sums, monkeypatch, m, n, k):
    monkeypatch.setattr(gemm_fp8, "_PERSISTENT_ROWS", 1)
    a, a_scale, b, b_scale = operands(draw, m, n, k)
    out = gemm_fp8.gemm_fp8(a, a_scale, b, b_scale)
    assert_product(out, a, a_scale, b, b_scale, fp8_sums)


def test_strided_activations(draw):
    a, a_scale, b, b_scale = operands(draw, 5, 64, 256)
    wide = torch.cat([a, a], 1)[:, :256]
    assert torch.equal(
        gemm_fp8.gemm_fp8(wide, a_scale, b, b_scale), gemm_fp8.gemm_fp8(a, a_scale, b, b_scale)
    )


def test_deterministic_rows_do_not_depend_on_the_batch(draw):
    a, a_scale, b, b_scale = operands(draw, 67, 192, 1152)
    together = gemm_fp8.gemm_fp8(a, a_scale, b, b_scale, deterministic=True)
    for rows in (slice(0, 1), slice(66, 67), slice(3, 20)):
        alone = gemm_fp8.gemm_fp8(a[rows].clone(), a_scale[rows].clone(), b, b_scale, deterministic=True)
        assert torch.equal(alone, together[rows])


def test_wrong_scales_are_refused(draw):
    a, a_scale, b, b_scale = operands(draw, 4, 64, 256)
    with pytest.raises(AssertionError, match="scales"):
        gemm_fp8.gemm_fp8(a, a_scale[:, :1].contiguous(), b, b_scale)
