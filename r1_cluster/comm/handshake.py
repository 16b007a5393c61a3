"""The handshake that opens every socket: who are you, and do you know the cluster's secret?

Mutual challenge–response with HMAC-SHA256. The dialler says who it is and what for (`Hello`) with a fresh
nonce; the listener answers with its own name, a nonce and a MAC; the dialler answers with its MAC; the
listener says welcome. Each MAC covers a label for its direction, both nonces, the listener's name and the
whole hello, so that nothing heard on one connection is worth anything on another.

Frames are msgpack behind a four-byte length. A peer that is too slow, too long-winded or wrong is dropped.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import time
from typing import Literal, TypeVar

import msgspec

from r1_cluster.comm import wire
from r1_cluster.comm.wire import AuthenticationError, LinkClosed, LinkError, LinkTimeout, WireError

HANDSHAKE_TIMEOUT_S = 5.0
MIN_SECRET_BYTES = 16
MAX_FRAME_BYTES = 4096
NONCE_BYTES = 32
_LENGTH = struct.Struct("<I")

Purpose = Literal["control", "tensor", "tokens", "watch"]
R = TypeVar("R")


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Who dials. `incarnation` tells a restarted process from the one before it under the same name."""

    peer: str
    incarnation: str
    epoch: int
    purpose: Purpose


class _Opening(msgspec.Struct, frozen=True, array_like=True, tag="opening"):
    version: int
    hello: Hello
    nonce: bytes


class _Challenge(msgspec.Struct, frozen=True, array_like=True, tag="challenge"):
    listener: str
    nonce: bytes
    mac: bytes


class _Proof(msgspec.Struct, frozen=True, array_like=True, tag="proof"):
    mac: bytes


class _Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    pass


def check_secret(secret: bytes) -> None:
    """Raises ValueError for a secret that is too short to be one."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(
            f"the cluster's secret has {len(secret)} bytes; at least {MIN_SECRET_BYTES} are needed"
        )


def greet(sock: socket.socket, listener: str, hello: Hello, secret: bytes, timeout_s: float) -> None:
    """The dialler's side: proves itself, and that `listener` is who answers.

    Raises AuthenticationError, LinkClosed, LinkTimeout. The caller closes the socket then.
    """
    deadline = time.monotonic() + timeout_s
    opening = _Opening(wire.VERSION, hello, secrets.token_bytes(NONCE_BYTES))
    try:
        _send_frame(sock, opening, deadline)
        challenge = _recv_frame(sock, _Challenge, deadline)
    except WireError as error:
        raise AuthenticationError(f"{listener} does not speak our protocol: {error}") from None
    if challenge.listener != listener:
        raise AuthenticationError(f"expected {listener}, found {challenge.listener} at its address")
    if not hmac.compare_digest(challenge.mac, _mac(secret, b"listener", opening, challenge)):
        raise AuthenticationError(f"{listener} does not have the same secret")
    try:
        _send_frame(sock, _Proof(_mac(secret, b"dialler", opening, challenge)), deadline)
        _recv_frame(sock, _Welcome, deadline)
    except (LinkClosed, WireError):
        raise AuthenticationError(f"{listener} did not let {hello.peer} in") from None


def admit(sock: socket.socket, listener: str, secret: bytes, timeout_s: float) -> Hello:
    """The listener's side: returns who it is, once that is proven.

    Raises AuthenticationError, LinkClosed, LinkTimeout, WireError. The caller closes the socket then.
    """
    deadline = time.monotonic() + timeout_s
    opening = _recv_frame(sock, _Opening, deadline)
    if opening.version != wire.VERSION or len(opening.nonce) != NONCE_BYTES:
        raise AuthenticationError(f"{opening.hello.peer} speaks protocol version {opening.version}")
    unproven = _Challenge(listener, secrets.token_bytes(NONCE_BYTES), b"")
    challenge = msgspec.structs.replace(unproven, mac=_mac(secret, b"listener", opening, unproven))
    _send_frame(sock, challenge, deadline)
    proof = _recv_frame(sock, _Proof, deadline)
    if not hmac.compare_digest(proof.mac, _mac(secret, b"dialler", opening, challenge)):
        raise AuthenticationError(f"{opening.hello.peer} does not have the same secret")
    _send_frame(sock, _Welcome(), deadline)
    return opening.hello


def _mac(secret: bytes, label: bytes, opening: _Opening, challenge: _Challenge) -> bytes:
    transcript = wire.pack((label, opening, challenge.listener, challenge.nonce))
    return hmac.new(secret, transcript, hashlib.sha256).digest()


def _send_frame(sock: socket.socket, record: msgspec.Struct, deadline: float) -> None:
    data = wire.pack(record)
    if len(data) > MAX_FRAME_BYTES:
        raise LinkError(f"a handshake frame of {len(data)} bytes; at most {MAX_FRAME_BYTES}")
    sock.settimeout(_remaining_s(deadline))
    try:
        sock.sendall(_LENGTH.pack(len(data)) + data)
    except TimeoutError:
        raise LinkTimeout("the peer was too slow in its handshake") from None
    except OSError as error:
        raise LinkClosed(f"the peer went away in its handshake: {error}") from None


def _recv_frame(sock: socket.socket, kind: type[R], deadline: float) -> R:
    (length,) = _LENGTH.unpack(_recv_exactly(sock, _LENGTH.size, deadline))
    if length > MAX_FRAME_BYTES:
        raise WireError(f"a handshake frame of {length} bytes; at most {MAX_FRAME_BYTES}")
    return wire.unpack(_recv_exactly(sock, length, deadline), kind)


def _recv_exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        sock.settimeout(_remaining_s(deadline))
        try:
            piece = sock.recv(num_bytes - len(data))
        except TimeoutError:
            raise LinkTimeout("the peer was too slow in its handshake") from None
        except OSError as error:
            raise LinkClosed(f"the peer went away in its handshake: {error}") from None
        if not piece:
            raise LinkClosed("the peer went away in its handshake")
        data += piece
    return bytes(data)


def _remaining_s(deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise LinkTimeout("the peer was too slow in its handshake")
    return remaining_s
