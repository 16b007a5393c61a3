"""Continuous batching: decides which sequences take part in the next step, and with how many tokens.

Decoding sequences come first, one token each; what the token budget leaves goes to prompts, in chunks,
first come first served. When pages run out, the sequence that came last loses its pages and is computed
again later ("preemption by recomputation"), which changes no text, only its time.

With several data ranks each has a batch of its own in every step, perhaps an empty one; whoever waits is
admitted where the fewest run.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from r1_cluster.engine.data_rank import Batch, DataRank
from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.sequence import Sequence, State
from r1_cluster.engine.suspects import Suspects
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
)


@dataclass(frozen=True)
class Limits:
    """Scheduler limits, of each data rank; see `config.Engine`. Up to `micro_batches` steps are in flight;
    another one decodes only where each of them has at least `least_decodes` sequences to decode."""

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
        allocators: Iterable[PageAllocator],
        eos_ids: frozenset[int],
        blank_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`allocators`: the pages of each data rank. `blank_ids`: the tokens of white space alone, which a
        model may write before a thought."""
        self.limits = limits
        self.data_ranks = [DataRank(i, allocator) for i, allocator in enumerate(allocators)]
        self.waiting: deque[Sequence] = deque()
        self.num_preempted = 0
        self._eos_ids, self._blank_ids = eos_ids, blank_ids
        self._by_request: dict[str, Sequence] = {}
        self._planned: dict[int, dict[int, Batch]] = {}  # of each step what data ranks have not computed yet
        self._suspects = Suspects()
        self._next_step = 0
        self._next_turn = 0

    @property
    def num_in_flight(self) -> int:
        return len(self._planned)

    @property
    def idle(self) -> bool:
        return not self._by_request

    @property
    def running(self) -> list[Sequence]:
        """Those of all data ranks."""
        return [sequence for rank in self.data_ranks for sequence in rank.running]

    @property
    def num_pages(self) -> int:
        return sum(rank.allocator.num_pages for rank in self.data_ranks)

    @property
    def num_pages_used(self) -> int:
        return sum(rank.allocator.num_used for rank in self.data_ranks)

    @property
    def _present(self) -> list[DataRank]:
        return [rank for rank in self.data_ranks if rank.present]

    def add(self, request: Request) -> None:
        """Queues a new request. The ingress has checked its length against `max_model_len` and the pages."""
        sequence = Sequence.of(request, self._eos_ids, self._blank_ids)
        self._by_request[request.request_id] = sequence
        holder = next((rank for rank in self.data_ranks if rank.join(sequence)), None)
        if holder is not None:
            holder.run(sequence)
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
        self._suspects.isolate(sequence)
        self._present[0].run(sequence, first=True)

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

    def schedule(self, epoch: int) -> list[StepPlan]:
        """The next step's plans, one for each data rank that is there; none when nothing can be computed now.
        Suspects wait for all else to end."""
        batches: dict[int, Batch] = {rank.index: [] for rank in self._present}
        if any(sequence in self._suspects for sequence in (*self.running, *self.waiting)):
            if self._planned:
                return []
            self._pick_suspect(batches)
        if not any(batches.values()):
            for rank in self._present:
                self._pick_decodes(rank, batches[rank.index])
                self._pick_prefills(rank, batches[rank.index])
            self._admit(batches)
        if not any(batches.values()):
            return []
        step = self._next_step
        for sequence, _ in (each for batch in batches.values() for each in batch):
            sequence.state = State.IN_FLIGHT
            sequence.turn = self._next_turn
            self._next_turn += 1
        self._next_step += 1
        self._planned[step] = batches
        plans = []
        for index, batch in batches.items():
            closed, self.data_ranks[index].closed = self.data_ranks[index].closed, []
            plans.append(self._plan(epoch, step, index, batch, closed))
        return plans

    def adopt(self, held: Iterable[dict[str, HeldSequence]]) -> None:
        """Reserves the pages of sequences that a former engine left on the workers of each data rank, until
        their requests come again (`add`) or `release_held` gives them up. On an engine that has no sequence
        yet."""
        for rank, sequences in zip(self.data_ranks, held):
            rank.takeover.adopt(sequences)

    def release_held(self) -> int:
        """Frees what no request came back for; returns how many sequences that were."""
        return sum(rank.give_up_held() for rank in self.data_ranks)

    def forget_kv(self, data_ranks: Collection[int]) -> None:
        """A stage of each of these lost its pages: their sequences are computed again, in the order of
        admission; their parts of steps in flight are as if they had never been planned."""
        for rank in (self.data_ranks[index] for index in data_ranks):
            for step in list(self._planned):
                self._unplan(step, rank.index)
            for sequence in rank.running:
                sequence.num_computed = 0
            rank.give_up_held()

    def use(self, data_ranks: Collection[int]) -> None:
        """From now on these are there, and no others, whose sequences go on elsewhere. The KV of a data rank
        that goes was lost, and `forget_kv` told so."""
        for rank in self.data_ranks:
            rank.present = rank.index in data_ranks
            if not rank.present:
                for sequence in reversed(list(rank.running)):
                    self._requeue(rank, sequence)

    def suspect(self) -> tuple[list[Request], float]:
        """A worker died while the planned steps ran: see `Suspects.accuse`."""
        batches = [[sequence for sequence, _ in batch] for _, _, batch in self._batches()]
        guilty, since = self._suspects.accuse(batches)
        return [sequence.request for sequence in guilty], since

    def replan(self, epoch: int) -> list[StepPlan]:
        """Plans of all steps in flight, under a new epoch: what a lost peer spoiled is done again. The part
        of a step with an aborted sequence, or a suspected one in company, is not repeated: its sequences are
        planned anew, the suspected ones alone."""
        in_flight = list(self._batches())
        for step, index, batch in in_flight:
            sequences = [sequence for sequence, _ in batch]
            crowded = len(in_flight) > 1 or len(batch) > 1
            in_company = crowded and any(s in self._suspects for s in sequences)
            if in_company or any(s.state is State.ENDING for s in sequences):
                self._unplan(step, index)
        plans = []
        for step, batches in list(self._planned.items()):
            self._planned[step] = {rank.index: batches.get(rank.index, []) for rank in self._present}
            plans += [self._plan(epoch, step, i, batch, []) for i, batch in self._planned[step].items()]
        return plans

    def commit(self, result: StepResult) -> list[Finished]:
        """Takes over what a data rank computed of a step; returns one delta per sequence that got a token or
        ended."""
        batches = self._planned[result.step]
        batch = batches.pop(result.data_rank)
        if not batches:
            del self._planned[result.step]
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
        live = {sequence.seq_id for sequence in (*self.running, *self.waiting)}
        assert len(live) == len(self._by_request)
        for rank in self.data_ranks:
            rank.check()

    def _batches(self) -> Iterator[tuple[int, int, Batch]]:
        """Step, data rank and sequences of what is in flight."""
        for step, batches in self._planned.items():
            for index, batch in batches.items():
                if batch:
                    yield step, index, batch

    def _unplan(self, step: int, data_rank: int) -> None:
        """A data rank's part of a step in flight is as if it had never been planned; a step that nobody has a
        part of is none."""
        batches = self._planned[step]
        for sequence, _ in batches.get(data_rank, []):
            self._landed(sequence)
        batches[data_rank] = []
        if not any(batches.values()):
            del self._planned[step]

    def _landed(self, sequence: Sequence) -> bool:
        """A sequence's step is over; whether it was aborted meanwhile, and has ended."""
        if sequence.state is State.ENDING:
            self._close(sequence)
            return True
        sequence.state = State.RUNNING
        return False

    def _pick_suspect(self, batches: dict[int, Batch]) -> None:
        # The engine's own request, of which it depends what a conviction excuses, comes before all others.
        ranks = sorted(self._present, key=lambda rank: all(s.request.sink != NOBODY for s in rank.running))
        for rank in ranks:
            for sequence in rank.running:
                if sequence in self._suspects and sequence.state is State.RUNNING:
                    chunk = min(sequence.num_missing, self.limits.max_batch_tokens)
                    if self._make_room(rank, sequence, sequence.num_computed + chunk, taken=[]):
                        batches[rank.index].append((sequence, chunk))
                        return
        for sequence in sorted(self.waiting, key=lambda s: s.request.sink != NOBODY):
            freest = self._freest(sequence, batches) if sequence in self._suspects else None
            if freest is not None:
                self.waiting.remove(sequence)
                self._start(freest, sequence, batches[freest.index])
                return

    def _pick_decodes(self, rank: DataRank, batch: Batch) -> None:
        decoding = [s for s in rank.running if s not in self._suspects and s.num_missing == 1]
        ready = [s for s in decoding if s.state is State.RUNNING]
        # Few sequences decode in one step, which costs its launches, messages and tiles of rows whatever they
        # are. Whoever comes in between waits for that step, and joins the others in the next.
        parts = max(1, min(self.limits.micro_batches, len(decoding) // self.limits.least_decodes))
        in_flight = [batches.get(rank.index, []) for batches in self._planned.values()]
        if sum(any(s.num_missing == 1 for s, _ in batch) for batch in in_flight) >= parts:
            return
        share = -(-len(decoding) // parts)
        # A takeover may leave more sequences than there may be.
        size = min(share, self._decode_budget(rank), self.limits.max_num_seqs)
        # Where there are more than a step has room for they take turns: who waits longest comes first.
        ready.sort(key=lambda sequence: sequence.turn)
        for sequence in ready:
            if len(batch) >= size:
                return
            # One before it may have taken its pages.
            running = sequence.state is State.RUNNING
            if running and self._make_room(rank, sequence, sequence.num_computed + 1, taken=batch):
                batch.append((sequence, 1))

    def _decode_budget(self, rank: DataRank) -> int:
        """Tokens of a step that decodes may take. A quarter is kept for prompts while one waits: else they
        would starve where as many sequences may decode as a step has tokens."""
        budget = self.limits.max_batch_tokens
        prefilling = any(s.num_missing > 1 for s in rank.running)
        admissible = bool(self.waiting) and len(rank.running) < self.limits.max_num_seqs
        return budget - max(budget // 4, min(1, budget - 1)) if prefilling or admissible else budget

    def _pick_prefills(self, rank: DataRank, batch: Batch) -> None:
        budget = self._left(batch)
        for sequence in list(rank.running):
            if budget <= 0:
                return
            # What decodes in this step misses one token, and is running still.
            if sequence.num_missing <= 1 or sequence.state is not State.RUNNING or sequence in self._suspects:
                continue
            chunk = min(sequence.num_missing, budget)
            if self._make_room(rank, sequence, sequence.num_computed + chunk, taken=batch):
                batch.append((sequence, chunk))
                budget -= chunk

    def _admit(self, batches: dict[int, Batch]) -> None:
        """First come, first served; a suspect is not admitted in company."""
        while self.waiting and self.waiting[0] not in self._suspects:
            rank = self._freest(self.waiting[0], batches)
            if rank is None:
                return
            self._start(rank, self.waiting.popleft(), batches[rank.index])

    def _freest(self, sequence: Sequence, batches: dict[int, Batch]) -> DataRank | None:
        """Of the data ranks that have room for a sequence in this step, the one where the fewest run."""
        fitting = [
            rank
            for rank in self._present
            if len(rank.running) < self.limits.max_num_seqs
            and self._left(batches[rank.index]) > 0
            and rank.fits(sequence)
        ]
        return min(fitting, key=lambda rank: len(rank.running), default=None)

    def _start(self, rank: DataRank, sequence: Sequence, batch: Batch) -> None:
        rank.run(sequence)
        chunk = min(len(sequence.tokens), self._left(batch))
        rank.allocator.grow(sequence.seq_id, chunk)
        batch.append((sequence, chunk))

    def _left(self, batch: Batch) -> int:
        return self.limits.max_batch_tokens - sum(num_new for _, num_new in batch)

    def _make_room(self, rank: DataRank, sequence: Sequence, num_tokens: int, taken: Batch) -> bool:
        """Grows `sequence`, preempting later ones until it fits; False if it must wait for this step."""
        while not rank.grow(sequence, num_tokens):
            planned = {other for other, _ in taken}
            spare = (s for s in reversed(rank.running) if not s.in_flight and s not in planned)
            victim = next(spare, None)
            if victim is None:
                return False
            self._requeue(rank, victim)
            self.num_preempted += 1
            if victim is sequence:
                return False
        return True

    def _requeue(self, rank: DataRank, sequence: Sequence) -> None:
        """A sequence loses its place and pages, and waits before all others."""
        sequence.state = State.WAITING
        rank.running.remove(sequence)
        rank.give_back(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)

    def _plan(self, epoch: int, step: int, data_rank: int, batch: Batch, closed: list[str]) -> StepPlan:
        tokens = array("i")
        allocator = self.data_ranks[data_rank].allocator
        tables = [allocator.table(sequence.seq_id) for sequence, _ in batch]
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
            data_rank=data_rank,
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
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
            for rank in self.data_ranks:  # one may still hold what a former engine had computed of it
                rank.closed.append(sequence.seq_id)
        else:
            rank = self.data_ranks[sequence.data_rank]
            rank.running.remove(sequence)
            rank.give_back(sequence)
        self._suspects.clear(sequence)
        del self._by_request[sequence.request.request_id]
