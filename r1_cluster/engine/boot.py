"""What an engine tells a worker before the first step. Light: the engine imports it, and no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from r1_cluster.comm.listener import Endpoint
from r1_cluster.config import Device, KvCacheDtype
from r1_cluster.planning.layout import WorkerSpec
from r1_cluster.records import HeldSequence

Transport = Literal["sockets", "device", "hccl", "gloo", "host memory"]
"""The way of tensors between workers: as bytes of the links' sockets, or beside them, from device to device:
on GPUs by CUDA IPC and NCCL, on NPUs by HCCL. The last two are the twins of NCCL and CUDA IPC on the CPU."""

TRANSPORTS: dict[Device, Transport] = {"cpu": "sockets", "cuda": "device", "npu": "hccl"}
"""The way between workers on each kind of device."""

ENGINE = "engine"
"""The engine's name in its handshakes with workers."""


class StepLimits(msgspec.Struct, frozen=True):
    """The largest steps to prepare for on a device: sequences, tokens, and tokens of one context."""

    max_num_seqs: int
    max_batch_tokens: int
    max_context_len: int


class WorkerBoot(msgspec.Struct, frozen=True):
    """All that a worker must know to start. Filled by the engine's supervisor."""

    name: str
    incarnation: str
    workers: tuple[WorkerSpec, ...]
    checkpoint: str
    dtype: str
    device: str
    deterministic: bool
    threads: int
    page_size: int
    num_pages: int
    lease_s: float
    step_timeout_s: float
    host: str
    link_ports: tuple[int, int]
    secret: bytes
    limits: StepLimits | None = None
    transport: Transport = "sockets"
    kv_cache_dtype: KvCacheDtype | None = None


class Topology(msgspec.Struct, frozen=True, array_like=True):
    """Where every worker listens, and which incarnation of it. Sent by the engine under a new epoch; the
    receiver answers with `Ready` once the links that it opens are up.

    `kv_eras` has one of each data rank, which changes when one of its stages has lost its KV: what the others
    hold of before is of no use then. Stages whose eras differ hold no sequence together.
    """

    epoch: int
    endpoints: dict[str, Endpoint]
    incarnations: dict[str, str]
    kv_eras: list[int]
    read_back: bool = False


class Ready(msgspec.Struct, frozen=True, array_like=True):
    """A worker's answer to a `Topology`: peers it could not reach and, from the first stage where it was
    asked to read back, the sequences whose KV is on the workers."""

    unreachable: list[str]
    held: dict[str, HeldSequence]
