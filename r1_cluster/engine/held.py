"""What the first stage keeps of every sequence, so that an engine that takes over can read it back."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from r1_cluster.comm.wire import MAX_BODY_BYTES
from r1_cluster.records import HeldSequence, StepPlan

logger = logging.getLogger(__name__)

_WORDS_BYTES = 128  # of a sequence beside its tokens and pages


def common(of_ranks: Sequence[dict[str, HeldSequence]]) -> dict[str, HeldSequence]:
    """What all ranks of the first stage hold. One may have had plans that another had not, and what those
    closed, or computed anew, is no longer there as the other still knows it."""
    if len(of_ranks) == 1:
        return of_ranks[0]
    held = {}
    for seq_id in set.intersection(*map(set, of_ranks)) if of_ranks else ():
        known = [sequences[seq_id] for sequences in of_ranks]
        least = min(known, key=lambda sequence: (sequence.committed, len(sequence.tokens)))
        fewest = min(known, key=lambda sequence: len(sequence.pages)).pages
        tokens = least.tokens[: 4 * least.committed]
        same = all(s.pages.startswith(fewest) and s.tokens.startswith(tokens) for s in known)
        if same:
            held[seq_id] = HeldSequence(tokens, max((s.pages for s in known), key=len), least.committed)
    return held


class HeldSequences:
    """Follows the plans: a sequence's tokens, its pages, and how much of its KV was committed.

    A plan's `num_cached` is what the engine had committed before it; the plan's own tokens are not counted,
    because whether all stages finished them is not known here.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, bytearray] = {}
        self._pages: dict[str, bytes] = {}
        self._committed: dict[str, int] = {}

    def note(self, plan: StepPlan) -> None:
        """Takes over what a plan says."""
        for seq_id in plan.closed:
            self._drop(seq_id)
        token, page = 0, 0
        for seq_id, cached, new, pages in zip(plan.seq_ids, plan.num_cached, plan.num_new, plan.num_pages):
            tokens = self._tokens.setdefault(seq_id, bytearray())
            # A sequence that is computed anew, or a step that is done again, starts behind what is kept.
            del tokens[4 * cached :]
            tokens += plan.tokens[4 * token : 4 * (token + new)]
            self._pages[seq_id] = plan.pages[4 * page : 4 * (page + pages)]
            self._committed[seq_id] = cached
            token, page = token + new, page + pages

    def all(self, limit_bytes: int = MAX_BODY_BYTES // 2) -> dict[str, HeldSequence]:
        """Every sequence that was not closed, as long as together they fit a message: what is left out is
        computed again."""
        fitting: dict[str, HeldSequence] = {}
        for seq_id, tokens in self._tokens.items():
            limit_bytes -= len(tokens) + len(self._pages[seq_id]) + _WORDS_BYTES
            if limit_bytes < 0:
                logger.warning("only %d of %d sequences are read back", len(fitting), len(self._tokens))
                break
            fitting[seq_id] = HeldSequence(bytes(tokens), self._pages[seq_id], self._committed[seq_id])
        return fitting

    def _drop(self, seq_id: str) -> None:
        for table in (self._tokens, self._pages, self._committed):
            table.pop(seq_id, None)
