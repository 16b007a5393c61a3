"""A request inside the engine: its tokens, how many of them have KV, and what it is doing."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import Enum

from r1_cluster.records import Request


class State(Enum):
    """What a sequence is doing. Only one that is waiting has no pages for sure."""

    WAITING = "waiting"
    RUNNING = "running"
    IN_FLIGHT = "in flight"
    """Running, in a step that was planned and has not ended."""
    ENDING = "ending"
    """In flight, and aborted meanwhile: it ends with its step."""


@dataclass(eq=False)
class Sequence:
    """A request inside the engine. `tokens` is prompt + generated; `num_computed` of them have KV.

    `turn` counts on whenever a sequence is planned: who has the lowest waits longest. `stop_ids` are the
    tokens that end it now. `undecided`: the model may still open a thought, through which stops sleep.
    `data_rank` is where it runs, once it does.
    """

    request: Request
    tokens: array[int]
    stop_ids: frozenset[int]
    num_computed: int = 0
    state: State = State.WAITING
    turn: int = -1
    undecided: bool = False
    data_rank: int = 0

    @classmethod
    def of(cls, request: Request, eos_ids: frozenset[int], blank_ids: frozenset[int]) -> Sequence:
        """A request as it comes, whatever a former engine generated of its answer. `blank_ids`: the tokens of
        white space alone, which a model may write before a thought."""
        tokens = array("i", request.prompt)
        tokens.extend(request.generated)
        sequence = cls(request, tokens, frozenset() if request.ignore_eos else eos_ids)
        # What was generated may hold the end of the thought, or that there is none.
        if request.sleeping_until is None or request.sleeping_until in request.generated:
            sequence.wake_stops()
        elif request.sleeping_from is not None:
            sequence.undecided = True
            first = next((token for token in request.generated if token not in blank_ids), None)
            if first is not None:
                sequence.decide(first)
        return sequence

    @property
    def seq_id(self) -> str:
        return self.request.request_id

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_missing(self) -> int:
        """Tokens without KV; one where the next step decodes."""
        return len(self.tokens) - self.num_computed

    @property
    def in_flight(self) -> bool:
        return self.state in (State.IN_FLIGHT, State.ENDING)

    def decide(self, token: int) -> None:
        """The first token that is not white space says whether there is a thought. What is neither tag is the
        answer already, and may end it."""
        self.undecided = False
        if token not in (self.request.sleeping_from, self.request.sleeping_until):
            self.wake_stops()

    def wake_stops(self) -> None:
        """From the next token on, the request's stop tokens end it. EOS never sleeps."""
        self.stop_ids = self.stop_ids.union(self.request.stop_token_ids)
