"""Weight-only INT8 and INT4 products."""

import pytest
import torch

from kernels import int_gemm, reference


def test_packing_is_inverted(draw):
    q = draw.integers(-8, 8, 5, 384, dtype=torch.int8)
    assert torch.equal(reference.unpack_int4(reference.pack_int4(q)), q)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 96, 256), (63, 64, 1152), (129, 72, 384)])
def test_gemm(draw, bits, m, n, k):
    x = draw.mixed(m, k, dtype=torch.bfloat16)
    q, scale = reference.quantize_int(draw.normal(n, k), bits)
    weight = reference.pack_int4(q) if bits == 4 else q
    expected = reference.gemm_int(x.double(), weight, scale)
    terms = reference.gemm_int(x.double().abs(), q.abs(), scale)
    for deterministic in (False, True):
        out = int_gemm.gemm_int(x, weight, scale, deterministic=deterministic)
        # BF16 products of integers up to 127 are exact in float32; sums round by 2^-24 each; one BF16 rounding.
        assert ((out.double() - expected).abs() <= 2**-8 * expected.abs() + 2**-19 * terms).all()
    assert torch.equal(
        out[m // 2], int_gemm.gemm_int(x[m // 2 :][:1].clone(), weight, scale, deterministic=True)[0]
    )
