"""Grouped-query attention (arXiv:2305.13245) over paged keys and values, rotated by halves."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import Cache, Rotation
from r1_cluster.models.batch import AttentionBatch
from r1_cluster.models.config import GqaShape
from r1_cluster.models.loader import Loader

_PARTS = ("q_proj", "k_proj", "v_proj")


class Gqa:
    """One layer's attention, from the normed hidden states to the output projection; or a rank's heads, whose
    outputs add up to it. Ranks beyond the keys' heads share those."""

    def __init__(self, loader: Loader, shape: GqaShape, eps: float) -> None:
        """`eps` is that of the norms of queries and keys, where there are any."""
        self._shard = loader.shard
        self._ops = loader.shard.ops
        self._tiled = loader.shard.deterministic
        self._eps = eps
        self._width = shape.head_dim
        ranks = loader.shard.ranks
        kv_heads = max(shape.num_key_value_heads // ranks, 1)
        self._heads = [shape.num_attention_heads // ranks, kv_heads, kv_heads]
        self._qkv = loader.weight(*(f"{part}.weight" for part in _PARTS))
        self._bias: Tensor | None = None
        if shape.qkv_bias:
            self._bias = loader.stack(*(f"{part}.bias" for part in _PARTS))
        self._q_norm = loader.get("q_norm.weight") if shape.qk_norm else None
        self._k_norm = loader.get("k_norm.weight") if shape.qk_norm else None
        self._out = loader.weight("o_proj.weight")

    def new_cache(self, num_pages: int, page_size: int) -> Cache:
        """Keys, then values, of each slot: [num_pages, page_size, 2, K, W], zeros; in FP8 each is scaled."""
        heads = num_pages, page_size, 2, self._heads[1]
        return self._shard.new_cache((*heads, self._width), heads)

    def forward(self, x_TD: Tensor, batch: AttentionBatch, rotation: Rotation, cache_PS2KW: Cache) -> Tensor:
        """See `Attention.forward`; what is kept are keys and values."""
        qkv = self._ops.linear(x_TD, self._qkv, self._bias, tiled=self._tiled)
        q_THW, k_TKW, v_TKW = torch.split(qkv.view(len(qkv), -1, self._width), self._heads, 1)
        if self._q_norm is not None and self._k_norm is not None:
            q_THW, k_TKW = self._normed(q_THW, self._q_norm), self._normed(k_TKW, self._k_norm)
        self._ops.rope_(q_THW, rotation, interleaved=False)
        self._ops.store_kv(cache_PS2KW, batch.slots_T, k_TKW, v_TKW, rotation)
        attended_THW = self._ops.gqa(q_THW, cache_PS2KW, batch.attention, scale=self._width**-0.5)
        return self._ops.linear(attended_THW.flatten(1), self._out, tiled=self._tiled)

    def _normed(self, x_THW: Tensor, weight_W: Tensor) -> Tensor:
        return self._ops.rms_norm(x_THW.flatten(0, 1), weight_W, self._eps).view(x_THW.shape)
