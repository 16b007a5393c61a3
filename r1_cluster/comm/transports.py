"""How one tensor gets from a process to another beside their socket: gloo, NCCL, HCCL, memory they share.

Neither allreduce nor recv_anysource is used anywhere: in gloo both can block for good when a peer dies.
None of gloo, NCCL and HCCL authenticates its peers: they belong on a private network.

What has run: gloo and host memory, in the tests, and CUDA IPC, by hand on one H200. NCCL has not, and HCCL
nowhere but in a test that plays torch_npu.
"""

from __future__ import annotations

import os
import uuid
from collections import deque
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ErrorType, _DistributedBackendOptions

from kernels.devices import find_device
from r1_cluster.comm.rendezvous import LinkStore
from r1_cluster.comm.shared_memory import CudaMemory, HostMemory, Memory, SharedPair, SlotPool
from r1_cluster.comm.wire import AT_ONCE_BYTES, WireSpec

_EAGER_SENDS = 8


class _Work(Protocol):
    def wait(self, timeout: timedelta = ...) -> bool: ...


class _Group(Protocol):
    """What torch's backends have and its stubs leave out."""

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> _Work: ...
    def recv(self, tensors: list[Tensor], src: int, tag: int) -> _Work: ...
    def abort(self) -> None: ...
    def get_error(self) -> ErrorType: ...
    def abort_hccl_comm(self, reason: str) -> None: ...  # of torch_npu's, in place of the two before


class Pair(Protocol):
    """One side of a two-rank group. Errors of the backend surface as RuntimeError. All on the current stream:
    what was sent may be overwritten by what that stream does later, and it may use what was received."""

    device: torch.device

    @property
    def broken(self) -> bool:
        """Whether the backend has given the pair up by itself. What was received last may be garbage then."""

    def send(self, tensor: Tensor) -> None:
        """Sends a contiguous, non-empty tensor of `device`. One of more than AT_ONCE_BYTES may wait for the
        peer to receive it."""

    def recv(self, spec: WireSpec) -> Tensor:
        """A new tensor of `device`."""

    def abort(self) -> None:
        """Gives up whatever is under way; from any thread."""


class Backend(Protocol):
    """Builds pairs: one object per process, made at its start."""

    device: torch.device

    def pair(self, store: LinkStore, rank: int, timeout_s: float) -> Pair:
        """The side of `rank` in the pair of those who share `store`; `timeout_s` bounds its transfers."""


class GlooBackend:
    """CPU tensors by gloo. `host` is the address that peers reach this process at: without it gloo would
    tell those on other hosts to connect to 127.0.0.1."""

    def __init__(self, host: str) -> None:
        self.device = torch.device("cpu")
        self._gloo_device = dist.ProcessGroupGloo.create_device(hostname=host)

    def pair(self, store: LinkStore, rank: int, timeout_s: float) -> Pair:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [self._gloo_device]
        group = dist.ProcessGroupGloo(store, rank, 2, options)
        return GlooPair(cast(_Group, group), 1 - rank)


class GlooPair:
    """See `GlooBackend`. The group's timeout bounds every wait, and `abort` does not end one: gloo cannot
    be woken while the peer lives but is silent in the midst of a payload. Gloo ends a send when the peer has
    received: a few short ones are copied and not waited for, as NCCL would leave them in its buffers."""

    def __init__(self, group: _Group, peer_rank: int) -> None:
        self.device = torch.device("cpu")
        self.broken = False  # its errors reach whoever waits
        self._group: _Group | None = group
        self._peer_rank = peer_rank
        self._sending: deque[tuple[_Work, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        if tensor.nbytes > AT_ONCE_BYTES:
            self._alive().send([tensor], self._peer_rank, 0).wait()
            return
        copy, sending = tensor.clone(), self._sending
        sending.append((self._alive().send([copy], self._peer_rank, 0), copy))
        if len(sending) > _EAGER_SENDS:
            sending.popleft()[0].wait()

    def recv(self, spec: WireSpec) -> Tensor:
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        self._alive().recv([tensor], self._peer_rank, 0).wait()
        return tensor

    def abort(self) -> None:
        # Dropping the group closes its sockets, which ends the peer's wait as well; its own abort() does not.
        self._group = None
        self._sending = deque()  # another one: `send` may be in the midst of it

    def _alive(self) -> _Group:
        if self._group is None:
            raise RuntimeError("the group was given up")
        return self._group


# To be set before CUDA starts. torch's watchdog over NCCL would by default end the process when a peer is
# lost, and before that sleep for a minute and write a dump: here the links' owners decide, and it only cleans
# up. Each pair has a stream of its own, and streams that share a hardware queue wait for each other.
_NCCL_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
_NCCL_PATIENCE = 4  # a transfer counts from when it was told; its peer may first have to finish a step


class NcclBackend:
    """Device tensors by NCCL. To be made before any other NCCL group of the process.

    Nothing here waits on the host: transfers are ordered with the current stream by events. NCCL's
    communicators have a stream each. On one for all of them, a send would hold back whatever follows until
    its receive runs at the other end, and two routers that ask two shards at the same time could wait in a
    circle. NVIDIA warns that communicators used at the same time must fit on the device together: hence few
    blocks for each.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pair(self, store: LinkStore, rank: int, timeout_s: float) -> Pair:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timedelta(seconds=_NCCL_PATIENCE * timeout_s)
        options.config.max_ctas = 2
        group = dist.ProcessGroupNCCL(store, rank, 2, options)
        return NcclPair(cast(_Group, group), 1 - rank, self.device, store)


class NcclPair:
    """See `NcclBackend`. The store is kept, because NCCL's own threads look into it."""

    def __init__(self, group: _Group, peer_rank: int, device: torch.device, store: LinkStore) -> None:
        self.device = device
        self._group = group
        self._peer_rank = peer_rank
        self._store = store

    @property
    def broken(self) -> bool:
        return self._group.get_error() != ErrorType.SUCCESS

    def send(self, tensor: Tensor) -> None:
        # A copy, which the sender cannot overwrite while it is on its way; nobody waits for it.
        self._group.send([tensor.clone()], self._peer_rank, 0)

    def recv(self, spec: WireSpec) -> Tensor:
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        self._group.recv([tensor], self._peer_rank, 0).wait()  # the stream waits, not the host
        return tensor

    def abort(self) -> None:
        self._group.abort()


# By default torch_npu's watchdog ends the process when a peer is lost: here the links' owners decide.
_HCCL_ENVIRONMENT = {"HCCL_ASYNC_ERROR_HANDLING": "0"}


class HcclBackend:
    """Tensors of Ascend's NPUs by HCCL, which torch_npu registers with torch.distributed by that name
    (`torch_npu/__init__.py`). As with NCCL nothing waits on the host. It has not run on a device."""

    def __init__(self) -> None:
        kind = find_device("npu")
        self.device = torch.device(kind.type, torch.get_device_module(kind).current_device())

    def pair(self, store: LinkStore, rank: int, timeout_s: float) -> Pair:
        options = _DistributedBackendOptions()
        options.store, options.group_rank, options.group_size = store, rank, 2
        options.timeout = timedelta(seconds=_NCCL_PATIENCE * timeout_s)
        if rank == 0:
            store.set("group", uuid.uuid4().hex)  # HCCL knows its communicators by name
        options.group_id, options.global_ranks_in_group = store.get("group").decode(), [0, 1]
        group = dist.Backend._plugins["HCCL"].creator_fn(options, None)
        return HcclPair(cast(_Group, group), 1 - rank, self.device, store)


class HcclPair(NcclPair):
    """See `HcclBackend`. HCCL tells errors to its log alone: it is the watch that notices a dead peer."""

    broken = False

    def abort(self) -> None:
        self._group.abort_hccl_comm("the link was closed")


class SharedMemoryBackend:
    """Pairs of processes that share a memory: the host's, or that of one GPU."""

    def __init__(self, memory: Memory) -> None:
        self.device = memory.device
        self._pool = SlotPool(memory)

    def pair(self, store: LinkStore, rank: int, timeout_s: float) -> Pair:
        return SharedPair(self._pool, store, rank, timeout_s)


class DeviceBackend:
    """CUDA IPC between processes on one GPU, where NCCL refuses to work, and NCCL between GPUs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._nccl = NcclBackend(device)
        self._ipc = SharedMemoryBackend(CudaMemory(device))

    def pair(self, store: LinkStore, rank: int, timeout_s: float) -> Pair:
        uuid = str(torch.cuda.get_device_properties(self.device).uuid).encode()
        store.set(f"uuid/{rank}", uuid)
        backend: Backend = self._ipc if store.get(f"uuid/{1 - rank}") == uuid else self._nccl
        return backend.pair(store, rank, timeout_s)


def backend_for(transport: str, host: str) -> Backend | None:
    """The backend of a `boot.Transport`; None for sockets, which need none. `host` is our own address."""
    if transport == "gloo":
        return GlooBackend(host)
    if transport == "host memory":
        return SharedMemoryBackend(HostMemory())
    if transport == "hccl":
        os.environ.update(_HCCL_ENVIRONMENT)
        return HcclBackend()
    if transport == "device":
        os.environ.update(_NCCL_ENVIRONMENT)
        return DeviceBackend(torch.device("cuda", torch.cuda.current_device()))
    return None
