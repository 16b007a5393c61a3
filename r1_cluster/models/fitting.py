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
    attention = config.attention
    inner: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()
    if config.fp8_block is not None:
        hidden = [config.intermediate_size]
        if config.moe is not None:
            hidden += [config.moe.shared_intermediate_size, config.moe.moe_intermediate_size]
        inner = (config.hidden_size, attention.num_attention_heads * attention.v_head_dim, *hidden)
        if attention.q_lora_rank is not None:
            inner = (*inner, attention.q_lora_rank)
        stacked = (attention.q_lora_rank or attention.num_attention_heads * attention.qk_head_dim, *hidden)
    return ModelShape(
        dtype=dtype,
        page_size=page_size,
        num_latent=attention.kv_lora_rank,
        num_rotated=attention.qk_rope_head_dim,
        num_nope=attention.qk_nope_head_dim,
        num_values=attention.v_head_dim,
        fp8_block=config.fp8_block,
        inner_widths=inner,
        stacked_rows=stacked,
    )
