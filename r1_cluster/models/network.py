"""The network by ranges of layers. Its mixtures of experts live elsewhere and are called."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ROW_TILE
from kernels.ops import Cache
from r1_cluster.models.batch import AttentionBatch
from r1_cluster.models.config import ModelConfig
from r1_cluster.models.family import ARCHITECTURES, EMBEDDING, FINAL_NORM, HEAD
from r1_cluster.models.layers import Mlp, Ranks
from r1_cluster.models.loader import Loader
from r1_cluster.models.rope import rope_table

MoeCall = Callable[[int, Tensor, int], Tensor]
"""(layer, normed hidden states [T, D], number of real rows) → the experts' output [T, D]."""


class _Layer:
    """One layer without its mixture of experts: `mlp` is None where there is one."""

    def __init__(self, config: ModelConfig, loader: Loader, index: int) -> None:
        self.index = index
        self.attention_norm = loader.get("input_layernorm.weight")
        self.attention = ARCHITECTURES[config.architecture].attention(config, loader.under("self_attn"))
        self.mlp_norm = loader.get("post_attention_layernorm.weight")
        self.mlp = None if index in config.moe_layers else Mlp(loader.under("mlp"))


class StageModel:
    """Layers [first, last): attention and dense MLPs; with layer 0 the embedding, with the last the head."""

    def __init__(self, config: ModelConfig, loader: Loader, layers: range) -> None:
        """Opens these layers' tensors alone. Raises CheckpointError, ValueError for a range that is none."""
        if not 0 <= layers.start < layers.stop <= config.num_hidden_layers or layers.step != 1:
            raise ValueError(f"{layers} is no range of the {config.num_hidden_layers} layers")
        self.config = config
        self.shard = loader.shard
        self.ops = loader.shard.ops
        self.is_first = layers.start == 0
        self.is_last = layers.stop == config.num_hidden_layers
        # A tied head is the embedding itself, which a first stage that is the last as well has once.
        self._embedding = loader.get(EMBEDDING) if self.is_first else None
        self._first_token = loader.first_row(EMBEDDING) if self.is_first else 0
        # Where ranks divide the stage: who adds up their parts. Set before the first step.
        self.ranks: Ranks | None = None
        self._layers = [_Layer(config, loader.layer(layer), layer) for layer in layers]
        self._final_norm = loader.get(FINAL_NORM) if self.is_last else None
        self._head: Tensor | None = None
        if self.is_last and config.tie_word_embeddings:
            self._head = loader.get(EMBEDDING) if self._embedding is None else self._embedding
        elif self.is_last:
            self._head = loader.get(HEAD)
        self._rope_table = rope_table(config.rope, config.max_position_embeddings, self.shard.device)

    def new_cache(self, num_pages: int, page_size: int) -> list[Cache]:
        """An empty cache for each own layer."""
        return [layer.attention.new_cache(num_pages, page_size) for layer in self._layers]

    def hidden(self, num_rows: int) -> Tensor:
        """A buffer for hidden states, [num_rows, D], zeros."""
        return self.shard.zeros(num_rows, self.config.hidden_size)

    def empty_logits(self, num_rows: int) -> Tensor:
        """A buffer for logits, float32 [num_rows, V]."""
        return torch.empty(num_rows, self.config.vocab_size, dtype=torch.float32, device=self.shard.device)

    @torch.inference_mode()
    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Token ids → [T, D]. On the first stage alone."""
        if self._embedding is None:
            raise ValueError("only the first stage embeds")
        if self.shard.ranks == 1:
            return self._embedding.index_select(0, token_ids_T)
        own_T = token_ids_T - self._first_token
        elsewhere_T = (own_T < 0) | (own_T >= len(self._embedding))
        x_TD = self._embedding.index_select(0, own_T.masked_fill_(elsewhere_T, 0))
        return self._add_up(x_TD.masked_fill_(elsewhere_T[:, None], 0))

    @torch.inference_mode()
    def forward(self, x_TD: Tensor, batch: AttentionBatch, caches: Sequence[Cache], moe: MoeCall) -> Tensor:
        """Hidden states [num_rows, D] through the stage's layers; what is kept of new tokens goes to
        `caches`.

        `x_TD` is overwritten. `moe` is called for each layer with experts. Running a step again over the
        same caches gives the same.
        """
        segments = self.segments(x_TD, batch, caches)
        try:
            layer, normed_TD = next(segments)
            while True:
                layer, normed_TD = segments.send(moe(layer, normed_TD, batch.num_tokens))
        except StopIteration as end:
            hidden_TD: Tensor = end.value
            return hidden_TD

    def segments(
        self, x_TD: Tensor, batch: AttentionBatch, caches: Sequence[Cache]
    ) -> Generator[tuple[int, Tensor], Tensor, Tensor]:
        """`forward`, cut where a mixture of experts is asked: yields (layer, normed hidden states), is sent
        the experts' output, returns the hidden states. Its caller sets inference mode."""
        if len(x_TD) != batch.num_rows:
            raise ValueError(f"{len(x_TD)} rows of hidden states came for a step of {batch.num_rows}")
        if batch.num_rows > batch.num_tokens and self.is_first:
            x_TD[batch.num_tokens :] = 0
        rotation = self.ops.rotation(self._rope_table, batch.positions_T)
        eps = self.config.rms_norm_eps
        delta_TD: Tensor | None = None  # what is still to be added to the hidden states
        for layer, cache in zip(self._layers, caches):
            normed, x_TD = self.ops.add_rms_norm(x_TD, delta_TD, layer.attention_norm, eps)
            delta_TD = self._add_up(layer.attention.forward(normed, batch, rotation, cache))
            normed, x_TD = self.ops.add_rms_norm(x_TD, delta_TD, layer.mlp_norm, eps)
            if layer.mlp is None:
                delta_TD = self._add_up((yield layer.index, normed))
            else:
                delta_TD = self._add_up(layer.mlp.forward(normed))
        return x_TD.add_(delta_TD) if delta_TD is not None else x_TD

    @torch.inference_mode()
    def logits(self, x_TD: Tensor, rows: Tensor) -> Tensor:
        """Hidden states of the last layer → float32 logits [len(rows), V], or a rank's columns of them. On
        the last stage alone."""
        if self._final_norm is None or self._head is None:
            raise ValueError("only the last stage has a head")
        x_SD = x_TD.index_select(0, rows)
        if self.shard.deterministic and len(rows) % ROW_TILE:
            x_SD = F.pad(x_SD, (0, 0, 0, ROW_TILE - len(rows) % ROW_TILE))
        normed = self.ops.rms_norm(x_SD, self._final_norm, self.config.rms_norm_eps)
        return self.ops.linear(normed, self._head, tiled=self.shard.deterministic)[: len(rows)].float()

    def _add_up(self, part_TD: Tensor) -> Tensor:
        """A rank's part of what is added to the hidden states → all of it."""
        return part_TD if self.ranks is None else self.ranks.add(part_TD)
