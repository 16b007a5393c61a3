"""The operations that the models are made of, chosen by device.

`for_device` answers with the implementation for a device: `kernels.cpu` in plain torch, other devices by one
entry in `_MODULES` each. Models hold the answer and never ask what they run on. Shape letters: T tokens ·
D model width · I, O inner and outer width of a product · H heads · C latent · R rope dims · L = C + R ·
E experts · e local experts · K top-k · N dispatched rows · F expert width · P pages · S sequences.

`tiled` asks for results that are bit-identical whatever other rows there are: rows are then computed in
tiles of ROW_TILE, and T must be a multiple of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

ROW_TILE = 8
"""Rows of a matrix product in deterministic mode. Measured (torch 2.13, MKL): four and more rows agree."""

ATTENTION_SPLIT = 64
"""Positions of the context that one product covers in absorbed attention."""


@dataclass(frozen=True)
class Routing:
    """How a gate chooses: DeepSeek-V3's `noaux_tc` (arXiv:2412.19437, section 2.1.2)."""

    num_groups: int
    top_groups: int
    top_k: int
    normalize: bool
    scaling: float


class AttentionPlan(Protocol):
    """What an implementation works out once per step from lengths and page tables, for all layers."""

    @property
    def absorbed_rows(self) -> Tensor | None:
        """int64: the token rows that `mla_absorbed` answers for; None means every row of the step."""

    @property
    def has_expanded(self) -> bool:
        """Whether some rows are left to `mla_expanded`."""


class Ops(Protocol):
    """One device's implementation; a module fulfils it."""

    def linear(self, x_TI: Tensor, weight_OI: Tensor, *, tiled: bool) -> Tensor:
        """x Wᵀ, [T, O]."""

    def head_linear(self, x_THI: Tensor, weight_HIO: Tensor, *, tiled: bool) -> Tensor:
        """Each head's own product, [T, H, O]; the weight may be a strided view."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Root mean square norm of each row, in float32, times the weight; rows may be strided."""

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        """SiLU of the first half of the columns times the second half, [T, F]."""

    def rope_(self, x_THR: Tensor, cos_sin_TR: Tensor) -> None:
        """Rotates the pairs (2i, 2i+1) in place by (cos, sin) of the same columns; x may be a view."""

    def store_latents(self, cache_PSL: Tensor, slots_T: Tensor, latents_TL: Tensor) -> None:
        """Writes rows to slots (page · page_size + offset)."""

    def plan_attention(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        page_table_SP: Tensor,
        page_size: int,
        *,
        absorb_all: bool,
        device: torch.device,
    ) -> AttentionPlan:
        """For sequences whose queries are their last positions; contexts include them. The page table
        (int64, on the host) holds each sequence's pages, anything after its last one."""

    def mla_absorbed(
        self, q_AHL: Tensor, cache_PSL: Tensor, plan: AttentionPlan, *, num_latent: int, scale: float
    ) -> Tensor:
        """Attention in the latent space, [A, H, C], for the plan's absorbed rows; rows past the real tokens
        are zero. A row's bits depend on its own query and context alone."""

    def mla_expanded(
        self,
        q_THQ: Tensor,
        cache_PSL: Tensor,
        plan: AttentionPlan,
        weight_HOC: Tensor,
        out_THV: Tensor,
        *,
        scale: float,
    ) -> None:
        """Attention over keys and values expanded from the latents, for the rows that are not absorbed;
        writes those rows of `out_THV`. `weight_HOC` has per head the rows of keys, then those of values."""

    def gate(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, routing: Routing, *, tiled: bool
    ) -> tuple[Tensor, Tensor]:
        """(weights_TK float32, expert_ids_TK int64), best first; weight and bias are float32."""

    def experts(
        self, x_ND: Tensor, counts: Sequence[int], gate_up_e2FD: Tensor, down_eDF: Tensor, *, tiled: bool
    ) -> Tensor:
        """Expert i's MLP on its counts[i] rows, [N, D]; rows are sorted by expert."""

    def dequantize(self, weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """FP8 weight [N, K] times its scales [ceil(N / rows), ceil(K / columns)] of each block."""


_MODULES = {"cpu": "kernels.cpu"}


def for_device(device: torch.device) -> Ops:
    """The implementation for a device. Raises NotImplementedError, naming those that there are."""
    name = _MODULES.get(device.type)
    if name is None:
        raise NotImplementedError(
            f"no operations for device {device.type!r}; there are: {', '.join(_MODULES)}"
        )
    return cast(Ops, importlib.import_module(name))
