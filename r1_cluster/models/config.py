"""A model in numbers, named as in config.json, from which `family` reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from r1_cluster.weights.tensors import IntFormat


class ModelConfigError(ValueError):
    """config.json is missing, broken, or contradicts itself; the message names the file's key."""


class UnsupportedModel(ModelConfigError):
    """config.json is sound, but describes a model that this engine cannot run."""


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters (arXiv:2309.00071), named as in config.json's `rope_scaling`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    truncate: bool
    attention_factor: float | None
    attn_factor: float

    def magnitude(self, mscale: float) -> float:
        """By what attention is sharpened for the longer context, weighted by `mscale` (section 3.4)."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching (arXiv:2407.21783, section 3.4.2), named as in config.json's `rope_scaling`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rope:
    """Rotary positions of `dim` numbers of each head; `scaling` stretches them, None leaves them plain."""

    dim: int
    theta: float
    scaling: Yarn | Llama3Rope | None


@dataclass(frozen=True)
class MlaShape:
    """Multi-head latent attention."""

    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query or key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """C + R: what one token keeps in the cache, in one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def cache_scales(self) -> int:
        """Scales that one token has in an FP8 cache, in one layer: the latent's and the rotated key's."""
        return 2


@dataclass(frozen=True)
class GqaShape:
    """Grouped-query attention (arXiv:2305.13245). `qkv_bias`: queries, keys and values are added a bias;
    `qk_norm`: each head's query and key are normed before they are rotated."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool
    qk_norm: bool

    @property
    def cache_width(self) -> int:
        """What one token keeps in the cache, in one layer: its keys and its values."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def cache_scales(self) -> int:
        """Scales that one token has in an FP8 cache, in one layer: each head's key's and value's."""
        return 2 * self.num_key_value_heads


@dataclass(frozen=True)
class MoeShape:
    """Mixtures of experts. Layer i is dense for i < first_k_dense_replace, else routes to experts."""

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    moe_intermediate_size: int
    first_k_dense_replace: int

    @property
    def shared_intermediate_size(self) -> int:
        """Inner width of the shared experts, which are stored as one MLP."""
        return self.n_shared_experts * self.moe_intermediate_size


@dataclass(frozen=True)
class ModelConfig:
    """What all models have. `moe` is None where no layer routes to experts.

    `tie_word_embeddings`: the head is the embedding, and no tensor of its own. `fp8_block` is the (rows,
    columns) that share one scale in an FP8 checkpoint, `int_format` how integers are stored in an INT8 or
    INT4 one; None for others.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    attention: MlaShape | GqaShape
    moe: MoeShape | None
    rope: Rope
    rms_norm_eps: float
    max_position_embeddings: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    tie_word_embeddings: bool
    fp8_block: tuple[int, int] | None
    int_format: IntFormat | None

    @property
    def moe_layers(self) -> range:
        """The layers that route to experts."""
        last = self.num_hidden_layers
        return range(last if self.moe is None else min(self.moe.first_k_dense_replace, last), last)
