"""A model's configuration, as its config.json states it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SUPPORTED_ARCHITECTURES = ("DeepseekV3ForCausalLM",)

_T = TypeVar("_T")


class ModelConfigError(ValueError):
    """config.json is missing, broken, or contradicts itself; the message names the file's key."""


class UnsupportedModel(ModelConfigError):
    """config.json is sound, but describes a model that this engine cannot run."""


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters (arXiv:2309.00071), named as in config.json's `rope_scaling`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    truncate: bool


@dataclass(frozen=True)
class ModelConfig:
    """What the network needs to know of itself; fields are named as in DeepSeek-R1's config.json.

    `fp8_block` is the (rows, columns) that share one scale in an FP8 checkpoint, None for others.
    Layer i is dense for i < first_k_dense_replace, else a mixture of experts.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    num_nextn_predict_layers: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    yarn: Yarn | None
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    fp8_block: tuple[int, int] | None

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Reads PATH/config.json. Raises ModelConfigError or UnsupportedModel."""
        file = Path(path) / "config.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelConfigError(
                f"{file} is not there: a checkpoint folder needs its config.json"
            ) from None
        except (OSError, ValueError) as error:
            raise ModelConfigError(f"{file} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ModelConfigError(f"{file} must hold a JSON object, it holds {type(values).__name__}")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> ModelConfig:
        """From config.json's content, as published (`rope_scaling`) or as transformers 5 writes it.

        Raises UnsupportedModel for another architecture or variant, ModelConfigError for keys that are
        missing, of the wrong type, or contradict each other.
        """
        _check_supported(values)
        rope = _rope_values(values)
        quantization = values.get("quantization_config")
        config = cls(
            architecture=SUPPORTED_ARCHITECTURES[0],
            vocab_size=_get(values, "vocab_size", int),
            hidden_size=_get(values, "hidden_size", int),
            intermediate_size=_get(values, "intermediate_size", int),
            moe_intermediate_size=_get(values, "moe_intermediate_size", int),
            num_hidden_layers=_get(values, "num_hidden_layers", int),
            num_attention_heads=_get(values, "num_attention_heads", int),
            q_lora_rank=None if values.get("q_lora_rank") is None else _get(values, "q_lora_rank", int),
            kv_lora_rank=_get(values, "kv_lora_rank", int),
            qk_nope_head_dim=_get(values, "qk_nope_head_dim", int),
            qk_rope_head_dim=_get(values, "qk_rope_head_dim", int),
            v_head_dim=_get(values, "v_head_dim", int),
            n_routed_experts=_get(values, "n_routed_experts", int),
            n_shared_experts=_get(values, "n_shared_experts", int),
            num_experts_per_tok=_get(values, "num_experts_per_tok", int),
            n_group=_get(values, "n_group", int),
            topk_group=_get(values, "topk_group", int),
            norm_topk_prob=_get(values, "norm_topk_prob", bool, True),
            routed_scaling_factor=_get(values, "routed_scaling_factor", float),
            first_k_dense_replace=_get(values, "first_k_dense_replace", int),
            num_nextn_predict_layers=_get(values, "num_nextn_predict_layers", int, 0),
            rms_norm_eps=_get(values, "rms_norm_eps", float),
            max_position_embeddings=_get(values, "max_position_embeddings", int),
            rope_theta=_get(rope, "rope_theta", float),
            yarn=_yarn(rope),
            bos_token_id=_get(values, "bos_token_id", int, 0),
            eos_token_ids=_eos_token_ids(values),
            dtype=str(values.get("dtype") or values.get("torch_dtype") or "bfloat16"),
            fp8_block=None if quantization is None else _fp8_block(quantization),
        )
        config._check_consistent()
        return config

    def _check_consistent(self) -> None:
        faults = []
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                if (
                    name in ("first_k_dense_replace", "num_nextn_predict_layers", "bos_token_id")
                    and value >= 0
                ):
                    continue
                faults.append(f"{name} must be positive, it is {value}")
        # The rotation reads pairs in place, so the rotary part must begin at an even offset.
        for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
            value = getattr(self, name)
            if value is not None and value % 2:
                faults.append(f"{name} must be even, it is {value}")
        if not faults and self.n_routed_experts % self.n_group:
            faults.append(
                f"n_routed_experts {self.n_routed_experts} is not a multiple of n_group {self.n_group}"
            )
        elif not faults:
            group_size = self.n_routed_experts // self.n_group
            if self.topk_group > self.n_group:
                faults.append(f"topk_group {self.topk_group} exceeds n_group {self.n_group}")
            if self.n_group > 1 and group_size < 2:
                faults.append(
                    f"a group of {group_size} expert has no two best: n_group {self.n_group} is too large"
                )
            if self.num_experts_per_tok > self.topk_group * group_size:
                faults.append(
                    f"num_experts_per_tok {self.num_experts_per_tok} exceeds the "
                    f"{self.topk_group * group_size} experts of topk_group {self.topk_group} groups"
                )
        if faults:
            raise ModelConfigError("config.json: " + "; ".join(faults))

    @property
    def latent_dim(self) -> int:
        """C + R: what one token keeps in the cache, in one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> range:
        """The layers that route to experts."""
        return range(min(self.first_k_dense_replace, self.num_hidden_layers), self.num_hidden_layers)


def _get(values: Mapping[str, object], key: str, kind: type[_T], default: _T | None = None) -> _T:
    value = values.get(key, default)
    if value is None:
        raise ModelConfigError(f"config.json: the key {key} is missing")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ModelConfigError(f"config.json: {key} must be of type {kind.__name__}, it is {value!r}")
    return value


def _check_supported(values: Mapping[str, object]) -> None:
    architectures = values.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if not any(name in SUPPORTED_ARCHITECTURES for name in names):
        found = ", ".join(map(str, names)) or "an architecture that config.json does not name"
        raise UnsupportedModel(f"{found} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}")
    only: dict[str, object] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "rope_interleave": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": values.get("num_attention_heads"),
    }
    faults = [
        f"{key} {values[key]!r} (only {value!r})"
        for key, value in only.items()
        if values.get(key) is not None and values[key] != value
    ]
    if faults:
        raise UnsupportedModel(
            f"{SUPPORTED_ARCHITECTURES[0]} with " + ", ".join(faults) + " is not supported"
        )


def _rope_values(values: Mapping[str, object]) -> dict[str, object]:
    found: dict[str, object] = {}
    if "rope_theta" in values:
        found["rope_theta"] = values["rope_theta"]
    for key in ("rope_scaling", "rope_parameters"):
        part = values.get(key)
        if part is None:
            continue
        if not isinstance(part, dict):
            raise ModelConfigError(f"config.json: {key} must be an object, it is {part!r}")
        found.update(part)
    return found


def _yarn(rope: Mapping[str, object]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported: default, yarn")
    return Yarn(
        factor=_get(rope, "factor", float),
        original_max_position_embeddings=_get(rope, "original_max_position_embeddings", int),
        beta_fast=_get(rope, "beta_fast", float, 32.0),
        beta_slow=_get(rope, "beta_slow", float, 1.0),
        mscale=_get(rope, "mscale", float, 0.0),
        mscale_all_dim=_get(rope, "mscale_all_dim", float, 0.0),
        truncate=_get(rope, "truncate", bool, True),
    )


def _eos_token_ids(values: Mapping[str, object]) -> tuple[int, ...]:
    listed = values.get("eos_token_id")
    if not isinstance(listed, list):
        return (_get(values, "eos_token_id", int, 1),)
    return tuple(_get({"eos_token_id": value}, "eos_token_id", int) for value in listed)


def _fp8_block(quantization: object) -> tuple[int, int]:
    values = quantization if isinstance(quantization, dict) else {}
    if values.get("quant_method") != "fp8":
        raise UnsupportedModel(f"quantization {quantization!r} is not supported; supported: fp8")
    match values.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case block:
            raise ModelConfigError(
                f"config.json: weight_block_size must be two positive integers, it is {block!r}"
            )
