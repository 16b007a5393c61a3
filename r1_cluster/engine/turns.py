"""Steps of a stage that take turns: while one waits for its mixture of experts, another one attends.

Only where the router is in another process. A stage asks it for one mixture at a time, and reads the answer
before it asks for the next: the two never send to each other at once, so that neither waits for the other to
read, however large the messages and whatever carries them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from r1_cluster.comm.links import Link
from r1_cluster.comm.wire import LinkError, Message, Unsendable, WireError
from r1_cluster.engine.roles import RemoteRouter, Step
from r1_cluster.records import StepPlan


@dataclass(frozen=True)
class Turn:
    """A step that a stage has begun. `before` is the link over which its hidden states came, None on the
    first stage; `before_s` is how long the operators of the stages before took."""

    plan: StepPlan
    step: Step
    before: Link | None
    before_s: float


class Turns:
    """The steps that wait for a stage's router. Owned by the worker's loop, which brings every MOE_RESULT,
    and says when the router is lost or `deadline` (of time.monotonic) has passed."""

    def __init__(
        self,
        router: RemoteRouter,
        end: Callable[[Turn, list[str]], None],
        refuse: Callable[[StepPlan, Unsendable], None],
    ) -> None:
        """`end(turn, lost)` is called for a step that was computed to its end, or given up because of those
        that were lost; `refuse(plan, why)` for one of which a message does not fit a link."""
        self.router = router
        self.deadline = math.inf
        self._end = end
        self._refuse = refuse
        self._waiting: deque[Turn] = deque()  # for the router, which works for the first of them

    def add(self, turn: Turn) -> None:
        """Takes a step that has come to a mixture of experts, or to its end."""
        if turn.step.asked is None:
            self._end(turn, [])
            return
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            self._ask()

    def take(self, message: Message) -> None:
        """The router's answer. The next step's question goes out before this step goes on. Raises WireError
        for what is no answer to the question that was asked."""
        if not self._waiting:
            raise WireError(f"{self.router.name} sent {message.header}, and was asked nothing")
        turn = self._waiting[0]
        assert turn.step.asked is not None
        try:
            y_TD, compute_s = self.router.read(turn.step.asked, message)
        except Unsendable as error:
            self.drop()
            self._refuse(turn.plan, error)
            return
        if lost := self.router.take_lost():
            self._give_up(lost)
            return
        self._waiting.popleft()
        self._ask()
        turn.step.go_on(y_TD, compute_s)
        self.add(turn)

    def lose(self) -> None:
        """The router is gone, or silent."""
        if self._waiting:
            self.router.hang_up()
            self._give_up([self.router.name])

    def drop(self) -> None:
        """Forgets all steps."""
        for turn in self._waiting:
            turn.step.close()
        self._waiting.clear()
        self.deadline = math.inf

    def _ask(self) -> None:
        """Asks for whoever is the first now."""
        self.deadline = math.inf
        if not self._waiting:
            return
        turn = self._waiting[0]
        assert turn.step.asked is not None
        try:
            self.router.ask(turn.step.asked)
            self.deadline = time.monotonic() + self.router.timeout_s
        except Unsendable as error:
            self.drop()
            self._refuse(turn.plan, error)
        except LinkError:
            self.deadline = 0.0  # it has passed: the loop says that the router is lost

    def _give_up(self, lost: list[str]) -> None:
        """One step's word of a loss is enough: the engine does all that are in flight again."""
        turn = self._waiting[0]
        self.drop()
        self._end(turn, lost)
