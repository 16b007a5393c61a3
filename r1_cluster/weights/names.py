"""The names under which layers ask for their tensors (Hugging Face's layout of DeepSeek-V3 and R1)."""

from __future__ import annotations

_LAYER = {
    "input_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate.weight",
    "gate_bias": "mlp.gate.e_score_correction_bias",
}


def layer_tensor(layer: int, part: str) -> str:
    """Name of one tensor of a layer; `part` is a key of the table above."""
    return f"model.layers.{layer}.{_LAYER[part]}"


def dense_mlp(layer: int, part: str) -> str:
    """Name in a dense layer's MLP; `part` is gate, up or down."""
    return f"model.layers.{layer}.mlp.{part}_proj.weight"


def shared_experts(layer: int, part: str) -> str:
    """Name in a layer's shared experts, which are stored as one MLP; `part` is gate, up or down."""
    return f"model.layers.{layer}.mlp.shared_experts.{part}_proj.weight"


def routed_expert(layer: int, expert: int, part: str) -> str:
    """Name in one routed expert; `part` is gate, up or down."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
