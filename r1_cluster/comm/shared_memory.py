"""Tensors between two processes that share a memory: that of one GPU (CUDA IPC), or the host's.

Each direction is a ring of slots in the sender's memory, which the receiver maps. A tensor goes through it in
pieces of a slot's size. The sender copies a piece into a free slot, records an event of its stream and raises
the count of filled slots; the receiver sees the count, lets its own stream wait for the event, copies the
piece out, records another event and raises the count of emptied slots. So the host waits for the other *host*
alone, never for a device.

The counts lie in a page of host memory that both map. Nothing else is shared, and nothing outlives the two.
"""

from __future__ import annotations

import mmap
import os
import time
import weakref
from typing import NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor

from r1_cluster.comm.rendezvous import LinkStore
from r1_cluster.comm.wire import TensorSpec

SLOTS = 4
SLOT_BYTES = 4 << 20
_BUSY_LOOKS = 500  # before whoever waits sleeps between two looks
_NAP_S = 20e-6


class Event(Protocol):
    """A point in a stream's work: `record` marks it in the current stream, `wait` makes that stream wait."""

    def record(self) -> None: ...

    def wait(self) -> None: ...


class Opened(NamedTuple):
    """A ring of the other process: its slots, and what keeps them mapped."""

    slots: Tensor
    owner: object


class Memory(Protocol):
    """A memory that two processes can map. A handle is bytes that the other one opens."""

    device: torch.device

    def new_slots(self) -> tuple[Opened, bytes]:
        """uint8 [SLOTS, SLOT_BYTES] and its handle."""

    def open_slots(self, handle: bytes) -> Opened:
        """The slots behind another process's handle."""

    def new_event(self) -> tuple[Event, bytes]:
        """An event of this process and its handle."""

    def open_event(self, handle: bytes) -> Event:
        """The event behind another process's handle."""


class _Done:
    """The host's event: whatever was told is done by then."""

    def record(self) -> None:
        pass

    def wait(self) -> None:
        pass


def _new_host_memory(num_bytes: int) -> tuple[mmap.mmap, str]:
    """Memory that ends with those who map it, and the path by which others of this host do."""
    descriptor = os.memfd_create("r1-cluster", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, num_bytes)
    memory = mmap.mmap(descriptor, num_bytes)
    weakref.finalize(memory, os.close, descriptor)  # which the path names
    return memory, f"/proc/{os.getpid()}/fd/{descriptor}"


def _open_host_memory(path: str, num_bytes: int) -> mmap.mmap:
    """What `_new_host_memory` made in another process. Raises RuntimeError."""
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), num_bytes)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the peer's memory cannot be mapped: {error}") from None


class HostMemory:
    """The host's memory: the twin of `CudaMemory` that runs anywhere."""

    device = torch.device("cpu")

    def new_slots(self) -> tuple[Opened, bytes]:
        memory, path = _new_host_memory(SLOTS * SLOT_BYTES)
        return self._slots(memory), path.encode()

    def open_slots(self, handle: bytes) -> Opened:
        return self._slots(_open_host_memory(handle.decode(), SLOTS * SLOT_BYTES))

    def _slots(self, memory: mmap.mmap) -> Opened:
        return Opened(torch.frombuffer(memory, dtype=torch.uint8).view(SLOTS, SLOT_BYTES), memory)

    def new_event(self) -> tuple[Event, bytes]:
        return _Done(), b""

    def open_event(self, handle: bytes) -> Event:
        return _Done()


class CudaMemory:
    """A GPU's memory, by CUDA IPC as `torch.multiprocessing` uses it. Never run, for want of a GPU.

    Needs the default allocator: what `expandable_segments` allocates has no IPC handle of this kind.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_slots(self) -> tuple[Opened, bytes]:
        slots = torch.empty(SLOTS, SLOT_BYTES, dtype=torch.uint8, device=self.device)
        storage = slots.untyped_storage()
        _, *shared = storage._share_cuda_()  # type: ignore[no-untyped-call]
        return Opened(slots, storage), msgspec.msgpack.encode(shared)

    def open_slots(self, handle: bytes) -> Opened:
        # The first of what was shared is the sender's own number of the device, which here may have another.
        shared = (self.device.index, *msgspec.msgpack.decode(handle))
        storage = torch.UntypedStorage._new_shared_cuda(*shared)
        slots = torch.empty(0, dtype=torch.uint8, device=self.device)
        slots.set_(storage, 0, (SLOTS, SLOT_BYTES), (SLOT_BYTES, 1))
        return Opened(slots, storage)

    def new_event(self) -> tuple[Event, bytes]:
        event = torch.cuda.Event(interprocess=True)  # type: ignore[no-untyped-call]
        event.record()
        return event, event.ipc_handle()  # type: ignore[no-untyped-call]

    def open_event(self, handle: bytes) -> Event:
        return torch.cuda.Event.from_ipc_handle(self.device, handle)  # type: ignore[no-any-return, no-untyped-call]


class _Handles(msgspec.Struct, frozen=True, array_like=True):
    """What an end tells the other: its ring, and the events that it records at each slot of either ring."""

    counts: str
    slots: bytes
    filled: list[bytes]
    emptied: list[bytes]


class _Ring:
    """One direction, seen from one end: the slots, the events at each slot, and the two counts (filled,
    emptied), which only ever rise. `position` is the number of slots that this end has used."""

    def __init__(self, ring: Opened, counts: mmap.mmap, filled: list[Event], emptied: list[Event]) -> None:
        self.slots, self._owner = ring
        self.counts = memoryview(counts).cast("q")
        self.filled = filled
        self.emptied = emptied
        self.position = 0


_FILLED, _EMPTIED, _COUNTS_BYTES = 0, 1, 16


class SharedPair:
    """One side of a pair over a `Memory`; a `transports.Pair`. A peer that is silent for `timeout_s` in the
    midst of a tensor is an error."""

    def __init__(self, memory: Memory, store: LinkStore, rank: int, timeout_s: float) -> None:
        self.device = memory.device
        self._timeout_s = timeout_s
        self._given_up = False
        slots, slots_handle = memory.new_slots()
        counts, counts_path = _new_host_memory(_COUNTS_BYTES)
        filled, emptied = ([memory.new_event() for _ in range(SLOTS)] for _ in range(2))
        mine = _Handles(counts_path, slots_handle, [h for _, h in filled], [h for _, h in emptied])
        store.set(f"memory/{rank}", msgspec.msgpack.encode(mine))
        theirs = msgspec.msgpack.decode(store.get(f"memory/{1 - rank}"), type=_Handles)
        self._out = _Ring(
            slots, counts, [event for event, _ in filled], [memory.open_event(h) for h in theirs.emptied]
        )
        self._in = _Ring(
            memory.open_slots(theirs.slots),
            _open_host_memory(theirs.counts, _COUNTS_BYTES),
            [memory.open_event(h) for h in theirs.filled],
            [event for event, _ in emptied],
        )

    def send(self, tensor: Tensor) -> None:
        ring = self._out
        for piece in torch.split(_bytes(tensor), SLOT_BYTES):
            slot = ring.position % SLOTS
            self._wait_for(ring, _EMPTIED, ring.position - SLOTS + 1)
            ring.emptied[slot].wait()
            ring.slots[slot, : len(piece)].copy_(piece)
            ring.filled[slot].record()
            ring.position += 1
            ring.counts[_FILLED] = ring.position

    def recv(self, spec: TensorSpec) -> Tensor:
        ring = self._in
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        for piece in torch.split(_bytes(tensor), SLOT_BYTES):
            slot = ring.position % SLOTS
            self._wait_for(ring, _FILLED, ring.position + 1)
            ring.filled[slot].wait()
            piece.copy_(ring.slots[slot, : len(piece)])
            ring.emptied[slot].record()
            ring.position += 1
            ring.counts[_EMPTIED] = ring.position
        return tensor

    def abort(self) -> None:
        self._given_up = True

    def _wait_for(self, ring: _Ring, which: int, count: int) -> None:
        looks, deadline = 0, 0.0
        while ring.counts[which] < count:
            if self._given_up:
                raise RuntimeError("the pair was given up")
            looks += 1
            if looks < _BUSY_LOOKS:
                os.sched_yield()
                continue
            now = time.monotonic()
            deadline = deadline or now + self._timeout_s
            if now > deadline:
                raise RuntimeError(f"the peer did nothing for {self._timeout_s} s")
            time.sleep(_NAP_S)


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes as a view."""
    return tensor.view(-1).view(torch.uint8)
