"""Worker, links and the engine's loop over the Triton operations, in the interpreter: the text of plain torch."""

import threading

import numpy as np
import pytest
import thread_cluster
import torch
from small_model import DENSE_KERNEL_SHAPE, KERNEL_SHAPE, config_values, dense_values, write_checkpoint

from kernels import ops
from r1_cluster.records import Request, SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="float32 on a device is refused"),
]


@pytest.fixture(autouse=True)
def _one_launch_at_a_time(monkeypatch):
    """Workers are threads here, and the interpreter keeps the program's number in one place."""
    from triton.runtime.interpreter import InterpretedFunction

    lock, run = threading.Lock(), InterpretedFunction.run

    def locked(self, *args, **kwargs):
        with lock, np.errstate(all="ignore"):
            return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", locked)


@pytest.mark.parametrize("layout", ["colocated", "disaggregated"])
def test_texts_are_those_of_plain_torch(monkeypatch, tmp_path, layout):
    write_checkpoint(tmp_path, config_values(**KERNEL_SHAPE))
    texts_are_those_of_plain_torch(monkeypatch, tmp_path, thread_cluster.LAYOUTS[layout])


@pytest.mark.system
def test_dense_texts_are_those_of_plain_torch(monkeypatch, tmp_path):
    write_checkpoint(tmp_path, dense_values("Qwen3ForCausalLM", **DENSE_KERNEL_SHAPE))
    texts_are_those_of_plain_torch(monkeypatch, tmp_path, thread_cluster.DENSE_LAYOUTS["two stages"])


def texts_are_those_of_plain_torch(monkeypatch, tmp_path, layout):
    monkeypatch.setattr(thread_cluster, "PAGE_SIZE", 16)
    asked = [
        Request("a", [5, 6, 7], SamplingParams(0.0, 1.0, 0, 0), 3, [], "sink", ignore_eos=True),
        Request("b", list(range(2, 12)), SamplingParams(1.0, 0.9, 20, 3), 2, [], "sink", ignore_eos=True),
    ]
    texts = []
    for name in ("kernels.cpu", "kernels.triton_ops"):
        monkeypatch.setattr(ops, "_MODULES", {"cpu": name})
        # An interpreted step takes seconds: nobody may be taken for dead meanwhile.
        cluster = thread_cluster.Cluster(tmp_path, layout, lease_s=120.0, step_timeout_s=60.0)
        try:
            texts.append(cluster.run(asked))
        finally:
            cluster.close()
    assert texts[0] == texts[1]
