"""The dense family, which the distilled models are built on: Llama 3 (arXiv:2407.21783), Qwen2
(arXiv:2407.10671) and Qwen3 (arXiv:2505.09388). One network: grouped-query attention and gated MLPs. Qwen2
adds a bias to queries, keys and values; Qwen3 norms each head's query and key.

Source: huggingface/transformers src/transformers/models/{llama,qwen2,qwen3}/modeling_*.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from r1_cluster.models.config import GqaShape, ModelConfig, ModelConfigError, UnsupportedModel
from r1_cluster.models.config_json import Values, check_only, common, get, positive_faults, rope
from r1_cluster.weights.tensors import TensorSpec, layer_name, mlp_tensors

if TYPE_CHECKING:
    from r1_cluster.models.layers import Attention
    from r1_cluster.models.loader import Loader


def parse(architecture: str, values: Values, *, qkv_bias: bool, qk_norm: bool) -> ModelConfig:
    """From config.json's content. Raises UnsupportedModel for another variant, ModelConfigError for keys that
    are missing, of the wrong type, or contradict each other."""
    # Qwen2 knows no `attention_bias`: its biases are always there.
    only = {"hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1}
    check_only(architecture, values, only if qkv_bias else only | {"attention_bias": False})
    _check_windows(architecture, values)
    if values.get("eos_token_id") is None:
        raise ModelConfigError("config.json: the key eos_token_id is missing")
    shape = GqaShape(
        num_attention_heads=(heads := get(values, "num_attention_heads", int)),
        num_key_value_heads=_or(values, "num_key_value_heads", heads),
        head_dim=_head_dim(values, heads, must_be_said=qk_norm),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )
    config = ModelConfig(
        architecture=architecture,
        **common(values),
        num_nextn_predict_layers=0,
        attention=shape,
        moe=None,
        rope=rope(values, shape.head_dim),
    )
    faults = [*positive_faults(config), *positive_faults(shape)]
    if shape.head_dim % 2:
        faults.append(f"head_dim must be even, it is {shape.head_dim}")
    if not faults and heads % shape.num_key_value_heads:
        faults.append(
            f"num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {shape.num_key_value_heads}"
        )
    if faults:
        raise ModelConfigError("config.json: " + "; ".join(faults))
    return config


PARSERS: dict[str, Callable[[Values], ModelConfig]] = {
    "LlamaForCausalLM": partial(parse, "LlamaForCausalLM", qkv_bias=False, qk_norm=False),
    "Qwen2ForCausalLM": partial(parse, "Qwen2ForCausalLM", qkv_bias=True, qk_norm=False),
    "Qwen3ForCausalLM": partial(parse, "Qwen3ForCausalLM", qkv_bias=False, qk_norm=True),
}
"""How each architecture's config.json is read."""


def layer_tensors(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """A layer's."""
    name, width, shape = layer_name(layer), config.hidden_size, _shape(config)
    heads = {
        "q_proj": shape.num_attention_heads,
        "k_proj": shape.num_key_value_heads,
        "v_proj": shape.num_key_value_heads,
    }
    yield TensorSpec(f"{name}.input_layernorm.weight", (width,), "norm")
    for projection, units in heads.items():
        num_rows, tensor = units * shape.head_dim, f"{name}.self_attn.{projection}"
        yield TensorSpec(f"{tensor}.weight", (num_rows, width), "attention", 0, units=units)
        if shape.qkv_bias:
            yield TensorSpec(f"{tensor}.bias", (num_rows,), "attention", 0, units=units)
    if shape.qk_norm:
        yield TensorSpec(f"{name}.self_attn.q_norm.weight", (shape.head_dim,), "norm")
        yield TensorSpec(f"{name}.self_attn.k_norm.weight", (shape.head_dim,), "norm")
    attended = (width, shape.num_attention_heads * shape.head_dim)
    yield TensorSpec(
        f"{name}.self_attn.o_proj.weight", attended, "attention", 1, units=shape.num_attention_heads
    )
    yield TensorSpec(f"{name}.post_attention_layernorm.weight", (width,), "norm")
    yield from mlp_tensors(f"{name}.mlp", "mlp", width, config.intermediate_size)


def attention(config: ModelConfig, loader: Loader) -> Attention:
    """One layer's. Raises CheckpointError."""
    from r1_cluster.models.gqa import Gqa  # with torch, which whoever reads configurations does without

    return Gqa(loader, _shape(config), config.rms_norm_eps)


def _shape(config: ModelConfig) -> GqaShape:
    assert isinstance(config.attention, GqaShape)
    return config.attention


def _or(values: Values, key: str, default: int) -> int:
    """A key that may be left out or null."""
    return default if values.get(key) is None else get(values, key, int)


def _head_dim(values: Values, heads: int, *, must_be_said: bool) -> int:
    """Width of a head: hidden_size / num_attention_heads where nothing else is said, which Qwen3 must."""
    if must_be_said or values.get("head_dim") is not None:
        return get(values, "head_dim", int)
    width = get(values, "hidden_size", int)
    if heads < 1 or width % heads:
        raise ModelConfigError(
            f"config.json: hidden_size {width} is not a multiple of num_attention_heads {heads}, "
            "and the key head_dim is missing"
        )
    return width // heads


def _check_windows(architecture: str, values: Values) -> None:
    """Raises UnsupportedModel where some layer attends to less than the whole context. What only describes a
    window that is off, as published Qwen2 files do, is accepted."""
    window = values.get("sliding_window")
    used = values.get("use_sliding_window", window is not None)
    types = values.get("layer_types")
    others = [kind for kind in types if kind != "full_attention"] if isinstance(types, list) else []
    if used or others:
        what = f"layer_types {others[0]!r}" if others else f"sliding_window {window!r}"
        raise UnsupportedModel(f"{architecture} with {what} in use (only full attention) is not supported")
