"""What a former engine left on the workers, until its requests come again."""

from __future__ import annotations

from array import array

from r1_cluster.engine.pages import OutOfPages, PageAllocator
from r1_cluster.engine.sequence import Sequence
from r1_cluster.records import HeldSequence, unpack_int32


class Takeover:
    """Sequences whose KV is on the workers, and whose pages are kept for them."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        self._held: dict[str, HeldSequence] = {}
        self.closed: list[str] = []  # whose KV was of no use after all, for whoever tells the workers

    @property
    def num_pages(self) -> int:
        """Pages that are kept."""
        return sum(len(self._allocator.table(seq_id)) for seq_id in self._held)

    def adopt(self, held: dict[str, HeldSequence]) -> None:
        """Keeps the pages of these sequences, where they are free; the KV of others is computed again."""
        for seq_id, sequence in held.items():
            try:
                self._allocator.claim(seq_id, unpack_int32(sequence.pages).tolist())
            except OutOfPages:
                continue
            self._held[seq_id] = sequence

    def join(self, sequence: Sequence) -> bool:
        """Gives a sequence that has come again its KV; False if there is none that fits."""
        held = self._held.pop(sequence.seq_id, None)
        if held is None:
            return False
        known = array("i", unpack_int32(held.tokens).tolist())
        # The last token's KV is computed (again) by the step that samples its successor.
        num_computed = min(held.committed, len(known), len(sequence.tokens) - 1)
        if known[:num_computed] != sequence.tokens[:num_computed] or not held.pages:
            self._allocator.release(sequence.seq_id)
            self.closed.append(sequence.seq_id)
            return False
        sequence.num_computed = num_computed
        return True

    def give_up(self) -> list[str]:
        """Frees what nobody came back for; returns whose it was."""
        given_up = list(self._held)
        for seq_id in given_up:
            self._allocator.release(seq_id)
        self._held.clear()
        return given_up
