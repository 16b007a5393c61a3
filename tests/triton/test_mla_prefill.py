"""Expanded prefill, the cache write, and reading a prefix back."""

import pytest
import torch

from kernels import mla_cache, mla_prefill, reference

BF16 = 2**-8


@pytest.mark.parametrize(
    ("query_lens", "prefixes", "num_heads"),
    [([1], [0], 2), ([63, 129, 1], [0, 5, 100], 1), ([70, 2], [64, 1], 2)],
)
def test_prefill(draw, query_lens, prefixes, num_heads):
    key_lens = [q + p for q, p in zip(query_lens, prefixes, strict=True)]
    tokens, keys = sum(query_lens), sum(key_lens)
    q = draw.normal(tokens, num_heads, 48, dtype=torch.bfloat16)
    kv = draw.normal(keys, num_heads, 64, dtype=torch.bfloat16)
    k_rope = draw.normal(keys, 16, dtype=torch.bfloat16) * 4
    parts = (q[..., :32], q[..., 32:], kv[..., :32], k_rope, kv[..., 32:])
    starts = [torch.tensor([0, *n]).cumsum(0).int().to(draw.device) for n in (query_lens, key_lens)]
    expected = reference.mla_prefill(*(x.double() for x in parts), *starts, 0.15)
    scale = expected.abs().amax(-1, keepdim=True)
    for deterministic in (False, True):
        out = mla_prefill.mla_prefill(
            *parts, *starts, 0.15, max_query_len=max(query_lens), deterministic=deterministic
        )
        # Probabilities and the result round to BF16; a mean of values keeps their size.
        assert ((out.double() - expected).abs() <= BF16 * scale + BF16 * expected.abs()).all()


def test_deterministic_prefill_does_not_depend_on_the_batch(draw):
    q = draw.normal(40, 1, 48, dtype=torch.bfloat16)
    kv = draw.normal(90, 1, 64, dtype=torch.bfloat16)
    k_rope = draw.normal(90, 16, dtype=torch.bfloat16)

    def run(queries, keys, query_lens, key_lens):
        starts = [torch.tensor([0, *n]).cumsum(0).int().to(draw.device) for n in (query_lens, key_lens)]
        return mla_prefill.mla_prefill(
            q[queries, :, :32],
            q[queries, :, 32:],
            kv[keys, :, :32],
            k_rope[keys],
            kv[keys, :, 32:],
            *starts,
            0.1,
            max_query_len=max(query_lens),
            deterministic=True,
        )

    together = run(slice(None), slice(None), [7, 33], [20, 70])
    assert torch.equal(run(slice(7, None), slice(20, None), [33], [70]), together[7:])


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_write_and_gather(draw, fp8):
    num_latent, num_rotated, page_size, num_pages = 64, 16, 16, 5
    lengths = [20, 33]
    tokens = sum(lengths)
    wide = draw.mixed(tokens, num_latent + num_rotated + 8, dtype=torch.bfloat16)
    kv, weight = wide[:, :-8], draw.normal(num_latent, dtype=torch.bfloat16)
    angle = draw.normal(64, num_rotated // 2)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(draw.device)
    table = torch.tensor([[4, 1, -1], [0, 3, 2]], dtype=torch.int32, device=draw.device)
    owner = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths)).to(draw.device)
    slots = table[owner, positions // page_size].long() * page_size + positions % page_size
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    cache = torch.empty(num_pages, page_size, num_latent + num_rotated, dtype=dtype, device=draw.device)
    scale = torch.empty(num_pages, page_size, 2, device=draw.device) if fp8 else None
    skipped = slots.clone()
    skipped[3] = -1
    for at in (skipped, slots):
        mla_cache.write_latent(kv, weight, 1e-6, angle.cos(), angle.sin(), positions, at, cache, scale)
        written = int((~torch.isnan(cache[..., 0].float())).sum())
        assert written == tokens - (at is skipped)
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(draw.device)
    kind = {"num_keys": tokens, "dtype": torch.float32 if fp8 else torch.bfloat16}
    out = mla_cache.gather_latent(cache, table, starts, num_latent, scale, **kind).double()
    tables = (angle.cos()[positions].double(), angle.sin()[positions].double())
    expected = reference.latent_entry(kv.double(), weight.double(), 1e-6, *tables, num_latent)
    # Half a step of the cache's format, relative to the value or, below FP8's normals, to the token's largest.
    halves = zip(
        out.split([num_latent, num_rotated], -1), expected.split([num_latent, num_rotated], -1), strict=True
    )
    for mine, theirs in halves:
        largest = theirs.abs().amax(-1, keepdim=True)
        bound = (
            theirs.abs() * 2**-4 + largest * (2**-10 / 448 + 1e-5)
            if fp8
            else theirs.abs() * 2**-8 + largest * 1e-5
        )
        assert ((mine - theirs).abs() <= bound * 1.001).all()


def test_write_beyond_two_to_the_31_elements(draw):
    """One slot on each side of 2^31 elements; memory is reserved, and two pages of it are touched."""
    num_latent, num_rotated, page_size = 64, 16, 64
    num_pages = 2**31 // (page_size * 80) + 2
    storage = torch.UntypedStorage(num_pages * page_size * 80, device=draw.device)
    cache = torch.tensor([], dtype=torch.uint8, device=draw.device).set_(storage)
    cache = cache.view(num_pages, page_size, 80).view(torch.float8_e4m3fn)
    scales = torch.UntypedStorage(num_pages * page_size * 8, device=draw.device)
    scale = torch.tensor([], device=draw.device).set_(scales).view(num_pages, page_size, 2)
    kv, weight = draw.normal(2, 80, dtype=torch.bfloat16), torch.ones(num_latent, device=draw.device)
    angle, positions = draw.normal(4, 8), torch.tensor([1, 2], device=draw.device)
    slots = torch.tensor([3, num_pages * page_size - 1], device=draw.device)
    mla_cache.write_latent(kv, weight, 1e-6, angle.cos(), angle.sin(), positions, slots, cache, scale)
    tables = (angle.cos()[1:3].double(), angle.sin()[1:3].double())
    expected = reference.latent_entry(kv.double(), weight.double(), 1e-6, *tables, num_latent)
    for row, (page, slot) in enumerate([(0, 3), (num_pages - 1, page_size - 1)]):
        entry = cache[page, slot].double() * scale[page, slot].double().repeat_interleave(
            torch.tensor([num_latent, num_rotated], device=draw.device)
        )
        bound = expected[row].abs().amax() * 2**-4
        assert ((entry - expected[row]).abs() <= bound).all()
