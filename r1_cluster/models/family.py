"""The architectures of the family: one entry for each, and what is asked of them by a model's config alone.

Whoever only reads configurations, as the ingress does, imports this without torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from r1_cluster.models import deepseek, llama
from r1_cluster.models.config import ModelConfig, ModelConfigError, UnsupportedModel
from r1_cluster.models.config_json import Values
from r1_cluster.weights.headers import lists
from r1_cluster.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from r1_cluster.models.layers import Attention
    from r1_cluster.models.loader import Loader


@dataclass(frozen=True)
class Architecture:
    """`parse` reads config.json's content; it raises ModelConfigError and UnsupportedModel. `layer_tensors`
    lists what a layer has, in the order of the forward pass; layers past the last are the MTP modules.
    `attention` builds a layer's, from a loader of what lies under `self_attn`."""

    parse: Callable[[Values], ModelConfig]
    layer_tensors: Callable[[ModelConfig, int], Iterable[TensorSpec]]
    attention: Callable[[ModelConfig, Loader], Attention]


ARCHITECTURES = {
    deepseek.ARCHITECTURE: Architecture(deepseek.parse, deepseek.layer_tensors, deepseek.attention),
    **{
        name: Architecture(parse, llama.layer_tensors, llama.attention)
        for name, parse in llama.PARSERS.items()
    },
}
"""By the name in config.json's `architectures`."""


def load_config(folder: str | Path) -> ModelConfig:
    """Of the checkpoint in a folder: as `read_config`, but that a head that is stored is used, whatever
    config.json says. transformers does so from version 5 on (`tie_weights` in its modeling_utils.py)."""
    config = read_config(folder)
    if config.tie_word_embeddings and lists(Path(folder), HEAD):
        return replace(config, tie_word_embeddings=False)
    return config


def read_config(folder: str | Path) -> ModelConfig:
    """Reads FOLDER/config.json. Raises ModelConfigError or UnsupportedModel."""
    file = Path(folder) / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelConfigError(f"{file} is not there: a checkpoint folder needs its config.json") from None
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelConfigError(f"{file} must hold a JSON object, it holds {type(values).__name__}")
    return parse_config(values)


def parse_config(values: Values) -> ModelConfig:
    """From config.json's content. Raises UnsupportedModel for another architecture or variant,
    ModelConfigError for keys that are missing, of the wrong type, or contradict each other."""
    listed = values.get("architectures")
    names = listed if isinstance(listed, list) else []
    known = [name for name in names if isinstance(name, str) and name in ARCHITECTURES]
    if not known:
        found = ", ".join(map(str, names)) or "an architecture that config.json does not name"
        raise UnsupportedModel(f"{found} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[known[0]].parse(values)


EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def tensor_table(config: ModelConfig) -> list[TensorSpec]:
    """All that a model needs, in the order of the forward pass."""
    vocabulary = (config.vocab_size, config.hidden_size)
    head = [] if config.tie_word_embeddings else [TensorSpec(HEAD, vocabulary, "head", 0)]
    return [
        TensorSpec(EMBEDDING, vocabulary, "embedding", 0),
        *_of_layers(config, range(config.num_hidden_layers)),
        TensorSpec(FINAL_NORM, (config.hidden_size,), "norm"),
        *head,
    ]


def mtp_table(config: ModelConfig) -> list[TensorSpec]:
    """Those of the modules that predict further tokens, which checkpoints have as layers past the last."""
    last = config.num_hidden_layers
    return _of_layers(config, range(last, last + config.num_nextn_predict_layers))


def _of_layers(config: ModelConfig, layers: range) -> list[TensorSpec]:
    listed = ARCHITECTURES[config.architecture].layer_tensors
    return [spec for layer in layers for spec in listed(config, layer)]
