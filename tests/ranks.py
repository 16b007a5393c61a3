"""Ranks of one stage as threads, joined by sockets."""

import socket
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

from r1_cluster.comm.links import TcpLink


def names_of(count):
    return [f"rank-{rank}" for rank in range(count)]


def link_ranks(count):
    """Of each rank: its links to the others, by name."""
    links = [{} for _ in range(count)]
    for a, b in combinations(range(count), 2):
        ends = socket.socketpair()
        for rank, other, end in ((a, b, ends[0]), (b, a, ends[1])):
            links[rank][f"rank-{other}"] = TcpLink(end, f"rank-{other}")
    return links


def close(links):
    for of_rank in links:
        for link in of_rank.values():
            link.close()


def in_ranks(count, work, timeout_s=60):
    """What `work(rank)` gave, or raised, in a thread for each rank."""
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, rank) for rank in range(count)]
        return [future.exception(timeout_s) or future.result() for future in futures]
