"""Several tensors in one copy: on the CPU as they are; elsewhere, here played by `meta`, as views of one buffer."""

import torch

from kernels.upload import upload


def test_the_cpu_copies_nothing():
    parts = [torch.arange(3), torch.rand(2, 2)]
    assert all(a is b for a, b in zip(upload(parts, torch.device("cpu")), parts, strict=True))


def test_shapes_dtypes_and_alignment():
    parts = [
        torch.arange(3, dtype=torch.int32),
        torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.rand(7),
    ]
    there = upload(parts, torch.device("meta"))
    assert [(x.dtype, x.shape) for x in there] == [(x.dtype, x.shape) for x in parts]
    assert all(x.storage_offset() * x.element_size() % 16 == 0 for x in there)
