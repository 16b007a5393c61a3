"""Whether a device's operations can serve a model: asked before anything is loaded."""

from __future__ import annotations

import torch

from kernels.ops import ModelShape, Ops
from r1_cluster.models.config import ModelConfig, UnsupportedModel


def check_fits(config: ModelConfig, ops: Ops, dtype: torch.dtype, page_size: int) -> None:
    """Raises UnsupportedModel with all that stands in the way."""
    if faults := ops.faults(_shape(config, dtype, page_size)):
        raise UnsupportedModel("the device's kernels cannot serve this model: " + "; ".join(faults))


def _shape(config: ModelConfig, dtype: torch.dtype, page_size: int) -> ModelShape:
    inner: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()
    if config.fp8_block is not None:
        query_width = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        hidden = (config.intermediate_size, shared_width, config.moe_intermediate_size)
        values = config.num_attention_heads * config.v_head_dim
        inner = (config.hidden_size, values, *hidden)
        if config.q_lora_rank is not None:
            inner = (*inner, config.q_lora_rank)
        stacked = (config.q_lora_rank or query_width, *hidden)
    return ModelShape(
        dtype=dtype,
        page_size=page_size,
        num_latent=config.kv_lora_rank,
        num_rotated=config.qk_rope_head_dim,
        num_nope=config.qk_nope_head_dim,
        num_values=config.v_head_dim,
        fp8_block=config.fp8_block,
        inner_widths=inner,
        stacked_rows=stacked,
    )
