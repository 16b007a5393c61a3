"""Ranks of one stage: as threads, joined by sockets, and what each of them computes, in whatever process."""

import socket
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from types import SimpleNamespace

import torch
from small_model import SmallModel

from r1_cluster.comm.links import TcpLink
from r1_cluster.comm.ranks import RankGroup
from r1_cluster.config import LayoutConfig
from r1_cluster.engine.parts import load_parts
from r1_cluster.engine.roles import RouterRole, StageRole, local_dispatcher
from r1_cluster.models.family import load_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.planning.layout import build_layout
from r1_cluster.weights.checkpoint import Checkpoint

PLAN = SimpleNamespace(epoch=1, step=1, micro_batch=0)
PROMPT = [5, 9, 2, 77, 31, 8, 8, 64, 3, 90, 17]


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


def logits_of_rank(names, rank, links, folder, dtype, device="cpu"):
    """A rank's hidden states of PROMPT and, of the first, the logits of its last token; both on the host."""
    config, device = load_config(folder), torch.device(device)
    table = tensor_table(config)
    layout = build_layout(LayoutConfig(tensor_parallel=len(names)), config)
    plans = SmallModel(folder, deterministic=True, dtype=dtype, device=device)
    plans.pages = plans.pages % 24
    shard = Shard(device, dtype, True, rank=rank, ranks=len(names))
    with Checkpoint(folder, table, config.fp8_block, config.int_format) as checkpoint:
        parts = load_parts(config, Loader.of(checkpoint, shard, table), layout.workers[rank])
    router = None
    if parts.router is not None:
        router = RouterRole(parts.router)
        router.dispatcher = local_dispatcher(parts.experts)
    group = RankGroup(names, rank, links, 60.0)
    role = StageRole(parts.stage, router, group, num_pages=24, page_size=16)
    batch = plans.batches([(0, PROMPT)])[0]
    with torch.inference_mode():
        group.begin(1, 1, 0)
        x = parts.stage.embed(batch.token_ids_T)
        hidden = parts.stage.forward(x, batch, role.caches, role._moe_of(PLAN))
        columns = group.gather(parts.stage.logits(hidden, batch.sample_rows))
    return hidden.cpu(), torch.cat(columns, 1).cpu() if columns else None
