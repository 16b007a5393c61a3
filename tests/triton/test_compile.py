"""Every kernel compiles ahead of time for six targets, and stays within each target's limits."""

import json
import os
import subprocess
import sys

import pytest

from kernels import target_cases, targets


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.apart
@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_compiles_within_limits(target):
    # A process of its own: here the kernels are interpreted.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.targets", target.name],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
        cwd=os.path.dirname(os.path.dirname(target_cases.__file__)),
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rows = [targets.Compiled(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    expected = {c.name for c in target_cases.CASES if targets.runs_on(c, target)}
    assert {row.kernel for row in rows} == expected
    assert [fault for row in rows for fault in row.faults(target)] == []
    assert all(row.registers > 0 for row in rows)


def test_every_fp8_kernel_is_left_out_where_there_is_no_fp8_and_nothing_else():
    ampere = next(t for t in targets.TARGETS if t.name == "sm_80")
    left_out = {c.name for c in target_cases.CASES if not targets.runs_on(c, ampere)}
    assert "gemm M=64" in left_out
    assert "mla decode, FP8 cache" in left_out
    assert not left_out & {
        "rms_norm",
        "gate",
        "combine",
        "mla decode, 128 heads",
        "gqa decode",
        "gemm int4",
        "sample, weigh",
    }


def test_the_sampler_is_compiled_without_fused_products():
    """Its masses must be the CPU's to the last bit; `faults` reports what the compiler fused all the same."""
    cases = [case for case in target_cases.CASES if case.name.startswith("sample, ")]
    assert len(cases) == 7
    assert not any(case.fused for case in cases)
    fusing = targets.Compiled("k", "sm_90", False, 0, 4, 3, 0, 9, 0, unwanted_fusions=2)
    assert len(fusing.faults(next(t for t in targets.TARGETS if t.name == "sm_90"))) == 1


def test_exceeded_limits_are_faults():
    hopper = next(t for t in targets.TARGETS if t.name == "sm_90")
    row = targets.Compiled("k", "sm_90", True, 0, 4, 3, hopper.shared_limit_bytes + 1, 256, 8)
    assert len(row.faults(hopper)) == 3
