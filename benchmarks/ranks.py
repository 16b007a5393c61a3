"""What ranks of a stage pay for a sum: `RankGroup.add` of decode size, between two and four processes.

    python -m benchmarks.ranks [--rounds 500] [--json]

Rows are tokens of R1's width in BF16. Every rank sends its part to every other and adds all of them in
float32; a round ends when the device has the sum. Where there is a GPU, all processes share it and parts go
by CUDA IPC, else by the links' sockets, through the host's memory, and by gloo, which is NCCL's twin.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.links import HOST, SECRET, TIMEOUT_S, measure
from kernels.devices import find_device, settle
from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import Link
from r1_cluster.comm.listener import Listener, connect
from r1_cluster.comm.process_group import ProcessGroups
from r1_cluster.comm.ranks import RankGroup
from r1_cluster.comm.transports import backend_for
from r1_cluster.engine.boot import Transport

WIDTH = 7168
TOKENS = (1, 8, 32)
COUNTS = (2, 4)
START_S = 300.0

Work = Callable[..., Any]
"""(names of the ranks, which of them this one is, its links to the others by name, …) → what it made."""


def in_processes(count: int, transport: Transport, work: Work, *given: object) -> list[Any]:
    """What `work` made in each of `count` processes that are linked pairwise; it, what it is given and what
    it makes are pickled. Raises RuntimeError where a process ends before."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(count):
            ours, theirs = context.Pipe()
            arguments = (theirs, count, rank, transport, work, given)
            processes.append(context.Process(target=_run, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        addresses = [_receive(pipe) for pipe in pipes]
        for pipe in pipes:
            pipe.send(addresses)
        return [_receive(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _receive(pipe: Connection) -> Any:
    try:
        if pipe.poll(START_S):
            return pipe.recv()
    except EOFError:
        pass
    raise RuntimeError("a rank ended, or was silent for too long: see its messages above")


def _run(
    parent: Connection, count: int, rank: int, transport: Transport, work: Work, given: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    names = [f"rank-{other}" for other in range(count)]
    listener = Listener(names[rank], SECRET, HOST, (0, 0))
    parent.send(listener.address)
    addresses = parent.recv()
    backend = backend_for(transport, HOST)
    groups = None if backend is None else ProcessGroups(backend, TIMEOUT_S)
    links: dict[str, Link] = {}
    # Each is called by all lower ranks before it calls the higher ones, so nobody waits in a circle.
    for _ in range(rank):
        hello, link = listener.accept(TIMEOUT_S)
        links[hello.peer] = link if groups is None else groups.join(link, 1)
    for other in range(rank + 1, count):
        link = connect(addresses[other], Hello(names[rank], "1", 0, "tensor"), SECRET)
        links[names[other]] = link if groups is None else groups.join(link, 0)
    parent.send(work(names, rank, links, *given))
    parent.poll(None)  # until all have what they wait for


def time_sums(
    names: Sequence[str], rank: int, links: dict[str, Link], device_name: str, rounds: int
) -> dict[str, dict[str, float]]:
    """Microseconds of a sum by number of processes and tokens, as this rank sees it; see `links.measure`."""
    device = find_device(device_name)
    results = {}
    for step, (count, tokens) in enumerate(itertools.product(COUNTS, TOKENS)):
        if rank < count:
            group = RankGroup(names[:count], rank, links, TIMEOUT_S)
            group.begin(0, step, 0)
            x_TD = torch.randn(tokens, WIDTH).to(device, torch.bfloat16)

            def once(group: RankGroup = group, x_TD: torch.Tensor = x_TD) -> None:
                group.add(x_TD)
                settle(device)

            results[f"{count} processes, {tokens}x{WIDTH}"] = measure(once, rounds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    ways: list[Transport] = ["device"] if on_gpu else ["sockets", "host memory", "gloo"]
    results = {}
    for way in ways:
        first, *_ = in_processes(max(COUNTS), way, time_sums, "cuda" if on_gpu else "cpu", arguments.rounds)
        results |= {f"{way}, {name}": row for name, row in first.items()}
    if arguments.json:
        print(json.dumps(results))
        return
    print(f"{'':40}{'p50 µs':>10}{'p90 µs':>10}{'cpu µs':>10}")
    for name, row in results.items():
        print(f"{name:40}{row['p50_us']:>10}{row['p90_us']:>10}{row['cpu_us']:>10}")


if __name__ == "__main__":
    main()
