"""Multi-head latent attention (DeepSeek-V2 report, arXiv:2405.04434, section 2.1) over a paged latent cache.

Computed in two ways, each the other's test. Absorbed: the keys' projection is moved to the query, the
values' behind the attention, so that all heads read the same cached latents. Expanded: keys and values are
projected from the latents, which is cheaper where many queries share a context.
"""

from __future__ import annotations

from torch import Tensor

from kernels.ops import Cache, Rotation, Weight
from r1_cluster.models.batch import AttentionBatch
from r1_cluster.models.config import MlaShape
from r1_cluster.models.loader import Loader


class Mla:
    """One layer's attention, from the normed hidden states to the output projection; or a rank's heads, whose
    outputs add up to it. Each rank keeps all latents."""

    def __init__(self, loader: Loader, shape: MlaShape, scale: float) -> None:
        """`scale` is what scores are multiplied by."""
        self._shard = loader.shard
        self._ops = loader.shard.ops
        self._tiled = loader.shard.deterministic
        self._eps = 1e-6  # of both inner norms, whatever rms_norm_eps says: DeepSeek-V3 inference/model.py
        self._scale = scale
        self._num_heads = shape.num_attention_heads // loader.shard.ranks
        self._num_latent = shape.kv_lora_rank
        self._num_nope = shape.qk_nope_head_dim
        self._cache_width = shape.cache_width
        query = "q_proj.weight" if shape.q_lora_rank is None else "q_a_proj.weight"
        self._down = loader.weight(query, "kv_a_proj_with_mqa.weight")
        self._query_width = loader.shape(query)[0]
        self._q_norm: Tensor | None = None
        self._q_up: Weight | None = None
        if shape.q_lora_rank is not None:
            self._q_norm = loader.get("q_a_layernorm.weight")
            self._q_up = loader.weight("q_b_proj.weight")
        self._kv_norm = loader.get("kv_a_layernorm.weight")
        # Per head the rows of the keys, then those of the values. Never in FP8: absorbed, it meets queries
        # and attended latents head by head, in small products that published engines keep in BF16 too.
        self._kv_up_HOC = loader.get("kv_b_proj.weight").view(self._num_heads, -1, self._num_latent)
        self._key_up_HNC = self._kv_up_HOC[:, : self._num_nope]
        self._value_up_HCV = self._kv_up_HOC[:, self._num_nope :].transpose(1, 2)
        self._out = loader.weight("o_proj.weight")

    def new_cache(self, num_pages: int, page_size: int) -> Cache:
        """Latents [num_pages, page_size, C + R], zeros; in FP8 latent and rotated key are scaled apart."""
        slots = num_pages, page_size
        return self._shard.new_cache((*slots, self._cache_width), (*slots, 2))

    def forward(self, x_TD: Tensor, batch: AttentionBatch, rotation: Rotation, cache_PSL: Cache) -> Tensor:
        """See `Attention.forward`; what is kept are latents."""
        down = self._ops.linear(x_TD, self._down, tiled=self._tiled)
        self._ops.store_latents(
            cache_PSL, batch.slots_T, down[:, self._query_width :], self._kv_norm, self._eps, rotation
        )
        q = down[:, : self._query_width]
        if self._q_norm is not None and self._q_up is not None:
            q = self._ops.rms_norm(q, self._q_norm, self._eps)
            q = self._ops.linear(q, self._q_up, tiled=self._tiled)
        q_THQ = q.view(len(q), self._num_heads, -1)
        self._ops.rope_(q_THQ[..., self._num_nope :], rotation, interleaved=True)
        attended_THV = self._attend(q_THQ, batch, cache_PSL)
        return self._ops.linear(attended_THV.flatten(1), self._out, tiled=self._tiled)

    def _attend(self, q_THQ: Tensor, batch: AttentionBatch, cache_PSL: Cache) -> Tensor:
        plan = batch.attention
        rows = plan.absorbed_rows
        if rows is None:
            return self._attend_absorbed(q_THQ, batch, cache_PSL)
        out_THV = q_THQ.new_empty(*q_THQ.shape[:2], self._value_up_HCV.shape[2])
        if len(rows):
            absorbed_AHV = self._attend_absorbed(q_THQ.index_select(0, rows), batch, cache_PSL)
            out_THV.index_copy_(0, rows.long(), absorbed_AHV)
        self._ops.mla_expanded(q_THQ, cache_PSL, plan, self._kv_up_HOC, out_THV, scale=self._scale)
        return out_THV

    def _attend_absorbed(self, q_AHQ: Tensor, batch: AttentionBatch, cache_PSL: Cache) -> Tensor:
        q_AHC = self._ops.head_linear(q_AHQ[..., : self._num_nope], self._key_up_HNC, tiled=self._tiled)
        latent_AHC = self._ops.mla_absorbed(
            q_AHC, q_AHQ[..., self._num_nope :], cache_PSL, batch.attention, scale=self._scale
        )
        return self._ops.head_linear(latent_AHC, self._value_up_HCV, tiled=self._tiled)
