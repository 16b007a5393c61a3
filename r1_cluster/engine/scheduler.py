"""Continuous batching: decides which sequences take part in the next step, and with how many tokens.

Decoding sequences come first, one token each; what the token budget leaves goes to prompts, in chunks,
first come first served. When pages run out, the sequence that came last loses its pages and is computed
again later ("preemption by recomputation"), which changes no text, only its time.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from dataclasses import dataclass, field

from r1_cluster.engine.pages import OutOfPages, PageAllocator
from r1_cluster.records import (
    NOBODY,
    FinishReason,
    HeldSequence,
    Refusal,
    Request,
    SampleSpec,
    StepPlan,
    StepResult,
    TokenDelta,
    unpack_int32,
)

MAX_KILLS = 2
"""Deaths of workers in steps that a sequence had to itself, after which its request is failed."""


@dataclass(eq=False)
class Sequence:
    """A request inside the engine. `tokens` is prompt + generated; `num_computed` of them have KV.

    `suspected`: a worker died in a step that this sequence took part in; until it has been through a step
    it runs alone, so that, should it be the cause, it is found out. `suspected_at` (time.monotonic) is when
    that began, `num_kills` counts the deaths in steps that it had to itself; its next token clears it of
    both. `turn` counts on whenever a sequence is planned: who has the lowest waits longest. `stop_ids` are
    the tokens that end it now. `undecided`: the model may still open a thought, through which stops sleep.
    """

    request: Request
    tokens: array[int]
    stop_ids: frozenset[int]
    num_computed: int = 0
    pages: array[int] = field(default_factory=lambda: array("i"))
    admitted: bool = False
    in_flight: bool = False
    aborted: bool = False
    suspected: bool = False
    suspected_at: float = math.inf
    num_kills: int = 0
    turn: int = -1
    undecided: bool = False

    @property
    def seq_id(self) -> str:
        return self.request.request_id

    def decide(self, token: int) -> None:
        """The first token that is not white space says whether there is a thought. What is neither tag is the
        answer already, and may end it."""
        self.undecided = False
        if token not in (self.request.sleeping_from, self.request.sleeping_until):
            self.wake_stops()

    def wake_stops(self) -> None:
        """From the next token on, the request's stop tokens end it. EOS never sleeps."""
        self.stop_ids = self.stop_ids.union(self.request.stop_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True)
class Limits:
    """Scheduler limits; see `config.Engine`."""

    max_num_seqs: int
    max_batch_tokens: int
    max_model_len: int
    micro_batches: int = 1


@dataclass(frozen=True)
class Finished:
    """A delta to be sent to its request's sink, and whether the request ended with it."""

    sink: str
    delta: TokenDelta


def refused(request: Request, refusal: Refusal) -> Finished:
    """The delta that ends a request by a refusal."""
    delta = TokenDelta(request.request_id, 0, [], "error", refusal, attempt=request.attempt)
    return Finished(request.sink, delta)


class Scheduler:
    """Holds all sequences of one engine. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        limits: Limits,
        allocator: PageAllocator,
        eos_ids: frozenset[int],
        blank_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`blank_ids`: the tokens of white space alone, which a model may write before a thought."""
        self.limits = limits
        self.allocator = allocator
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self._eos_ids, self._blank_ids = eos_ids, blank_ids
        self._by_request: dict[str, Sequence] = {}
        self._planned: dict[int, list[tuple[Sequence, int]]] = {}
        self._closed: list[str] = []
        self._held: dict[str, HeldSequence] = {}
        self._next_step = 0
        self._next_turn = 0

    @property
    def num_in_flight(self) -> int:
        return len(self._planned)

    @property
    def idle(self) -> bool:
        return not self._by_request

    def add(self, request: Request) -> None:
        """Queues a new request. The ingress has checked its length against `max_model_len` and the pages."""
        tokens = array("i", request.prompt)
        tokens.extend(request.generated)
        stop_ids = frozenset() if request.ignore_eos else self._eos_ids
        sequence = Sequence(request, tokens, stop_ids)
        # What a former engine generated may hold the end of the thought, or that there is none.
        if request.sleeping_until is None or request.sleeping_until in request.generated:
            sequence.wake_stops()
        elif request.sleeping_from is not None:
            sequence.undecided = True
            first = next((token for token in request.generated if token not in self._blank_ids), None)
            if first is not None:
                sequence.decide(first)
        self._by_request[request.request_id] = sequence
        if not self._take_over(sequence):
            self.waiting.append(sequence)

    def catch_up(self, request: Request) -> Finished | None:
        """For a request that is here already, asked for again by an ingress that missed some tokens: those
        tokens. None for a new one."""
        sequence = self._by_request.get(request.request_id)
        if sequence is None:
            return None
        sequence.aborted = False  # its step may not have ended since
        sequence.request = request
        known = len(request.generated)
        missed = sequence.tokens[len(request.prompt) + known :].tolist()
        delta = TokenDelta(request.request_id, known, missed, attempt=request.attempt)
        return Finished(request.sink, delta)

    def put_on_trial(self, request: Request) -> None:
        """A new request that is computed alone, and before all that is suspected."""
        self.add(request)
        sequence = self.waiting.pop()
        sequence.admitted = sequence.suspected = True
        self.running.insert(0, sequence)

    def requests(self) -> list[Request]:
        """All that have not ended."""
        return [sequence.request for sequence in self._by_request.values() if not sequence.aborted]

    def abort(self, request_id: str) -> None:
        """Ends a request without a further token. One in flight gives up its pages when its step ends."""
        sequence = self._by_request.get(request_id)
        if sequence is None:
            return
        sequence.aborted = True
        if not sequence.in_flight:
            self._close(sequence)

    def schedule(self, epoch: int) -> StepPlan | None:
        """The next step's plan; None when nothing can be computed now. Suspects wait for all else to end."""
        batch: list[tuple[Sequence, int]] = []
        if any(sequence.suspected for sequence in self.running):
            if self._planned:
                return None
            batch = self._pick_suspect()
        if not batch:
            batch = self._pick_decodes()
            self._pick_prefills(batch)
        if not batch:
            return None
        step = self._next_step
        for sequence, _ in batch:
            sequence.in_flight = True
            sequence.turn = self._next_turn
            self._next_turn += 1
        self._next_step += 1
        self._planned[step] = batch
        closed, self._closed = self._closed, []
        return self._plan(epoch, step, batch, closed)

    def adopt(self, held: dict[str, HeldSequence]) -> None:
        """Reserves the pages of sequences that a former engine left on the workers, until their requests
        come again (`add`) or `release_held` gives them up. On an engine that has no sequence yet."""
        for request_id, sequence in held.items():
            try:
                self.allocator.claim(request_id, unpack_int32(sequence.pages).tolist())
            except OutOfPages:
                continue  # its KV is computed again
            self._held[request_id] = sequence

    def release_held(self) -> int:
        """Frees what no request came back for; returns how many sequences that were."""
        for request_id in self._held:
            self.allocator.release(request_id)
            self._closed.append(request_id)
        count = len(self._held)
        self._held.clear()
        return count

    def forget_kv(self) -> None:
        """A stage lost its pages: every sequence is computed again, in the order of admission; steps in
        flight are as if they had never been planned."""
        for batch in self._planned.values():
            for sequence, _ in batch:
                sequence.in_flight = False
        self._planned.clear()
        for sequence in list(self.running):
            sequence.num_computed = 0
            if sequence.aborted:
                self._close(sequence)
        self.release_held()

    def suspect(self) -> list[Sequence]:
        """A worker died while the planned steps ran: their sequences are suspected, and run alone until
        each has been through a step. Returns those that have killed twice when alone; the engine's own
        requests are never among them."""
        guilty = []
        now = time.monotonic()
        for batch in self._planned.values():
            for sequence, _ in batch:
                sequence.suspected = True
                sequence.suspected_at = min(sequence.suspected_at, now)
                if len(batch) == len(self._planned) == 1:
                    sequence.num_kills += 1
                    if sequence.num_kills >= MAX_KILLS and sequence.request.sink != NOBODY:
                        guilty.append(sequence)
        return guilty

    def replan(self, epoch: int) -> list[StepPlan]:
        """Plans of all steps in flight, under a new epoch: what a lost peer spoiled is done again. A step
        with an aborted sequence, or a suspected one in company, is not repeated: its sequences are planned
        anew, the suspected ones alone."""
        crowded = len(self._planned) > 1
        for step, batch in list(self._planned.items()):
            sequences = [sequence for sequence, _ in batch]
            in_company = (crowded or len(batch) > 1) and any(sequence.suspected for sequence in sequences)
            if in_company or any(sequence.aborted for sequence in sequences):
                del self._planned[step]
                for sequence in sequences:
                    sequence.in_flight = False
                    if sequence.aborted:
                        self._close(sequence)
        return [self._plan(epoch, step, batch, []) for step, batch in self._planned.items()]

    def commit(self, result: StepResult) -> list[Finished]:
        """Takes over what a step computed; returns one delta per sequence that got a token or ended."""
        batch = self._planned.pop(result.step)
        tokens = iter(result.tokens)
        deltas = []
        for sequence, num_new in batch:
            sequence.in_flight = sequence.suspected = False
            sequence.num_computed += num_new
            sampled = sequence.num_computed == len(sequence.tokens)
            token = next(tokens) if sampled else None
            if sequence.aborted:
                self._close(sequence)
            elif token is not None:
                deltas.append(self._append(sequence, token) if token >= 0 else self._fail(sequence))
        return deltas

    def check(self) -> None:
        """Raises AssertionError unless pages and sequences agree."""
        self.allocator.check()
        live = {sequence.seq_id for sequence in (*self.running, *self.waiting)}
        assert len(live) == len(self._by_request)
        held = sum(len(sequence.pages) for sequence in self.running)
        held += sum(len(sequence.pages) // 4 for sequence in self._held.values())
        assert held == self.allocator.num_used, f"{held} pages in tables, {self.allocator.num_used} in use"
        for sequence in self.running:
            assert len(sequence.pages) >= self.allocator.pages_for(sequence.num_computed)

    def _take_over(self, sequence: Sequence) -> bool:
        """Joins a request with the KV that a former engine left for it; False if there is none that fits."""
        held = self._held.pop(sequence.seq_id, None)
        if held is None:
            return False
        known = array("i", unpack_int32(held.tokens).tolist())
        # The last token's KV is computed (again) by the step that samples its successor.
        num_computed = min(held.committed, len(known), len(sequence.tokens) - 1)
        if known[:num_computed] != sequence.tokens[:num_computed] or not held.pages:
            self.allocator.release(sequence.seq_id)
            return False
        sequence.pages = array("i", unpack_int32(held.pages).tolist())
        sequence.num_computed = num_computed
        sequence.admitted = True
        self.running.append(sequence)
        return True

    def _pick_suspect(self) -> list[tuple[Sequence, int]]:
        for sequence in self.running:
            if sequence.suspected and not sequence.in_flight:
                chunk = min(len(sequence.tokens) - sequence.num_computed, self.limits.max_batch_tokens)
                if self._make_room(sequence, sequence.num_computed + chunk, taken=[]):
                    return [(sequence, chunk)]
        return []

    def _pick_decodes(self) -> list[tuple[Sequence, int]]:
        batch: list[tuple[Sequence, int]] = []
        ready = [
            s
            for s in self.running
            if not s.in_flight and not s.suspected and len(s.tokens) - s.num_computed == 1
        ]
        share = -(-len(ready) // max(1, self.limits.micro_batches - self.num_in_flight))
        # A takeover may leave more sequences than there may be.
        size = min(share, self._decode_budget(), self.limits.max_num_seqs)
        # Where there are more than a step has room for they take turns: who waits longest comes first.
        ready.sort(key=lambda sequence: sequence.turn)
        for sequence in ready[:size]:
            if sequence.admitted and self._make_room(sequence, sequence.num_computed + 1, taken=batch):
                batch.append((sequence, 1))
        return batch

    def _decode_budget(self) -> int:
        """Tokens of a step that decodes may take. A quarter is kept for prompts while one waits: else they
        would starve where as many sequences may decode as a step has tokens."""
        budget = self.limits.max_batch_tokens
        prefilling = any(len(s.tokens) - s.num_computed > 1 for s in self.running)
        admissible = bool(self.waiting) and len(self.running) < self.limits.max_num_seqs
        return budget - max(budget // 4, min(1, budget - 1)) if prefilling or admissible else budget

    def _pick_prefills(self, batch: list[tuple[Sequence, int]]) -> None:
        budget = self.limits.max_batch_tokens - len(batch)
        taken = {id(sequence) for sequence, _ in batch}
        for sequence in list(self.running):
            missing = len(sequence.tokens) - sequence.num_computed
            if budget <= 0:
                return
            if missing <= 1 or sequence.suspected or not sequence.admitted:
                continue
            if sequence.in_flight or id(sequence) in taken:
                continue
            chunk = min(missing, budget)
            if self._make_room(sequence, sequence.num_computed + chunk, taken=batch):
                batch.append((sequence, chunk))
                budget -= chunk
        while budget > 0 and self.waiting and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            # All of it must fit now: admitting what would soon have to be preempted computes twice.
            if self.allocator.pages_for(len(sequence.tokens) + 1) > self.allocator.num_free:
                return
            self.waiting.popleft()
            sequence.admitted = True
            self.running.append(sequence)
            chunk = min(len(sequence.tokens), budget)
            self._grow(sequence, chunk)
            batch.append((sequence, chunk))
            budget -= chunk

    def _make_room(self, sequence: Sequence, num_tokens: int, taken: list[tuple[Sequence, int]]) -> bool:
        """Grows `sequence`, preempting later ones until it fits; False if it must wait for this step."""
        while True:
            try:
                self._grow(sequence, num_tokens)
                return True
            except OutOfPages:
                planned = {id(other) for other, _ in taken}
                victim = next(
                    (s for s in reversed(self.running) if not s.in_flight and id(s) not in planned), None
                )
                if victim is None:
                    return False
                self._preempt(victim)
                if victim is sequence:
                    return False

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        sequence.pages.extend(self.allocator.grow(sequence.seq_id, num_tokens))

    def _preempt(self, sequence: Sequence) -> None:
        sequence.admitted = False
        self.running.remove(sequence)
        self.allocator.release(sequence.seq_id)
        sequence.pages = array("i")
        sequence.num_computed = 0
        # Its pages are others' from now on: the first stage must not offer them to a next engine.
        self._closed.append(sequence.seq_id)
        self.waiting.appendleft(sequence)
        self.num_preempted += 1

    def _plan(self, epoch: int, step: int, batch: list[tuple[Sequence, int]], closed: list[str]) -> StepPlan:
        tokens = array("i")
        samples = []
        for index, (sequence, num_new) in enumerate(batch):
            end = sequence.num_computed + num_new
            tokens.extend(sequence.tokens[sequence.num_computed : end])
            if end == len(sequence.tokens):
                samples.append(SampleSpec(index, end, sequence.request.sampling))
        return StepPlan(
            epoch=epoch,
            step=step,
            micro_batch=step % self.limits.micro_batches,
            seq_ids=[sequence.seq_id for sequence, _ in batch],
            num_cached=[sequence.num_computed for sequence, _ in batch],
            num_new=[num_new for _, num_new in batch],
            tokens=tokens.tobytes(),
            num_pages=[len(sequence.pages) for sequence, _ in batch],
            pages=b"".join(sequence.pages.tobytes() for sequence, _ in batch),
            samples=samples,
            closed=closed,
        )

    def _append(self, sequence: Sequence, token: int) -> Finished:
        position = sequence.num_generated
        sequence.tokens.append(token)
        # What killed before did so again before it came this far.
        sequence.num_kills, sequence.suspected_at = 0, math.inf
        if sequence.undecided and token not in self._blank_ids:
            sequence.decide(token)
        reason: FinishReason | None = None
        if token in sequence.stop_ids:
            reason = "stop"
        elif (
            sequence.num_generated >= sequence.request.max_tokens
            or len(sequence.tokens) >= self.limits.max_model_len
        ):
            reason = "length"
        request = sequence.request
        if reason is not None:
            self._close(sequence)
        elif token == request.sleeping_until:
            sequence.wake_stops()
        delta = TokenDelta(request.request_id, position, [token], reason, attempt=request.attempt)
        return Finished(request.sink, delta)

    def _fail(self, sequence: Sequence) -> Finished:
        """The sampler had no token for this sequence: its request ends, and no other."""
        self._close(sequence)
        return refused(sequence.request, Refusal("failed_row"))

    def _close(self, sequence: Sequence) -> None:
        if sequence.admitted:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.allocator.release(sequence.seq_id)
        self._closed.append(sequence.seq_id)
        del self._by_request[sequence.request.request_id]
