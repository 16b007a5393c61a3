"""Writes the trained network in the Hugging Face layout of DeepSeek-R1, and reads it back."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nano_r1.model import MoE, NanoConfig, NanoR1
from nano_r1.tokenizer import BOS_ID, EOS_ID

_BIAS = "mlp.gate.e_score_correction_bias"  # stays float32, as in R1's checkpoint


def config_json(config: NanoConfig) -> dict[str, object]:
    """config.json in DeepSeek's own keys."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **asdict(config),
        "num_key_value_heads": config.num_attention_heads,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 1,
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "rope_interleave": True,
        "ep_size": 1,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _layer_name(name: str) -> str:
    """The published name of a parameter inside a layer."""
    renamed = {"mlp.router": "mlp.gate.weight", "mlp.bias": _BIAS}
    return renamed.get(name, name.replace("mlp.shared.", "mlp.shared_experts."))


_EXPERT_WEIGHTS = {"gate_EFD": "gate_proj", "up_EFD": "up_proj", "down_EDF": "down_proj"}


def _layer_tensors(state: dict[str, Tensor], prefix: str, layer: int) -> dict[str, Tensor]:
    tensors = {}
    for name, value in state.items():
        if not name.startswith(prefix):
            continue
        inner = name.removeprefix(prefix)
        stacked = _EXPERT_WEIGHTS.get(inner.removeprefix("mlp."))
        if stacked is None:
            tensors[f"model.layers.{layer}.{_layer_name(inner)}"] = value
        else:
            for expert, weight in enumerate(value):
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{stacked}.weight"] = weight
    return tensors


def published_tensors(model: NanoR1) -> dict[str, Tensor]:
    """All weights under R1's names; the MTP module is one layer more, with copies of embedding and head."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    last = model.config.num_hidden_layers
    mtp = f"model.layers.{last}."
    tensors = {
        "model.embed_tokens.weight": state["embed_tokens.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
        mtp + "embed_tokens.weight": state["embed_tokens.weight"],
        mtp + "enorm.weight": state["mtp.enorm.weight"],
        mtp + "hnorm.weight": state["mtp.hnorm.weight"],
        mtp + "eh_proj.weight": state["mtp.eh_proj.weight"],
        mtp + "shared_head.norm.weight": state["mtp.norm.weight"],
        mtp + "shared_head.head.weight": state["lm_head.weight"],
    }
    for layer in range(last):
        tensors |= _layer_tensors(state, f"layers.{layer}.", layer)
    return tensors | _layer_tensors(state, "mtp.layer.", last)


def save_model(model: NanoR1, folder: Path) -> None:
    """Write model.safetensors (BF16, correction biases float32), config.json, generation_config.json."""
    tensors = {
        name: (value.float() if name.endswith(_BIAS) else value.to(torch.bfloat16)).contiguous().clone()
        for name, value in published_tensors(model).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_json(model.config), indent=1) + "\n")
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def load_model(folder: Path) -> NanoR1:
    """Read a folder that `save_model` wrote into a float32 network."""
    published = json.loads((folder / "config.json").read_text())
    model = NanoR1(NanoConfig(**{field.name: published[field.name] for field in fields(NanoConfig)}))
    tensors = load_file(folder / "model.safetensors")
    shared = published_tensors(model)  # views into the model's own storage
    if set(shared) != set(tensors):
        raise ValueError(f"names differ: {sorted(set(shared) ^ set(tensors))[:5]}")
    for name, value in tensors.items():
        shared[name].copy_(value)
    return model.eval()


def moe_blocks(model: NanoR1) -> dict[int, MoE]:
    """MoE blocks by layer number, the MTP module's as the layer after the last."""
    first = model.config.first_k_dense_replace
    return {first + index: block for index, block in enumerate(model.moe_layers())}
