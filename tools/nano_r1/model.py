"""The tiny DeepSeek-V3 network for training: MLA, a dense first layer, routed experts, one MTP module.

Equations: DeepSeek-V3 technical report, sections 2.1 (MLA, DeepSeekMoE with bias balancing) and 2.2 (MTP).
What the weights mean is as published in `inference/model.py` of deepseek-ai/DeepSeek-V3; the MTP module reads
the trunk's hidden states after `model.norm`, as vLLM's and SGLang's readers of R1 checkpoints feed it.

Shapes: B rows · S positions of a row · T tokens · D model width · H heads · C latent · R rope dims ·
E experts · K top-k · F expert width · V vocabulary · N = T x K.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NanoConfig:
    """Sizes of the network, by the names of R1's config.json."""

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    q_lora_rank: int = 64
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(num_positions: int, rope_dims: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [positions, R/2], of the angles position x theta^(-2i/R)."""
    frequencies = theta ** (-torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x0, x1), (x2, x3), … of the last dimension; cos and sin are half as wide.

    The rotated halves come out one after the other; query and key do alike, so their product does not change.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


class KVCache:
    """Keys and values of the positions so far, one pair per attention layer, each [B, H, S, dims]."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k_BHSd: Tensor, v_BHSd: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new positions of one layer and return all of them."""
        if layer in self._entries:
            old_k, old_v = self._entries[layer]
            k_BHSd, v_BHSd = torch.cat((old_k, k_BHSd), 2), torch.cat((old_v, v_BHSd), 2)
        self._entries[layer] = (k_BHSd, v_BHSd)
        return k_BHSd, v_BHSd

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but `rows` (indices)."""
        self._entries = {layer: (k[rows], v[rows]) for layer, (k, v) in self._entries.items()}


@dataclass
class Positions:
    """What attention needs of the tokens: rope cos and sin [S, R/2], additive mask [B or 1, 1, S, all]."""

    cos: Tensor
    sin: Tensor
    mask: Tensor
    cache: KVCache | None = None


class Attention(nn.Module):
    """Multi-head latent attention in its expanded form."""

    def __init__(self, config: NanoConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, heads = config.hidden_size, config.num_attention_heads
        head_dims = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * head_dims, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, width, bias=False)
        self.scale = 1 / math.sqrt(head_dims)

    def forward(self, x_BSD: Tensor, positions: Positions) -> Tensor:
        c, heads = self.config, self.config.num_attention_heads
        rows, length, _ = x_BSD.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        q_BHSd = q.view(rows, length, heads, -1).transpose(1, 2)
        q_nope, q_rope = q_BHSd.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        latent_BSC, k_rope_BSR = self.kv_a_proj_with_mqa(x_BSD).split(
            (c.kv_lora_rank, c.qk_rope_head_dim), -1
        )
        kv = self.kv_b_proj(self.kv_a_layernorm(latent_BSC)).view(rows, length, heads, -1).transpose(1, 2)
        k_nope, v_BHSd = kv.split((c.qk_nope_head_dim, c.v_head_dim), -1)
        k_rope = rotate_pairs(k_rope_BSR[:, None], positions.cos, positions.sin).expand(-1, heads, -1, -1)
        q_BHSd = torch.cat((q_nope, rotate_pairs(q_rope, positions.cos, positions.sin)), -1)
        k_BHSd = torch.cat((k_nope, k_rope), -1)
        if positions.cache is not None:
            k_BHSd, v_BHSd = positions.cache.extend(self.layer, k_BHSd, v_BHSd)
        scores = (q_BHSd * self.scale) @ k_BHSd.transpose(-1, -2)
        weights = torch.softmax(scores + positions.mask, -1)
        output: Tensor = self.o_proj((weights @ v_BHSd).transpose(1, 2).reshape(rows, length, -1))
        return output


class DenseMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class MoE(nn.Module):
    """Routed experts chosen by sigmoid scores within the best groups, and one shared expert.

    `load` [E] counts the tokens each expert got; who reads it sets it back to zero.
    """

    bias: Tensor  # [E]

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        experts, width, hidden = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.router = nn.Parameter(torch.randn(experts, width) * 0.02)
        self.gate_EFD = nn.Parameter(torch.randn(experts, hidden, width) / math.sqrt(width))
        self.up_EFD = nn.Parameter(torch.randn(experts, hidden, width) / math.sqrt(width))
        self.down_EDF = nn.Parameter(torch.randn(experts, width, hidden) / math.sqrt(hidden))
        self.shared = DenseMLP(width, hidden)
        self.register_buffer("bias", torch.zeros(experts))
        self.load = torch.zeros(experts)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and expert numbers, each [T, K]; the bias steers the choice, not the weight."""
        c = self.config
        scores_TE = torch.sigmoid(x_TD @ self.router.T)
        with torch.no_grad():
            choice = (scores_TE + self.bias).view(-1, c.n_group, c.n_routed_experts // c.n_group)
            groups = choice.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
            allowed = torch.zeros(choice.shape[:2], dtype=torch.bool).scatter_(1, groups, True)
            choice = choice.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
            experts_TK = choice.topk(c.num_experts_per_tok, -1).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        return weights_TK, experts_TK

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_TK, experts_TK = self.route(x_TD)
        top_k = self.config.num_experts_per_tok
        order_N = experts_TK.flatten().argsort(stable=True)
        counts_E = torch.bincount(experts_TK.flatten(), minlength=self.config.n_routed_experts)
        self.load = self.load + counts_E
        tokens_N = order_N // top_k
        parts = torch.split(x_TD.index_select(0, tokens_N), counts_E.tolist())
        outputs = [
            F.linear(
                F.silu(F.linear(part, self.gate_EFD[e])) * F.linear(part, self.up_EFD[e]), self.down_EDF[e]
            )
            for e, part in enumerate(parts)
        ]
        weighted_ND = torch.cat(outputs) * weights_TK.flatten().index_select(0, order_N)[:, None]
        routed_TD = torch.zeros_like(x_TD).index_add(0, tokens_N, weighted_ND)
        output: Tensor = self.shared(x_BSD) + routed_TD.view(x_BSD.shape)
        return output


class Layer(nn.Module):
    """One transformer layer; the first ones have a dense MLP, the rest experts."""

    def __init__(self, config: NanoConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            DenseMLP(config.hidden_size, config.intermediate_size)
            if layer < config.first_k_dense_replace
            else MoE(config)
        )

    def forward(self, x_BSD: Tensor, positions: Positions) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), positions)
        output: Tensor = x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))
        return output


class MTPModule(nn.Module):
    """Predicts the token after the next from the trunk's hidden state and the next token's embedding."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.layer = Layer(config, config.num_hidden_layers)
        self.norm = RMSNorm(width, eps)

    def forward(self, hidden_BSD: Tensor, next_embedding_BSD: Tensor, positions: Positions) -> Tensor:
        joined = torch.cat((self.enorm(next_embedding_BSD), self.hnorm(hidden_BSD)), -1)
        output: Tensor = self.norm(self.layer(self.eh_proj(joined), positions))
        return output


class NanoR1(nn.Module):
    """Trunk, head and MTP module; embedding and head are shared between trunk and MTP."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MTPModule(config)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def trunk(self, ids_BS: Tensor, positions: Positions) -> Tensor:
        """Hidden states [B, S, D] after the last norm."""
        x_BSD = self.embed_tokens(ids_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, positions)
        hidden: Tensor = self.norm(x_BSD)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of normed hidden states."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def draft(self, hidden_BSD: Tensor, next_ids_BS: Tensor, positions: Positions) -> Tensor:
        """MTP hidden states [B, S, D]: at position i they predict token i+2 from state i and token i+1."""
        state: Tensor = self.mtp(hidden_BSD, self.embed_tokens(next_ids_BS), positions)
        return state

    def moe_layers(self) -> list[MoE]:
        """All MoE blocks, the MTP module's last."""
        return [layer.mlp for layer in [*self.layers, self.mtp.layer] if isinstance(layer.mlp, MoE)]

    def positions(self, mask: Tensor, start: int = 0, cache: KVCache | None = None) -> Positions:
        """Rope tables from position `start` on for the mask's rows."""
        c = self.config
        cos, sin = rope_table(start + mask.shape[-2], c.qk_rope_head_dim, c.rope_theta)
        return Positions(cos[start:], sin[start:], mask, cache)


def causal_mask(length: int) -> Tensor:
    """Additive mask [1, 1, S, S]: a token sees itself and earlier ones, never the padding on its right."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(length, length).masked_fill(~seen, -1e9)[None, None]
