"""Reading config.json key by key, in the words that all families share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict, TypeVar

from r1_cluster.models.config import Llama3Rope, ModelConfigError, Rope, UnsupportedModel, Yarn
from r1_cluster.weights.tensors import IntFormat

Values = Mapping[str, object]
_T = TypeVar("_T")
# No model comes near these, and what is listed or tabled by them would fill the memory before a check of the
# weights could say that they do not fit.
_MOST = {
    "num_hidden_layers": 10_000,
    "num_nextn_predict_layers": 10_000,
    "n_routed_experts": 100_000,
    "max_position_embeddings": 1 << 24,
}
_MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers", "bos_token_id")


class Common(TypedDict):
    """The keys that every family's config.json has, as arguments of `ModelConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    rms_norm_eps: float
    max_position_embeddings: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    tie_word_embeddings: bool
    fp8_block: tuple[int, int] | None
    int_format: IntFormat | None


def get(values: Values, key: str, kind: type[_T], default: _T | None = None) -> _T:
    """One key's value. Raises ModelConfigError where it is missing or of another type."""
    value = values.get(key, default)
    if value is None:
        raise ModelConfigError(f"config.json: the key {key} is missing")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ModelConfigError(f"config.json: {key} must be of type {kind.__name__}, it is {value!r}")
    return value


def check_only(architecture: str, values: Values, only: Values) -> None:
    """Raises UnsupportedModel with every key whose value is another one than what can be run."""
    faults = [
        f"{key} {values[key]!r} (only {value!r})"
        for key, value in only.items()
        if values.get(key) is not None and values[key] != value
    ]
    if faults:
        raise UnsupportedModel(f"{architecture} with " + ", ".join(faults) + " is not supported")


def common(values: Values) -> Common:
    """Raises ModelConfigError, and UnsupportedModel for a quantization that is not supported."""
    fp8_block, int_format = _quantization(values.get("quantization_config"))
    return {
        "vocab_size": get(values, "vocab_size", int),
        "hidden_size": get(values, "hidden_size", int),
        "intermediate_size": get(values, "intermediate_size", int),
        "num_hidden_layers": get(values, "num_hidden_layers", int),
        "rms_norm_eps": get(values, "rms_norm_eps", float),
        "max_position_embeddings": get(values, "max_position_embeddings", int),
        "bos_token_id": get(values, "bos_token_id", int, 0),
        "eos_token_ids": _eos_token_ids(values),
        "dtype": str(values.get("dtype") or values.get("torch_dtype") or "bfloat16"),
        "tie_word_embeddings": get(values, "tie_word_embeddings", bool, False),
        "fp8_block": fp8_block,
        "int_format": int_format,
    }


def rope(values: Values, dim: int) -> Rope:
    """As published (`rope_scaling`) or as transformers 5 writes it (`rope_parameters`)."""
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
    if found.get("partial_rotary_factor") not in (None, 1):
        raise UnsupportedModel(
            f"partial_rotary_factor {found['partial_rotary_factor']!r} (only 1) is not supported"
        )
    theta = get(found, "rope_theta", float)
    if not 1 < theta < math.inf:
        raise ModelConfigError(f"config.json: rope_theta must be finite and exceed 1, it is {theta}")
    scaling = _scaling(found)
    if scaling is not None and (faults := positive_faults(scaling)):
        raise ModelConfigError("config.json: " + "; ".join(faults))
    return Rope(dim, theta, scaling)


def _positive(values: Values, key: str) -> float:
    number = get(values, key, float)
    if not 0 < number < math.inf:
        raise ModelConfigError(f"config.json: {key} must be positive and finite, it is {number}")
    return number


def positive_faults(shape: object) -> list[str]:
    """What of a shape's integers should be positive and is not, or is larger than any model's."""
    integers = {
        name: value
        for name, value in vars(shape).items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
    faults = [
        f"{name} must be positive, it is {value}"
        for name, value in integers.items()
        if value < (0 if name in _MAY_BE_ZERO else 1)
    ]
    return faults + [
        f"{name} {integers[name]} exceeds {most}"
        for name, most in _MOST.items()
        if integers.get(name, 0) > most
    ]


def _scaling(values: Values) -> Yarn | Llama3Rope | None:
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return None
    if kind == "llama3":
        return _llama3(values)
    if kind != "yarn":
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported: default, llama3, yarn")
    return Yarn(
        factor=_positive(values, "factor"),
        original_max_position_embeddings=get(values, "original_max_position_embeddings", int),
        beta_fast=get(values, "beta_fast", float, 32.0),
        beta_slow=get(values, "beta_slow", float, 1.0),
        mscale=get(values, "mscale", float, 0.0),
        mscale_all_dim=get(values, "mscale_all_dim", float, 0.0),
        truncate=get(values, "truncate", bool, True),
        attention_factor=None
        if values.get("attention_factor") is None
        else _positive(values, "attention_factor"),
        attn_factor=1.0 if values.get("attn_factor") is None else _positive(values, "attn_factor"),
    )


def _llama3(values: Values) -> Llama3Rope:
    scaling = Llama3Rope(
        factor=_positive(values, "factor"),
        low_freq_factor=_positive(values, "low_freq_factor"),
        high_freq_factor=_positive(values, "high_freq_factor"),
        original_max_position_embeddings=get(values, "original_max_position_embeddings", int),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelConfigError(
            f"config.json: high_freq_factor {scaling.high_freq_factor} must exceed "
            f"low_freq_factor {scaling.low_freq_factor}"
        )
    return scaling


def _eos_token_ids(values: Values) -> tuple[int, ...]:
    listed = values.get("eos_token_id")
    if not isinstance(listed, list):
        return (get(values, "eos_token_id", int, 1),)
    return tuple(get({"eos_token_id": value}, "eos_token_id", int) for value in listed)


def _quantization(value: object) -> tuple[tuple[int, int] | None, IntFormat | None]:
    """`(fp8_block, int_format)` of `quantization_config`, at most one of which is not None."""
    if value is None:
        return None, None
    values = value if isinstance(value, dict) else {}
    match values.get("quant_method"):
        case "fp8":
            return _fp8_block(values), None
        case "compressed-tensors":
            return None, _int_format(values)
    raise UnsupportedModel(f"quantization {value!r} is not supported; supported: fp8, compressed-tensors")


def _fp8_block(values: Values) -> tuple[int, int]:
    match values.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case block:
            raise ModelConfigError(
                f"config.json: weight_block_size must be two positive integers, it is {block!r}"
            )


def _int_format(values: Values) -> IntFormat:
    """Of compressed-tensors' many formats the weight-only ones whose groups are rows, or 128 columns of them.

    Which modules are meant (`targets`, `ignore`) is seen by the tensors that the checkpoint has.
    """
    groups = values.get("config_groups")
    match list(groups.values()) if isinstance(groups, dict) else None:
        case [
            {"weights": {"num_bits": 4 | 8 as bits, "type": "int", "strategy": strategy} as weights} as group
        ]:
            group_size = weights.get("group_size") if strategy == "group" else None
            sound = (strategy, group_size) in (("channel", None), ("group", 128))
            sound = sound and weights.get("symmetric", True) is True and not weights.get("actorder")
            if sound and not group.get("input_activations") and values.get("format") == "pack-quantized":
                return IntFormat(bits, group_size)
    raise UnsupportedModel(
        f"compressed-tensors with format {values.get('format')!r} and config_groups {groups!r} is not "
        "supported; supported: pack-quantized, one group, symmetric integers of 4 or 8 bits by channel or by "
        "groups of 128, activations not quantized"
    )
