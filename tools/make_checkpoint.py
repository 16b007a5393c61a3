#!/usr/bin/env python3
"""Makes a seeded, random checkpoint with the architecture of DeepSeek-R1 or of a model distilled from it, in
Hugging Face format.

    python tools/make_checkpoint.py build/nano
    python tools/make_checkpoint.py build/tied --model-type qwen2 --set tie_word_embeddings=true
    python tools/make_checkpoint.py build/odd --size nano576 --set n_routed_experts=24 --set rope_scaling=null

The files are those that DeepSeek publishes: config.json, sharded safetensors with their index (the MTP
module stored as one more layer), tokenizer.json with R1's splits and special tokens,
tokenizer_config.json with R1's chat template, generation_config.json. A tensor's values depend on the seed
and its name alone, and tensors are written one by one, so that a large checkpoint needs no more memory
than its largest tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from make_tokenizer import MIN_VOCAB, make_tokenizer

from r1_cluster.models.config import ModelConfig
from r1_cluster.models.family import mtp_table, parse_config, tensor_table
from r1_cluster.weights.tensors import TensorSpec

Config = dict[str, object]
FloatArray = npt.NDArray[np.float32]

_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
_WRITTEN_AT_ONCE = 1 << 24  # numbers

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


class Stored(NamedTuple):
    """A tensor to be written as "F32" or "BF16"."""

    spec: TensorSpec
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.spec.shape) * (4 if self.dtype == "F32" else 2)


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
    if model.dtype not in _DTYPES:
        raise ValueError(f"torch_dtype {model.dtype!r} is none of {', '.join(_DTYPES)}")
    return config


def _is_gate_bias(spec: TensorSpec) -> bool:
    return spec.part == "gate" and len(spec.shape) == 1


def stored_tensors(model: ModelConfig) -> list[Stored]:
    """All tensors of the published layout, in the order of the forward pass; the MTP module comes last."""
    # R1 keeps the gates' biases in float32 whatever the checkpoint's type.
    return [
        Stored(spec, "F32" if _is_gate_bias(spec) else _DTYPES[model.dtype])
        for spec in (*tensor_table(model), *mtp_table(model))
    ]


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


def _to_bytes(values: FloatArray, dtype: str) -> bytes:
    if dtype == "F32":
        return values.astype("<f4", copy=False).tobytes()
    bits = values.view(np.uint32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))  # to nearest, ties to even
    return (rounded >> 16).astype("<u2").tobytes()


def _write_values(file: BinaryIO, values: FloatArray, dtype: str) -> None:
    flat = values.reshape(-1)
    for start in range(0, flat.size, _WRITTEN_AT_ONCE):
        file.write(_to_bytes(flat[start : start + _WRITTEN_AT_ONCE], dtype))


def write_weights(
    folder: Path,
    stored: Sequence[Stored],
    values: Callable[[TensorSpec], FloatArray],
    max_shard_bytes: int,
) -> None:
    """Writes model-*-of-*.safetensors and their index; asks for the values of one tensor at a time."""
    shards: list[list[Stored]] = [[]]
    for tensor in stored:
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + tensor.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file_name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor.spec.name: file_name for tensor in shard}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in shard:
            spec, end = tensor.spec, offset + tensor.num_bytes
            header[spec.name] = {"dtype": tensor.dtype, "shape": spec.shape, "data_offsets": (offset, end)}
            offset = end
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)  # the format aligns the data to 8 bytes
        with (folder / file_name).open("wb") as file:
            file.write(len(packed).to_bytes(8, "little") + packed)
            for tensor in shard:
                _write_values(file, values(tensor.spec), tensor.dtype)
    total = sum(tensor.num_bytes for tensor in stored)
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def make_checkpoint(
    path: str | Path,
    size: str = "nano",
    seed: int = 0,
    max_shard_bytes: int = 1 << 30,
    model_type: str = "deepseek_v3",
    **overrides: object,
) -> Path:
    """Writes the checkpoint to `path`, in place of an older one, and returns the path.

    `overrides` are keys of config.json. Raises ValueError if they do not fit together, and
    FileExistsError if `path` holds anything but a checkpoint.
    """
    config = build_config(size, model_type, **overrides)
    model = parse_config(config)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} is not empty and holds no checkpoint")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    write_weights(folder, stored_tensors(model), lambda spec: random_values(spec, seed), max_shard_bytes)
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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--max-shard-bytes", type=int, default=1 << 30, metavar="N")
    parser.add_argument(
        "--set", type=_override, action="append", default=[], metavar="KEY=VALUE", help="a key of config.json"
    )
    options = parser.parse_args(arguments)
    try:
        overrides = {"torch_dtype": options.dtype} | dict(options.set)
        folder = make_checkpoint(
            options.path,
            options.size,
            options.seed,
            options.max_shard_bytes,
            options.model_type,
            **overrides,
        )
    except (ValueError, OSError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 1
    size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size_bytes / 2**20:.1f} MiB, {len(list(folder.glob('*.safetensors')))} shard(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
