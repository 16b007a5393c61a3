"""Gate, sort, pack, unpack, gather and combine."""

import pytest
import torch

from kernels import moe_combine, moe_gate, moe_sort, reference

BF16 = 2**-8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_groups", "top_groups", "top_k", "normalize"),
    [(1, 256, 8, 4, 8, True), (63, 256, 8, 4, 8, True), (129, 24, 3, 2, 5, False), (3, 8, 1, 1, 2, True)],
)
def test_gate(draw, num_tokens, num_experts, num_groups, top_groups, top_k, normalize):
    logits = draw.mixed(num_tokens, num_experts) / 8
    bias = draw.normal(num_experts) / 4
    kind = {
        "num_groups": num_groups,
        "top_groups": top_groups,
        "top_k": top_k,
        "normalize": normalize,
        "scaling": 2.5,
    }
    weights, ids = moe_gate.gate(logits, bias, **kind)
    # The same choices need the same float32 scores; exact ties are among them (zero logits and equal biases).
    _, expected_ids = reference.gate(logits, bias, **kind)
    scores = torch.sigmoid(logits.double())
    choice = scores + bias.double()
    differing = (ids != expected_ids).any(-1).nonzero().flatten().tolist()
    for token in differing:  # a near tie that float32's two sigmoids order differently, and nothing else
        mine, theirs = choice[token, ids[token].long()], choice[token, expected_ids[token].long()]
        torch.testing.assert_close(mine.sum(), theirs.sum(), rtol=0, atol=1e-5)
    assert len(differing) <= max(1, num_tokens // 50)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    expected = scores.gather(-1, ids.long())
    expected = expected / expected.sum(-1, keepdim=True) if normalize else expected
    torch.testing.assert_close(weights.double(), expected * 2.5, rtol=1e-5, atol=1e-7)


def test_gate_breaks_ties_towards_the_lower_id(draw):
    logits, bias = torch.zeros(2, 32, device=draw.device), torch.zeros(32, device=draw.device)
    _, ids = moe_gate.gate(logits, bias, num_groups=4, top_groups=2, top_k=6, normalize=True, scaling=1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "block"),
    [(1, 8, 256, 16), (63, 3, 20, 4), (129, 8, 32, 128), (300, 8, 8, 16), (7, 2, 5, 1)],
)
def test_sort_rows(draw, num_tokens, top_k, num_experts, block):
    # Ids past the local experts and -1 belong to other shards; the last local expert gets no token.
    ids = draw.integers(-1, num_experts + 3, num_tokens, top_k)
    ids[ids == num_experts - 1] = 0
    expected = reference.sort_rows(ids.cpu(), num_experts, block)
    for mine, theirs in zip(moe_sort.sort_rows(ids, num_experts, block), expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize(("num_tokens", "real"), [(8, 5), (8, 0), (600, 513)])
def test_sort_rows_leaves_out_the_tokens_that_pad_a_batch(draw, num_tokens, real):
    ids = draw.integers(0, 12, num_tokens, 3)
    limit = torch.tensor([real], dtype=torch.int32, device=draw.device)
    cut = ids.cpu().clone()
    cut[real:] = -1
    expected = reference.sort_rows(cut, 12, 16)
    for mine, theirs in zip(moe_sort.sort_rows(ids, 12, 16, limit), expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


def test_sort_rows_without_a_local_row(draw):
    ids = torch.full((3, 2), 9, dtype=torch.int32, device=draw.device)
    rows = moe_sort.sort_rows(ids, 4, 16)
    assert rows.counts.tolist() == [0] * 4
    assert (rows.row_of_slot == -1).all()
    assert (rows.slot_of_row == -1).all()
    assert (rows.expert_of_block == -1).all()


def test_rows_are_spread_as_if_packed_and_unpacked(draw):
    q, scale = reference.quantize(draw.mixed(9, 256))
    q, scale = q.to(draw.device), scale.to(draw.device)
    order = moe_sort.sort_rows(draw.integers(0, 4, 9, 3), 4, 16)
    message = moe_combine.pack_rows(q, scale, order.row_of_slot, 3)
    index = torch.arange(len(message), dtype=torch.int32, device=draw.device)
    expected = moe_combine.unpack_rows(message, index, 256, q.dtype)
    for mine, theirs in zip(moe_combine.spread_rows(q, scale, order.row_of_slot, 3), expected):
        assert torch.equal(mine.float(), theirs.float())


@pytest.mark.slow
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 128), (63, 1152)])
def test_dispatch_and_return(draw, num_tokens, width):
    """Pack, unpack into blocks, gather back: every row arrives at its expert and returns to its place."""
    top_k, num_experts = 3, 6
    ids = draw.integers(0, num_experts, num_tokens, top_k)
    x = draw.mixed(num_tokens, width)
    q, scale = reference.quantize(x)
    order = moe_sort.sort_rows(ids, num_experts, 1)
    message = moe_combine.pack_rows(q, scale, order.row_of_slot, top_k)
    sent_ids = ids.flatten()[order.row_of_slot.long()][:, None].contiguous()
    rows = moe_sort.sort_rows(sent_ids, num_experts, 16)
    arrived_q, arrived_scale = moe_combine.unpack_rows(message, rows.row_of_slot, width, q.dtype)
    arrived = reference.dequantize(arrived_q, arrived_scale)
    assert (arrived[rows.row_of_slot < 0] == 0).all()
    back = moe_combine.gather_rows(arrived.bfloat16(), rows.slot_of_row)
    home = moe_combine.gather_rows(back, order.slot_of_row)
    expected = reference.dequantize(q, scale).bfloat16().repeat_interleave(top_k, 0)
    assert torch.equal(home, expected)


@pytest.mark.parametrize(("num_tokens", "width", "top_k"), [(1, 100, 8), (33, 1500, 3)])
def test_combine(draw, num_tokens, width, top_k):
    rows = draw.mixed(num_tokens * top_k + 5, width, dtype=torch.bfloat16)
    slots = (
        torch.randperm(rows.shape[0], generator=draw.generator)[: num_tokens * top_k].int().to(draw.device)
    )
    slots[::7] = -1
    rows[~torch.isin(torch.arange(rows.shape[0], device=draw.device), slots)] = float("nan")
    weights = draw.scales(num_tokens, top_k)
    shared = draw.mixed(num_tokens, width, dtype=torch.bfloat16)
    for extra in (None, shared):
        out = moe_combine.combine(rows, slots, weights, extra)
        wide = None if extra is None else extra.double()
        expected = reference.combine(rows.double(), slots, weights.double(), wide)
        terms = reference.combine(
            rows.double().abs(), slots, weights.double(), None if wide is None else wide.abs()
        )
        # One BF16 rounding of the result, and float32 sums of at most nine terms.
        assert ((out.double() - expected).abs() <= BF16 * expected.abs() + 2**-20 * terms).all()
