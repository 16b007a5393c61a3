"""The sequences of one data rank: those that run on it, and the pages that they have there."""

from __future__ import annotations

from dataclasses import dataclass, field

from r1_cluster.engine.pages import OutOfPages, PageAllocator
from r1_cluster.engine.sequence import Sequence, State
from r1_cluster.engine.takeover import Takeover

Batch = list[tuple[Sequence, int]]
"""Sequences of a step, each with the number of its new tokens."""


@dataclass
class DataRank:
    """A data rank as the scheduler sees it. An engine has one, or as many as `layout.data_parallel` says.

    `closed` are sequences whose pages here became free since the plan before; `present`, whether its stages
    are there.
    """

    index: int
    allocator: PageAllocator
    running: list[Sequence] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    present: bool = True

    def __post_init__(self) -> None:
        self.takeover = Takeover(self.allocator)

    def run(self, sequence: Sequence, *, first: bool = False) -> None:
        """Takes a sequence in."""
        sequence.state = State.RUNNING
        sequence.data_rank = self.index
        self.running.insert(0 if first else len(self.running), sequence)

    def join(self, sequence: Sequence) -> bool:
        """Whether a former engine had computed it here, and so it has its KV."""
        joined = self.takeover.join(sequence)
        self.closed += self.takeover.closed
        self.takeover.closed.clear()
        return joined

    def fits(self, sequence: Sequence) -> bool:
        """Whether there are pages for all of it: admitting what would soon have to be preempted computes
        twice."""
        return self.allocator.pages_for(len(sequence.tokens) + 1) <= self.allocator.num_free

    def give_back(self, sequence: Sequence) -> None:
        """Frees a sequence's pages. They may be others' from now on: the first stage must not offer them to a
        next engine."""
        self.allocator.release(sequence.seq_id)
        self.closed.append(sequence.seq_id)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether its pages can, and now do, hold so many tokens."""
        try:
            self.allocator.grow(sequence.seq_id, num_tokens)
        except OutOfPages:
            return False
        return True

    def give_up_held(self) -> int:
        """Frees what no request came back for; returns how many sequences that were."""
        given_up = self.takeover.give_up()
        self.closed.extend(given_up)
        return len(given_up)

    def check(self) -> None:
        """Raises AssertionError unless pages and sequences agree."""
        self.allocator.check()
        held = sum(len(self.allocator.table(sequence.seq_id)) for sequence in self.running)
        held += self.takeover.num_pages
        assert held == self.allocator.num_used, f"{held} pages in tables, {self.allocator.num_used} in use"
        for sequence in self.running:
            assert sequence.data_rank == self.index
            table = self.allocator.table(sequence.seq_id)
            assert len(table) >= self.allocator.pages_for(sequence.num_computed)
