"""What a sum over tensor-parallel ranks costs in a decode step: `RankGroup.add` between processes of this
machine, over Unix sockets.

    python -m benchmarks.all_reduce [--ranks 2 4] [--rounds 200]

Every rank has a tensor [tokens, width]; after the sum each has that of all. Rows are the median time of a
sum as the first rank sees it, the CPU time that it costs all ranks together, and the time of the same sum
within one process, all in microseconds: what is above the last are links.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
from multiprocessing.connection import Connection

import torch

from benchmarks.dispatch import Cpu, connected, median_ms
from r1_cluster.comm.links import TcpLink
from r1_cluster.comm.ranks import RankGroup

TIMEOUT_S = 60.0
WARM_UP_ROUNDS = 20
ROWS = (1, 8, 32)
WIDTHS = (4096, 7168, 8192)
DTYPES = (torch.bfloat16, torch.float32)


class Rank:
    """One rank's part of the work, in whatever process."""

    def __init__(self, names: list[str], rank: int, sockets: dict[str, socket.socket]) -> None:
        torch.set_num_threads(1)
        links = {peer: TcpLink(sock, peer) for peer, sock in sockets.items()}
        self._group = RankGroup(names, rank, links, TIMEOUT_S)
        self._num_steps = 0

    @torch.inference_mode()
    def sums(self, shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> tuple[float, float]:
        """(median time of a sum in µs, CPU time of a sum in µs), once all ranks are there."""
        x = torch.ones(shape, dtype=dtype)

        def once() -> None:
            self._num_steps += 1
            self._group.begin(1, self._num_steps, 0)
            self._group.add(x)

        median_ms(once, WARM_UP_ROUNDS)
        used = Cpu.now()
        took_us = median_ms(once, rounds) * 1e3
        return took_us, Cpu.now().plus(used, -1).both_s / rounds * 1e6


def work(
    names: list[str], rank: int, sockets: dict[str, socket.socket], rounds: int, parent: Connection
) -> None:
    """Another rank than the first: does all there is to do, and says what each took."""
    own = Rank(names, rank, sockets)
    for dtype in DTYPES:
        for tokens in ROWS:
            for width in WIDTHS:
                parent.send(own.sums((tokens, width), dtype, rounds))


def measure(num_ranks: int, rounds: int) -> dict[torch.dtype, list[tuple[float, float]]]:
    """By dtype, for all ROWS and WIDTHS: (µs of a sum, µs of CPU of all ranks)."""
    names = [f"rank-{rank}" for rank in range(num_ranks)]
    sockets: list[dict[str, socket.socket]] = [{} for _ in names]
    for low in range(num_ranks):
        for high in range(low + 1, num_ranks):
            sockets[low][names[high]], sockets[high][names[low]] = connected(tcp=False)
    context = multiprocessing.get_context("spawn")
    others = []
    for rank in range(1, num_ranks):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (names, rank, sockets[rank], rounds, theirs)
        process = context.Process(target=work, args=arguments, daemon=True)
        process.start()
        for sock in sockets[rank].values():
            sock.close()
        theirs.close()
        others.append((process, ours))
    first = Rank(names, 0, sockets[0])
    found: dict[torch.dtype, list[tuple[float, float]]] = {}
    for dtype in DTYPES:
        for tokens in ROWS:
            for width in WIDTHS:
                took_us, cpu_us = first.sums((tokens, width), dtype, rounds)
                cpu_us += sum(ours.recv()[1] for _, ours in others)
                found.setdefault(dtype, []).append((took_us, cpu_us))
    for process, _ in others:
        process.join()
    return found


@torch.inference_mode()
def within(num_ranks: int, shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> float:
    """µs of the same sum where all parts are in one process."""
    parts = [torch.ones(shape, dtype=dtype) for _ in range(num_ranks)]

    def once() -> torch.Tensor:
        total = parts[0].float() + parts[1].float()
        for part in parts[2:]:
            total += part
        return total.to(dtype)

    return median_ms(once, rounds) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [(tokens, width) for tokens in ROWS for width in WIDTHS]
    print(f"| ranks | | {' | '.join(f'{tokens} × {width}' for tokens, width in shapes)} |")
    print("| ---: | --- |" + " ---: |" * len(shapes))
    for num_ranks in options.ranks:
        for dtype, cells in measure(num_ranks, options.rounds).items():
            name = str(dtype).removeprefix("torch.")
            print(f"| {num_ranks} | {name}: µs | {' | '.join(f'{took:.0f}' for took, _ in cells)} |")
            print(f"| | CPU µs, all ranks | {' | '.join(f'{cpu:.0f}' for _, cpu in cells)} |")
            alone = [within(num_ranks, shape, dtype, options.rounds) for shape in shapes]
            print(f"| | within a process | {' | '.join(f'{took:.0f}' for took in alone)} |")


if __name__ == "__main__":
    main()
