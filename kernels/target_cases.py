"""The kernels at the shapes R1 gives them, with the launch shape that each target gets ahead of time."""

from dataclasses import dataclass, field
from typing import Any

import triton

from kernels import (
    attention_merge,
    fp8,
    gemm_fp8,
    gqa,
    int_gemm,
    int_moe_gemm,
    mla_cache,
    mla_decode,
    mla_prefill,
    moe_combine,
    moe_gate,
    moe_gemm,
    moe_gemm_plain,
    moe_sort,
    norm,
    penalties,
    rope,
    sampler,
    silu,
)


@dataclass(frozen=True)
class Launch:
    """Compile-time arguments and launch options."""

    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Case:
    """One kernel at one shape. The signature lists the run-time arguments' types in order; ' marks ÷16."""

    name: str
    kernel: Any
    signature: str
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    hot: bool = False
    """Held to no spills on sm_90, or to the allowance."""
    narrow: dict[str, Any] = field(default_factory=dict)
    """What differs where shared memory is small: sm_89 and gfx942."""
    amd: dict[str, Any] = field(default_factory=dict)
    """What differs on AMD, after `narrow`."""
    spill_allowance: int = 0
    """Stack bytes a thread that a hot kernel may use on sm_90, outside its main loop."""
    fused: bool = True
    """Whether a product and a sum may become one operation that rounds once."""

    def launch(self, target: str) -> Launch:
        """Arguments and options for a target."""
        chosen = dict(self.constexprs) | {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if target in ("sm_89", "gfx942"):
            chosen |= self.narrow
        if target.startswith("gfx"):
            chosen["num_stages"] = min(chosen["num_stages"], 2)
            chosen |= self.amd
        if target == "gfx942" and "FP8_MAX" in chosen:
            chosen["FP8_MAX"] = 240.0
        warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
        return Launch(chosen, warps, stages)


def kernel_of(case: Case) -> triton.JITFunction:
    """The compilable function under an autotuner, if there is one."""
    return getattr(case.kernel, "fn", case.kernel) if hasattr(case.kernel, "configs") else case.kernel


def _of_cache(signature: str, types: tuple[str, str]) -> str:
    """A signature with the types of the cache and of its scales."""
    return signature.replace("cache", types[0]).replace("scale", types[1])


_D = {"D": 7168, "BLOCK_D": 8192, "HAS_RESIDUAL": True}
_GATE = {
    "NUM_GROUPS": 8,
    "GROUP_SIZE": 32,
    "TOP_GROUPS": 4,
    "TOP_K": 8,
    "NORMALIZE": True,
    "BLOCK_G": 8,
    "BLOCK_S": 32,
    "BLOCK_K": 8,
}
_COUNT = {"TOP_K": 8, "CHUNK": 1024, "BLOCK_E": 256}
_PLACE = {"TOP_K": 8, "BLOCK_ROWS": 128, "CHUNK": 1024, "BLOCK_E": 256, "FILL_BLOCKS": 1}
_COPY = {"ROWS_PER_SOURCE": 8, "HEAD": 1792, "TAIL": 56, "TO_STRIDE": 1848, "TO_TAIL_STRIDE": 1848}
_PLAIN = "*fp8' *fp32' *fp8' *fp32' *bf16' i32 i32 i32' i32 i32 i32'"
_GROUPED = "*fp8' *fp32' *fp8' *fp32' *i32' *bf16' i32' i32 i32' i32' i32' i32"
_GATE_UP = "*fp8' *fp32' *fp8' *fp32' *i32' *fp8' *fp32' i32' i32 i32' i32' i32' i32"
_MLA = "*bf16' *bf16' *bf16' *fp32' *i32' *i32' *i32' *fp32' *fp32' fp32" + " i32'" * 9
_MLA_SHAPE = {"C": 512, "R": 64, "PAGE": 64}
_NARROW_MLA = {"BLOCK_ROWS": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
_GQA = "*bf16' cache cache scale scale *i32' *i32' *i32' *fp32' *fp32' fp32 i32' i32 i32 i32"
_GQA += " i32' i32' i32' i32 i32' i32'"
_GQA_SHAPE = {"D": 128, "PAGE": 64, "BLOCK_N": 64}
_WRITE_KV = "*bf16' *bf16' *fp32' *fp32' *i64' *i64' cache cache scale scale i32' i32' i32' i32"
_PLAIN_CACHE, _FP8_CACHE = ("*bf16'", "*bf16'"), ("*fp8'", "*fp32'")
_INT = "*bf16' weight *fp32' *bf16' i32 i32 i32' i32' i32 i32'"
_INT_SHAPE = {"EVEN": True, "BLOCK_M": 16, "BLOCK_N": 64}
_INT8, _INT4 = {"PACKED": False, "PER_ROW": True}, {"PACKED": True, "PER_ROW": False}
_GROUPED_INT = "*bf16' weight *fp32' *i32' *i32' *bf16' i32' i32' i32' i32' i32'"
_SAMPLE = {"BLOCK": 2048, "SPLITS": 64}

CASES = [
    Case("rms_norm", norm._rms_norm_kernel, "*bf16' *bf16' *bf16' *bf16' *bf16' i32' i32' fp32", _D, 16),
    Case(
        "rope",
        rope._rope_kernel,
        "*bf16' *fp32' *fp32' *i32' *bf16' i32' i32' i32' i32' i32'",
        {"HALF": 32, "INTERLEAVED": True, "BLOCK_H": 32, "BLOCK_R": 32},
    ),
    Case(
        "quantize",
        fp8._quantize_kernel,
        "*bf16' *fp8' *fp32' i32' i32 i32",
        {"FP8_MAX": 448.0, "BLOCK_G": 16, "SILU_MUL": False},
    ),
    Case(
        "silu_mul_quantize",
        fp8._quantize_kernel,
        "*bf16' *fp8' *fp32' i32' i32 i32",
        {"FP8_MAX": 448.0, "BLOCK_G": 16, "SILU_MUL": True},
    ),
    Case(
        "rms_norm_quantize",
        fp8._rms_norm_quantize_kernel,
        "*bf16' *bf16' *bf16' *fp8' *fp32' *bf16' *bf16' i32' i32' fp32",
        {"G": 56, "FP8_MAX": 448.0, "BLOCK_G": 64, "HAS_RESIDUAL": True, "KEEP_NORMED": True},
        16,
    ),
    Case(
        "dequantize_weight",
        fp8._dequantize_weight_kernel,
        "*fp8' *fp32' *bf16' i32' i32' i32",
        {"BLOCK_N": 64},
    ),
    Case("gate", moe_gate._gate_kernel, "*fp32' *fp32' *fp32' *i32' i32' fp32", _GATE, 1),
    Case("sort count", moe_sort._count_kernel, "*i32' *i32' *i32' i32 i32'", _COUNT),
    Case("sort scan", moe_sort._scan_kernel, "*i32' *i32' i32", {"BLOCK_E": 256, "BLOCK_CHUNKS": 128}, 1),
    Case(
        "sort place",
        moe_sort._place_kernel,
        "*i32' *i32' *i32' *i32' *i32' *i32' *i32' i32 i32' i32 i32",
        _PLACE | {"SINGLE": False},
        8,
    ),
    Case(
        "sort place, one launch",
        moe_sort._place_kernel,
        "*i32' *i32' *i32' *i32' *i32' *i32' *i32' i32 i32' i32 i32",
        _PLACE | {"SINGLE": True, "BLOCK_ROWS": 16, "FILL_BLOCKS": 8},
        8,
    ),
    Case(
        "gemm M=16",
        gemm_fp8.plain_gemm_kernel,
        _PLAIN,
        {"BLOCK_M": 16, "BLOCK_N": 128},
        4,
        5,
        True,
    ),
    Case(
        "gemm M=64",
        gemm_fp8.plain_gemm_kernel,
        _PLAIN,
        {"BLOCK_M": 64, "BLOCK_N": 128},
        4,
        4,
        True,
        {"num_stages": 3},
    ),
    Case(
        "gemm M=128",
        gemm_fp8.plain_gemm_kernel,
        _PLAIN,
        {"BLOCK_M": 128, "BLOCK_N": 128},
        8,
        4,
        True,
        {"num_stages": 3},
    ),
    Case("gemm, add parts", gemm_fp8.add_parts_kernel, "*fp32' *bf16' i32' i32", {"BLOCK": 1024}),
    Case(
        "gemm persistent",
        gemm_fp8.persistent_gemm_kernel,
        "tensordesc<fp8[BLOCK_M,128]> *fp32' tensordesc<fp8[BLOCK_N,128]> *fp32' "
        "tensordesc<bf16[BLOCK_M,BLOCK_N]> i32 i32 i32' i32",
        {"BLOCK_M": 128, "BLOCK_N": 128, "NUM_PROGRAMS": 132},
        8,
        4,
        True,
        {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
    ),
    Case(
        "grouped gemm, decode",
        moe_gemm.grouped_gemm_kernel,
        _GROUPED,
        {"MASKED": True, "BLOCK_M": 16, "BLOCK_N": 128, "GROUP_M": 1},
        4,
        5,
        True,
    ),
    Case(
        "grouped gemm, prefill",
        moe_gemm.grouped_gemm_kernel,
        _GROUPED,
        {"MASKED": False, "BLOCK_M": 128, "BLOCK_N": 128, "GROUP_M": 8},
        8,
        4,
        True,
        {"num_stages": 3},
    ),
    Case(
        "gate-up, decode",
        moe_gemm.gate_up_kernel,
        _GATE_UP,
        {"MASKED": True, "FP8_MAX": 448.0, "BLOCK_M": 16, "GROUP_M": 1},
        4,
        4,
        True,
        {"num_stages": 2},
    ),
    Case(
        "gate-up, prefill",
        moe_gemm.gate_up_kernel,
        _GATE_UP,
        {"MASKED": False, "FP8_MAX": 448.0, "BLOCK_M": 64, "GROUP_M": 8},
        8,
        4,
        True,
        {"num_stages": 2},
    ),
    Case(
        "grouped plain, decode",
        moe_gemm_plain.grouped_plain_kernel,
        "*bf16' *bf16' *i32' *i32' *bf16' i32' i32' i32' i32' i32'",
        {"ROWS_PER_SOURCE": 8, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 1},
        4,
        3,
        True,
    ),
    Case(
        "grouped plain, prefill",
        moe_gemm_plain.grouped_plain_kernel,
        "*bf16' *bf16' *i32' *i32' *bf16' i32' i32' i32' i32' i32'",
        {"ROWS_PER_SOURCE": 8, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8},
        8,
        3,
        True,
        {"num_stages": 2},
    ),
    Case("silu_mul", silu.silu_mul_kernel, "*bf16' *bf16' i32'", {"F": 18432, "BLOCK": 1024}),
    Case(
        "combine",
        moe_combine._combine_kernel,
        "*bf16' *i32' *fp32' *bf16' *bf16' i32' i32'",
        {"D": 7168, "TOP_K": 8, "HAS_SHARED": True, "BLOCK_D": 1024},
    ),
    Case(
        "mla decode, 128 heads",
        mla_decode.mla_decode_kernel,
        _MLA,
        _MLA_SHAPE | {"SCALED": False, "BLOCK_ROWS": 64, "BLOCK_N": 32},
        8,
        2,
        True,
        _NARROW_MLA,
        # Read in the machine code: all around and after the loop over whole blocks, which has none.
        spill_allowance=104,
    ),
    Case(
        "mla decode, 16 heads",
        mla_decode.mla_decode_kernel,
        _MLA,
        _MLA_SHAPE | {"SCALED": False, "BLOCK_ROWS": 16, "BLOCK_N": 32},
        4,
        3,
        True,
        _NARROW_MLA,
    ),
    Case(
        "mla decode, FP8 cache",
        mla_decode.mla_decode_kernel,
        _MLA.replace("*bf16' *fp32'", "*fp8' *fp32'", 1),
        _MLA_SHAPE | {"SCALED": True, "BLOCK_ROWS": 64, "BLOCK_N": 32},
        8,
        2,
        narrow=_NARROW_MLA,
    ),
    Case(
        "merge splits",
        attention_merge.merge_kernel,
        "*fp32' *fp32' *i32' *i32' *bf16' i32' i32' i32'",
        {"WIDTH": 512, "BLOCK_WIDTH": 512},
    ),
    Case(
        "mla prefill",
        mla_prefill.mla_prefill_kernel,
        "*bf16' *bf16' *bf16' *bf16' *bf16' *i32' *i32' *bf16' fp32" + " i32'" * 11,
        {"NOPE": 128, "ROPE": 64, "VALUE": 128, "BLOCK_M": 128, "BLOCK_N": 64},
        8,
        2,
        True,
        {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    ),
    Case(
        "write latent, FP8 cache",
        mla_cache.write_latent_kernel,
        "*bf16' *bf16' *fp32' *fp32' *i64' *i64' *fp8' *fp32' i32' fp32",
        {"C": 512, "R": 64, "SCALED": True, "FP8_MAX": 448.0},
        2,
    ),
    Case(
        "write latent",
        mla_cache.write_latent_kernel,
        "*bf16' *bf16' *fp32' *fp32' *i64' *i64' *bf16' *bf16' i32' fp32",
        {"C": 512, "R": 64, "SCALED": False, "FP8_MAX": 1.0},
        2,
    ),
    Case(
        "gather latent",
        mla_cache.gather_latent_kernel,
        "*bf16' *bf16' *i32' *i32' *bf16' i32'",
        _MLA_SHAPE | {"SCALED": False, "BLOCK_N": 16},
    ),
    Case(
        "gather latent, FP8 cache",
        mla_cache.gather_latent_kernel,
        "*fp8' *fp32' *i32' *i32' *bf16' i32'",
        _MLA_SHAPE | {"SCALED": True, "BLOCK_N": 16},
    ),
    *(
        case
        for words, types, scaled in (("", _PLAIN_CACHE, False), (", FP8 cache", _FP8_CACHE, True))
        for case in (
            Case(
                f"gqa decode{words}",
                gqa.paged_attention_kernel,
                _of_cache(_GQA, types),
                _GQA_SHAPE | {"BLOCK_ROWS": 16, "SCALED": scaled},
                4,
                3,
                True,
            ),
            Case(
                f"gqa prefill{words}",
                gqa.paged_attention_kernel,
                _of_cache(_GQA, types),
                _GQA_SHAPE | {"BLOCK_ROWS": 128, "SCALED": scaled},
                8,
                3,
                True,
                {"BLOCK_ROWS": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
            ),
            Case(
                f"write kv{words}",
                gqa.write_kv_kernel,
                _of_cache(_WRITE_KV, types),
                {
                    "D": 128,
                    "NUM_HEADS": 8,
                    "BLOCK_H": 8,
                    "SCALED": scaled,
                    "FP8_MAX": 448.0 if scaled else 1.0,
                },
            ),
        )
    ),
    Case("gemm int8", int_gemm.int_gemm_kernel, _INT.replace("weight", "*i8'"), _INT_SHAPE | _INT8),
    Case("gemm int4", int_gemm.int_gemm_kernel, _INT.replace("weight", "*u8'"), _INT_SHAPE | _INT4),
    Case(
        "gemm int4, short group",
        int_gemm.int_gemm_kernel,
        _INT.replace("weight", "*u8'"),
        _INT_SHAPE | _INT4 | {"EVEN": False},
    ),
    *(
        Case(
            f"grouped int{bits}, {when}",
            int_moe_gemm.grouped_int_kernel,
            _GROUPED_INT.replace("weight", pointer),
            shape | {"EVEN": True, "ROWS_PER_SOURCE": 8, "BLOCK_M": rows, "BLOCK_N": 64, "GROUP_M": group},
            warps,
            stages,
            True,
        )
        for bits, pointer, shape in ((8, "*i8'", _INT8), (4, "*u8'", _INT4))
        for when, rows, group, warps, stages in (("decode", 16, 1, 4, 3), ("prefill", 128, 8, 8, 2))
    ),
    Case(
        "sample, largest",
        sampler.largest_kernel,
        "*fp32' *fp32' *i32' *fp32' *i32' *fp32' *i64' *i32' i32' i32' i32'",
        {"BLOCK": 2048, "CLEAR": 128},
        8,
        fused=False,
    ),
    Case(
        "sample, weigh",
        sampler.weigh_kernel,
        "*fp32' *fp32' *i32' *fp32' *fp32' *i32' *fp32' *i64' *i64' *i32' i32' i32' i32'",
        _SAMPLE,
        8,
        fused=False,
    ),
    Case(
        "sample, coarse",
        sampler.coarse_kernel,
        "*fp32' *i32' *fp32' *fp32' *i32' *i64' *i64' *i32' *i32' *i64' i32' i32'",
        {"SPLITS": 64},
        8,
        fused=False,
    ),
    Case(
        "sample, refine",
        sampler.refine_kernel,
        "*fp32' *fp32' *fp32' *fp32' *i32' *fp32' *i64' *i32' *i32' i32' i32' i32'",
        _SAMPLE,
        8,
        fused=False,
    ),
    Case(
        "sample, fine",
        sampler.fine_kernel,
        "*fp32' *fp32' *fp32' *i32' *i64' *i32' *i32' *i64' *i32' i32'",
        {"SPLITS": 64},
        8,
        fused=False,
    ),
    Case(
        "sample, keep",
        sampler.keep_kernel,
        "*fp32' *fp32' *fp32' *fp32' *i32' *fp32' *i32' *i64' i32' i32' i32'",
        _SAMPLE,
        8,
        fused=False,
    ),
    Case(
        "sample, locate",
        sampler.locate_kernel,
        "*fp32' *fp32' *fp32' *fp32' *i64' *i64' *i32' *fp32' *i32' *i64' *i64' i32' i32' i32'",
        _SAMPLE,
        8,
        fused=False,
    ),
    Case(
        "penalties",
        penalties.penalties_kernel,
        "*fp32' *i32' *i32' *fp32' *fp32' *fp32' i32' i32",
        {"BLOCK": 256},
        2,
    ),
    Case(
        "pack",
        moe_combine._copy_rows_kernel,
        "*i32' *i32' *i32' *i32' *i32' i32' i32",
        _COPY | {"BLOCK": 1024},
    ),
]
