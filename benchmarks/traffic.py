"""What a layout's links carry in one step: counted by their own counters, beside what arithmetic says.

The workers run as threads of this process, over the sockets that they would have as processes; the engine's
scheduler and its control links give them one step at a time. What is due follows from the plan, the layout,
the model's widths and the experts that the gates chose, and has to be what was counted, to the byte.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.processes import SECRET, Settings, worker_boot
from kernels import ROW_TILE
from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import wait_any
from r1_cluster.comm.listener import connect
from r1_cluster.comm.wire import HEADER_SIZE, SPEC_SIZE, pack, pack_seconds
from r1_cluster.config import LayoutConfig, Service
from r1_cluster.engine.boot import ENGINE
from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.pipeline import Member, Pipeline
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.engine.worker import Hidden, Worker
from r1_cluster.models.config import ModelConfig
from r1_cluster.models.family import EMBEDDING, HEAD, load_config, tensor_table
from r1_cluster.planning.layout import Layout, WorkerSpec, build_layout
from r1_cluster.records import Request, SamplingParams, StepPlan, StepResult
from r1_cluster.weights.tensors import rank_slices

WAIT_S = 60.0
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0)


class Carried(NamedTuple):
    """What went from one worker, or the engine, to another."""

    messages: int
    num_bytes: int


Carriage = dict[tuple[str, str], Carried]
"""By sender and receiver; those between whom nothing went are not in it."""


class Step(NamedTuple):
    """A step as it was planned and answered, by data rank; by data rank and layer the experts [T, K] that the
    gates chose for its tokens; and what it made the links carry."""

    plans: list[StepPlan]
    results: list[StepResult]
    chosen: dict[tuple[int, int], np.ndarray]
    carried: Carriage

    @property
    def num_tokens(self) -> int:
        """Those of all data ranks."""
        return sum(sum(plan.num_new) for plan in self.plans)


class Steps:
    """A layout's workers, and steps over them, one at a time. To be closed; a context manager does."""

    def __init__(self, settings: Settings, layout: LayoutConfig) -> None:
        self.config = load_config(Path(settings.checkpoint))
        self.layout = build_layout(layout, self.config)
        self._chosen: dict[tuple[int, int], np.ndarray] = {}
        self._results: list[StepResult] = []
        self._workers: dict[str, Worker] = {}
        for spec in self.layout.workers:
            worker = self._workers[spec.name] = Worker(worker_boot(settings, self.layout, spec.name, "first"))
            self._note_choices(worker)
        self._threads = [threading.Thread(target=worker.run) for worker in self._workers.values()]
        for thread in self._threads:
            thread.start()
        self._pipeline = Pipeline(
            self.layout, {name: self._member(name) for name in self._workers}, 1, WAIT_S
        )
        self._pipeline.link(1)
        limits = Limits(settings.max_num_seqs, settings.max_batch_tokens, settings.max_context_len)
        allocators = [PageAllocator(settings.num_pages, settings.page_size) for _ in self.layout.first_stages]
        self._scheduler = Scheduler(limits, allocators, frozenset())

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipeline.close()
        for worker in self._workers.values():
            worker.stop()
        for thread in self._threads:
            thread.join()

    def _member(self, name: str) -> Member:
        endpoint = self._workers[name].listener.address
        return Member(connect(endpoint, Hello(ENGINE, ENGINE, 1, "control"), SECRET), endpoint, "first")

    def _note_choices(self, worker: Worker) -> None:
        if worker.router is None:
            return
        model = worker.router.model
        gate = model.gate

        def noting(layer: int, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights_TK, ids_TK = gate(layer, x_TD)
            self._chosen[worker.spec.data_rank, layer] = ids_TK.numpy()
            return weights_TK, ids_TK

        model.gate = noting  # type: ignore[method-assign]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Step:
        """The step that computes all prompts; they go on until `clear`."""
        for i, prompt in enumerate(prompts):
            self._scheduler.add(Request(f"r{i}", list(prompt), GREEDY, 1 << 20, [], ENGINE, ignore_eos=True))
        return self.step()

    def clear(self) -> None:
        """Ends all sequences."""
        for request in self._scheduler.requests():
            self._scheduler.abort(request.request_id)

    def step(self) -> Step:
        """The next step: of all sequences one token more."""
        before = self._carried()
        plans = self._scheduler.schedule(self._pipeline.epoch)
        assert plans, "there is no sequence"
        self._chosen.clear()
        for plan in plans:
            self._pipeline.send(plan)
        results = sorted((self._result() for _ in plans), key=lambda result: result.data_rank)
        for result in results:
            self._scheduler.commit(result)
        after = self._carried()
        none = Carried(0, 0)
        grown = {
            link: Carried(*(a - b for a, b in zip(now, before.get(link, none))))
            for link, now in after.items()
        }
        num_tokens = [sum(plan.num_new) for plan in plans]
        return Step(
            plans,
            results,
            {which: ids_TK[: num_tokens[which[0]]] for which, ids_TK in self._chosen.items()},
            {link: carried for link, carried in grown.items() if carried != none},
        )

    def _result(self) -> StepResult:
        if self._results:
            return self._results.pop()
        links = [member.link for member in self._pipeline.members.values()]
        while ready := wait_any(links, WAIT_S):
            self._results += filter(None, map(self._pipeline.receive, ready))
            if self._results:
                return self._results.pop()
        raise RuntimeError(f"a step has not ended in {WAIT_S:g} s")

    def _carried(self) -> Carriage:
        """What has been carried so far, once both ends of each link say the same."""
        deadline = time.monotonic() + WAIT_S
        while True:
            sent: Carriage = {}
            received: Carriage = {}
            ends = [(name, worker.peers.traffic.copy()) for name, worker in self._workers.items()]
            ends += [(ENGINE, {name: m.link.traffic for name, m in self._pipeline.members.items()})]
            for end, peers in ends:
                for peer, traffic in peers.items():
                    sent[end, peer] = Carried(traffic.sent_messages, traffic.sent_bytes)
                    received[peer, end] = Carried(traffic.received_messages, traffic.received_bytes)
            if sent == received:
                return sent
            if time.monotonic() > deadline:
                differ = [link for link in sent if sent[link] != received.get(link)]
                raise RuntimeError(f"the two ends of these links have counted differently: {differ}")
            time.sleep(0.001)


def due(config: ModelConfig, layout: Layout, step: Step, item_bytes: int) -> Carriage:
    """What a step has its links carry by arithmetic. A row of hidden states is D · `item_bytes`; a step's T
    tokens go to stages, ranks and routers in whole tiles of rows, and to experts in T · K rows."""
    found: Carriage = {}

    def carry(sender: str, receiver: str, num_bytes: int, times: int = 1) -> None:
        if times:
            before = found.get((sender, receiver), Carried(0, 0))
            found[sender, receiver] = Carried(before.messages + times, before.num_bytes + times * num_bytes)

    for firsts, plan in zip(layout.first_stages, step.plans, strict=True):
        for rank in firsts:
            carry(ENGINE, rank.name, HEADER_SIZE + len(pack(plan)))
    for ranks in layout.stages:
        first, end = _span(ranks[0].stage)
        is_last = end == config.num_hidden_layers
        plan = step.plans[ranks[0].data_rank]
        if is_last:
            result = step.results[ranks[0].data_rank]
            carry(ranks[0].name, ENGINE, HEADER_SIZE + len(pack(result)))
        if not plan.num_new:
            continue
        num_rows = -(-sum(plan.num_new) // ROW_TILE) * ROW_TILE
        hidden = _message(num_rows * config.hidden_size * item_bytes)
        num_moe = sum(first <= layer < end for layer in config.moe_layers)
        for rank in ranks:
            if following := layout.following(rank):
                carry(rank.name, following, hidden + len(pack(Hidden(plan, 0.0))))
            router = layout.router_of(rank)
            if router is not None and router is not rank:
                carry(rank.name, router.name, hidden, num_moe)
                carry(router.name, rank.name, hidden + len(pack_seconds(0.0)), num_moe)
            # After attention and after each MLP or mixture, and after the embedding.
            sums = 2 * (end - first) + (first == 0)
            for other in ranks:
                if other is not rank:
                    carry(rank.name, other.name, hidden, sums)
            if is_last and rank.rank and plan.samples:
                num_logits = len(plan.samples) * _columns(config, rank)
                carry(rank.name, ranks[0].name, _message(num_logits * 4))
    first_hosts = {shard.experts: shard for shard in reversed(layout.shards)}
    for worker in layout.workers:
        if worker.router is None or layout.has_its_experts(worker):
            continue
        first, end = _span(worker.router)
        exchanged = layout.exchange_of(worker)
        shards = [(shard.experts, shard) for shard in exchanged] or first_hosts.items()
        for layer in config.moe_layers:
            if not first <= layer < end:
                continue
            chosen = step.chosen.get((worker.data_rank, layer), np.empty((0, 1)))
            for span, shard in shards:
                low, high = _span(span)
                rows = int(((chosen >= low) & (chosen < high)).sum())
                payload = _message(rows * config.hidden_size * item_bytes) if rows else HEADER_SIZE
                if not exchanged:
                    carry(worker.name, shard.name, payload + 4 * (high - low), int(rows > 0))
                    carry(shard.name, worker.name, payload + len(pack_seconds(0.0)), int(rows > 0))
                elif shard is not worker:  # who has no rows says so
                    carry(worker.name, shard.name, payload + 4 * (high - low))
                    carry(shard.name, worker.name, payload)
    return found


def _message(payload_bytes: int) -> int:
    """A message of one tensor."""
    return HEADER_SIZE + SPEC_SIZE + payload_bytes


def _span(span: tuple[int, int] | None) -> tuple[int, int]:
    assert span is not None
    return span


def _columns(config: ModelConfig, rank: WorkerSpec) -> int:
    name = EMBEDDING if config.tie_word_embeddings else HEAD
    (head,) = (spec for spec in tensor_table(config) if spec.name == name)
    slices = rank_slices(head, rank.rank, rank.ranks)
    assert slices is not None
    return len(range(*slices[0].indices(head.shape[0])))


def measure(steps: Steps, decode: Sequence[int], prefill: int) -> dict[str, Step]:
    """A step that decodes each of so many sequences, and one that computes a prompt of `prefill` tokens."""
    rng = np.random.default_rng(1)

    def prompts(count: int, length: int) -> list[list[int]]:
        prompts: list[list[int]] = rng.integers(0, steps.config.vocab_size, (count, length)).tolist()
        return prompts

    found = {}
    for count in decode:
        steps.prefill(prompts(count, 4))
        found[f"decode of {count}"] = steps.step()
        steps.clear()
    found[f"prefill of {prefill}"] = steps.prefill(prompts(1, prefill))
    steps.clear()
    return found


def tables(
    config: ModelConfig, layout: Layout, steps: Mapping[str, Step], item_bytes: int
) -> tuple[list[str], bool]:
    """(lines, whether all is as arithmetic says): messages and bytes by link, and by layer for the links that
    every layer uses."""
    dues = {name: due(config, layout, step, item_bytes) for name, step in steps.items()}
    names = [ENGINE, *(worker.name for worker in layout.workers)]
    used = {
        link for carriage in (*dues.values(), *(step.carried for step in steps.values())) for link in carriage
    }
    links = sorted(used, key=lambda link: [names.index(end) for end in link])
    head = [f"| messages · bytes a step | {' | '.join(steps)} |", "| --- |" + " ---: |" * len(steps)]
    lines = list(head)
    for link in links:
        cells = []
        for name, step in steps.items():
            carried, expected = step.carried.get(link), dues[name].get(link)
            cells.append(_cell(carried) + ("" if carried == expected else f" (due: {_cell(expected)})"))
        lines.append(f"| {' → '.join(link)} | {' | '.join(cells)} |")
    every_layer = list(_of_every_layer(config, layout, links))
    if every_layer:
        lines += ["", head[0].replace("a step", "a layer and step"), head[1]]
    for name, num_layers, members in every_layer:
        cells = []
        for step in steps.values():
            carried = [step.carried.get(link, Carried(0, 0)) for link in members]
            messages, num_bytes = (sum(column) / num_layers for column in zip(*carried))
            cells.append(f"{messages:.1f} · {num_bytes:,.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if any(layout.router_of(rank) not in (None, rank) for ranks in layout.stages for rank in ranks):
        assert config.moe is not None
        row = config.moe.num_experts_per_tok * config.hidden_size * item_bytes
        cells = [f"{step.num_tokens * row:,}" for step in steps.values()]
        lines.append(f"| of which rows, one way: T · K · D · {item_bytes} | {' | '.join(cells)} |")
    return lines, all(step.carried == dues[name] for name, step in steps.items())


def _of_every_layer(
    config: ModelConfig, layout: Layout, links: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, int, list[tuple[str, str]]]]:
    """(name, number of layers that use them, links): between roles, and between the ranks of a stage."""
    roles = {worker.name: worker.roles for worker in layout.workers}
    ranks = {rank.name: index for index, stage in enumerate(layout.stages) for rank in stage}
    for sender, receiver in (("stage", "router"), ("router", "experts")):
        both = ((sender,), (receiver,))
        for ways in (both, both[::-1]):
            members = [link for link in links if tuple(roles.get(end) for end in link) == ways]
            if members:
                yield f"{ways[0][0]} → {ways[1][0]}, all", len(config.moe_layers), members
    members = [link for link in links if ENGINE not in link and ranks.get(link[0]) == ranks.get(link[1], -1)]
    if members:
        yield "rank ⇄ rank, all", config.num_hidden_layers, members
    peers = {w.name: {peer.name for peer in layout.exchange_of(w)} for w in layout.workers}
    members = [link for link in links if link[1] in peers.get(link[0], ())]
    if members:
        yield "data rank ⇄ data rank, all", len(config.moe_layers), members


def _cell(carried: Carried | None) -> str:
    return "none" if carried is None else f"{carried.messages} · {carried.num_bytes:,}"


def report(service: Service, decode: Sequence[int], prefill: int) -> tuple[list[str], bool]:
    """`tables` of a service file's layout and model, on the CPU."""
    most = max(prefill, 4 * max(decode))
    settings = Settings(
        checkpoint=service.model.path,
        device="cpu",
        dtype=service.dtype,
        transport="sockets",
        max_batch_tokens=most,
        max_num_seqs=max(decode),
        max_context_len=most + 1,
        step_timeout_s=WAIT_S,
        lease_s=2 * WAIT_S,
    )
    with Steps(settings, service.layout) as steps:
        found = measure(steps, decode, prefill)
        return tables(steps.config, steps.layout, found, ITEM_BYTES[service.dtype])
