"""The names that DeepSeek's own inference code has for R1's tensors.

Source: DeepSeek-V3 inference/convert.py.
"""

from __future__ import annotations

_MODULES = {
    "embed_tokens": "embed",
    "self_attn": "attn",
    "mlp": "ffn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lm_head": "head",
    "weight_scale_inv": "scale",
    "e_score_correction_bias": "bias",
}


def inference_name(name: str) -> str:
    """From Hugging Face's: model.layers.3.mlp.gate.e_score_correction_bias is layers.3.ffn.gate.bias."""
    return ".".join(_MODULES.get(part, part) for part in name.removeprefix("model.").split("."))
