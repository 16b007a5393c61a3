"""Ahead-of-time compilation of every kernel at R1's shapes for six targets, on a machine without any of them.

`python -m kernels.targets --write` compiles all and writes the table of shared memory, registers and spills.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.target_cases import CASES, Case, kernel_of


@dataclass(frozen=True)
class Target:
    """A GPU architecture and what one program may use of it."""

    name: str
    gpu: GPUTarget
    shared_limit_bytes: int
    register_limit: int
    fp8: str | None
    """Triton's name of the E4M3 format that its matrix units take; None: no FP8 kernel runs there."""


TARGETS = [
    Target("sm_80", GPUTarget("cuda", 80, 32), 166_912, 255, None),
    Target("sm_89", GPUTarget("cuda", 89, 32), 101_376, 255, "fp8e4nv"),
    Target("sm_90", GPUTarget("cuda", 90, 32), 232_448, 255, "fp8e4nv"),
    Target("sm_100", GPUTarget("cuda", 100, 32), 232_448, 255, "fp8e4nv"),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 65_536, 512, "fp8e4b8"),
    Target("gfx950", GPUTarget("hip", "gfx950", 64), 163_840, 512, "fp8e4nv"),
]


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one target."""

    kernel: str
    target: str
    hot: bool
    spill_allowance: int
    num_warps: int
    num_stages: int
    shared_bytes: int
    registers: int
    spilled: int
    """Stack bytes a thread (NVIDIA) or spilled vector registers (AMD)."""
    blocks: dict[str, int | float | bool] = field(default_factory=dict)
    unwanted_fusions: int = 0
    """Products fused with sums (NVIDIA) in a kernel whose bits must not depend on that."""

    def faults(self, target: Target) -> list[str]:
        """Limits exceeded, in words."""
        found = []
        if self.shared_bytes > target.shared_limit_bytes:
            found.append(f"{self.shared_bytes} bytes of shared memory, {target.shared_limit_bytes} at most")
        if self.registers > target.register_limit:
            found.append(f"{self.registers} registers, {target.register_limit} at most")
        if self.hot and self.spilled > self.spill_allowance and target.name == "sm_90":
            found.append(f"spills {self.spilled} bytes")
        if self.unwanted_fusions:
            found.append(f"fuses {self.unwanted_fusions} products with sums")
        return [f"{self.kernel} on {target.name}: {fault}" for fault in found]


def runs_on(case: Case, target: Target) -> bool:
    """Whether the target has the formats that the case needs."""
    return target.fp8 is not None or "fp8" not in case.signature


def compile_case(case: Case, target: Target) -> Compiled:
    """Compiles one kernel for one target; raises what the compiler raises."""
    kernel = kernel_of(case)
    launch = case.launch(target.name)
    names = [p.name for p in kernel.params]
    signature_text = case.signature.replace("fp8", target.fp8 or "")
    for name in ("BLOCK_M", "BLOCK_N"):
        signature_text = signature_text.replace(name, str(launch.constexprs.get(name)))
    types = signature_text.split()
    arguments = [n for n in names if n not in launch.constexprs]
    assert len(types) == len(arguments), f"{case.name}: {len(types)} types for {arguments}"
    # A type ending in ' is a pointer or a stride divisible by 16, as the wrappers' tensors are.
    signature = {n: t.rstrip("'") for n, t in zip(arguments, types)}
    aligned = {n for n, t in zip(arguments, types) if t.endswith("'")}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned}
    signature |= dict.fromkeys(launch.constexprs, "constexpr")
    source = ASTSource(kernel, {n: signature[n] for n in names}, launch.constexprs, attributes)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": case.fused,
    }
    compiled = triton.compile(source, target=target.gpu, options=options)
    registers, spilled = _resources(compiled, target)
    return Compiled(
        case.name,
        target.name,
        case.hot,
        case.spill_allowance,
        launch.num_warps,
        launch.num_stages,
        compiled.metadata.shared,
        registers,
        spilled,
        {k: v for k, v in launch.constexprs.items() if k.startswith("BLOCK")},
        0 if case.fused else compiled.asm.get("ptx", "").count("fma."),
    )


def _resources(compiled: triton.compiler.CompiledKernel, target: Target) -> tuple[int, int]:
    """`(registers, spilled)` as the assembler reports them."""
    if target.gpu.backend == "hip":
        text: str = compiled.asm["amdgcn"]

        def metadata(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", text)
            assert found, f"no .{name} in the assembly"
            return int(found[1])

        return metadata("vgpr_count"), metadata("vgpr_spill_count")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def table(rows: Iterable[Compiled]) -> str:
    """Markdown: a row per kernel, a column per target with shared KiB, registers and spills."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        spill = f" · spills {row.spilled}" if row.spilled else ""
        cell = (
            f"{row.shared_bytes / 1024:.0f} KiB · {row.registers}{spill} · w{row.num_warps} s{row.num_stages}"
        )
        cells.setdefault(row.kernel + (" (hot)" if row.hot else ""), {})[row.target] = cell
    names = [t.name for t in TARGETS]
    lines = ["| kernel | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    lines += [f"| {k} | " + " | ".join(c.get(n, "–") for n in names) + " |" for k, c in cells.items()]
    return "\n".join(lines)


_HEADER = f"""# Kernels compiled ahead of time
Written by `python -m kernels.targets --write` with Triton {triton.__version__}; no GPU was used, so no
speed is claimed. Each cell: shared memory of a program · registers of a thread · spills, if any (stack bytes
on NVIDIA, vector registers on AMD) · warps and pipeline stages. Shapes are R1's (kernels/target_cases.py);
sm_80 has no FP8.
"""


def main() -> int:
    """Compiles the named targets (all by default); prints JSON lines, or writes the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("targets", nargs="*", default=[], help="names such as sm_90; all if none is named")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kernels_aot.md")
    parser.add_argument("--case", help="compile only kernels whose name contains this")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    rows, faults = [], []
    for target in [t for t in TARGETS if not options.targets or t.name in options.targets]:
        for case in [c for c in CASES if runs_on(c, target) and (options.case or "") in c.name]:
            try:
                row = compile_case(case, target)
            except Exception as error:  # the compiler raises many kinds, and all are faults of this case
                faults.append(f"{case.name} on {target.name}: {type(error).__name__}: {str(error)[-600:]}")
                continue
            rows.append(row)
            faults += row.faults(target)
            if not options.write:
                print(json.dumps(asdict(row)), flush=True)
    if options.write:
        path = Path(__file__).parent.parent / "benchmarks/results/kernels_aot.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_HEADER + "\n" + table(rows) + "\n")
        print(path)
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
