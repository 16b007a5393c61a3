"""The bytes of a message: header, tensor descriptors, body, payload; and the errors of links.

A message on a stream is

    header      HEADER_SIZE bytes, little-endian: magic, version, kind, flags, number of tensors, epoch,
                step, layer, micro-batch, rows, body length
    descriptors SPEC_SIZE bytes for each tensor: dtype code, number of dimensions, four sizes
    body        msgpack, or counts as int32
    payload     each tensor's raw little-endian bytes, in order (absent when EXTERNAL is set: a process
                group carries it)

Everything that comes from the network is checked against the bounds below before it is believed, and
`WireError` is raised where it does not hold. There is no pickle anywhere.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import msgspec

if TYPE_CHECKING:
    # Only who carries tensors loads torch: the engine and the ingress send records alone.
    import torch
    from torch import Tensor

MAGIC = b"R1CL"
VERSION = 1
MAX_TENSORS = 16
MAX_DIMS = 4
MAX_BODY_BYTES = 64 << 20
MAX_PAYLOAD_BYTES = 1 << 30
AT_ONCE_BYTES = 1 << 16
"""A message with so many bytes of tensors is on its way when `send` returns, whoever receives by then:
sockets buffer as much, and so must whatever carries tensors beside them."""

_HEADER = struct.Struct("<4sBBBBQQiIII")
_SPEC = struct.Struct("<BBxx4I")
_SECONDS = struct.Struct("<d")
HEADER_SIZE = _HEADER.size
SPEC_SIZE = _SPEC.size

_DTYPE_NAMES = (
    "float32",
    "bfloat16",
    "float16",
    "int32",
    "int64",
    "uint8",
    "int8",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
)
_UINT8 = _DTYPE_NAMES.index("uint8")

T = TypeVar("T")


class LinkError(Exception):
    """Anything that keeps a link from carrying a message."""


class LinkClosed(LinkError):
    """The peer is gone, or this side closed the link."""


class LinkTimeout(LinkError):
    """Nothing came, or nothing could be sent, within the time allowed."""


class WireError(LinkError):
    """The peer sent bytes that are not a message of this protocol."""


class Unsendable(LinkError):
    """What was to be sent does not fit the protocol. Nothing was sent and the link stands: it is this side's
    fault, which no other peer, link or second try would mend."""


class StaleEpoch(LinkError):
    """The peer speaks of a later epoch than ours: this process was deposed."""


class AuthenticationError(LinkError):
    """The handshake failed: another secret, another peer than expected, or not our protocol."""


class Kind(IntEnum):
    """What a message is about."""

    CONTROL = 1
    PLAN = 2
    RESULT = 3
    HIDDEN = 4
    MOE = 5
    MOE_RESULT = 6
    DISPATCH = 7
    COMBINE = 8
    TOKENS = 9
    HEARTBEAT = 10
    GROUP = 11
    ASSIGN = 12
    DEPOSED = 13
    BROADCAST = 14
    REDUCE = 15


class Flags:
    """Bits of `Header.flags`; plain ints, because an enum's arithmetic costs microseconds.

    TAINTED: rows of this message were lost on the way, the step's result must not be committed.
    EXTERNAL: the payload does not follow on this stream.
    REFUSED: what belongs here is `Unsendable`; the body is why.
    """

    TAINTED: Final = 1
    EXTERNAL: Final = 2
    REFUSED: Final = 4


class Header(NamedTuple):
    """What every message says. `rows` is the number of valid rows in its tensors, `layer` -1 where none
    is meant; `kind` is a `Kind`, kept as an int because it is compared on the hot path."""

    kind: int
    epoch: int = 0
    step: int = 0
    layer: int = -1
    micro_batch: int = 0
    rows: int = 0
    flags: int = 0


class WireSpec(NamedTuple):
    """dtype and shape of a tensor that is to come."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Message(NamedTuple):
    """One message. `tensors` are the receiver's own; `body` is msgpack unless the kind says otherwise."""

    header: Header
    tensors: Sequence[Tensor] = ()
    body: bytes = b""


def encode_prefix(header: Header, tensors: Sequence[Tensor], body_bytes: int) -> bytes:
    """Header and descriptors as bytes; body and payload follow them on the stream.

    Raises Unsendable for what the receiver would refuse: more than MAX_TENSORS tensors or MAX_DIMS
    dimensions, an unknown dtype, a field out of its range, too many bytes.
    """
    if len(tensors) > MAX_TENSORS or body_bytes > MAX_BODY_BYTES:
        raise Unsendable(
            f"message of {len(tensors)} tensors and a body of {body_bytes} bytes; "
            f"at most {MAX_TENSORS} and {MAX_BODY_BYTES}"
        )
    parts = []
    payload_bytes = 0
    try:
        parts.append(
            _HEADER.pack(
                MAGIC,
                VERSION,
                header.kind,
                header.flags,
                len(tensors),
                header.epoch,
                header.step,
                header.layer,
                header.micro_batch,
                header.rows,
                body_bytes,
            )
        )
        for tensor in tensors:
            shape = tensor.shape
            code = _codes().get(tensor.dtype)
            if code is None or len(shape) > MAX_DIMS:
                raise Unsendable(
                    f"a tensor of {tensor.dtype} and shape {tuple(shape)} can't travel on a link"
                )
            parts.append(_SPEC.pack(code, len(shape), *shape, *(0,) * (MAX_DIMS - len(shape))))
            payload_bytes += tensor.nbytes
    except struct.error as error:
        raise Unsendable(f"a field of {header} does not fit the wire format: {error}") from None
    if payload_bytes > MAX_PAYLOAD_BYTES:
        raise Unsendable(f"payload of {payload_bytes} bytes; at most {MAX_PAYLOAD_BYTES}")
    return b"".join(parts)


def decode_header(data: bytes | bytearray | memoryview) -> tuple[Header, int, int]:
    """HEADER_SIZE bytes → (header, number of tensors, body bytes). Raises WireError."""
    magic, version, kind, flags, num_tensors, epoch, step, layer, micro_batch, rows, body_bytes = (
        _HEADER.unpack(data)
    )
    if magic != MAGIC or version != VERSION:
        raise WireError(f"not a message of protocol {MAGIC!r} version {VERSION}")
    if num_tensors > MAX_TENSORS or body_bytes > MAX_BODY_BYTES:
        raise WireError(
            f"peer announced {num_tensors} tensors and a body of {body_bytes} bytes; "
            f"at most {MAX_TENSORS} and {MAX_BODY_BYTES}"
        )
    return Header(kind, epoch, step, layer, micro_batch, rows, flags), num_tensors, body_bytes


def decode_specs(data: bytes | bytearray | memoryview, num_tensors: int) -> list[WireSpec]:
    """The first `num_tensors` · SPEC_SIZE bytes of `data` → descriptors. Raises WireError."""
    specs = []
    total_bytes = 0
    for i in range(num_tensors):
        code, num_dims, *sizes = _SPEC.unpack_from(data, i * SPEC_SIZE)
        if not 1 <= code <= len(_DTYPE_NAMES) or num_dims > MAX_DIMS or any(sizes[num_dims:]):
            raise WireError(f"tensor descriptor with dtype code {code} and {num_dims} dimensions")
        spec = WireSpec(_dtypes()[code - 1], tuple(sizes[:num_dims]))
        # An empty tensor's other sizes must be sane too: torch multiplies them for the strides.
        total_bytes += spec.dtype.itemsize * math.prod(max(size, 1) for size in spec.shape)
        specs.append(spec)
    if total_bytes > MAX_PAYLOAD_BYTES:
        raise WireError(f"peer announced a payload of {total_bytes} bytes; at most {MAX_PAYLOAD_BYTES}")
    return specs


def message_bytes(message: Message) -> int:
    """How many bytes a message is on a stream, its payload included."""
    payload_bytes = sum(tensor.nbytes for tensor in message.tensors)
    return HEADER_SIZE + SPEC_SIZE * len(message.tensors) + len(message.body) + payload_bytes


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; writable where the tensor is."""
    if tensor.numel() == 0:
        return memoryview(b"")
    # One element counts as contiguous whatever its stride is, but torch shows bytes only where that is 1.
    return tensor.as_strided((tensor.numel(),), (1,)).view(_dtypes()[_UINT8]).numpy().data


def only_tensor(message: Message) -> Tensor:
    """The tensor of a message that has one. Raises WireError."""
    if len(message.tensors) != 1:
        raise WireError(f"{message.header} came with {len(message.tensors)} tensors")
    return message.tensors[0]


def pack_seconds(seconds: float) -> bytes:
    """A duration → a message's body."""
    return _SECONDS.pack(seconds)


def unpack_seconds(body: bytes) -> float:
    """A body of `pack_seconds` → the duration. Raises WireError where it is none."""
    if len(body) != _SECONDS.size:
        raise WireError(f"a duration of {len(body)} bytes")
    seconds: float = _SECONDS.unpack(body)[0]
    return seconds


def pack(record: object) -> bytes:
    """A msgspec record → a message's body."""
    return msgspec.msgpack.encode(record)


def unpack(body: bytes, kind: type[T]) -> T:
    """A message's body → record of type `kind`. Raises WireError where it is not one."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"body is not a {kind.__name__}: {error}") from None


@cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that may travel; a dtype's code is its place here plus one."""
    import torch

    return tuple(getattr(torch, name) for name in _DTYPE_NAMES)


@cache
def _codes() -> dict[torch.dtype, int]:
    return {dtype: code for code, dtype in enumerate(_dtypes(), start=1)}
