"""Tensors between two processes that share a memory: that of one GPU (CUDA IPC), or the host's.

Each direction is a ring of slots in the sender's memory, which the receiver maps. A tensor goes through it in
pieces of a slot's size. The sender copies a piece into a free slot, waits until its device has done so, and
raises the count of filled slots; the receiver sees the count, copies the piece out, waits likewise, and
raises the count of emptied slots. So what has been counted is there, whoever dies next, and no process ever
waits for another one's device.

The counts lie in a page of host memory that both map. Nothing else is shared, and nothing outlives the two.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor

from r1_cluster.comm.rendezvous import LinkStore
from r1_cluster.comm.wire import WireSpec

SLOTS = 4
SLOT_BYTES = 4 << 20
_BUSY_LOOKS = 500  # before whoever waits sleeps between two looks
_NAP_S = 20e-6


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

    def fence(self) -> Callable[[], bool]:
        """Whether the current stream has done all that it was told so far."""


class HostBlock:
    """Host memory that ends with those who map it, and how others of this host find it: a descriptor of
    a process, and what it must lead to (in another container the same path may name another file)."""

    def __init__(self, num_bytes: int) -> None:
        descriptor = os.memfd_create("r1-cluster", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, num_bytes)
        self.memory = mmap.mmap(descriptor, num_bytes)
        weakref.finalize(self.memory, os.close, descriptor)
        status = os.fstat(descriptor)
        place = (os.getpid(), descriptor, status.st_dev, status.st_ino)
        self.handle = msgspec.msgpack.encode(place)

    @staticmethod
    def open(handle: bytes, num_bytes: int) -> mmap.mmap:
        """The memory behind another process's handle. Raises RuntimeError."""
        pid, descriptor, device, inode = msgspec.msgpack.decode(handle, type=tuple[int, int, int, int])
        path = f"/proc/{pid}/fd/{descriptor}"
        try:
            with open(path, "r+b") as file:
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) != (device, inode):
                    raise RuntimeError(f"{path} is not the peer's memory: it sees other processes than we do")
                return mmap.mmap(file.fileno(), num_bytes)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"the peer's memory cannot be mapped: {error}") from None


class HostMemory:
    """The host's memory: the twin of `CudaMemory` that runs anywhere."""

    device = torch.device("cpu")

    def new_slots(self) -> tuple[Opened, bytes]:
        block = HostBlock(SLOTS * SLOT_BYTES)
        return self._slots(block.memory), block.handle

    def open_slots(self, handle: bytes) -> Opened:
        return self._slots(HostBlock.open(handle, SLOTS * SLOT_BYTES))

    def _slots(self, memory: mmap.mmap) -> Opened:
        return Opened(torch.frombuffer(memory, dtype=torch.uint8).view(SLOTS, SLOT_BYTES), memory)

    def fence(self) -> Callable[[], bool]:
        return lambda: True


class CudaMemory:
    """A GPU's memory, by CUDA IPC as `torch.multiprocessing` uses it.

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

    def fence(self) -> Callable[[], bool]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.query


class SlotPool:
    """The rings of one process. One that has served is kept for the next pair: a receiver only reads it, and
    a GPU's memory that a dead receiver had mapped is never freed by torch."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._free: list[tuple[Opened, bytes]] = []

    def take(self) -> tuple[Opened, bytes]:
        """A ring of our own and its handle."""
        return self._free.pop() if self._free else self.memory.new_slots()

    def give_back(self, ring: tuple[Opened, bytes]) -> None:
        """Its pair has ended."""
        self._free.append(ring)


class _Handles(msgspec.Struct, frozen=True, array_like=True):
    """What an end tells the other of its ring."""

    counts: bytes
    slots: bytes


class _Ring:
    """One direction, seen from one end: the slots and the two counts (filled, emptied), which only ever rise.
    `position` is the number of slots that this end has used."""

    def __init__(self, ring: Opened, counts: mmap.mmap) -> None:
        self.slots, self._owner = ring
        self.counts = memoryview(counts).cast("q")
        self.position = 0


_FILLED, _EMPTIED, _COUNTS_BYTES = 0, 1, 16


class SharedPair:
    """One side of a pair over a `Memory`; a `transports.Pair`. A peer that is silent for `timeout_s` in the
    midst of a tensor is an error."""

    broken = False  # what was received is there

    def __init__(self, pool: SlotPool, store: LinkStore, rank: int, timeout_s: float) -> None:
        self.device = pool.memory.device
        self._pool = pool
        self._timeout_s = timeout_s
        self._given_up = False
        self._sending = threading.Lock()
        slots, slots_handle = ring = pool.take()
        self._mine: tuple[Opened, bytes] | None = ring
        counts = HostBlock(_COUNTS_BYTES)
        store.set(f"memory/{rank}", msgspec.msgpack.encode(_Handles(counts.handle, slots_handle)))
        theirs = msgspec.msgpack.decode(store.get(f"memory/{1 - rank}"), type=_Handles)
        self._out = _Ring(slots, counts.memory)
        self._in = _Ring(pool.memory.open_slots(theirs.slots), HostBlock.open(theirs.counts, _COUNTS_BYTES))

    def send(self, tensor: Tensor) -> None:
        ring = self._out
        with self._sending:
            for piece in torch.split(_bytes(tensor), SLOT_BYTES):
                self._wait(lambda: ring.counts[_EMPTIED] > ring.position - SLOTS)
                ring.slots[ring.position % SLOTS, : len(piece)].copy_(piece)
                self._count(ring, _FILLED)

    def recv(self, spec: WireSpec) -> Tensor:
        ring = self._in
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        for piece in torch.split(_bytes(tensor), SLOT_BYTES):
            self._wait(lambda: ring.counts[_FILLED] > ring.position)
            piece.copy_(ring.slots[ring.position % SLOTS, : len(piece)])
            self._count(ring, _EMPTIED)
        return tensor

    def abort(self) -> None:
        self._given_up = True
        with self._sending:  # whoever sends has noticed by then, and writes to the ring no more
            if self._mine is not None:
                self._pool.give_back(self._mine)
            self._mine = None

    def _count(self, ring: _Ring, which: int) -> None:
        """One slot more, once the device has done its part."""
        self._wait(self._pool.memory.fence())
        ring.position += 1
        ring.counts[which] = ring.position

    def _wait(self, until: Callable[[], bool]) -> None:
        looks, deadline = 0, 0.0
        while not self._given_up and not until():
            looks += 1
            if looks < _BUSY_LOOKS:
                os.sched_yield()
                continue
            now = time.monotonic()
            deadline = deadline or now + self._timeout_s
            if now > deadline:
                raise RuntimeError(f"the peer did nothing for {self._timeout_s} s")
            time.sleep(_NAP_S)
        if self._given_up:
            raise RuntimeError("the pair was given up")


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes as a view. One element counts as contiguous whatever its stride is, but
    torch shows bytes only where that is 1."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
