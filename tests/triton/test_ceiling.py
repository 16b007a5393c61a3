"""The copy that benchmarks measure a device's bandwidth with copies all there is, and nothing else."""

import importlib
import sys

import pytest
import torch


@pytest.fixture
def kernels(monkeypatch):
    """benchmarks.kernels, whose kernel takes the interpreter where the others here do."""
    monkeypatch.delitem(sys.modules, "benchmarks.kernels", raising=False)
    yield importlib.import_module("benchmarks.kernels")
    sys.modules.pop("benchmarks.kernels", None)


@pytest.mark.parametrize("size", [1, 4096, 10_001])
def test_copy(draw, kernels, size):
    source = draw.integers(-(2**31), 2**31 - 1, size)
    target = torch.full((size + 5,), 7, dtype=torch.int32, device=draw.device)
    kernels.copy(source, target)
    assert torch.equal(target[:size], source)
    assert target[size:].tolist() == [7] * 5
