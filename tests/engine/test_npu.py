"""What Ascend's NPUs run, over a device that Python plays (tests/ascend): BF16, plain torch, tensors by HCCL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace
from processes import (
    COLOCATED,
    assert_killed_unnoticed,
    assert_texts_survive,
    requests,
    settings,
    texts_alone_and_together,
)
from small_model import FP8_SHAPE, config_values, to_fp8, write_checkpoint

from benchmarks.processes import LocalEngine
from kernels.devices import NoDevice, find_device
from r1_cluster.config import LayoutConfig

ASCEND = Path(__file__).parents[1] / "ascend"
MODELS = """
import sys
from pathlib import Path
import numpy as np
import torch
from small_model import SmallModel, fit_for, write_stored
from kernels.devices import find_device, free_bytes, num_devices, settle
from r1_cluster.weights.tensors import INT4, INT8

npu = find_device("npu")
assert (num_devices(npu), free_bytes(npu)) == (1, 1 << 34)
settle(npu)
cases = [("float", "deepseek"), ("fp8", "deepseek"), (INT8, "deepseek"), (INT4, "deepseek"), ("float", "qwen3")]
for number, (stored, model) in enumerate(cases):
    folder = write_stored(Path(sys.argv[1]) / str(number), fit_for(stored, model), stored)
    for deterministic in (True, False)[stored != "float" :]:
        logits = []
        for device in (torch.device("cpu"), npu):
            small = SmallModel(folder, deterministic=deterministic, dtype=torch.bfloat16, device=device)
            logits += [small.step(chunks) for chunks in ([(0, np.arange(40)), (1, np.arange(3))], [(0, [1]), (1, [2])])]
        assert [made.device.type for made in logits] == ["cpu", "cpu", "npu", "npu"]
        assert all(map(torch.equal, logits[:2], [made.cpu() for made in logits[2:]])), (stored, model)
print("equal:", len(cases))
"""


@pytest.fixture
def ascend(monkeypatch):
    """Processes that are started from now on find torch_npu; this one does not import it."""
    monkeypatch.syspath_prepend(ASCEND)


def test_an_npu_without_torch_npu_is_refused():
    with pytest.raises(NoDevice, match="torch_npu cannot be imported here"):
        find_device("npu")


@pytest.mark.slow
def test_models_have_the_logits_of_the_cpu(tmp_path):
    """Bit for bit, since the CPU plays the device; and no operation is given tensors of both."""
    path = os.pathsep.join(
        map(str, (ASCEND, ASCEND.parent, ASCEND.parents[1], os.environ.get("PYTHONPATH", "")))
    )
    done = subprocess.run(
        [sys.executable, "-c", MODELS, tmp_path],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal: 5\n"


@pytest.mark.system
def test_texts_are_the_cpus_and_survive_a_killed_process(tmp_path, ascend):
    """FP8 weights, experts apart, over HCCL."""
    kind = settings(tmp_path, dtype="bfloat16", device="npu", transport="hccl")
    write_checkpoint(tmp_path, config_values(**FP8_SHAPE))
    to_fp8(tmp_path)
    asked = requests(4, 12)
    with LocalEngine(replace(kind, device="cpu", transport="sockets"), COLOCATED) as engine:
        on_cpu = texts_alone_and_together(engine, asked)
    layout = LayoutConfig(kind="disaggregated", expert_shards=1)
    assert_texts_survive(kind, layout, "experts-0", count=4, max_tokens=12, expected=on_cpu)


@pytest.mark.slow
def test_texts_of_ranks_are_the_cpus_and_survive_a_killed_rank(tmp_path, ascend):
    kind = settings(tmp_path, dtype="bfloat16", device="npu", transport="hccl")
    asked, layout = requests(4, 12), LayoutConfig(tensor_parallel=2)
    with LocalEngine(replace(kind, device="cpu", transport="sockets"), layout) as engine:
        on_cpu = texts_alone_and_together(engine, asked)
    with LocalEngine(kind, layout) as engine:
        assert engine.run(asked)[0] == on_cpu
        assert_killed_unnoticed(engine, "stage-0-rank-1", asked, on_cpu)
