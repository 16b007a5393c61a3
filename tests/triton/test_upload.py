"""Several tensors in one copy: the same code packs for the CPU, a device, and `meta`, which plays one."""

import pytest
import torch

from kernels.upload import pack, unpack, upload

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
DTYPES = [
    torch.int32,
    torch.int64,
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.bool,
    torch.uint8,
    torch.int16,
]


def awkward(dtype):
    """A tensor of every stride and size that a step's integers may come with."""
    plain = torch.arange(30).remainder(7).to(dtype).view(5, 6)
    return {
        "matrix": plain,
        "0-dim": plain[2, 3],
        "one element": plain[1, 1:2],
        "one element of stride 0": plain.as_strided((1,), (0,)),
        "one element of strides 7, 3": plain.as_strided((1, 1), (7, 3)),
        "expanded": plain[1:2, 1:2].expand(3, 4),
        "0-dim expanded": plain[4, 5].expand(1),
        "empty": plain[:0],
        "empty inside": plain.new_zeros(3, 0, 2),
        "transposed": plain.t(),
        "every other column": plain[:, ::2],
        "every other row": plain[1::2],
        "odd size": plain.flatten()[:13],
        "from the middle": plain[1:3, 2:5],
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_tensor_arrives_as_it_is(device, dtype):
    parts = awkward(dtype)
    there = upload(list(parts.values()), torch.device(device))
    for (name, part), arrived in zip(parts.items(), there, strict=True):
        assert (arrived.dtype, arrived.shape, arrived.device.type) == (dtype, part.shape, device), name
        assert torch.equal(arrived.cpu(), part), name
        assert arrived.is_contiguous(), name
        assert arrived.data_ptr() % 16 == 0, name


def test_dtypes_share_one_buffer():
    parts = [tensor for dtype in DTYPES for tensor in awkward(dtype).values()]
    buffer = pack(parts, pinned=False)
    assert all(torch.equal(mine, part) for mine, part in zip(unpack(buffer, parts), parts, strict=True))
    there = upload(parts, torch.device("cpu"))
    assert len({part.untyped_storage().data_ptr() for part in there}) == 1


def test_what_was_uploaded_is_not_the_host_s_own():
    part = torch.arange(3)
    (there,) = upload([part], torch.device("cpu"))
    part.zero_()
    assert there.tolist() == [0, 1, 2]


def test_nothing_is_uploaded_as_nothing():
    assert upload([], torch.device("cpu")) == []


def test_a_device_gets_views_of_one_aligned_buffer():
    parts = [tensor for dtype in DTYPES for tensor in awkward(dtype).values()]
    there = upload(parts, torch.device("meta"))
    assert [(x.dtype, x.shape) for x in there] == [(x.dtype, x.shape) for x in parts]
    assert all(x.storage_offset() * x.element_size() % 16 == 0 for x in there)
