"""What is tuned on a device is tuned once: by the first process that meets it."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# One product by the plain kernel, one by the persistent one; prints how many configurations were measured, and,
# where a folder is given, leaves the table there.
START = """
import sys
from pathlib import Path
import torch
from kernels import gemm_fp8, tuned
measured, measure = [], tuned.triton.testing.do_bench
tuned.triton.testing.do_bench = lambda *given, **options: measured.append(1) or measure(*given, **options)
for rows in (16, 1024):
    a, b = (torch.randn(n, 256, device="cuda").to(torch.float8_e4m3fn) for n in (rows, 256))
    gemm_fp8.gemm_fp8(a, torch.ones(rows, 2, device="cuda"), b, torch.ones(2, 2, device="cuda"))
torch.cuda.synchronize()
if sys.argv[1:]:
    tuned.write(Path(sys.argv[1]))
print(len(measured))
"""


@pytest.fixture
def start(tmp_path):
    """start(cache, *arguments) → configurations measured by a process with that cache of Triton's."""

    def start(cache, *arguments):
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / cache)}
        done = subprocess.run(
            [sys.executable, "-c", START, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    return start


def test_a_second_start_tunes_nothing(start):
    assert start("one") > 2
    assert start("one") == 0


def test_a_start_with_a_table_tunes_nothing(start, tmp_path):
    """Whatever Triton's cache holds."""
    assert start("one", str(tmp_path / "tables")) > 2
    (table,) = (tmp_path / "tables").iterdir()
    from kernels import tuned

    assert tuned.read(table)
    kept = tuned.FOLDER / table.name
    if kept.exists():
        pytest.skip(f"{kept.name} is in the package: {start('two')} configurations were measured beside it")
    kept.parent.mkdir(exist_ok=True)
    try:
        kept.write_bytes(table.read_bytes())
        assert start("two") == 0
    finally:
        kept.unlink()
