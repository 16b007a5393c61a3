"""Row kernels: norm, rope, FP8 quantization."""

import pytest
import torch

from kernels import fp8, norm, reference, rope, silu

# One rounding to BF16 moves a value by at most 2^-9 of itself; float32 work before it adds far less.
BF16 = 2**-8


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 192), (63, 100), (129, 64)])
def test_rms_norm(draw, num_tokens, width):
    x = draw.mixed(num_tokens, width, dtype=torch.bfloat16)
    residual = draw.mixed(num_tokens, 2 * width, dtype=torch.bfloat16)[:, :width]
    weight = draw.normal(width, dtype=torch.bfloat16)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-6)
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-6).double(), expected, rtol=BF16, atol=1e-12)
    normed, summed = norm.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(summed, (x.float() + residual.float()).bfloat16())
    expected = reference.rms_norm(summed.double(), weight.double(), 1e-6)
    torch.testing.assert_close(normed.double(), expected, rtol=BF16, atol=1e-12)


def test_rms_norm_of_a_row_does_not_depend_on_its_batch(draw):
    x, weight = draw.mixed(9, 300, dtype=torch.bfloat16), draw.normal(300)
    together = norm.rms_norm(x, weight, 1e-6)
    assert torch.equal(together[4:5], norm.rms_norm(x[4:5].clone(), weight, 1e-6))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("num_tokens", "num_heads", "width"), [(1, 3, 64), (7, 40, 24)])
def test_rope(draw, interleaved, num_tokens, num_heads, width):
    angle = draw.normal(50, width // 2)
    positions = draw.integers(0, 50, num_tokens)
    wide = draw.mixed(num_tokens, num_heads, width + 32, dtype=torch.bfloat16)
    x = wide[..., 32:]
    out = rope.rope(x, angle.cos(), angle.sin(), positions, interleaved=interleaved)
    at = positions.long()
    expected = reference.rope(x.double(), angle.cos()[at].double(), angle.sin()[at].double(), interleaved)
    # A pair's two terms may cancel, so the bound is one rounding of the larger of them.
    assert ((out.double() - expected).abs() <= BF16 * x.double().abs().amax(-1, keepdim=True) * 2).all()
    before = wide[..., :32].clone()
    rope.rope(x, angle.cos(), angle.sin(), positions, interleaved=interleaved, in_place=True)
    assert torch.equal(x, out)
    assert torch.equal(wide[..., :32], before)


def assert_quantized(q, scale, values, exact):
    """Scales agree with float64 to float32 rounding; each value is within half a step of FP8.

    Half a step of E4M3 is 2^-4 of a normal value and 2^-10 of the scale below the normals; `exact` widens it
    where the values quantized were themselves rounded.
    """
    torch.testing.assert_close(scale.double(), reference.group_scale(values, q.dtype), rtol=1e-5, atol=0)
    back = reference.dequantize(q, scale.double())
    step = scale.double().repeat_interleave(128, -1) * 2.0**-10
    assert ((back - values).abs() <= torch.maximum(values.abs() * 2**-4, step) * (1 + exact)).all()


FNUZ = pytest.param(
    torch.float8_e4m3fnuz,
    marks=pytest.mark.skipif(
        torch.cuda.is_available() and not torch.version.hip, reason="NVIDIA has no such format"
    ),
)


@pytest.mark.parametrize("fp8_dtype", [torch.float8_e4m3fn, FNUZ])
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 128), (63, 384)])
def test_quantize(draw, fp8_dtype, num_tokens, width):
    x = draw.mixed(num_tokens, width + 64, dtype=torch.bfloat16)[:, :width]
    x[0, :128] = 0
    q, scale = fp8.quantize(x, fp8_dtype)
    assert_quantized(q, scale, x.double(), 1e-5)
    assert (q[0, :128].float() == 0).all()
    same_scale = (x.float().unflatten(-1, (-1, 128)) / scale[..., None]).flatten(-2)
    largest = torch.finfo(fp8_dtype).max
    assert torch.equal(q.float(), same_scale.clamp(-largest, largest).to(fp8_dtype).float())


def test_silu_mul_quantize(draw):
    gate_up = draw.mixed(65, 512, dtype=torch.bfloat16)
    q, scale = fp8.silu_mul_quantize(gate_up)
    assert_quantized(q, scale, reference.silu_mul(gate_up.double()), 1e-4)


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 24), (9, 1100)])
def test_silu_mul(draw, num_tokens, width):
    gate_up = draw.normal(num_tokens, 2 * width + 8, dtype=torch.bfloat16)[:, : 2 * width]
    expected = reference.silu_mul(gate_up.double())
    torch.testing.assert_close(silu.silu_mul(gate_up).double(), expected, rtol=BF16, atol=1e-12)


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 384), (63, 128)])
def test_rms_norm_quantize(draw, num_tokens, width):
    x, residual = (draw.mixed(num_tokens, width, dtype=torch.bfloat16) for _ in range(2))
    weight = draw.normal(width)
    plain = fp8.rms_norm_quantize(x, weight, 1e-6)
    assert_quantized(plain.q, plain.scale, reference.rms_norm(x.double(), weight.double(), 1e-6), 1e-4)
    both = fp8.rms_norm_quantize(x, weight, 1e-6, residual_TD=residual, keep_normed=True)
    assert torch.equal(both.sum, (x.float() + residual.float()).bfloat16())
    expected = reference.rms_norm(both.sum.double(), weight.double(), 1e-6)
    assert_quantized(both.q, both.scale, expected, 1e-4)
    torch.testing.assert_close(both.normed.double(), expected, rtol=BF16, atol=1e-12)


def test_dequantize_weight(draw):
    weight, scale = draw.fp8(200, 320), draw.scales(2, 3)
    out = fp8.dequantize_weight(weight, scale)
    expected = reference.dequantize_weight(weight, scale.double())
    torch.testing.assert_close(out.double(), expected, rtol=BF16, atol=0)
