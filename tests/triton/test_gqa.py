"""Paged grouped-query attention and its cache write."""

import pytest
import torch

from kernels import gqa, reference
from kernels.cpu_cache import quantize_rows

BF16 = 2**-8
FP8 = 2**-4
D, PAGE = 32, 16


def paged(draw, context_lens, query_lens, num_heads, num_key_heads):
    num_pages = sum(-(-n // PAGE) for n in context_lens) + 2
    order = torch.randperm(num_pages, generator=draw.generator).int().tolist()
    table = torch.full(
        (len(context_lens), max(-(-n // PAGE) for n in context_lens)), 2**30, dtype=torch.int32
    )
    # As the engine lays them out: a slot's keys, then its values.
    both = torch.full((num_pages, PAGE, 2, num_key_heads, D), float("nan"), dtype=torch.bfloat16)
    caches = both.unbind(2)
    for s, length in enumerate(context_lens):
        for i in range(-(-length // PAGE)):
            table[s, i] = order.pop()
            for cache in caches:
                filled = min(length - i * PAGE, PAGE)
                cache[table[s, i], :filled] = torch.randn(filled, num_key_heads, D, generator=draw.generator)
    q = draw.normal(sum(query_lens), num_heads, D, dtype=torch.bfloat16)
    context = torch.tensor(context_lens, dtype=torch.int32)
    start = torch.tensor([0, *query_lens]).cumsum(0).int()
    return [q, *both.to(draw.device).unbind(2), *(x.to(draw.device) for x in (table, context, start))]


def in_fp8(arguments):
    """(the same arguments over an FP8 cache, its scales); slots that hold NaN keep it, and so do their scales."""
    q, k, v, *rest = arguments
    values, scales = quantize_rows(torch.stack((k, v), 2), torch.float8_e4m3fn)
    return [q, *values.unbind(2), *rest], scales.unbind(2)


def assert_attended(out, arguments, scales=None):
    """Probabilities are rounded to BF16, each times its value; values of both signs may leave little of a sum
    of large ones."""
    q, k, v, *rest = arguments
    k, v = k.double(), v.double()
    expected = reference.paged_attention(q.double(), k, v, *rest, 0.2, scales)
    summed = reference.paged_attention(q.double(), k, v.abs(), *rest, 0.2, scales)
    assert ((out.double() - expected).abs() <= BF16 * summed + BF16 * expected.abs()).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("context_lens", "query_lens", "num_heads", "num_key_heads"),
    [([1, 37], [1, 1], 12, 2), ([63, 129, 5], [63, 65, 2], 7, 1), ([80, 20], [4, 1], 8, 8)],
)
def test_paged_attention(draw, context_lens, query_lens, num_heads, num_key_heads):
    arguments = paged(draw, context_lens, query_lens, num_heads, num_key_heads)
    assert_attended(gqa.paged_attention(*arguments, 0.2, max_query_len=max(query_lens)), arguments)
    rounded, scales = in_fp8(arguments)
    out = gqa.paged_attention(*rounded, 0.2, scales, max_query_len=max(query_lens))
    assert_attended(out, rounded, scales)


def test_caches_of_their_own(draw):
    arguments = paged(draw, [63, 5], [4, 2], 4, 2)
    arguments[1:3] = [cache.contiguous() for cache in arguments[1:3]]
    assert_attended(gqa.paged_attention(*arguments, 0.2, max_query_len=4), arguments)


def test_caches_whose_slots_do_not_follow_one_another_are_refused(draw):
    q, k, v, *rest = paged(draw, [63, 5], [4, 2], 4, 2)
    halves = torch.empty(k.shape[0], 2, *k.shape[1:], dtype=k.dtype, device=k.device).unbind(1)
    with pytest.raises(AssertionError, match="slots lie one after the other"):
        gqa.paged_attention(q, *halves, *rest, 0.2, max_query_len=4)
    with pytest.raises(AssertionError, match="caches lie differently"):
        gqa.paged_attention(q, k, v.contiguous(), *rest, 0.2, max_query_len=4)


def test_splits_are_merged(draw, monkeypatch):
    monkeypatch.setattr(gqa, "_LEAST_SPLIT", 64)
    monkeypatch.setattr(gqa, "num_processors", lambda device: 64)
    arguments = paged(draw, [200, 3, 66], [1, 1, 4], 4, 2)
    assert_attended(gqa.paged_attention(*arguments, 0.2, max_query_len=4), arguments)
    rounded, scales = in_fp8(arguments)
    assert_attended(gqa.paged_attention(*rounded, 0.2, scales, max_query_len=4), rounded, scales)


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_deterministic_output_depends_neither_on_batch_nor_on_chunking(draw, monkeypatch, fp8):
    monkeypatch.setattr(gqa, "DETERMINISTIC_SPLIT", 64)
    arguments, scales = paged(draw, [150, 40], [30, 2], 4, 2), None
    if fp8:
        arguments, scales = in_fp8(arguments)
    together = gqa.paged_attention(*arguments, 0.2, scales, max_query_len=30, deterministic=True)
    q, k, v, table, _, _ = arguments
    for query in (0, 8, 29):
        lengths = (torch.tensor([n], dtype=torch.int32, device=draw.device) for n in (121 + query,))
        start = torch.tensor([0, 1], dtype=torch.int32, device=draw.device)
        alone = gqa.paged_attention(
            q[query : query + 1].clone(),
            k,
            v,
            table[:1].clone(),
            *lengths,
            start,
            0.2,
            scales,
            max_query_len=1,
            deterministic=True,
        )
        assert torch.equal(alone[0], together[query])


@pytest.mark.parametrize("together", [True, False])
def test_write_kv(draw, together):
    k, v = (draw.mixed(5, 3, 2 * D, dtype=torch.bfloat16)[:, :, :D].contiguous() for _ in range(2))
    angle, positions = draw.normal(20, D // 2), draw.integers(0, 20, 5)
    slots = torch.tensor([17, -1, 3, 40, 0], device=draw.device)
    if together:
        caches = torch.empty(3, PAGE, 2, 3, D, dtype=torch.bfloat16, device=draw.device).unbind(2)
    else:
        caches = [torch.empty(3, PAGE, 3, D, dtype=torch.bfloat16, device=draw.device) for _ in range(2)]
    gqa.write_kv(k, v, angle.cos(), angle.sin(), positions, slots, *caches)
    at = positions.long()
    turned = reference.rope(k.double(), angle.cos()[at].double(), angle.sin()[at].double(), False)
    kept = slots >= 0
    assert torch.equal(caches[1].flatten(0, 1)[slots[kept]], v[kept])
    written = caches[0].flatten(0, 1)[slots[kept]].double()
    bound = BF16 * 2 * k.double().abs().amax(-1, keepdim=True)[kept]
    assert ((written - turned[kept]).abs() <= bound).all()
    assert int((~torch.isnan(caches[0][..., 0, 0])).sum()) == 4


@pytest.mark.parametrize("together", [True, False])
def test_write_kv_in_fp8(draw, together):
    """Values are those of plain torch, bit for bit; rotated keys within half a step of the format."""
    k, v = (draw.mixed(5, 3, D, dtype=torch.bfloat16).contiguous() for _ in range(2))
    v[1, 2] = 0
    angle, positions = draw.normal(20, D // 2), draw.integers(0, 20, 5)
    slots = torch.tensor([17, -1, 3, 40, 0], device=draw.device)
    shape = (3, PAGE, 2, 3)
    values = torch.empty(*shape, D, dtype=torch.float8_e4m3fn, device=draw.device)
    caches, scales = values.unbind(2), torch.empty(shape, device=draw.device).unbind(2)
    if not together:
        caches, scales = ([x.contiguous() for x in parts] for parts in (caches, scales))
    for scale in scales:
        scale.fill_(float("nan"))
    gqa.write_kv(k, v, angle.cos(), angle.sin(), positions, slots, *caches, scales)
    kept = slots >= 0
    at = slots[kept]
    mine = [
        (cache.flatten(0, 1)[at].float(), scale.flatten(0, 1)[at, :, None])
        for cache, scale in zip(caches, scales)
    ]
    q, scale = quantize_rows(v[kept], torch.float8_e4m3fn)
    if draw.device == "cpu":
        assert torch.equal(mine[1][0], q.float())
        assert torch.equal(mine[1][1][..., 0], scale)
    angles = (x[positions.long()].double() for x in (angle.cos(), angle.sin()))
    turned = reference.rope(k.double(), *angles, False)
    for (numbers, scale), exact in zip(mine, (turned[kept], v[kept].double())):
        largest = exact.abs().amax(-1, keepdim=True)
        bound = exact.abs() * FP8 + largest * (2**-10 / 448 + 1e-6)
        assert ((numbers.double() * scale.double() - exact).abs() <= bound * 1.001 + 1e-15).all()
    for scale in scales:
        assert int((~torch.isnan(scale[..., 0])).sum()) == 4


def test_nan_stays_in_an_fp8_cache(draw):
    """What hid it would hide why a model fails; the heads beside it are not touched."""
    k, v = (torch.ones(1, 2, D, dtype=torch.bfloat16, device=draw.device) for _ in range(2))
    k[0, 1, 3], v[0, 1, 5] = float("nan"), float("inf")
    angle = torch.zeros(1, D // 2, device=draw.device)
    where = torch.zeros(1, dtype=torch.int64, device=draw.device)
    caches = torch.zeros(1, PAGE, 2, 2, D, dtype=torch.float8_e4m3fn, device=draw.device).unbind(2)
    scales = torch.zeros(1, PAGE, 2, 2, device=draw.device).unbind(2)
    gqa.write_kv(k, v, angle.cos(), angle.sin(), where, where, *caches, scales)
    for cache, scale in zip(caches, scales):
        read = cache[0, 0].float() * scale[0, 0, :, None]
        assert read[1].isnan().any()
        assert torch.equal(read[0], torch.ones_like(read[0]))


def test_an_fp8_cache_needs_its_scales(draw):
    arguments = paged(draw, [20], [1], 2, 1)
    rounded, scales = in_fp8(arguments)
    with pytest.raises(AssertionError, match="a cache of another dtype"):
        gqa.paged_attention(*rounded, 0.2, max_query_len=1)
    with pytest.raises(AssertionError, match="an FP8 cache, and no other, has scales"):
        gqa.paged_attention(*arguments, 0.2, scales, max_query_len=1)


def test_fp8_slots_beyond_two_to_the_31_elements(draw):
    """One slot on each side of 2^31 elements is written and read; memory is reserved, and two pages touched."""
    heads, num_pages = 2, 2**31 // (PAGE * 2 * 2 * D) + 2
    size = num_pages * PAGE * 2 * heads
    bits = torch.tensor([], dtype=torch.uint8, device=draw.device)
    bits.set_(torch.UntypedStorage(size * D, device=draw.device))
    values = bits.view(num_pages, PAGE, 2, heads, D).view(torch.float8_e4m3fn)
    scale = torch.tensor([], device=draw.device).set_(torch.UntypedStorage(size * 4, device=draw.device))
    caches, scales = values.unbind(2), scale.view(num_pages, PAGE, 2, heads).unbind(2)
    k, v = (draw.normal(PAGE + 1, heads, D, dtype=torch.bfloat16) for _ in range(2))
    table = torch.tensor([[num_pages - 1, 1]], dtype=torch.int32, device=draw.device)
    slots = torch.arange(PAGE + 1, device=draw.device) + (num_pages - 1) * PAGE
    slots[-1] = PAGE
    angle = torch.zeros(1, D // 2, device=draw.device)
    where = torch.zeros(PAGE + 1, dtype=torch.int64, device=draw.device)
    gqa.write_kv(k.clone(), v, angle.cos(), angle.sin(), where, slots, *caches, scales)
    q = draw.normal(1, heads, D, dtype=torch.bfloat16)
    context, start = (torch.tensor(x, dtype=torch.int32, device=draw.device) for x in ([PAGE + 1], [0, 1]))
    out = gqa.paged_attention(q, *caches, table, context, start, 0.2, scales, max_query_len=1)
    rounded = [
        quantize_rows(torch.cat((x, x.new_zeros(PAGE - 1, heads, D))), torch.float8_e4m3fn) for x in (k, v)
    ]
    near = [x.view(2, PAGE, *x.shape[1:]) for pair in zip(*rounded) for x in pair]
    order = torch.tensor([[0, 1]], dtype=torch.int32, device=draw.device)
    assert_attended(out, [q, *near[:2], order, context, start], near[2:])
