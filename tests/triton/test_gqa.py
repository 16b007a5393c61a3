"""Paged grouped-query attention and its cache write."""

import pytest
import torch

from kernels import gqa, reference

BF16 = 2**-8
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


def assert_attended(out, arguments):
    q, k, v, *rest = arguments
    expected = reference.paged_attention(q.double(), k.double(), v.double(), *rest, 0.2)
    scale = expected.abs().amax(-1, keepdim=True)
    assert ((out.double() - expected).abs() <= BF16 * scale + BF16 * expected.abs()).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("context_lens", "query_lens", "num_heads", "num_key_heads"),
    [([1, 37], [1, 1], 12, 2), ([63, 129, 5], [63, 65, 2], 7, 1), ([80, 20], [4, 1], 8, 8)],
)
def test_paged_attention(draw, context_lens, query_lens, num_heads, num_key_heads):
    arguments = paged(draw, context_lens, query_lens, num_heads, num_key_heads)
    assert_attended(gqa.paged_attention(*arguments, 0.2, max_query_len=max(query_lens)), arguments)


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


@pytest.mark.slow
def test_deterministic_output_depends_neither_on_batch_nor_on_chunking(draw, monkeypatch):
    monkeypatch.setattr(gqa, "DETERMINISTIC_SPLIT", 64)
    arguments = paged(draw, [150, 40], [30, 2], 4, 2)
    together = gqa.paged_attention(*arguments, 0.2, max_query_len=30, deterministic=True)
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
