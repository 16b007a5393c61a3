#!/usr/bin/env python3
"""Makes a seeded, random checkpoint with the architecture of DeepSeek-R1 or of a model distilled from it, in
Hugging Face format.

    python tools/make_checkpoint.py build/nano
    python tools/make_checkpoint.py build/tied --model-type qwen2 --set tie_word_embeddings=true
    python tools/make_checkpoint.py build/fp8 --size small --dtype fp8
    python tools/make_checkpoint.py build/odd --size nano576 --set n_routed_experts=24 --set rope_scaling=null

The files are those that DeepSeek publishes: config.json, sharded safetensors with their index (the MTP
module stored as one more layer), tokenizer.json with R1's splits and special tokens,
tokenizer_config.json with R1's chat template, generation_config.json. Weights are in float32 or BF16; or, all
else being BF16, in FP8 blocks as DeepSeek has them, in INT8 or INT4 as `r1-cluster weights quantize` writes
them, rounded from float32. A tensor's values depend on the seed and its name alone, and tensors are written
one by one, so that a large checkpoint needs no more memory than some copies of its largest tensor.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from make_tokenizer import MIN_VOCAB, make_tokenizer
from torch import Tensor

from kernels.int_weight import quantize_int
from r1_cluster.cli.quantize import FORMATS
from r1_cluster.models.family import mtp_table, parse_config, tensor_table
from r1_cluster.weights.blocks import BLOCK, quantize
from r1_cluster.weights.cast import FP8_CONFIG
from r1_cluster.weights.headers import INDEX
from r1_cluster.weights.integers import quantization_config, to_words
from r1_cluster.weights.inventory import FP8, Stored, blocks, may_be_fp8
from r1_cluster.weights.quantize import is_quantized, stored_as
from r1_cluster.weights.stream import lay_out, new_file, raw
from r1_cluster.weights.tensors import SCALE_SUFFIX, TensorSpec

Config = dict[str, object]
FloatArray = npt.NDArray[np.float32]

_FLOATS = {"float32": "F32", "bfloat16": "BF16"}
DTYPES = (*_FLOATS, "fp8", *FORMATS)

R1_CONFIG: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "use_cache": True,
}
_NANO: Config = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}
# R1's own latent geometry (512 + 64), which some kernels are written for.
_R1_HEADS: Config = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
SIZES: dict[str, Config] = {
    "nano": _NANO,
    "nano576": _NANO | _R1_HEADS | {"vocab_size": 4096, "num_attention_heads": 2, "num_key_value_heads": 2},
    "small": _NANO
    | _R1_HEADS
    | {
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 256,
        "n_routed_experts": 32,
        "n_group": 8,
        "topk_group": 4,
    },
}


_DENSE_CONFIG: Config = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
}
_NO_WINDOW: Config = {"max_window_layers": 21, "sliding_window": None, "use_sliding_window": False}
# As the published models of each: theirs are the positions, biases, norms and windows.
_LLAMA_CONFIG = _DENSE_CONFIG | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 32,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
}
# No head_dim: a head is hidden_size / num_attention_heads wide.
_QWEN2_CONFIG = _DENSE_CONFIG | _NO_WINDOW | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3_CONFIG = (
    _DENSE_CONFIG
    | _NO_WINDOW
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 32,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "attn_factor": 0.8782488562869419,
        },
        "rope_theta": 1000000,
    }
)
_DENSE_SIZES: dict[str, Config] = {
    "nano": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
}
KINDS: dict[str, tuple[Config, dict[str, Config]]] = {
    "deepseek_v3": (R1_CONFIG, SIZES),
    "llama": (_LLAMA_CONFIG, _DENSE_SIZES),
    "qwen2": (_QWEN2_CONFIG, _DENSE_SIZES),
    "qwen3": (_QWEN3_CONFIG, _DENSE_SIZES),
}
"""By config.json's `model_type`: what all sizes have, and the sizes."""


def build_config(size: str = "nano", model_type: str = "deepseek_v3", **overrides: object) -> Config:
    """config.json in the form that such models have; ValueError names what does not fit together."""
    if model_type not in KINDS:
        raise ValueError(f"no model_type {model_type!r}; there are: {', '.join(KINDS)}")
    base, sizes = KINDS[model_type]
    if size not in sizes:
        raise ValueError(f"no size {size!r} of {model_type}; there are: {', '.join(sizes)}")
    config = base | sizes[size]
    if unknown := sorted(set(overrides) - set(config)):
        raise ValueError(
            f"no such key in config.json: {', '.join(unknown)}; there are: {', '.join(sorted(config))}"
        )
    if "num_attention_heads" in overrides and model_type == "deepseek_v3":
        config["num_key_value_heads"] = overrides["num_attention_heads"]
    config |= overrides
    model = parse_config(config)
    if model.vocab_size < MIN_VOCAB:
        raise ValueError(f"vocab_size {model.vocab_size} is below {MIN_VOCAB} (bytes and special tokens)")
    if model.dtype not in _FLOATS:
        raise ValueError(f"torch_dtype {model.dtype!r} is none of {', '.join(_FLOATS)}")
    return config


def _is_gate_bias(spec: TensorSpec) -> bool:
    return spec.part == "gate" and len(spec.shape) == 1


def random_values(spec: TensorSpec, seed: int) -> FloatArray:
    """float32 array of `spec.shape`, a function of the seed and the tensor's name."""
    mean, std = 0.0, spec.shape[-1] ** -0.5
    if spec.part == "norm":
        mean, std = 1.0, 0.1
    elif spec.part == "embedding":
        std = 1.0
    elif _is_gate_bias(spec):
        std = 0.05
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    values = rng.standard_normal(spec.shape, dtype=np.float32)
    values *= np.float32(std)
    values += np.float32(mean)
    return values


def stored(spec: TensorSpec, dtype: str, torch_dtype: str) -> list[Stored]:
    """The tensors that one of the model's is stored as in one of DTYPES; in `torch_dtype` what that leaves in
    floats."""
    if dtype == "fp8" and may_be_fp8(spec):
        scales = Stored(spec.name + SCALE_SUFFIX, "F32", blocks(spec.shape, BLOCK), spec.part)
        return [Stored(spec.name, FP8, spec.shape, spec.part), scales]
    if dtype in FORMATS and is_quantized(spec):
        return stored_as(spec.name, spec.shape, FORMATS[dtype])
    # R1 keeps the gates' biases in float32 whatever the checkpoint's type.
    kept = "F32" if _is_gate_bias(spec) else _FLOATS[torch_dtype]
    return [Stored(spec.name, kept, spec.shape, spec.part)]


def encoded(weight: Tensor, parts: list[Stored], dtype: str) -> list[Tensor]:
    """A float32 tensor as the tensors of `stored`."""
    if len(parts) == 1:
        return [weight if parts[0].dtype == "F32" else weight.bfloat16()]
    if dtype == "fp8":
        return [*quantize(weight)]
    q, scale = quantize_int(weight, FORMATS[dtype].bits, FORMATS[dtype].group_size)
    return [to_words(q, FORMATS[dtype].bits), scale.bfloat16(), torch.tensor(weight.shape)]


def write_weights(
    folder: Path, specs: Sequence[TensorSpec], seed: int, dtype: str, torch_dtype: str, max_shard_bytes: int
) -> None:
    """Writes model-*-of-*.safetensors and their index, one tensor at a time."""
    shards: list[dict[TensorSpec, list[Stored]]] = [{}]
    num_bytes = total = 0
    for spec in specs:
        parts = stored(spec, dtype, torch_dtype)
        size = sum(tensor.num_bytes for tensor in parts)
        if shards[-1] and num_bytes + size > max_shard_bytes:
            shards.append({})
            num_bytes = 0
        shards[-1][spec] = parts
        num_bytes, total = num_bytes + size, total + size
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file_name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        plan = lay_out((tensor, spec.name) for spec, parts in shard.items() for tensor in parts)
        weight_map |= dict.fromkeys(plan.tensors, file_name)
        with new_file(folder / file_name, plan) as write:
            for spec, parts in shard.items():
                weight = torch.from_numpy(random_values(spec, seed))
                for tensor, data in zip(parts, encoded(weight, parts, dtype), strict=True):
                    write(raw(data), plan.tensors[tensor.name].offset)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def quantization(specs: Sequence[TensorSpec], dtype: str) -> Config:
    """What config.json says of weights in `dtype`."""
    if dtype in _FLOATS:
        return {}
    if dtype == "fp8":
        return {"quantization_config": FP8_CONFIG}
    in_floats = [
        spec.name.removesuffix(".weight")
        for spec in specs
        if len(spec.shape) == 2 and spec.part != "embedding" and not is_quantized(spec)
    ]
    return {"quantization_config": quantization_config(FORMATS[dtype], sorted(in_floats))}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def make_checkpoint(
    path: str | Path,
    size: str = "nano",
    seed: int = 0,
    max_shard_bytes: int = 1 << 30,
    model_type: str = "deepseek_v3",
    dtype: str = "float32",
    **overrides: object,
) -> Path:
    """Writes the checkpoint to `path`, in place of an older one, and returns the path.

    `dtype` is one of DTYPES, `overrides` are keys of config.json; `torch_dtype` among them says what is not
    quantized is stored in. Raises ValueError if they do not fit together, and FileExistsError if `path` holds
    anything but a checkpoint.
    """
    if dtype not in DTYPES:
        raise ValueError(f"no dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    in_floats = dtype if dtype in _FLOATS else "bfloat16"
    config = build_config(size, model_type, **{"torch_dtype": in_floats} | overrides)
    model = parse_config(config)
    specs = [*tensor_table(model), *mtp_table(model)]
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} is not empty and holds no checkpoint")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    write_weights(folder, specs, seed, dtype, model.dtype, max_shard_bytes)
    config |= quantization(specs, dtype)
    config |= make_tokenizer(folder, str(config["model_type"]), model.vocab_size)
    _write_json(folder / "config.json", config)
    return folder


def _override(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", help="folder to write; an older checkpoint there is replaced")
    parser.add_argument("--model-type", choices=KINDS, default="deepseek_v3")
    parser.add_argument("--size", choices=SIZES, default="nano")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--max-shard-bytes", type=int, default=1 << 30, metavar="N")
    parser.add_argument(
        "--set", type=_override, action="append", default=[], metavar="KEY=VALUE", help="a key of config.json"
    )
    options = parser.parse_args(arguments)
    try:
        folder = make_checkpoint(
            options.path,
            options.size,
            options.seed,
            options.max_shard_bytes,
            options.model_type,
            options.dtype,
            **dict(options.set),
        )
    except (ValueError, OSError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 1
    size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size_bytes / 2**20:.1f} MiB, {len(list(folder.glob('*.safetensors')))} shard(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
