"""What a sum over tensor-parallel ranks costs in a decode step: `RankGroup.add` between processes of this
machine, over Unix sockets.

    python -m benchmarks.all_reduce [--ranks 2 4] [--rounds 200]

Every rank has a tensor [tokens, width]; after the sum each has that of all. Rows are the median time of a
sum as the first rank sees it, the CPU time that it costs all ranks together, and the time of the same sum
within one process, all in microseconds: what is above the last are links.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch

from benchmarks.dispatch import Cpu, median_ms
from benchmarks.ranks import in_processes
from r1_cluster.comm.links import Link
from r1_cluster.comm.ranks import RankGroup

TIMEOUT_S = 60.0
WARM_UP_ROUNDS = 20
ROWS = (1, 8, 32)
WIDTHS = (4096, 7168, 8192)
DTYPES = (torch.bfloat16, torch.float32)


@torch.inference_mode()
def sums(
    names: Sequence[str], rank: int, links: dict[str, Link], rounds: int
) -> dict[torch.dtype, list[tuple[float, float]]]:
    """One rank's part of the work: by dtype, for all ROWS and WIDTHS, the median time and the CPU time of a
    sum, in µs, once all ranks are there."""
    group, num_steps = RankGroup(names, rank, links, TIMEOUT_S), 0
    found: dict[torch.dtype, list[tuple[float, float]]] = {}
    for dtype, tokens, width in itertools.product(DTYPES, ROWS, WIDTHS):
        x = torch.ones((tokens, width), dtype=dtype)

        def once(x: torch.Tensor = x) -> None:
            nonlocal num_steps
            num_steps += 1
            group.begin(1, num_steps, 0)
            group.add(x)

        median_ms(once, WARM_UP_ROUNDS)
        used = Cpu.now()
        took_us = median_ms(once, rounds) * 1e3
        cpu_us = Cpu.now().plus(used, -1).both_s / rounds * 1e6
        found.setdefault(dtype, []).append((took_us, cpu_us))
    return found


def measure(num_ranks: int, rounds: int) -> dict[torch.dtype, list[tuple[float, float]]]:
    """By dtype, for all ROWS and WIDTHS: (µs of a sum, as the first rank sees it, µs of CPU of all ranks)."""
    first, *others = in_processes(num_ranks, "sockets", sums, rounds)
    return {
        dtype: [
            (took_us, cpu_us + sum(other[dtype][i][1] for other in others))
            for i, (took_us, cpu_us) in enumerate(cells)
        ]
        for dtype, cells in first.items()
    }


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
