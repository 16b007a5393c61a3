"""Every Triton operation in plain torch: the definition that the kernels are tested against.

Each function computes in the dtype and on the device of its inputs, so that the tests run it in float64,
and on a GPU where the kernel ran. Signatures are those of the Triton wrappers, less what only a launch
needs. Shape letters: T tokens · D model width · H heads · C latent · R rope dims · E experts · K top-k (or
a product's inner width, beside M rows and N columns) · F expert width · V vocabulary · P pages · S
sequences · G groups of 128.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cpu_sampler import COLDEST, inverse_of, keys_of, masses_of, odd_draw
from kernels.int_weight import dequantize_groups
from kernels.ops import FAILED

GROUP = 128
"""Width of one quantization group: DeepSeek-V3 report, section 3.3.2."""


def groups_of(x: Tensor, size: int) -> Tensor:
    """[..., N] as [..., N / size, size]."""
    return x.reshape(*x.shape[:-1], -1, size)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root mean square norm of each row of [T, D], times the weight; keeps the dtype of `x_TD`."""
    return x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps) * weight_D


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(normed_TD, sum_TD)`: the sum with the residual stream, and its norm."""
    sum_TD = x_TD + residual_TD
    return rms_norm(sum_TD, weight_D, eps), sum_TD


def rope(x_THR: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
    """Rotates pairs of [T, H, R] by the angles of each token, [T, R/2].

    Interleaved pairs are (2i, 2i+1), DeepSeek's `inference/model.py`; else (i, i + R/2), Llama's and Qwen's.
    """
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    first, second = (x_THR[..., 0::2], x_THR[..., 1::2]) if interleaved else x_THR.chunk(2, -1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def group_scale(x_TD: Tensor, fp8_dtype: torch.dtype) -> Tensor:
    """Scale of each group of 128 columns, [T, D/128]: largest magnitude over the format's largest value."""
    amax = groups_of(x_TD, GROUP).abs().amax(-1)
    return amax.clamp_min(1e-12) / torch.finfo(fp8_dtype).max


def quantize(x_TD: Tensor, fp8_dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """`(q_TD, scale_TG)`, one per token and 128 columns: `act_quant` of DeepSeek's `inference/kernel.py`."""
    scale_TG = group_scale(x_TD, fp8_dtype)
    largest = torch.finfo(fp8_dtype).max
    scaled = (groups_of(x_TD, GROUP) / scale_TG[..., None]).clamp(-largest, largest)
    return scaled.flatten(-2).to(fp8_dtype), scale_TG


def dequantize(q_TD: Tensor, scale_TG: Tensor) -> Tensor:
    """What `quantize` stands for, in the dtype of the scales."""
    return (groups_of(q_TD.to(scale_TG.dtype), GROUP) * scale_TG[..., None]).flatten(-2)


def dequantize_weight(weight_NK: Tensor, scale_NK: Tensor) -> Tensor:
    """Weight [..., N, K] times its scales [..., ceil(N/128), ceil(K/128)], in the dtype of the scales."""
    num_rows, num_columns = weight_NK.shape[-2:]
    spread = scale_NK.repeat_interleave(GROUP, -2)[..., :num_rows, :]
    return weight_NK.to(scale_NK.dtype) * spread.repeat_interleave(GROUP, -1)[..., :num_columns]


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """SiLU of the first half of the columns times the second half."""
    gate, up = gate_up_T2F.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def gemm_fp8(a_MK: Tensor, a_scale_MG: Tensor, b_NK: Tensor, b_scale_NG: Tensor) -> Tensor:
    """Block-scaled product `a bᵀ`, [M, N], in the dtype of the scales."""
    return dequantize(a_MK, a_scale_MG) @ dequantize_weight(b_NK, b_scale_NG).mT


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
    """`(weights_TK, expert_ids_TK)`, best first, the lower id at a tie.

    Sigmoid scores; the bias counts for selection only; a group's score is the sum of its two best; experts
    outside the best groups are out. DeepSeek-V3 report, section 2.1.2; `Gate` of its `inference/model.py`.
    """
    scores_TE = torch.sigmoid(logits_TE)
    choice_TGE = groups_of(scores_TE + bias_E, bias_E.numel() // num_groups)
    group_score = choice_TGE.topk(min(2, choice_TGE.shape[-1]), -1).values.sum(-1)
    kept = group_score.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
    group_out = torch.ones_like(group_score, dtype=torch.bool).scatter(-1, kept, False)
    choice_TE = choice_TGE.masked_fill(group_out[..., None], float("-inf")).flatten(-2)
    ids_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = scores_TE.gather(-1, ids_TK)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK * scaling, ids_TK.to(torch.int32)


class SortedRows(NamedTuple):
    """Dispatched rows (n = token · K + k) in the order of their experts, each part padded to whole blocks."""

    row_of_slot: Tensor
    """int32 [M], the row in each slot, -1 in padding."""
    slot_of_row: Tensor
    """int32 [N], the inverse; -1 for a row whose expert is not among these."""
    counts: Tensor
    """int32 [E], rows of each expert."""
    expert_of_block: Tensor
    """int32 [B], expert of each block of M / B slots, -1 past the last."""


def max_slots(num_rows: int, num_experts: int, block: int) -> int:
    """Slots that always suffice: every expert hit wastes at most `block - 1`."""
    bound = num_rows + min(num_experts, num_rows) * (block - 1)
    return -(-bound // block) * block


def sort_rows(expert_ids_TK: Tensor, num_experts: int, block: int) -> SortedRows:
    """Stable counting sort of rows by expert; ids outside [0, num_experts) are left out."""
    ids_N = expert_ids_TK.flatten().long()
    local_N = (ids_N >= 0) & (ids_N < num_experts)
    count_E = torch.bincount(ids_N[local_N], minlength=num_experts)
    padded_E = (count_E + block - 1) // block * block
    start_E = padded_E.cumsum(0) - padded_E
    num_slots = max_slots(ids_N.numel(), num_experts, block)
    row_of_slot = ids_N.new_full((num_slots,), -1, dtype=torch.int32)
    slot_of_row = ids_N.new_full((ids_N.numel(),), -1, dtype=torch.int32)
    expert_of_block = ids_N.new_full((num_slots // block,), -1, dtype=torch.int32)
    for expert in range(num_experts):
        rows = (ids_N == expert).nonzero().flatten()
        start = int(start_E[expert])
        row_of_slot[start : start + rows.numel()] = rows.int()
        slot_of_row[rows] = torch.arange(start, start + rows.numel(), dtype=torch.int32, device=rows.device)
        expert_of_block[start // block : (start + int(padded_E[expert])) // block] = expert
    return SortedRows(row_of_slot, slot_of_row, count_E.int(), expert_of_block)


def grouped_gemm(
    a_MK: Tensor, a_scale_MG: Tensor, b_ENK: Tensor, b_scale_ENG: Tensor, expert_of_block_B: Tensor
) -> Tensor:
    """Product of each block of rows with its expert's weight, [M, N]; blocks without an expert stay zero."""
    a = dequantize(a_MK, a_scale_MG).reshape(expert_of_block_B.numel(), -1, a_MK.shape[1])
    out = a.new_zeros(*a.shape[:2], b_ENK.shape[1])
    for block, expert in enumerate(expert_of_block_B.tolist()):
        if expert >= 0:
            out[block] = a[block] @ dequantize_weight(b_ENK[expert], b_scale_ENG[expert]).mT
    return out.flatten(0, 1)


def grouped_plain(a_MK: Tensor, b_ENK: Tensor, expert_of_block_B: Tensor) -> Tensor:
    """As `grouped_gemm`, of weights and rows that are not quantized."""
    a = a_MK.reshape(expert_of_block_B.numel(), -1, a_MK.shape[1])
    out = a.new_zeros(*a.shape[:2], b_ENK.shape[1])
    for block, expert in enumerate(expert_of_block_B.tolist()):
        if expert >= 0:
            out[block] = a[block] @ b_ENK[expert].mT
    return out.flatten(0, 1)


def combine(
    rows_MD: Tensor, slot_of_row_N: Tensor, weights_TK: Tensor, shared_TD: Tensor | None = None
) -> Tensor:
    """Sum over k, in order, of weight times the row in that slot (-1: none), then the shared output."""
    out = rows_MD.new_zeros(weights_TK.shape[0], rows_MD.shape[1])
    slots_TK = slot_of_row_N.view(weights_TK.shape).long()
    for k in range(weights_TK.shape[1]):
        here = slots_TK[:, k] >= 0
        out[here] += weights_TK[here, k : k + 1] * rows_MD[slots_TK[here, k]]
    return out if shared_TD is None else out + shared_TD


def gather_latent(
    latent_cache_PSC: Tensor,
    page_table_P: Tensor,
    context_len: int,
    latent_scale_PS2: Tensor | None,
    num_latent: int,
) -> Tensor:
    """The [context_len, C + R] latents of one sequence, scales applied."""
    size = latent_cache_PSC.shape[1]
    pages = page_table_P[: -(-context_len // size)].long()
    latent = latent_cache_PSC[pages].flatten(0, 1)[:context_len]
    if latent_scale_PS2 is None:
        return latent
    scale = latent_scale_PS2[pages].flatten(0, 1)[:context_len]
    widths = torch.tensor([num_latent, latent.shape[-1] - num_latent], device=scale.device)
    return latent.to(scale.dtype) * scale.repeat_interleave(widths, -1)


def causal_attention(q_QHD: Tensor, k_LHD: Tensor, v_LHE: Tensor, scale: float) -> Tensor:
    """Softmax attention of the last Q of L positions over all before them, [Q, H, E]."""
    num_q, num_k = q_QHD.shape[0], k_LHD.shape[0]
    scores = torch.einsum("qhd,khd->hqk", q_QHD, k_LHD) * scale
    positions_L = torch.arange(num_k, device=k_LHD.device)
    visible = positions_L <= positions_L[num_k - num_q :, None]
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~visible, float("-inf")).softmax(-1), v_LHE)


def mla_decode(
    q_latent_THC: Tensor,
    q_rope_THR: Tensor,
    latent_cache_PSC: Tensor,
    page_table_SP: Tensor,
    context_len_S: Tensor,
    query_start_S1: Tensor,
    scale: float,
    latent_scale_PS2: Tensor | None = None,
) -> Tensor:
    """Absorbed multi-head latent attention over paged latents, [T, H, C]: DeepSeek-V2 report, section 2.1.2.

    Queries of sequence s are rows query_start[s] to query_start[s+1], its last context positions.
    """
    num_heads, num_latent = q_latent_THC.shape[1:]
    out = torch.zeros_like(q_latent_THC)
    starts = query_start_S1.tolist()
    for s, (first, last) in enumerate(pairwise(starts)):
        latent = gather_latent(
            latent_cache_PSC, page_table_SP[s], int(context_len_S[s]), latent_scale_PS2, num_latent
        ).to(q_latent_THC.dtype)
        keys = latent[:, None].expand(-1, num_heads, -1)
        query = torch.cat([q_latent_THC[first:last], q_rope_THR[first:last]], -1)
        if last > first:
            out[first:last] = causal_attention(query, keys, keys[..., :num_latent], scale)
    return out


def mla_prefill(
    q_nope_THD: Tensor,
    q_rope_THR: Tensor,
    k_nope_LHD: Tensor,
    k_rope_LR: Tensor,
    v_LHE: Tensor,
    query_start_S1: Tensor,
    key_start_S1: Tensor,
    scale: float,
) -> Tensor:
    """Expanded multi-head latent attention, [T, H, 128]; queries are their sequence's last positions."""
    out = q_nope_THD.new_zeros(*q_nope_THD.shape[:2], v_LHE.shape[-1])
    queries, keys = query_start_S1.tolist(), key_start_S1.tolist()
    for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:]):
        k_rope = k_rope_LR[k0:k1, None].expand(-1, k_nope_LHD.shape[1], -1)
        key = torch.cat([k_nope_LHD[k0:k1], k_rope], -1)
        query = torch.cat([q_nope_THD[q0:q1], q_rope_THR[q0:q1]], -1)
        out[q0:q1] = causal_attention(query, key, v_LHE[k0:k1], scale)
    return out


def paged_attention(
    q_THD: Tensor,
    k_cache_PSHD: Tensor,
    v_cache_PSHD: Tensor,
    page_table_SP: Tensor,
    context_len_S: Tensor,
    query_start_S1: Tensor,
    scale: float,
    kv_scale_PSH: Sequence[Tensor] | None = None,
) -> Tensor:
    """Grouped-query attention over paged keys and values, [T, H, D]; heads of a group share one key head.

    In an FP8 cache every key and value is multiplied by its scale, in the dtype of the queries."""
    out = torch.zeros_like(q_THD)
    if kv_scale_PSH is not None:
        k_scale, v_scale = (scale_PSH.to(q_THD.dtype)[..., None] for scale_PSH in kv_scale_PSH)
        k_cache_PSHD, v_cache_PSHD = (
            k_cache_PSHD.to(k_scale.dtype) * k_scale,
            v_cache_PSHD.to(v_scale.dtype) * v_scale,
        )
    share = q_THD.shape[1] // k_cache_PSHD.shape[2]
    starts, size = query_start_S1.tolist(), k_cache_PSHD.shape[1]
    for s, (first, last) in enumerate(pairwise(starts)):
        length = int(context_len_S[s])
        pages = page_table_SP[s, : -(-length // size)].long()
        k = k_cache_PSHD[pages].flatten(0, 1)[:length].repeat_interleave(share, 1)
        v = v_cache_PSHD[pages].flatten(0, 1)[:length].repeat_interleave(share, 1)
        if last > first:
            out[first:last] = causal_attention(q_THD[first:last], k, v, scale)
    return out


def latent_entry(
    kv_TC: Tensor, norm_weight_C: Tensor, eps: float, cos_TR: Tensor, sin_TR: Tensor, num_latent: int
) -> Tensor:
    """What MLA caches of [T, C + R]: the normed latent, and the rotated (interleaved) key."""
    latent = rms_norm(kv_TC[:, :num_latent], norm_weight_C, eps)
    return torch.cat([latent, rope(kv_TC[:, None, num_latent:], cos_TR, sin_TR, True)[:, 0]], -1)


def gemm_int(x_MK: Tensor, values_NP: Tensor, scale_NG: Tensor) -> Tensor:
    """Weight-only product with integers of 8 or 4 bits as they lie in memory (`ops.GroupScaled`), [M, N]."""
    return x_MK @ dequantize_groups(values_NP, scale_NG, x_MK.shape[1], x_MK.dtype).mT


def grouped_int(a_MK: Tensor, values_ENP: Tensor, scale_ENG: Tensor, expert_of_block_B: Tensor) -> Tensor:
    """As `grouped_plain`, with integer weights as `gemm_int` takes them."""
    weight_ENK = dequantize_groups(values_ENP, scale_ENG, a_MK.shape[1], a_MK.dtype)
    return grouped_plain(a_MK, weight_ENK, expert_of_block_B)


def apply_penalties(
    logits_SV: Tensor,
    token_ids_SL: Tensor,
    output_count_SL: Tensor,
    repetition_S: Tensor,
    frequency_S: Tensor,
    presence_S: Tensor,
) -> Tensor:
    """Logits after penalties; a row of `token_ids_SL` lists the distinct tokens of prompt and output, or -1.

    Repetition divides a positive logit and multiplies another, for every listed token; frequency times the
    token's count in the output, and presence where that is not zero, are subtracted (OpenAI's definition).
    """
    out = logits_SV.clone()
    for s in range(logits_SV.shape[0]):
        listed = token_ids_SL[s] >= 0
        ids, count = token_ids_SL[s][listed].long(), output_count_SL[s][listed]
        x = out[s, ids]
        x = torch.where(x > 0, x / repetition_S[s], x * repetition_S[s])
        out[s, ids] = x - frequency_S[s] * count - presence_S[s] * (count > 0)
    return out


def kept_tokens(scaled_SV: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor) -> Tensor:
    """bool [S, V]: tokens as probable as the least probable one that top-k, top-p and min-p keep, or more.

    Each on the whole distribution. Ties with the last token kept stay. `top_k` 0, `top_p` 1, `min_p` 0: off.
    """
    num_tokens = scaled_SV.shape[-1]
    ranked = scaled_SV.sort(-1, descending=True).values
    k_S = torch.where(top_k_S > 0, top_k_S, num_tokens).clamp(max=num_tokens).long()
    least = ranked.gather(-1, k_S[:, None] - 1)
    mass = (ranked - ranked[:, :1]).exp().cumsum(-1)
    last = (
        (mass < top_p_S[:, None].to(mass.dtype) * mass[:, -1:])
        .sum(-1, keepdim=True)
        .clamp(max=num_tokens - 1)
    )
    nucleus = torch.where(top_p_S[:, None] < 1, ranked.gather(-1, last), float("-inf"))
    floor = ranked[:, :1] + min_p_S[:, None].to(ranked.dtype).log()
    return scaled_SV >= torch.maximum(torch.maximum(least, nucleus), floor)


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    seed_S: Tensor,
    position_S: Tensor,
) -> Tensor:
    """int64 [S]: each row's token as `kernels.cpu_sampler` defines it, or FAILED, in Python's integers."""
    columns = (temperature_S, top_k_S, top_p_S, min_p_S, seed_S, position_S)
    rows = zip(logits_SV.float().cpu(), *(column.tolist() for column in columns))
    return torch.tensor([_sample_row(*row) for row in rows], dtype=torch.int64, device=logits_SV.device)


def _sample_row(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    largest = float(logits_V.max())
    if not math.isfinite(largest) or any(math.isnan(x) for x in (temperature, top_p, min_p)):
        return FAILED
    if temperature < COLDEST:
        return logits_V.tolist().index(largest)
    kept: list[int] = kept_masses(logits_V, temperature, top_k, top_p, min_p).tolist()
    target = sum(kept) * odd_draw(seed, position) // 2**25
    return next(token for token, mass in enumerate(accumulate(kept)) if mass > target)


def kept_masses(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """int64 [V]: each token's mass as `kernels.cpu_sampler` defines it, 0 where a filter leaves it out."""
    device, logits_V = logits_V.device, logits_V.cpu()
    inverse = inverse_of(torch.tensor([[temperature]]))
    keys: list[int] = keys_of(logits_V[None], logits_V.max().view(1, 1), inverse)[0].tolist()
    masses: list[int] = masses_of(torch.tensor(keys, dtype=torch.int32)).tolist()
    ranked = sorted(range(len(keys)), key=lambda token: keys[token])
    limit = keys[ranked[-1]]
    if 0 < top_k < len(keys):
        limit = keys[ranked[top_k - 1]]
    share = int(min(max(top_p, 0.0), 1.0) * 2**31)
    if share < 2**31:
        wanted = max(sum(masses) * share // 2**31, 1)
        reached = accumulate(masses[token] for token in ranked)
        limit = min(limit, next(keys[token] for token, mass in zip(ranked, reached) if mass >= wanted))
    least = int(min(max(min_p, 0.0), 1.0) * 2**40)
    kept = [mass if key <= limit and mass >= least else 0 for key, mass in zip(keys, masses)]
    return torch.tensor(kept, dtype=torch.int64, device=device)
