"""Paged latent attention: split or not, BF16 or FP8 cache, one to four queries, any share of heads."""

import pytest
import torch

from kernels import mla_decode, reference

C, R, PAGE = 64, 16, 16


class Paged:
    """Sequences of given lengths on scattered pages; unused pages and slots hold NaN."""

    def __init__(self, draw, context_lens, query_lens, num_heads, dtype=torch.bfloat16, fp8=False):
        reach = max(-(-n // PAGE) for n in context_lens)
        num_pages = sum(-(-n // PAGE) for n in context_lens) + 3
        order = torch.randperm(num_pages, generator=draw.generator).int().tolist()
        table = torch.full((len(context_lens), reach), 2**30, dtype=torch.int32)
        latents = draw.normal(num_pages, PAGE, C + R)
        latents[..., C:] *= 8
        cache = torch.full_like(latents, float("nan"))
        for s, length in enumerate(context_lens):
            for i in range(-(-length // PAGE)):
                page = order.pop()
                table[s, i] = page
                cache[page, : length - i * PAGE] = latents[page, : length - i * PAGE]
        self.scale_cache = None
        if fp8:
            halves = [cache[..., :C], cache[..., C:]]
            scales = [h.nan_to_num().abs().amax(-1).clamp_min(1e-12) / 448 for h in halves]
            halves = [h / s[..., None] for h, s in zip(halves, scales, strict=True)]
            self.scale_cache = torch.stack(scales, -1).to(draw.device)
            cache = torch.cat(halves, -1).to(torch.float8_e4m3fn)
        self.cache = cache.to(draw.device) if fp8 else cache.to(draw.device, dtype)
        self.table = table.to(draw.device)
        self.context = torch.tensor(context_lens, dtype=torch.int32, device=draw.device)
        self.start = torch.tensor([0, *query_lens]).cumsum(0).int().to(draw.device)
        self.max_query_len = max(query_lens)
        tokens = sum(query_lens)
        self.q_latent = draw.normal(tokens, num_heads, C, dtype=dtype)
        self.q_rope = draw.normal(tokens, num_heads, R, dtype=dtype)

    def run(self, **kind):
        return mla_decode.mla_decode(
            self.q_latent,
            self.q_rope,
            self.cache,
            self.table,
            self.context,
            self.start,
            0.1,
            self.scale_cache,
            max_query_len=self.max_query_len,
            **kind,
        )

    def expected(self):
        cache = self.cache if self.scale_cache is not None else self.cache.double()
        scale = None if self.scale_cache is None else self.scale_cache.double()
        return reference.mla_decode(
            self.q_latent.double(),
            self.q_rope.double(),
            cache,
            self.table,
            self.context,
            self.start,
            0.1,
            scale,
        )


def assert_attended(out, expected):
    """Probabilities and the result are rounded to BF16, 2^-9 each; a mean of values keeps their size."""
    scale = expected.abs().amax(-1, keepdim=True)
    assert ((out.double() - expected).abs() <= 2**-8 * scale + 2**-8 * expected.abs()).all()


@pytest.mark.parametrize("num_heads", [128, 16, 3])
def test_head_shares(draw, num_heads):
    paged = Paged(draw, [1, 37], [1, 1], num_heads)
    assert_attended(paged.run(), paged.expected())


@pytest.mark.parametrize("fp8", [False, True])
def test_queries_for_speculation(draw, fp8):
    """Two to four queries a sequence see one token more each, also where a split ends among them."""
    paged = Paged(draw, [4, 129, 63, 66], [4, 3, 2, 4], 8, fp8=fp8)
    assert_attended(paged.run(), paged.expected())


@pytest.mark.parametrize("fp8", [False, True])
def test_splits_are_merged(draw, monkeypatch, fp8):
    monkeypatch.setattr(mla_decode, "_LEAST_SPLIT", 64)
    paged = Paged(draw, [300, 5, 130], [2, 1, 4], 4, fp8=fp8)
    monkeypatch.setattr(mla_decode, "num_processors", lambda device: 64)
    assert_attended(paged.run(), paged.expected())


def test_a_batch_without_queries_for_one_sequence(draw):
    paged = Paged(draw, [20, 33], [0, 2], 4)
    assert_attended(paged.run(), paged.expected())


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_deterministic_output_depends_neither_on_batch_nor_on_chunking(draw, monkeypatch, fp8):
    """One query at a time, as decode computes it, equals the same queries in one chunk, bit by bit."""
    monkeypatch.setattr(mla_decode, "DETERMINISTIC_SPLIT", 64)
    paged = Paged(draw, [150, 40], [30, 2], 4, fp8=fp8)
    together = paged.run(deterministic=True)
    assert_attended(together, paged.expected())
    queries = (paged.q_latent, paged.q_rope)
    for query in (0, 8, 29):
        paged.q_latent, paged.q_rope = (q[query : query + 1].clone() for q in queries)
        alone = mla_decode.mla_decode(
            paged.q_latent,
            paged.q_rope,
            paged.cache,
            paged.table[:1].clone(),
            torch.tensor([121 + query], dtype=torch.int32, device=draw.device),
            torch.tensor([0, 1], dtype=torch.int32, device=draw.device),
            0.1,
            paged.scale_cache,
            max_query_len=1,
            deterministic=True,
        )
        assert torch.equal(alone[0], together[query])


def test_slots_beyond_two_to_the_31_elements(draw):
    """The last page of a cache of more than 2^31 elements; memory is reserved, and only two pages are touched."""
    num_pages = 2**31 // (PAGE * (C + R)) + 2
    paged = Paged(draw, [24], [1], 2, fp8=True)
    expected = paged.expected()
    shape = (num_pages, PAGE, C + R)
    storage = torch.UntypedStorage(num_pages * PAGE * (C + R), device=draw.device)
    large = torch.tensor([], dtype=torch.uint8, device=draw.device).set_(storage).view(shape)
    scales = torch.tensor([], dtype=torch.float32, device=draw.device)
    scales = scales.set_(torch.UntypedStorage(num_pages * PAGE * 8, device=draw.device)).view(*shape[:2], 2)
    for i, page in enumerate((num_pages - 1, num_pages - 2)):
        source = int(paged.table[0, i])
        large[page] = paged.cache[source].view(torch.uint8)
        scales[page] = paged.scale_cache[source]
        paged.table[0, i] = page
    paged.cache, paged.scale_cache = large.view(torch.float8_e4m3fn), scales
    assert_attended(paged.run(), expected)
