"""The one table of a checkpoint's tensor names (Hugging Face's layout of DeepSeek-V3 and R1)."""

from __future__ import annotations

from r1_cluster.models.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

SCALE_SUFFIX = "_scale_inv"
"""An FP8 tensor's block scales stand under its own name with this suffix."""

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


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, None for the embedding, the final norm and the head."""
    parts = name.split(".")
    if len(parts) > 2 and parts[:2] == ["model", "layers"] and parts[2].isdigit():
        return int(parts[2])
    return None


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this config has, with its shape, but for FP8 scales and the MTP module
    (layer num_hidden_layers), whose tensors are known names that nobody here opens."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, width),
        FINAL_NORM: (width,),
        HEAD: (config.vocab_size, width),
    }
    for layer in range(config.num_hidden_layers):
        for part, shape in _attention_shapes(config).items():
            shapes[layer_tensor(layer, part)] = shape
        if layer not in config.moe_layers:
            shapes |= {
                dense_mlp(layer, p): s for p, s in _mlp_shapes(width, config.intermediate_size).items()
            }
            continue
        moe = config.moe
        assert moe is not None
        shapes[layer_tensor(layer, "gate")] = (moe.n_routed_experts, width)
        shapes[layer_tensor(layer, "gate_bias")] = (moe.n_routed_experts,)
        shared_width = moe.shared_intermediate_size
        shapes |= {shared_experts(layer, p): s for p, s in _mlp_shapes(width, shared_width).items()}
        for part, shape in _mlp_shapes(width, moe.moe_intermediate_size).items():
            for expert in range(moe.n_routed_experts):
                shapes[routed_expert(layer, expert, part)] = shape
    return shapes


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, attention = config.hidden_size, config.attention
    heads = attention.num_attention_heads
    query_width = heads * attention.qk_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_norm": (width,),
        "mlp_norm": (width,),
        "kv_a": (attention.cache_width, width),
        "kv_a_norm": (attention.kv_lora_rank,),
        "kv_b": (heads * (attention.qk_nope_head_dim + attention.v_head_dim), attention.kv_lora_rank),
        "o": (width, heads * attention.v_head_dim),
    }
    if attention.q_lora_rank is None:
        return shapes | {"q": (query_width, width)}
    return shapes | {
        "q_a": (attention.q_lora_rank, width),
        "q_a_norm": (attention.q_lora_rank,),
        "q_b": (query_width, attention.q_lora_rank),
    }


def _mlp_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
