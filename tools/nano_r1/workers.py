"""Data-parallel gradients from single-threaded processes that meet once a step.

Threads inside one process would meet at every small matrix product; on a machine that others use too, each of
those meetings may wait for the scheduler. The parameters lie in shared memory: the parent updates them.
"""

import multiprocessing.synchronize
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from nano_r1.batches import Chat, Group, chats_at, groups_for
from nano_r1.model import NanoR1, causal_mask
from nano_r1.tokenizer import ChatEncoder

PATIENCE_S = 600.0  # a worker whose parent is gone ends after this time


def group_losses(model: NanoR1, group: Group) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of the tokens to be learnt: by the head, and by the MTP module one token ahead."""
    positions = model.positions(causal_mask(group.ids.shape[1]))
    hidden = model.trunk(group.ids, positions)
    drafted = model.draft(hidden, group.ids.roll(-1, 1), positions)
    sums = []
    for state, shift in ((hidden, 1), (drafted, 2)):
        learnt = group.learnt[:, shift:]
        logits = model.head(state[:, :-shift][learnt])
        sums.append(F.cross_entropy(logits, group.ids[:, shift:][learnt], reduction="sum"))
    return sums[0], sums[1]


@dataclass(frozen=True)
class StepPlan:
    """What decides the chats of a step."""

    step: int
    seed: int
    num_tokens: int
    mtp_weight: float


@dataclass(frozen=True)
class StepResult:
    """Mean losses of a step and the tokens in it."""

    loss: float
    mtp_loss: float
    num_tokens: int


def accumulate(model: NanoR1, chats: list[Chat], mtp_weight: float, worker: int, num_workers: int) -> Tensor:
    """Add one worker's share of the gradient to `.grad`; returns its summed losses [2]."""
    num_learnt = sum(len(chat.ids) - chat.num_prompt for chat in chats)
    sums = torch.zeros(2)
    for group in groups_for(chats, worker, num_workers):
        loss, mtp_loss = group_losses(model, group)
        torch.autograd.backward((loss + mtp_weight * mtp_loss) / num_learnt)
        sums += torch.stack((loss.detach(), mtp_loss.detach()))
    return sums / num_learnt


def take_loads(model: NanoR1) -> Tensor:
    """The expert loads [layers, E] since they were taken last."""
    loads = torch.stack([block.load for block in model.moe_layers()])
    for block in model.moe_layers():
        block.load = torch.zeros_like(block.load)
    return loads


@dataclass
class _Mailbox:
    """Shared memory of one worker: its gradients, expert loads and losses."""

    grads: list[Tensor]
    loads: Tensor
    losses: Tensor


def _work(
    worker: int,
    num_workers: int,
    model: NanoR1,
    tokenizer_json: str,
    mailbox: _Mailbox,
    plans: "mp.SimpleQueue[StepPlan | None]",
    barrier: multiprocessing.synchronize.Barrier,
) -> None:
    torch.set_num_threads(1)
    encoder = ChatEncoder(Tokenizer.from_str(tokenizer_json))
    while (plan := plans.get()) is not None:
        chats = chats_at(plan.step, plan.seed, encoder, plan.num_tokens)
        for param in model.parameters():
            param.grad = None
        mailbox.losses.copy_(accumulate(model, chats, plan.mtp_weight, worker, num_workers))
        mailbox.loads.copy_(take_loads(model))
        for shared, param in zip(mailbox.grads, model.parameters(), strict=True):
            shared.copy_(torch.zeros_like(param) if param.grad is None else param.grad)
        barrier.wait(PATIENCE_S)


def _shared_zeros(shape: Sequence[int]) -> Tensor:
    zeros: Tensor = torch.zeros(*shape).share_memory_()  # type: ignore[no-untyped-call]
    return zeros


class WorkerPool:
    """The parent's view: itself and `num_workers - 1` processes."""

    def __init__(self, model: NanoR1, encoder: ChatEncoder, num_workers: int) -> None:
        torch.set_num_threads(1)
        self.model, self.encoder, self.num_workers = model.share_memory(), encoder, num_workers
        context = mp.get_context("spawn")
        self._barrier = context.Barrier(num_workers)
        self._plans = [context.SimpleQueue() for _ in range(num_workers - 1)]
        self._mailboxes = [
            _Mailbox(
                [_shared_zeros(param.shape) for param in model.parameters()],
                _shared_zeros((len(model.moe_layers()), model.config.n_routed_experts)),
                _shared_zeros((2,)),
            )
            for _ in self._plans
        ]
        self._processes = [
            context.Process(
                target=_work,
                args=(
                    index + 1,
                    num_workers,
                    self.model,
                    encoder.tokenizer.to_str(),
                    self._mailboxes[index],
                    self._plans[index],
                    self._barrier,
                ),
                daemon=True,
            )
            for index in range(num_workers - 1)
        ]
        for process in self._processes:
            process.start()

    def gradient(self, plan: StepPlan) -> tuple[StepResult, Tensor]:
        """Leave the step's gradient in `.grad`; returns its losses and the expert loads [layers, E]."""
        for queue in self._plans:
            queue.put(plan)
        chats = chats_at(plan.step, plan.seed, self.encoder, plan.num_tokens)
        losses = accumulate(self.model, chats, plan.mtp_weight, 0, self.num_workers)
        loads = take_loads(self.model)
        self._barrier.wait(PATIENCE_S)
        for mailbox in self._mailboxes:
            losses += mailbox.losses
            loads += mailbox.loads
            for param, shared in zip(self.model.parameters(), mailbox.grads, strict=True):
                param.grad = shared.clone() if param.grad is None else param.grad.add_(shared)
        num_tokens = sum(len(chat.ids) for chat in chats)
        return StepResult(losses[0].item(), losses[1].item(), num_tokens), loads

    def close(self) -> None:
        """End the workers."""
        for queue in self._plans:
            queue.put(None)
        for process in self._processes:
            process.join()
