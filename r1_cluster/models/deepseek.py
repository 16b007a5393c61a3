"""DeepSeek-V3, R1's architecture: how its config.json is read, which tensors it has, and how its
attention is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from r1_cluster.models.config import MlaShape, ModelConfig, ModelConfigError, MoeShape, Yarn
from r1_cluster.models.config_json import Values, check_only, common, get, positive_faults, rope
from r1_cluster.weights.tensors import TensorSpec, layer_name, mlp_tensors

if TYPE_CHECKING:
    from r1_cluster.models.layers import Attention
    from r1_cluster.models.loader import Loader

ARCHITECTURE = "DeepseekV3ForCausalLM"


def parse(values: Values) -> ModelConfig:
    """From config.json's content. Raises UnsupportedModel for another variant, ModelConfigError for keys that
    are missing, of the wrong type, or contradict each other."""
    check_only(
        ARCHITECTURE,
        values,
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "rope_interleave": True,
            "tie_word_embeddings": False,
            "num_key_value_heads": values.get("num_attention_heads"),
        },
    )
    shape, moe = _attention_shape(values), _moe_shape(values)
    config = ModelConfig(
        architecture=ARCHITECTURE,
        **common(values),
        num_nextn_predict_layers=get(values, "num_nextn_predict_layers", int, 0),
        attention=shape,
        moe=moe,
        rope=rope(values, shape.qk_rope_head_dim),
    )
    faults = [*positive_faults(config), *positive_faults(shape), *positive_faults(moe)]
    # The rotation reads pairs in place, so the rotary part must begin at an even offset.
    for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
        value = getattr(shape, name)
        if value is not None and value % 2:
            faults.append(f"{name} must be even, it is {value}")
    if faults := faults or _group_faults(moe):
        raise ModelConfigError("config.json: " + "; ".join(faults))
    return config


def layer_tensors(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """A layer's. What follows the last layer is the MTP module (arXiv:2412.19437, section 2.2), stored as one
    more layer with an embedding and a head of its own."""
    name, width, moe = layer_name(layer), config.hidden_size, config.moe
    assert moe is not None
    is_mtp = layer >= config.num_hidden_layers
    if is_mtp:
        yield TensorSpec(f"{name}.embed_tokens.weight", (config.vocab_size, width), "embedding", 0)
        yield TensorSpec(f"{name}.enorm.weight", (width,), "norm")
        yield TensorSpec(f"{name}.hnorm.weight", (width,), "norm")
        yield TensorSpec(f"{name}.eh_proj.weight", (width, 2 * width), "mtp")
    yield TensorSpec(f"{name}.input_layernorm.weight", (width,), "norm")
    yield from _attention_tensors(f"{name}.self_attn", _shape(config), width)
    yield TensorSpec(f"{name}.post_attention_layernorm.weight", (width,), "norm")
    if layer < moe.first_k_dense_replace:
        yield from mlp_tensors(f"{name}.mlp", "mlp", width, config.intermediate_size)
    else:
        yield from _moe_tensors(f"{name}.mlp", moe, width)
    if is_mtp:
        yield TensorSpec(f"{name}.shared_head.norm.weight", (width,), "norm")
        yield TensorSpec(f"{name}.shared_head.head.weight", (config.vocab_size, width), "head", 0)


def attention(config: ModelConfig, loader: Loader) -> Attention:
    """One layer's. Raises CheckpointError."""
    from r1_cluster.models.mla import Mla  # with torch, which whoever reads configurations does without

    return Mla(loader, _shape(config), _softmax_scale(config))


def _shape(config: ModelConfig) -> MlaShape:
    assert isinstance(config.attention, MlaShape)
    return config.attention


def _attention_tensors(name: str, shape: MlaShape, width: int) -> Iterator[TensorSpec]:
    heads, rank = shape.num_attention_heads, shape.q_lora_rank
    if rank is None:
        rows = (heads * shape.qk_head_dim, width)
        yield TensorSpec(f"{name}.q_proj.weight", rows, "attention", 0, units=heads)
    else:
        yield TensorSpec(f"{name}.q_a_proj.weight", (rank, width), "attention")
        yield TensorSpec(f"{name}.q_a_layernorm.weight", (rank,), "norm")
        rows = (heads * shape.qk_head_dim, rank)
        yield TensorSpec(f"{name}.q_b_proj.weight", rows, "attention", 0, units=heads)
    yield TensorSpec(f"{name}.kv_a_proj_with_mqa.weight", (shape.cache_width, width), "attention")
    yield TensorSpec(f"{name}.kv_a_layernorm.weight", (shape.kv_lora_rank,), "norm")
    rows = (heads * (shape.qk_nope_head_dim + shape.v_head_dim), shape.kv_lora_rank)
    # Absorbed, it meets queries and attended latents head by head: see `mla`.
    yield TensorSpec(f"{name}.kv_b_proj.weight", rows, "attention", 0, stays_float=True, units=heads)
    attended = (width, heads * shape.v_head_dim)
    yield TensorSpec(f"{name}.o_proj.weight", attended, "attention", 1, units=heads)


def _moe_tensors(name: str, moe: MoeShape, width: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.gate.weight", (moe.n_routed_experts, width), "gate")
    yield TensorSpec(f"{name}.gate.e_score_correction_bias", (moe.n_routed_experts,), "gate")
    yield from mlp_tensors(f"{name}.shared_experts", "shared_experts", width, moe.shared_intermediate_size)
    for expert in range(moe.n_routed_experts):
        yield from mlp_tensors(f"{name}.experts.{expert}", "experts", width, moe.moe_intermediate_size)


def _softmax_scale(config: ModelConfig) -> float:
    """What scores are multiplied by: 1 / sqrt(qk head width), under YaRN times the square of its magnitude.

    Source: DeepSeek-V3 inference/model.py, class MLA.
    """
    scale = 1.0 / math.sqrt(_shape(config).qk_head_dim)
    if isinstance(yarn := config.rope.scaling, Yarn) and yarn.mscale_all_dim:
        scale *= yarn.magnitude(yarn.mscale_all_dim) ** 2
    return scale


def _attention_shape(values: Values) -> MlaShape:
    return MlaShape(
        num_attention_heads=get(values, "num_attention_heads", int),
        q_lora_rank=None if values.get("q_lora_rank") is None else get(values, "q_lora_rank", int),
        kv_lora_rank=get(values, "kv_lora_rank", int),
        qk_nope_head_dim=get(values, "qk_nope_head_dim", int),
        qk_rope_head_dim=get(values, "qk_rope_head_dim", int),
        v_head_dim=get(values, "v_head_dim", int),
    )


def _moe_shape(values: Values) -> MoeShape:
    return MoeShape(
        n_routed_experts=get(values, "n_routed_experts", int),
        n_shared_experts=get(values, "n_shared_experts", int),
        num_experts_per_tok=get(values, "num_experts_per_tok", int),
        n_group=get(values, "n_group", int),
        topk_group=get(values, "topk_group", int),
        norm_topk_prob=get(values, "norm_topk_prob", bool, True),
        routed_scaling_factor=get(values, "routed_scaling_factor", float),
        moe_intermediate_size=get(values, "moe_intermediate_size", int),
        first_k_dense_replace=get(values, "first_k_dense_replace", int),
    )


def _group_faults(moe: MoeShape) -> list[str]:
    if moe.n_routed_experts % moe.n_group:
        return [f"n_routed_experts {moe.n_routed_experts} is not a multiple of n_group {moe.n_group}"]
    faults = []
    group_size = moe.n_routed_experts // moe.n_group
    if moe.topk_group > moe.n_group:
        faults.append(f"topk_group {moe.topk_group} exceeds n_group {moe.n_group}")
    if moe.n_group > 1 and group_size < 2:
        faults.append(f"a group of {group_size} expert has no two best: n_group {moe.n_group} is too large")
    if moe.num_experts_per_tok > moe.topk_group * group_size:
        faults.append(
            f"num_experts_per_tok {moe.num_experts_per_tok} exceeds the "
            f"{moe.topk_group * group_size} experts of topk_group {moe.topk_group} groups"
        )
    return faults
