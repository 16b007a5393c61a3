#!/usr/bin/env python3
"""Makes a seeded, random checkpoint with the architecture of DeepSeek-R1, in Hugging Face format.

    python tools/make_checkpoint.py build/nano
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
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from r1_cluster.text.template import R1_CHAT_TEMPLATE

Config = dict[str, object]
FloatArray = npt.NDArray[np.float32]

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
# R1 marks none of these as special, so that they survive decoding with `skip_special_tokens`.
CONTROL_TOKENS = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
MIN_VOCAB = 256 + 3 + len(CONTROL_TOKENS)

# The splits of R1's tokenizer.json: digits in threes, runs of Chinese and Japanese, words and punctuation.
R1_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Prose and code that every Python installation has.
TRAINING_MODULES = ("argparse", "typing", "datetime", "statistics", "random", "textwrap", "inspect", "turtle")

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


class TensorSpec(NamedTuple):
    """One tensor to be written. `dtype` is "F32" or "BF16"; `mean` + `std` · N(0, 1) are its values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "F32" else 2)


def build_config(size: str = "nano", **overrides: object) -> Config:
    """config.json in the form that DeepSeek publishes; ValueError names what does not fit together."""
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; there are: {', '.join(SIZES)}")
    config = R1_CONFIG | SIZES[size]
    if unknown := sorted(set(overrides) - set(config)):
        raise ValueError(
            f"no such key in config.json: {', '.join(unknown)}; there are: {', '.join(sorted(config))}"
        )
    if "num_attention_heads" in overrides:
        config["num_key_value_heads"] = overrides["num_attention_heads"]
    config |= overrides
    faults = []
    if _int(config, "vocab_size") < MIN_VOCAB:
        faults.append(f"vocab_size {config['vocab_size']} is below {MIN_VOCAB} (bytes and special tokens)")
    if _int(config, "n_routed_experts") % _int(config, "n_group"):
        faults.append(
            f"n_group {config['n_group']} does not divide n_routed_experts {config['n_routed_experts']}"
        )
    elif _int(config, "num_experts_per_tok") > (
        _int(config, "topk_group") * _int(config, "n_routed_experts") // _int(config, "n_group")
    ):
        faults.append("num_experts_per_tok is more than topk_group groups hold")
    if _int(config, "topk_group") > _int(config, "n_group"):
        faults.append("topk_group is more than n_group")
    if _int(config, "qk_rope_head_dim") % 2:
        faults.append("qk_rope_head_dim is odd")
    if config["torch_dtype"] not in ("float32", "bfloat16"):
        faults.append(f"torch_dtype {config['torch_dtype']!r} is neither float32 nor bfloat16")
    if faults:
        raise ValueError("; ".join(faults))
    return config


def _int(config: Config, key: str) -> int:
    value = config[key]
    if not isinstance(value, int):
        raise ValueError(f"{key} must be an integer, not {value!r}")
    return value


class _Layout:
    """Collects the tensors of R1's published layout, module by module."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.hidden = _int(config, "hidden_size")
        self.dtype = "F32" if config["torch_dtype"] == "float32" else "BF16"
        self.specs: list[TensorSpec] = []

    def matrix(self, name: str, rows: int, columns: int) -> None:
        self.specs.append(TensorSpec(f"{name}.weight", (rows, columns), self.dtype, 0.0, columns**-0.5))

    def embedding(self, name: str) -> None:
        shape = (_int(self.config, "vocab_size"), self.hidden)
        self.specs.append(TensorSpec(f"{name}.weight", shape, self.dtype, 0.0, 1.0))

    def norm(self, name: str, width: int) -> None:
        self.specs.append(TensorSpec(f"{name}.weight", (width,), self.dtype, 1.0, 0.1))

    def mlp(self, name: str, width: int) -> None:
        self.matrix(f"{name}.gate_proj", width, self.hidden)
        self.matrix(f"{name}.up_proj", width, self.hidden)
        self.matrix(f"{name}.down_proj", self.hidden, width)

    def attention(self, name: str) -> None:
        heads, latent = _int(self.config, "num_attention_heads"), _int(self.config, "kv_lora_rank")
        nope, rope = _int(self.config, "qk_nope_head_dim"), _int(self.config, "qk_rope_head_dim")
        value = _int(self.config, "v_head_dim")
        if self.config["q_lora_rank"] is None:
            self.matrix(f"{name}.q_proj", heads * (nope + rope), self.hidden)
        else:
            rank = _int(self.config, "q_lora_rank")
            self.matrix(f"{name}.q_a_proj", rank, self.hidden)
            self.norm(f"{name}.q_a_layernorm", rank)
            self.matrix(f"{name}.q_b_proj", heads * (nope + rope), rank)
        self.matrix(f"{name}.kv_a_proj_with_mqa", latent + rope, self.hidden)
        self.norm(f"{name}.kv_a_layernorm", latent)
        self.matrix(f"{name}.kv_b_proj", heads * (nope + value), latent)
        self.matrix(f"{name}.o_proj", self.hidden, heads * value)

    def moe(self, name: str) -> None:
        experts, width = _int(self.config, "n_routed_experts"), _int(self.config, "moe_intermediate_size")
        self.matrix(f"{name}.gate", experts, self.hidden)
        # R1 keeps this one in float32 whatever the checkpoint's type.
        self.specs.append(TensorSpec(f"{name}.gate.e_score_correction_bias", (experts,), "F32", 0.0, 0.05))
        self.mlp(f"{name}.shared_experts", width * _int(self.config, "n_shared_experts"))
        for expert in range(experts):
            self.mlp(f"{name}.experts.{expert}", width)

    def layer(self, index: int) -> None:
        name = f"model.layers.{index}"
        self.norm(f"{name}.input_layernorm", self.hidden)
        self.attention(f"{name}.self_attn")
        self.norm(f"{name}.post_attention_layernorm", self.hidden)
        if index < _int(self.config, "first_k_dense_replace"):
            self.mlp(f"{name}.mlp", _int(self.config, "intermediate_size"))
        else:
            self.moe(f"{name}.mlp")

    def mtp_module(self, index: int) -> None:
        name = f"model.layers.{index}"
        self.embedding(f"{name}.embed_tokens")
        self.norm(f"{name}.enorm", self.hidden)
        self.norm(f"{name}.hnorm", self.hidden)
        self.matrix(f"{name}.eh_proj", self.hidden, 2 * self.hidden)
        self.layer(index)
        self.norm(f"{name}.shared_head.norm", self.hidden)
        self.matrix(f"{name}.shared_head.head", _int(self.config, "vocab_size"), self.hidden)


def tensor_specs(config: Config) -> list[TensorSpec]:
    """All tensors of R1's published layout, in the order of the forward pass; the MTP module comes last."""
    layout = _Layout(config)
    num_layers = _int(config, "num_hidden_layers")
    layout.embedding("model.embed_tokens")
    for index in range(num_layers):
        layout.layer(index)
    layout.norm("model.norm", layout.hidden)
    layout.matrix("lm_head", _int(config, "vocab_size"), layout.hidden)
    for index in range(num_layers, num_layers + _int(config, "num_nextn_predict_layers")):
        layout.mtp_module(index)
    return layout.specs


def random_values(spec: TensorSpec, seed: int) -> FloatArray:
    """float32 array of `spec.shape`, a function of the seed and the tensor's name."""
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    values = rng.standard_normal(spec.shape, dtype=np.float32)
    values *= np.float32(spec.std)
    values += np.float32(spec.mean)
    return values


def _to_bytes(values: FloatArray, dtype: str) -> bytes:
    if dtype == "F32":
        return values.astype("<f4", copy=False).tobytes()
    bits = values.view(np.uint32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))  # to nearest, ties to even
    return (rounded >> 16).astype("<u2").tobytes()


def write_weights(
    folder: Path,
    specs: Sequence[TensorSpec],
    values: Callable[[TensorSpec], FloatArray],
    max_shard_bytes: int,
) -> None:
    """Writes model-*-of-*.safetensors and their index; asks for the values of one tensor at a time."""
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.num_bytes for s in shards[-1]) + spec.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file_name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        weight_map |= {spec.name: file_name for spec in shard}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in shard:
            end = offset + spec.num_bytes
            header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (offset, end)}
            offset = end
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)  # the format aligns the data to 8 bytes
        with (folder / file_name).open("wb") as file:
            file.write(len(packed).to_bytes(8, "little") + packed)
            for spec in shard:
                file.write(_to_bytes(values(spec), spec.dtype))
    total = sum(spec.num_bytes for spec in specs)
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` entries, laid out as R1's: BOS 0, EOS 1, padding 2, then bytes
    and merges, then the control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in R1_SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in (BOS, EOS, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in CONTROL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


@cache
def _default_tokenizer(vocab_size: int) -> Tokenizer:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [library / f"{name}.py" for name in TRAINING_MODULES]
    if vocab_size > 2048:
        files = sorted(library.glob("*.py"))
    return train_tokenizer((file.read_text(encoding="utf-8") for file in files), vocab_size)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json, tokenizer_config.json (with R1's chat template) and generation_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))

    def added(text: str) -> dict[str, object]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": text, **flags}

    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": added(BOS),
            "clean_up_tokenization_spaces": False,
            "eos_token": added(EOS),
            "legacy": True,
            "model_max_length": 16384,
            "pad_token": added(EOS),
            # R1 names LlamaTokenizerFast, for which transformers 5 replaces the file's splits.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
            "chat_template": R1_CHAT_TEMPLATE,
        },
    )
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def make_checkpoint(
    path: str | Path,
    size: str = "nano",
    seed: int = 0,
    max_shard_bytes: int = 1 << 30,
    **overrides: object,
) -> Path:
    """Writes the checkpoint to `path`, in place of an older one, and returns the path.

    `overrides` are keys of config.json. Raises ValueError if they do not fit together, and
    FileExistsError if `path` holds anything but a checkpoint.
    """
    config = build_config(size, **overrides)
    specs = tensor_specs(config)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} is not empty and holds no checkpoint")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    write_weights(folder, specs, lambda spec: random_values(spec, seed), max_shard_bytes)
    write_tokenizer(folder, _default_tokenizer(_int(config, "vocab_size")))
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
            options.path, options.size, options.seed, options.max_shard_bytes, **overrides
        )
    except (ValueError, OSError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 1
    size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size_bytes / 2**20:.1f} MiB, {len(list(folder.glob('*.safetensors')))} shard(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
