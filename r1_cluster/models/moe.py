"""The mixture of experts in its two halves: what a router holds, and what an expert shard holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from kernels.ops import DeviceOps, Routing, ScaledWeight, Weight
from r1_cluster.models.batch import buckets
from r1_cluster.models.config import ModelConfig
from r1_cluster.models.layers import Mlp
from r1_cluster.models.loader import Loader


class RouterModel:
    """Gates and shared experts of some MoE layers."""

    def __init__(self, config: ModelConfig, loader: Loader, layers: Sequence[int]) -> None:
        """Opens the gates and shared experts of `layers` alone. Raises CheckpointError."""
        moe = config.moe
        assert moe is not None, "only layers with experts have a router"
        self.shard = loader.shard
        self._ops = loader.shard.ops
        self._tiled = loader.shard.deterministic
        self._width = config.hidden_size
        self._routing = Routing(
            num_groups=moe.n_group,
            top_groups=moe.topk_group,
            top_k=moe.num_experts_per_tok,
            normalize=moe.norm_topk_prob,
            scaling=moe.routed_scaling_factor,
        )
        mlps = {layer: loader.layer(layer).under("mlp") for layer in layers}
        self._gates = {
            layer: (mlp.get_float32("gate.weight"), mlp.get_float32("gate.e_score_correction_bias"))
            for layer, mlp in mlps.items()
        }
        self._shared = {layer: Mlp(mlp.under("shared_experts")) for layer, mlp in mlps.items()}

    @torch.inference_mode()
    def gate(self, layer: int, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Normed hidden states → (weights_TK float32, expert_ids_TK int64 or int32), best expert first."""
        weight_ED, bias_E = self._gates[layer]
        return self._ops.gate(x_TD, weight_ED, bias_E, self._routing, tiled=self._tiled)

    def warm_up(self, max_tokens: int) -> None:
        """Compiles and tunes a device's kernels for every power of two of tokens and for the most there can
        be, so that no step waits for that. All layers have the same shapes."""
        layer = next(iter(self._gates))
        for num_tokens in buckets(max_tokens):
            x_TD = self.shard.zeros(num_tokens, self._width)
            self.gate(layer, x_TD)
            self.shared(layer, x_TD)

    @torch.inference_mode()
    def shared(self, layer: int, x_TD: Tensor) -> Tensor:
        """Output of the shared experts, [T, D]."""
        return self._shared[layer].forward(x_TD)


class ExpertModel:
    """The routed experts [experts.start, experts.stop) of some MoE layers."""

    def __init__(self, config: ModelConfig, loader: Loader, layers: Sequence[int], experts: range) -> None:
        """Opens these experts' tensors alone. Raises CheckpointError, ValueError for a range that is none."""
        num_experts = 0 if config.moe is None else config.moe.n_routed_experts
        if not 0 <= experts.start < experts.stop <= num_experts or experts.step != 1:
            raise ValueError(f"{experts} is no range of the {num_experts} routed experts")
        self.experts = experts
        self.num_experts = num_experts  # of the model
        self.shard = loader.shard
        self._width = config.hidden_size
        self._ops = loader.shard.ops
        self._tiled = loader.shard.deterministic
        self._weights = {
            layer: _load_experts(loader.layer(layer).under("mlp.experts"), experts) for layer in layers
        }

    @torch.inference_mode()
    def forward(self, layer: int, x_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows sorted by expert, counts[i] of them for experts[i] → [N, D] in the same order, on the device
        that they came from.

        Raises ValueError where counts do not fit the experts or the rows.
        """
        if len(counts) != len(self.experts) or sum(counts) != len(x_ND):
            raise ValueError(
                f"{len(x_ND)} rows came with {len(counts)} counts of sum {sum(counts)} "
                f"for {len(self.experts)} experts"
            )
        if not len(x_ND):
            return torch.empty_like(x_ND)
        gate_up_e2FD, down_eDF = self._weights[layer]
        x = x_ND.to(self.shard.device)
        return self._ops.experts(x, counts, gate_up_e2FD, down_eDF, tiled=self._tiled).to(x_ND.device)

    @torch.inference_mode()
    def share(
        self,
        layer: int,
        x_TD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        asked: Sequence[bool] | None = None,
    ) -> Tensor:
        """What these experts, or those of them that are `asked`, add to the mixture: Σ weight · expert(x)
        over the k that are theirs, [T, D], on the device that x came from. Where `on_device` alone."""
        device = self.shard.device
        ids_TK = expert_ids_TK.to(device, torch.int32)
        if asked is not None:
            theirs = torch.tensor([*asked, False], device=device)  # the last for whoever is not here
            own_TK = ids_TK - self.experts.start
            here = (own_TK >= 0) & (own_TK < len(self.experts))
            ids_TK = torch.where(theirs[torch.where(here, own_TK, -1)], ids_TK, -1)
        y_TD = self.mixture(layer, x_TD.to(device), weights_TK.to(device), ids_TK)
        return y_TD.to(x_TD.device)

    def warm_up(self, max_rows: int) -> None:
        """See `RouterModel.warm_up`; for rows that fall evenly on the experts."""
        layer = next(iter(self._weights))
        num_experts = len(self.experts)
        for num_rows in buckets(max_rows):
            counts = [(num_rows + i) // num_experts for i in range(num_experts)]
            self.forward(layer, torch.zeros(num_rows, self._width, dtype=self.shard.dtype), counts)

    def warm_up_shares(self, max_tokens: int, top_k: int) -> None:
        """See `RouterModel.warm_up`; for broadcast steps."""
        layer = next(iter(self._weights))
        for num_tokens in buckets(max_tokens):
            x_TD = self.shard.zeros(num_tokens, self._width)
            ids_TK = torch.arange(top_k, device=x_TD.device).expand(num_tokens, top_k) + self.experts.start
            self.share(layer, x_TD, torch.ones(num_tokens, top_k, device=x_TD.device), ids_TK)

    @property
    def on_device(self) -> bool:
        """Whether `mixture` and `share` may be called."""
        return self._ops.HAS_MOE

    @torch.inference_mode()
    def mixture(
        self,
        layer: int,
        x_TD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        num_tokens: Tensor | None = None,
    ) -> Tensor:
        """The mixture over these experts; others' ids are left out: see `DeviceOps.moe`."""
        first = self.experts.start
        gate_up_e2FD, down_eDF = self._weights[layer]
        ops = cast(DeviceOps, self._ops)
        return ops.moe(
            x_TD,
            weights_TK,
            expert_ids_TK - first if first else expert_ids_TK,
            gate_up_e2FD,
            down_eDF,
            num_tokens=num_tokens,
            tiled=self._tiled,
        )


_PARTS: tuple[tuple[str, ...], ...] = (("gate_proj.weight", "up_proj.weight"), ("down_proj.weight",))


def _load_experts(loader: Loader, experts: range) -> tuple[Weight, Weight]:
    """(gate and up [e, 2F, D], down [e, D, F]), filled tensor by tensor: no second copy at any time."""
    if loader.stays_scaled(*(f"{expert}.{name}" for expert in experts for names in _PARTS for name in names)):
        return _load_scaled_experts(loader, experts)
    first, shard = loader.under(str(experts.start)), loader.shard
    hidden, width = first.shape("gate_proj.weight")
    gate_up = torch.empty(len(experts), 2 * hidden, width, dtype=shard.dtype, device=shard.device)
    down = torch.empty(len(experts), width, hidden, dtype=shard.dtype, device=shard.device)
    for i, expert in enumerate(experts):
        own = loader.under(str(expert))
        own.get("gate_proj.weight", gate_up[i, :hidden])
        own.get("up_proj.weight", gate_up[i, hidden:])
        own.get("down_proj.weight", down[i])
    return gate_up, down


def _load_scaled_experts(loader: Loader, experts: range) -> tuple[ScaledWeight, ScaledWeight]:
    """As `_load_experts`, as they are stored."""
    stacks: list[ScaledWeight] = []
    for part in _PARTS:
        first = loader.under(str(experts.start)).weight(*part)
        assert not isinstance(first, Tensor)
        values, scale = (x.new_empty(len(experts), *x.shape) for x in (first.values, first.scale))
        values[0].view(torch.uint8).copy_(first.values.view(torch.uint8))
        scale[0] = first.scale
        stacks.append(replace(first, values=values, scale=scale))
    for i, expert in enumerate(experts[1:], 1):
        for stack, part in zip(stacks, _PARTS):
            place = replace(stack, values=stack.values[i], scale=stack.scale[i])
            loader.under(str(expert)).fill(place, *part)
    gate_up, down = stacks
    return gate_up, down
