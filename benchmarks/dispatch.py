"""What it costs to bring tokens to experts and back where the experts themselves cost nothing: one router and
several expert shards, each a process of this machine, over the links that they would have as actors.

    python -m benchmarks.dispatch [--shards 8 16] [--tokens 128] [--rounds 50] [--tcp]

By default a decode step of R1 on one rank: 128 tokens, the best 8 of 256 experts, 7168 numbers wide, BF16.
Experts give back what they get. A round is a dispatch and its combine. CPU time is by token and layer, of
the router's process and of all shards' together; `kernel` is the share of it that was spent in system calls.
The router's own parts are run alone, on a round's tensors; what is left of its CPU time are its sockets. A
shard has nothing but sockets to do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import socket
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from r1_cluster.comm.dispatch import LinkDispatcher, StepTag, handle, sort_rows, sum_rows
from r1_cluster.comm.links import TcpLink
from r1_cluster.comm.wire import Header, Kind, LinkClosed, pack, unpack

TIMEOUT_S = 60.0
WARM_UP_ROUNDS = 5
NUM_EXPERTS, TOP_K, WIDTH = 256, 8, 7168


class Cpu(NamedTuple):
    """CPU seconds of a process, in its own code and in the kernel."""

    user_s: float = 0.0
    system_s: float = 0.0

    @classmethod
    def now(cls) -> Cpu:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(usage.ru_utime, usage.ru_stime)

    def plus(self, other: Cpu, sign: int = 1) -> Cpu:
        return Cpu(self.user_s + sign * other.user_s, self.system_s + sign * other.system_s)

    @property
    def both_s(self) -> float:
        return self.user_s + self.system_s


def connected(*, tcp: bool) -> tuple[socket.socket, socket.socket]:
    """Two ends over this host's loopback, or of a Unix socket."""
    if not tcp:
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        return near, far


def serve(sock: socket.socket) -> None:
    """An expert shard: gives rows back as they came and, on a heartbeat, the CPU time that it has used."""
    torch.set_num_threads(1)
    link = TcpLink(sock, "router")
    try:
        while True:
            message = link.recv(None)
            if message.header.kind == Kind.HEARTBEAT:
                link.send(message.header, (), pack(Cpu.now()))
            else:
                link.send(*handle(message, lambda layer, x_ND, counts: x_ND))
    except LinkClosed:
        link.close()


class Shards:
    """Expert shards in processes of their own, and a dispatcher over them. To be closed; a context manager
    does."""

    def __init__(self, count: int, *, tcp: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._links: list[TcpLink] = []
        self._processes = []
        for i in range(count):
            near, far = connected(tcp=tcp)
            process = context.Process(target=serve, args=(far,), daemon=True)
            process.start()
            far.close()
            self._processes.append(process)
            self._links.append(TcpLink(near, f"experts-{i}"))
        spans = [range(NUM_EXPERTS * i // count, NUM_EXPERTS * (i + 1) // count) for i in range(count)]
        self.dispatcher = LinkDispatcher(self._links, spans, TIMEOUT_S)
        self.cpu()  # all have started: who reads nothing for some seconds counts as gone

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._links:
            link.close()
        for process in self._processes:
            process.join()

    def carried(self) -> tuple[int, int]:
        """Messages and bytes, both ways, so far."""
        traffic = [link.traffic for link in self._links]
        return (
            sum(t.sent_messages + t.received_messages for t in traffic),
            sum(t.sent_bytes + t.received_bytes for t in traffic),
        )

    def cpu(self) -> Cpu:
        """What all shards have used so far."""
        used = Cpu()
        for link in self._links:
            link.send(Header(Kind.HEARTBEAT))
            used = used.plus(unpack(link.recv(TIMEOUT_S).body, Cpu))
        return used


class Row(NamedTuple):
    """What a round took and carried; CPU times are of one round."""

    round_ms: float
    messages: float
    num_bytes: float
    router: Cpu
    shards: Cpu
    parts_ms: dict[str, float]


def median_ms(once: Callable[[], object], rounds: int) -> float:
    """The median time of one call."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        once()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def cpu_ms(once: Callable[[], object], rounds: int) -> float:
    """The mean CPU time of one call."""
    before = Cpu.now()
    for _ in range(rounds):
        once()
    return Cpu.now().plus(before, -1).both_s / rounds * 1e3


def draw(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_TD, weights_TK, expert_ids_TK) of a step whose tokens choose all experts alike."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, WIDTH, generator=generator).to(torch.bfloat16)
    chances = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    return x_TD, torch.rand(num_tokens, TOP_K, generator=generator), chances.topk(TOP_K).indices


@torch.inference_mode()
def measure(num_shards: int, num_tokens: int, rounds: int, *, tcp: bool = False) -> Row:
    """Rounds of `num_tokens` tokens over so many shards. Raises RuntimeError where what is combined is not
    Σ_k weight · x."""
    x_TD, weights_TK, ids_TK = draw(num_tokens)
    with Shards(num_shards, tcp=tcp) as shards:
        dispatcher = shards.dispatcher

        def once() -> Tensor:
            dispatcher.dispatch(StepTag(1, 1, 1, 0), x_TD, weights_TK, ids_TK, num_tokens)
            return dispatcher.combine()

        for _ in range(WARM_UP_ROUNDS):
            y_TD = once()
        if not torch.allclose(y_TD.float(), x_TD * weights_TK.sum(1, keepdim=True), rtol=0.02):
            raise RuntimeError("what came back is not what was sent")
        shards_before, router_before, carried_before = shards.cpu(), Cpu.now(), shards.carried()
        round_ms = median_ms(once, rounds)
        messages, num_bytes = (
            (now - before) / rounds for now, before in zip(shards.carried(), carried_before)
        )
        router = Cpu.now().plus(router_before, -1)
        others = shards.cpu().plus(shards_before, -1)
    owner_E = dispatcher._owner_E
    order = sort_rows(ids_TK, num_tokens, owner_E)
    x_ND = x_TD.index_select(0, order.tokens_N)
    parts_ms = {
        "sort": cpu_ms(lambda: sort_rows(ids_TK, num_tokens, owner_E), rounds),
        "gather": cpu_ms(lambda: x_TD.index_select(0, order.tokens_N), rounds),
        "assemble": cpu_ms(lambda: torch.zeros_like(x_ND).copy_(x_ND), rounds),
        "weigh and sum": cpu_ms(lambda: sum_rows(x_ND, order, weights_TK, num_tokens), rounds),
    }

    def of_a_round(cpu: Cpu) -> Cpu:
        return Cpu(cpu.user_s / rounds, cpu.system_s / rounds)

    return Row(round_ms, messages, num_bytes, of_a_round(router), of_a_round(others), parts_ms)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--tcp", action="store_true", help="loopback TCP in place of Unix sockets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {
        count: measure(count, options.tokens, options.rounds, tcp=options.tcp) for count in options.shards
    }
    print("| shards | ms a round | messages | MB | µs of CPU by token: router | shards | all | kernel |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for count, row in rows.items():
        both = row.router.plus(row.shards)
        router, shards, every = (cpu.both_s / options.tokens * 1e6 for cpu in (row.router, row.shards, both))
        print(
            f"| {count} | {row.round_ms:.1f} | {row.messages:g} | {row.num_bytes / 1e6:.1f} | {router:.0f} | "
            f"{shards:.0f} | {every:.0f} | {both.system_s / both.both_s:.0%} |"
        )
    names = list(rows[options.shards[0]].parts_ms)
    print(f"\n| shards | of the router's CPU: {' | '.join(names)} | sockets |")
    print("| ---: |" + " ---: |" * (len(names) + 1))
    for count, row in rows.items():
        total_ms = row.router.both_s * 1e3
        own = [row.parts_ms[name] for name in names]
        cells = [f"{ms:.1f} ms, {ms / total_ms:.0%}" for ms in (*own, total_ms - sum(own))]
        print(f"| {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
