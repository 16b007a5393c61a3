"""Continuous batching: decides which sequences take part in the next step, and with how many tokens.

Decoding sequences come first, one token each; what the token budget leaves goes to prompts, in chunks,
first come first served. When pages run out, the sequence that came last loses its pages and is computed
again later ("preemption by recomputation"), which changes no text, only its time.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass

from r1_cluster.engine.pages import OutOfPages, PageAllocator
from r1_cluster.engine.sequence import Sequence, State
from r1_cluster.engine.suspects import Suspects
from r1_cluster.engine.takeover import Takeover
from r1_cluster.records import (
    FinishReason,
    HeldSequence,
    Refusal,
    Request,
    SampleSpec,
    StepPlan,
    StepResult,
    TokenDelta,
)


@dataclass(frozen=True)
class Limits:
    """Scheduler limits; see `config.Engine`. Up to `micro_batches` steps are in flight; another one decodes
    only where each of them has at least `least_decodes` sequences to decode."""

    max_num_seqs: int
    max_batch_tokens: int
    max_model_len: int
    micro_batches: int = 1
    least_decodes: int = 1


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
        self._suspects = Suspects()
        self._takeover = Takeover(allocator)
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
        sequence = Sequence.of(request, self._eos_ids, self._blank_ids)
        self._by_request[request.request_id] = sequence
        if self._takeover.join(sequence):
            sequence.state = State.RUNNING
            self.running.append(sequence)
        else:
            self.waiting.append(sequence)

    def catch_up(self, request: Request) -> Finished | None:
        """For a request that is here already, asked for again by an ingress that missed some tokens: those
        tokens. None for a new one."""
        sequence = self._by_request.get(request.request_id)
        if sequence is None:
            return None
        if sequence.state is State.ENDING:
            sequence.state = State.IN_FLIGHT
        sequence.request = request
        known = len(request.generated)
        missed = sequence.tokens[len(request.prompt) + known :].tolist()
        delta = TokenDelta(request.request_id, known, missed, attempt=request.attempt)
        return Finished(request.sink, delta)

    def put_on_trial(self, request: Request) -> None:
        """A new request that is computed alone, and before all that is suspected."""
        self.add(request)
        sequence = self.waiting.pop()
        sequence.state = State.RUNNING
        self._suspects.isolate(sequence)
        self.running.insert(0, sequence)

    def requests(self) -> list[Request]:
        """All that have not ended."""
        return [
            sequence.request for sequence in self._by_request.values() if sequence.state is not State.ENDING
        ]

    def abort(self, request_id: str) -> None:
        """Ends a request without a further token. One in flight gives up its pages when its step ends."""
        sequence = self._by_request.get(request_id)
        if sequence is None:
            return
        if sequence.in_flight:
            sequence.state = State.ENDING
        else:
            self._close(sequence)

    def schedule(self, epoch: int) -> StepPlan | None:
        """The next step's plan; None when nothing can be computed now. Suspects wait for all else to end."""
        batch: list[tuple[Sequence, int]] = []
        if any(sequence in self._suspects for sequence in self.running):
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
            sequence.state = State.IN_FLIGHT
            sequence.turn = self._next_turn
            self._next_turn += 1
        self._next_step += 1
        self._planned[step] = batch
        closed, self._closed = self._closed, []
        return self._plan(epoch, step, batch, closed)

    def adopt(self, held: dict[str, HeldSequence]) -> None:
        """Reserves the pages of sequences that a former engine left on the workers, until their requests
        come again (`add`) or `release_held` gives them up. On an engine that has no sequence yet."""
        self._takeover.adopt(held)

    def release_held(self) -> int:
        """Frees what no request came back for; returns how many sequences that were."""
        given_up = self._takeover.give_up()
        self._closed.extend(given_up)
        return len(given_up)

    def forget_kv(self) -> None:
        """A stage lost its pages: every sequence is computed again, in the order of admission; steps in
        flight are as if they had never been planned."""
        for step in list(self._planned):
            self._unplan(step)
        for sequence in self.running:
            sequence.num_computed = 0
        self.release_held()

    def suspect(self) -> tuple[list[Request], float]:
        """A worker died while the planned steps ran: see `Suspects.accuse`."""
        batches = [[sequence for sequence, _ in batch] for batch in self._planned.values()]
        guilty, since = self._suspects.accuse(batches)
        return [sequence.request for sequence in guilty], since

    def replan(self, epoch: int) -> list[StepPlan]:
        """Plans of all steps in flight, under a new epoch: what a lost peer spoiled is done again. A step
        with an aborted sequence, or a suspected one in company, is not repeated: its sequences are planned
        anew, the suspected ones alone."""
        crowded = len(self._planned) > 1
        for step, batch in list(self._planned.items()):
            sequences = [sequence for sequence, _ in batch]
            in_company = (crowded or len(batch) > 1) and any(s in self._suspects for s in sequences)
            if in_company or any(s.state is State.ENDING for s in sequences):
                self._unplan(step)
        return [self._plan(epoch, step, batch, []) for step, batch in self._planned.items()]

    def commit(self, result: StepResult) -> list[Finished]:
        """Takes over what a step computed; returns one delta per sequence that got a token or ended."""
        batch = self._planned.pop(result.step)
        tokens = iter(result.tokens)
        deltas = []
        for sequence, num_new in batch:
            self._suspects.survived(sequence)
            sequence.num_computed += num_new
            token = None if sequence.num_missing else next(tokens)
            if not self._landed(sequence) and token is not None:
                deltas.append(self._append(sequence, token) if token >= 0 else self._fail(sequence))
        return deltas

    def check(self) -> None:
        """Raises AssertionError unless pages and sequences agree."""
        self.allocator.check()
        live = {sequence.seq_id for sequence in (*self.running, *self.waiting)}
        assert len(live) == len(self._by_request)
        held = sum(len(self.allocator.table(sequence.seq_id)) for sequence in self.running)
        held += self._takeover.num_pages
        assert held == self.allocator.num_used, f"{held} pages in tables, {self.allocator.num_used} in use"
        for sequence in self.running:
            table = self.allocator.table(sequence.seq_id)
            assert len(table) >= self.allocator.pages_for(sequence.num_computed)

    def _unplan(self, step: int) -> None:
        """A step in flight is as if it had never been planned."""
        for sequence, _ in self._planned.pop(step):
            self._landed(sequence)

    def _landed(self, sequence: Sequence) -> bool:
        """A sequence's step is over; whether it was aborted meanwhile, and has ended."""
        if sequence.state is State.ENDING:
            self._close(sequence)
            return True
        sequence.state = State.RUNNING
        return False

    def _pick_suspect(self) -> list[tuple[Sequence, int]]:
        for sequence in self.running:
            if sequence in self._suspects and sequence.state is State.RUNNING:
                chunk = min(sequence.num_missing, self.limits.max_batch_tokens)
                if self._make_room(sequence, sequence.num_computed + chunk, taken=[]):
                    return [(sequence, chunk)]
        return []

    def _pick_decodes(self) -> list[tuple[Sequence, int]]:
        batch: list[tuple[Sequence, int]] = []
        decoding = [s for s in self.running if s not in self._suspects and s.num_missing == 1]
        ready = [s for s in decoding if s.state is State.RUNNING]
        # Few sequences decode in one step, which costs its launches, messages and tiles of rows whatever they
        # are. Whoever comes in between waits for that step, and joins the others in the next.
        parts = max(1, min(self.limits.micro_batches, len(decoding) // self.limits.least_decodes))
        if sum(any(s.num_missing == 1 for s, _ in step) for step in self._planned.values()) >= parts:
            return batch
        share = -(-len(decoding) // parts)
        # A takeover may leave more sequences than there may be.
        size = min(share, self._decode_budget(), self.limits.max_num_seqs)
        # Where there are more than a step has room for they take turns: who waits longest comes first.
        ready.sort(key=lambda sequence: sequence.turn)
        for sequence in ready[:size]:
            # One before it may have taken its pages.
            running = sequence.state is State.RUNNING
            if running and self._make_room(sequence, sequence.num_computed + 1, taken=batch):
                batch.append((sequence, 1))
        return batch

    def _decode_budget(self) -> int:
        """Tokens of a step that decodes may take. A quarter is kept for prompts while one waits: else they
        would starve where as many sequences may decode as a step has tokens."""
        budget = self.limits.max_batch_tokens
        prefilling = any(s.num_missing > 1 for s in self.running)
        admissible = bool(self.waiting) and len(self.running) < self.limits.max_num_seqs
        return budget - max(budget // 4, min(1, budget - 1)) if prefilling or admissible else budget

    def _pick_prefills(self, batch: list[tuple[Sequence, int]]) -> None:
        budget = self.limits.max_batch_tokens - len(batch)
        for sequence in list(self.running):
            if budget <= 0:
                return
            # What decodes in this step misses one token, and is running still.
            if sequence.num_missing <= 1 or sequence.state is not State.RUNNING or sequence in self._suspects:
                continue
            chunk = min(sequence.num_missing, budget)
            if self._make_room(sequence, sequence.num_computed + chunk, taken=batch):
                batch.append((sequence, chunk))
                budget -= chunk
        while budget > 0 and self.waiting and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            # All of it must fit now: admitting what would soon have to be preempted computes twice.
            if self.allocator.pages_for(len(sequence.tokens) + 1) > self.allocator.num_free:
                return
            self.waiting.popleft()
            sequence.state = State.RUNNING
            self.running.append(sequence)
            chunk = min(len(sequence.tokens), budget)
            self.allocator.grow(sequence.seq_id, chunk)
            batch.append((sequence, chunk))
            budget -= chunk

    def _make_room(self, sequence: Sequence, num_tokens: int, taken: list[tuple[Sequence, int]]) -> bool:
        """Grows `sequence`, preempting later ones until it fits; False if it must wait for this step."""
        while True:
            try:
                self.allocator.grow(sequence.seq_id, num_tokens)
                return True
            except OutOfPages:
                planned = {other for other, _ in taken}
                spare = (s for s in reversed(self.running) if not s.in_flight and s not in planned)
                victim = next(spare, None)
                if victim is None:
                    return False
                self._preempt(victim)
                if victim is sequence:
                    return False

    def _preempt(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self.running.remove(sequence)
        self.allocator.release(sequence.seq_id)
        sequence.num_computed = 0
        # Its pages are others' from now on: the first stage must not offer them to a next engine.
        self._closed.append(sequence.seq_id)
        self.waiting.appendleft(sequence)
        self.num_preempted += 1

    def _plan(self, epoch: int, step: int, batch: list[tuple[Sequence, int]], closed: list[str]) -> StepPlan:
        tokens = array("i")
        tables = [self.allocator.table(sequence.seq_id) for sequence, _ in batch]
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
            num_pages=[len(table) for table in tables],
            pages=b"".join(table.tobytes() for table in tables),
            samples=samples,
            closed=closed,
        )

    def _append(self, sequence: Sequence, token: int) -> Finished:
        position = sequence.num_generated
        sequence.tokens.append(token)
        # What killed before did so again before it came this far.
        self._suspects.clear(sequence)
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
        (self.waiting if sequence.state is State.WAITING else self.running).remove(sequence)
        self._suspects.clear(sequence)
        self.allocator.release(sequence.seq_id)
        self._closed.append(sequence.seq_id)
        del self._by_request[sequence.request.request_id]
