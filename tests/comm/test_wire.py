from __future__ import annotations

import math

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1_cluster.comm import wire
from r1_cluster.comm.wire import Header, Message, Unsendable, WireError

HEADERS = st.builds(
    Header,
    kind=st.integers(0, 255),
    epoch=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    layer=st.integers(-(2**31), 2**31 - 1),
    micro_batch=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 2**32 - 1),
    flags=st.integers(0, 255),
)
TENSORS = st.lists(
    st.builds(
        lambda dtype, shape: torch.empty(shape, dtype=dtype),
        st.sampled_from(wire._dtypes()),
        st.lists(st.integers(0, 5), max_size=4),
    ),
    max_size=wire.MAX_TENSORS,
)


@given(HEADERS, TENSORS, st.integers(0, wire.MAX_BODY_BYTES))
def test_a_prefix_survives_the_round_trip(header, tensors, body_bytes):
    data = wire.encode_prefix(header, tensors, body_bytes)
    assert wire.decode_header(data[: wire.HEADER_SIZE]) == (header, len(tensors), body_bytes)
    specs = wire.decode_specs(data[wire.HEADER_SIZE :], len(tensors))
    assert [(spec.dtype, spec.shape) for spec in specs] == [(t.dtype, tuple(t.shape)) for t in tensors]
    assert [spec.num_bytes for spec in specs] == [t.nbytes for t in tensors]


@given(st.binary(min_size=wire.HEADER_SIZE, max_size=wire.HEADER_SIZE))
def test_random_bytes_are_no_header(data):
    with pytest.raises(WireError):
        wire.decode_header(data)


@settings(max_examples=300)
@given(st.binary(min_size=wire.SPEC_SIZE, max_size=wire.SPEC_SIZE), st.integers(0, 12), st.integers(0, 5))
def test_descriptors_are_refused_or_small_enough_to_allocate(data, code, num_dims):
    data = bytes([code, num_dims]) + data[2:]
    try:
        (spec,) = wire.decode_specs(data, 1)
    except WireError:
        return
    assert spec.num_bytes <= wire.MAX_PAYLOAD_BYTES
    assert math.prod(max(size, 1) for size in spec.shape) <= wire.MAX_PAYLOAD_BYTES
    assert len(spec.shape) == num_dims


def test_what_the_peer_may_not_announce():
    good = wire.encode_prefix(Header(1), [], 0)
    assert wire.decode_header(good)
    too_many_tensors = bytearray(good)
    too_many_tensors[7] = wire.MAX_TENSORS + 1
    too_long_a_body = good[:-4] + (wire.MAX_BODY_BYTES + 1).to_bytes(4, "little")
    other_version = good[:4] + bytes([wire.VERSION + 1]) + good[5:]
    for bad in (too_many_tensors, too_long_a_body, other_version):
        with pytest.raises(WireError):
            wire.decode_header(bad)
    # Each tensor is within the bounds, both together are not.
    half = wire._SPEC.pack(6, 1, wire.MAX_PAYLOAD_BYTES // 2 + 1, 0, 0, 0)
    assert wire.decode_specs(half, 1)
    with pytest.raises(WireError):
        wire.decode_specs(half * 2, 2)


@pytest.mark.parametrize(
    ("header", "tensors", "body_bytes"),
    [
        (Header(256), [], 0),
        (Header(1, epoch=-1), [], 0),
        (Header(1, layer=2**31), [], 0),
        (Header(1), [torch.zeros(1)] * (wire.MAX_TENSORS + 1), 0),
        (Header(1), [torch.zeros(1, 1, 1, 1, 1)], 0),
        (Header(1), [torch.zeros(1, dtype=torch.complex64)], 0),
        (Header(1), [torch.empty(wire.MAX_PAYLOAD_BYTES + 1, dtype=torch.uint8)], 0),
        (Header(1), [], wire.MAX_BODY_BYTES + 1),
    ],
)
def test_the_sender_is_told_what_does_not_fit(header, tensors, body_bytes):
    with pytest.raises(Unsendable):
        wire.encode_prefix(header, tensors, body_bytes)


def test_a_body_of_another_kind_is_a_wire_error():
    class Point(msgspec.Struct, array_like=True):
        x: int
        y: int
        name: str = ""

    assert wire.unpack(wire.pack(Point(1, 2)), Point) == Point(1, 2)
    for bad in (
        b"",
        b"\xc1",
        wire.pack([1]),
        wire.pack([1, "2"]),
        b"\x93\x01\x02\xa1\x80",  # a name that is no UTF-8
        b"\x94\x01\x02\xa0" + b"\x91" * 100_000,  # a field of a later version, deeper than any stack
    ):
        with pytest.raises(WireError):
            wire.unpack(bad, Point)


def test_durations_and_lone_tensors_are_checked():
    assert wire.unpack_seconds(wire.pack_seconds(0.25)) == 0.25
    (tensor,) = tensors = [torch.zeros(2)]
    assert wire.only_tensor(Message(Header(1), tensors)) is tensor
    for bad in (b"", b"1234567", b"123456789"):
        with pytest.raises(WireError):
            wire.unpack_seconds(bad)
    for count in (0, 2):
        with pytest.raises(WireError, match=f"{count} tensors"):
            wire.only_tensor(Message(Header(1), tensors * count))


def test_tensor_bytes_are_a_view():
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    view = wire.tensor_bytes(tensor)
    view[2:4] = torch.tensor([1.5], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert tensor[0].tolist() == [0.0, 1.5, 0.0]
    assert len(wire.tensor_bytes(torch.empty(0, 4))) == 0
    assert len(wire.tensor_bytes(torch.tensor(1.0))) == 4


def test_bytes_of_one_element_whatever_its_strides():
    """torch calls these contiguous, but shows the bytes of none of them."""
    values = torch.arange(9, dtype=torch.int32)
    for size, stride in [((1,), (0,)), ((1, 1), (7, 3)), ((), ())]:
        one = values[5:].as_strided(size, stride, 5)
        assert one.is_contiguous()
        assert bytes(wire.tensor_bytes(one)) == b"\x05\0\0\0"
