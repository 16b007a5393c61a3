"""The gate of a mixture of experts in one kernel: sigmoid, bias, group-limited top-k; one warp a token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import rows_dense


@triton.jit
def _gate_kernel(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    id_ptr: tl.tensor,
    logits_stride: int,
    scaling: float,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_S)[None, :]
    inside = (group < NUM_GROUPS)[:, None] & (member < GROUP_SIZE)
    expert = group[:, None] * GROUP_SIZE + member
    logits = tl.load(logits_ptr + token * logits_stride + expert, mask=inside, other=0.0)
    score = tl.sigmoid(logits.to(tl.float32))
    bias = tl.load(bias_ptr + expert, mask=inside, other=0.0).to(tl.float32)
    choice = tl.where(inside, score + bias, float("-inf"))

    group_score = tl.max(choice, 1)
    if GROUP_SIZE > 1:
        first = tl.argmax(choice, 1)
        group_score += tl.max(tl.where(member == first[:, None], float("-inf"), choice), 1)
    group_score = tl.where(group < NUM_GROUPS, group_score, float("-inf"))
    mine, other = group_score[:, None], group_score[None, :]
    ahead = (other > mine) | ((other == mine) & (group[None, :] < group[:, None]))
    kept = tl.sum(ahead.to(tl.int32), 1) < TOP_GROUPS
    choice = tl.where(kept[:, None], choice, float("-inf"))

    size: tl.constexpr = BLOCK_G * BLOCK_S
    choice = tl.reshape(choice, [size])
    score = tl.reshape(score, [size])
    lane = tl.arange(0, size)
    column = tl.arange(0, BLOCK_K)
    weights = tl.zeros([BLOCK_K], tl.float32)
    ids = tl.zeros([BLOCK_K], tl.int32)
    for k in range(TOP_K):
        best = tl.argmax(choice, 0)
        weights = tl.where(column == k, tl.sum(tl.where(lane == best, score, 0.0), 0), weights)
        ids = tl.where(column == k, best // BLOCK_S * GROUP_SIZE + best % BLOCK_S, ids)
        choice = tl.where(lane == best, float("-inf"), choice)
    if NORMALIZE:
        weights = weights / tl.sum(weights, 0)
    tl.store(weight_ptr + token * TOP_K + column, weights * scaling, mask=column < TOP_K)
    tl.store(id_ptr + token * TOP_K + column, ids, mask=column < TOP_K)


def gate(
    logits_TE: Tensor,
    bias_E: Tensor,
    *,
    num_groups: int,
    top_groups: int,
    top_k: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """`(weights_TK float32, expert_ids_TK int32)`, best first; see `reference.gate`."""
    num_tokens, num_experts = logits_TE.shape
    assert rows_dense(logits_TE), "logits' rows must be contiguous"
    assert bias_E.shape == (num_experts,)
    assert bias_E.is_contiguous()
    assert num_experts % num_groups == 0, f"{num_experts} experts do not divide into {num_groups} groups"
    size = num_experts // num_groups
    assert top_k <= top_groups * size, f"top {top_k} of {top_groups} groups of {size} experts"
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    if num_tokens:
        _gate_kernel[(num_tokens,)](
            logits_TE,
            bias_E,
            weights_TK,
            ids_TK,
            logits_TE.stride(0),
            scaling,
            NUM_GROUPS=num_groups,
            GROUP_SIZE=size,
            TOP_GROUPS=top_groups,
            TOP_K=top_k,
            NORMALIZE=normalize,
            BLOCK_G=triton.next_power_of_2(num_groups),
            BLOCK_S=triton.next_power_of_2(size),
            BLOCK_K=triton.next_power_of_2(top_k),
            num_warps=1,
        )
    return weights_TK, ids_TK
