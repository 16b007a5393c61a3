"""Whether a device's operations can serve a model: asked before anything is loaded."""

from __future__ import annotations

import torch

from kernels.launch import has_fp8
from kernels.ops import ModelShape, Ops
from r1_cluster.models.config import GqaShape, MlaShape, ModelConfig, UnsupportedModel


def check_fits(config: ModelConfig, ops: Ops, dtype: torch.dtype, page_size: int) -> None:
    """Raises UnsupportedModel with all that stands in the way."""
    if faults := ops.faults(_shape(config, dtype, page_size)):
        raise UnsupportedModel("the device's kernels cannot serve this model: " + "; ".join(faults))


def check_fp8(config: ModelConfig, device: torch.device, *, fp8_cache: bool) -> None:
    """Raises UnsupportedModel where FP8 is asked of a device whose kernels have none."""
    asked = ["engine.kv_cache_dtype fp8"] * fp8_cache + ["a checkpoint in FP8"] * (
        config.fp8_block is not None
    )
    if asked and not has_fp8(device):
        name = torch.cuda.get_device_name(device)
        raise UnsupportedModel(f"{name} has no FP8, which is asked for by {' and by '.join(asked)}")


def _shape(config: ModelConfig, dtype: torch.dtype, page_size: int) -> ModelShape:
    widths, inner, stacked = _of_attention(config.attention)
    if config.fp8_block is None:
        return ModelShape(dtype, page_size, widths)
    hidden = [config.intermediate_size]
    if config.moe is not None:
        hidden += [config.moe.shared_intermediate_size, config.moe.moe_intermediate_size]
    return ModelShape(
        dtype=dtype,
        page_size=page_size,
        head_widths=widths,
        fp8_block=config.fp8_block,
        inner_widths=(config.hidden_size, *hidden, *inner),
        stacked_rows=(*hidden, *stacked),
    )


def _of_attention(shape: MlaShape | GqaShape) -> tuple[dict[str, int], tuple[int, ...], tuple[int, ...]]:
    """Widths of heads, inner widths of products beside the hidden size, and rows of stacked weights."""
    if isinstance(shape, GqaShape):
        heads = shape.num_attention_heads * shape.head_dim
        return {"head_dim": shape.head_dim}, (heads,), (heads, shape.num_key_value_heads * shape.head_dim)
    widths = {
        "kv_lora_rank": shape.kv_lora_rank,
        "qk_rope_head_dim": shape.qk_rope_head_dim,
        "qk_nope_head_dim": shape.qk_nope_head_dim,
        "v_head_dim": shape.v_head_dim,
    }
    inner = [shape.num_attention_heads * shape.v_head_dim]
    inner += [] if shape.q_lora_rank is None else [shape.q_lora_rank]
    return widths, tuple(inner), (shape.q_lora_rank or shape.num_attention_heads * shape.qk_head_dim,)
