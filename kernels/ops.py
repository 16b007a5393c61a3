"""The operations that the models are made of, chosen by device.

`for_device` answers with the implementation for a device: `kernels.triton_ops` for CUDA (which is what torch
calls AMD's devices as well), `kernels.cpu` in plain torch for the CPU and every other device, Ascend's npu
among them. Models hold the answer and never ask what they run on. Shape letters: T tokens ·
D model width · I, O inner and outer width of a product · H heads · C latent · R rope dims · L = C + R ·
E experts · e local experts · K top-k, in attention key heads · W their width · N dispatched rows ·
F expert width · P pages · S sequences.

`tiled` asks for results that are bit-identical whatever other rows there are: rows are then computed in
tiles of ROW_TILE, and T must be a multiple of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor

ATTENTION_SPLIT = 64
"""Positions of the context that one product covers in attention by splits."""

FAILED = -1
"""What `Ops.sample` answers for a row from which no token can be drawn."""


@dataclass(frozen=True)
class Routing:
    """How a gate chooses: DeepSeek-V3's `noaux_tc` (arXiv:2412.19437, section 2.1.2)."""

    num_groups: int
    top_groups: int
    top_k: int
    normalize: bool
    scaling: float


@dataclass(frozen=True)
class BlockScaled:
    """An FP8 weight [..., N, K] with the float32 scales [..., ⌈N/128⌉, ⌈K/128⌉] of its 128×128 blocks."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class GroupScaled:
    """A weight [..., N, K] of few bits, multiplied as what it stands for: activations are not quantized.

    `values` are [..., N, P], int8 or FP8, or [..., N, P/2] uint8 with two numbers of 4 bits in a byte
    (`int_weight.pack_int4`); the columns from K (`width`) to P are zero. `scale` [..., N, G] is float32: each
    row's columns share them in G groups of P / G.
    """

    values: Tensor
    scale: Tensor
    width: int

    def expert(self, index: int) -> GroupScaled:
        """One weight of a stack."""
        return GroupScaled(self.values[index], self.scale[index], self.width)


ScaledWeight: TypeAlias = BlockScaled | GroupScaled

Weight: TypeAlias = Tensor | ScaledWeight


@dataclass(frozen=True)
class Fp8Cache:
    """A paged cache in the device's E4M3 format; each run of `values` that shares a number of the float32
    `scale` stands for itself times that.

    Of latents [P, page, C + R] each slot has two scales [P, page, 2], the latent's and the rotated key's; of
    keys and values [P, page, 2, K, W] one for every head's key and value [P, page, 2, K].
    """

    values: Tensor
    scale: Tensor


Cache: TypeAlias = Tensor | Fp8Cache
"""One layer's latents, or keys and values, in the compute dtype or in FP8. Attention reads of every token,
those of the same step among them, what the cache holds: so it does not matter how a prompt was cut."""

Rotation: TypeAlias = object
"""What an implementation turns a step's queries and keys by; made by `Ops.rotation`, once per step."""


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides whether an implementation can serve it.

    `head_widths` are those that attention multiplies over, by their names in config.json. `inner_widths` are
    the inner widths of its block-scaled products and `stacked_rows` the rows of weights that have another one
    below them; both empty where no weight is FP8.
    """

    dtype: torch.dtype
    page_size: int
    head_widths: Mapping[str, int]
    fp8_block: tuple[int, int] | None = None
    inner_widths: tuple[int, ...] = ()
    stacked_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Draws:
    """How each of S rows of logits becomes a token: one list entry a row. `top_k` 0 keeps all tokens;
    temperature 0 is greedy; the random number is a function of (seed, position), modulo 2^64. Any number may
    stand in any place: what it means, and that NaN fails its row, is said in `kernels.cpu_sampler`."""

    temperatures: Sequence[float]
    top_ks: Sequence[int]
    top_ps: Sequence[float]
    seeds: Sequence[int]
    positions: Sequence[int]


class AttentionPlan(Protocol):
    """What an implementation works out once per step from lengths and page tables, for all layers."""

    @property
    def absorbed_rows(self) -> Tensor | None:
        """int64: the rows of tokens that came alone or in a few, for which `mla_absorbed` answers; None means
        every row of the step."""

    @property
    def has_expanded(self) -> bool:
        """Whether some rows are left to `mla_expanded`."""


class Ops(Protocol):
    """One device's implementation; a module fulfils it."""

    KEEPS_FP8: bool
    """Whether FP8 weights stay as they are in the checkpoint, in the form that `block_scaled` gives them."""

    HAS_MOE: bool
    """Whether it is `DeviceOps`: a mixture of experts is one call that the host need not follow."""

    def faults(self, shape: ModelShape) -> list[str]:
        """Why a model cannot be served, one clause each; nothing where it can."""

    def linear(self, x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None, *, tiled: bool) -> Tensor:
        """x Wᵀ + bias, [T, O]."""

    def head_linear(self, x_THI: Tensor, weight_HIO: Tensor, *, tiled: bool) -> Tensor:
        """Each head's own product, [T, H, O]; the weight may be a strided view."""

    def mlp(self, x_TD: Tensor, gate_up_2FD: Weight, down_DF: Weight, *, tiled: bool) -> Tensor:
        """down(SiLU(gate x) · up x), [T, D]; the first weight has the rows of the gate, then those of up."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Root mean square norm of each row, in float32, times the weight; rows may be strided."""

    def add_rms_norm(
        self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm of x + delta, x + delta); x may be overwritten. None adds nothing."""

    def rotation(self, table_PR: Tensor, positions_T: Tensor) -> Rotation:
        """Cos and sin, alternating in the table's rows, at each token's position."""

    def rope_(self, x_THR: Tensor, rotation: Rotation, *, interleaved: bool) -> None:
        """Rotates pairs in place by each token's angles: (2i, 2i+1) where they are interleaved, else
        (i, i + R/2); x may be a view."""

    def store_latents(
        self,
        cache_PSL: Cache,
        slots_T: Tensor,
        latent_TL: Tensor,
        norm_weight_C: Tensor,
        eps: float,
        rotation: Rotation,
    ) -> None:
        """Norms the first C columns, rotates the rest, and writes each row to its slot (page · page_size +
        offset); rows past the slots are padding. `latent_TL` may be overwritten."""

    def store_kv(
        self, cache_PS2KW: Cache, slots_T: Tensor, k_TKW: Tensor, v_TKW: Tensor, rotation: Rotation
    ) -> None:
        """Rotates keys by halves, and writes keys and values to their slots; rows past the slots are
        padding. Both may be views whose heads are dense; `k_TKW` may be overwritten."""

    def plan_attention(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        page_table_SP: Tensor,
        page_size: int,
        *,
        absorb_all: bool,
        along: Sequence[Tensor],
        device: torch.device,
    ) -> tuple[AttentionPlan, list[Tensor]]:
        """For sequences whose queries are their last positions; contexts include them. The page table
        (int64, on the host) holds each sequence's pages, anything after its last one. `along` are further
        integers of the step on the host, which go to the device in the same copy: they come back as the
        second result."""

    def mla_absorbed(
        self,
        q_latent_AHC: Tensor,
        q_rope_AHR: Tensor,
        cache_PSL: Cache,
        plan: AttentionPlan,
        *,
        scale: float,
    ) -> Tensor:
        """Attention in the latent space, [A, H, C], for the plan's absorbed rows; rows past the real tokens
        are zero. A row's bits depend on its own query and context alone."""

    def mla_expanded(
        self,
        q_THQ: Tensor,
        cache_PSL: Cache,
        plan: AttentionPlan,
        weight_HOC: Tensor,
        out_THV: Tensor,
        *,
        scale: float,
    ) -> None:
        """Attention over keys and values expanded from the latents, for the rows that are not absorbed;
        writes those rows of `out_THV`. `weight_HOC` has per head the rows of keys, then those of values."""

    def gqa(self, q_THW: Tensor, cache_PS2KW: Cache, plan: AttentionPlan, *, scale: float) -> Tensor:
        """Grouped-query attention for all rows of the step, [T, H, W]; H / K neighbouring heads share a key
        head. Rows past the real tokens are zero. Where the plan has all rows absorbed, a row's bits depend on
        its own query and context alone."""

    def gate(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, routing: Routing, *, tiled: bool
    ) -> tuple[Tensor, Tensor]:
        """(weights_TK float32, expert_ids_TK int64 or int32), best first; weight and bias are float32."""

    def experts(
        self, x_ND: Tensor, counts: Sequence[int], gate_up_e2FD: Weight, down_eDF: Weight, *, tiled: bool
    ) -> Tensor:
        """Expert i's MLP on its counts[i] rows, [N, D]; rows are sorted by expert."""

    def block_scaled(
        self, values: Tensor, scale: Tensor, block: tuple[int, int], device: torch.device
    ) -> ScaledWeight:
        """An FP8 weight (E4M3FN) and the scales of its blocks, as read from a checkpoint, in the device's own
        format. Only where KEEPS_FP8."""

    def dequantize(self, weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """FP8 weight [N, K] times its scales [ceil(N / rows), ceil(K / columns)] of each block."""

    def sample(self, logits_SV: Tensor, draws: Draws) -> list[int]:
        """One token per row of float32 logits, by inverse CDF over the kept tokens in the order of ids;
        FAILED for a row that holds NaN, has no finite largest logit, or whose parameters are NaN. The same
        on every device, bit for bit: `kernels.cpu_sampler` has the definition."""


class DeviceOps(Ops, Protocol):
    """An implementation whose mixture of experts never waits for the host: it may be captured in a graph."""

    def moe(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        gate_up_e2FD: Weight,
        down_eDF: Weight,
        *,
        num_tokens: Tensor | None,
        tiled: bool,
    ) -> Tensor:
        """y[t] = Σ_k weights[t, k] · expert_k(x[t]), added in the order of k, [T, D]. Rows past `num_tokens`
        (one integer on the device; None: all are real) are zero."""

    def refill_(self, plan: AttentionPlan, other: AttentionPlan) -> None:
        """Copies a decode step's contexts and pages into a plan of more sequences and longer contexts, over
        whose tensors a graph was recorded. What is left over sees one token of any page."""


_MODULES = {"cuda": "kernels.triton_ops"}
_PLAIN = "kernels.cpu"


def for_device(device: torch.device | str) -> Ops:
    """The implementation for a device, or for those of a type, which torch need not know here."""
    kind = device if isinstance(device, str) else device.type
    return cast(Ops, importlib.import_module(_MODULES.get(kind, _PLAIN)))
