"""Round trips between two processes over each kind of link, and what a dispatch costs its router; or what the
links of a service's layout carry in a step.

    python benchmarks/links.py [--rounds 2000] [--json]
    python -m benchmarks.links SERVICE.yaml [--decode 1 8 32] [--prefill 256]

The latter counts (`benchmarks/traffic.py`), and fails where arithmetic says otherwise.

A round trip sends one float32 tensor with 32 bytes of body and receives the same back. `cpu` is the CPU
time of the asking process in one round. Where there is a GPU, its memory is a further row (CUDA IPC), whose
round ends when the answer has been announced, not when it has arrived. The last row is the router's own work
in one dispatch and combine of a tiny model (8 tokens, width 128, top-2 of 8 experts on 3 shards), with links
that answer by a function call.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from r1_cluster.comm.dispatch import LinkDispatcher, StepTag, handle
from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import Link, LocalLink
from r1_cluster.comm.listener import Endpoint, Listener, connect
from r1_cluster.comm.process_group import ProcessGroups
from r1_cluster.comm.transports import backend_for
from r1_cluster.comm.wire import Header, Kind, LinkClosed
from r1_cluster.config import load_service

HOST = "127.0.0.1"
SECRET = bytes(32)
TIMEOUT_S = 30.0
SHAPES = ((8, 128), (64, 7168))
WARM_UP_ROUNDS = 100


def groups_for(kind: str) -> ProcessGroups | None:
    backend = backend_for(kind, HOST)
    return None if backend is None else ProcessGroups(backend, TIMEOUT_S)


def echo(kind: str, endpoint: Endpoint) -> None:
    """The other process: sends back what it gets until the link ends."""
    torch.set_num_threads(1)
    header_link = connect(endpoint, Hello(kind, "1", 0, "tensor"), SECRET, force_tcp=kind == "tcp")
    link: Link = header_link
    if (groups := groups_for(kind)) is not None:
        link = groups.join(header_link, 1)
    try:
        while True:
            message = link.recv(None)
            link.send(message.header, message.tensors, message.body)
    except LinkClosed:
        link.close()


def measure(once: Callable[[], None], rounds: int) -> dict[str, float]:
    """Microseconds of one call: median, 90th percentile, CPU time."""
    for _ in range(WARM_UP_ROUNDS):
        once()
    times_us = []
    cpu_start_s = time.process_time()
    for _ in range(rounds):
        start_s = time.perf_counter()
        once()
        times_us.append((time.perf_counter() - start_s) * 1e6)
    cpu_us = (time.process_time() - cpu_start_s) / rounds * 1e6
    return {
        "p50_us": round(statistics.median(times_us), 1),
        "p90_us": round(statistics.quantiles(times_us, n=10)[-1], 1),
        "cpu_us": round(cpu_us, 1),
    }


def round_trips(link: Link, shape: tuple[int, int], rounds: int) -> dict[str, float]:
    x_TD = torch.randn(shape, device=link.device)
    header = Header(Kind.DISPATCH, rows=shape[0])

    def once() -> None:
        link.send(header, [x_TD], bytes(32))
        link.recv(TIMEOUT_S)

    return measure(once, rounds)


@torch.inference_mode()  # as in a worker
def dispatch_cost(rounds: int) -> dict[str, float]:
    shards = [range(0, 3), range(3, 6), range(6, 8)]
    links = [
        LocalLink(f"expert{i}", lambda message: handle(message, lambda layer, x_ND, counts: x_ND))
        for i in range(len(shards))
    ]
    dispatcher = LinkDispatcher(links, shards, TIMEOUT_S)
    x_TD, weights_TK = torch.randn(8, 128), torch.rand(8, 2)
    expert_ids_TK = torch.rand(8, 8).topk(2).indices
    tag = StepTag(1, 1, 1, 0)

    def once() -> None:
        dispatcher.dispatch(tag, x_TD, weights_TK, expert_ids_TK, 8)
        dispatcher.combine()

    return measure(once, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("service", type=Path, nargs="?", help="count what this service's links carry instead")
    parser.add_argument("--decode", type=int, nargs="+", default=[1, 8, 32], help="sequences of a step")
    parser.add_argument("--prefill", type=int, default=256, help="tokens of a step")
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.service is not None:
        from benchmarks.traffic import report

        lines, as_due = report(load_service(arguments.service), arguments.decode, arguments.prefill)
        print("\n".join(lines))
        return 0 if as_due else 1
    results: dict[str, dict[str, float]] = {}
    listener = Listener("benchmark", SECRET, HOST, (0, 0))
    kinds = ["unix", "tcp", "gloo", "host memory", *(["device"] if torch.cuda.is_available() else [])]
    for kind in kinds:
        process = multiprocessing.get_context("spawn").Process(target=echo, args=(kind, listener.address))
        process.start()
        _, accepted = listener.accept(TIMEOUT_S)
        groups = groups_for(kind)
        link: Link = accepted if groups is None else groups.join(accepted, 0)
        for shape in SHAPES:
            rounds = arguments.rounds if shape == SHAPES[0] else max(arguments.rounds // 10, 20)
            results[f"{kind} {shape[0]}x{shape[1]}"] = round_trips(link, shape, rounds)
        link.close()
        process.join()
        if groups is not None:
            groups.close()
    results["dispatch, no sockets"] = dispatch_cost(arguments.rounds)
    listener.close()
    if arguments.json:
        print(json.dumps(results))
        return 0
    print(f"{'':24}{'p50 µs':>10}{'p90 µs':>10}{'cpu µs':>10}")
    for name, row in results.items():
        print(f"{name:24}{row['p50_us']:>10}{row['p90_us']:>10}{row['cpu_us']:>10}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
