"""Expert shards of small matrices, behind links of a process or behind sockets, and steps to send them."""

import socket
import threading

import numpy as np
import torch

from r1_cluster.comm.dispatch import LocalDispatcher, StepTag, handle
from r1_cluster.comm.links import LocalLink, TcpLink
from r1_cluster.comm.wire import LinkError

D = 32
TAG = StepTag(1, 2, 3, 0)


def make_experts(experts):
    """Experts [e0, e1) of a layer: one matrix each, rows in tiles of 8 as in deterministic mode."""
    weights = [torch.randn(D, D, generator=torch.Generator().manual_seed(e)) for e in experts]

    def forward(layer, x_ND, counts):
        assert layer == TAG.layer
        assert len(counts) == len(weights)
        assert sum(counts) == len(x_ND)
        y_ND = torch.empty_like(x_ND)
        first = 0
        for weight, count in zip(weights, counts):
            for row in range(first, first + count, 8):
                rows = min(8, first + count - row)
                tile = torch.zeros(8, D, dtype=x_ND.dtype)
                tile[:rows] = x_ND[row : row + rows]
                y_ND[row : row + rows] = (tile.float() @ weight).to(x_ND.dtype)[:rows]
            first += count
        return y_ND

    return forward


def naive(x_TD, expert_ids_TK, weights_TK, num_tokens, experts):
    """Token by token, k by k."""
    y_TD = torch.zeros_like(x_TD)
    for t in range(num_tokens):
        total = torch.zeros(D)
        for k, expert in enumerate(expert_ids_TK[t].tolist()):
            counts = [0] * experts
            counts[expert] = 1
            y = make_experts(range(experts))(TAG.layer, x_TD[t : t + 1], counts)[0]
            total = total + y.float() * weights_TK[t, k]
        y_TD[t] = total.to(x_TD.dtype)
    return y_TD


def split(num_experts, num_shards):
    return [
        range(*np.linspace(0, num_experts, num_shards + 1).astype(int)[i : i + 2]) for i in range(num_shards)
    ]


def local_links(shards):
    forwards = [make_experts(shard) for shard in shards]
    return [
        LocalLink(f"expert{i}", lambda message, forward=forward: handle(message, forward))
        for i, forward in enumerate(forwards)
    ]


class Shard:
    """An expert shard behind a socket, served by a thread."""

    def __init__(self, name, experts):
        near, far = socket.socketpair()
        self.link, self.far = TcpLink(near, name), TcpLink(far, "router")
        self.num_served = 0
        self.thread = threading.Thread(target=self.serve, args=(make_experts(experts),))
        self.thread.start()

    def serve(self, forward):
        try:
            while True:
                reply = handle(self.far.recv(None), forward)
                self.num_served += 1  # before the router can know of it
                self.far.send(*reply)
        except LinkError:
            return

    def stop(self):
        self.far.close()
        self.link.close()
        self.thread.join(5)


def step(dispatcher, x_TD, expert_ids_TK, weights_TK, num_tokens, tag=TAG):
    dispatcher.dispatch(tag, x_TD, weights_TK, expert_ids_TK, num_tokens)
    return dispatcher.combine()


def draw_step(num_rows, num_tokens, num_experts, top_k, seed, hot=None, dtype=torch.float32):
    """Activations, ids and weights; only the `hot` first experts are chosen where given."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_rows, D, generator=generator).to(dtype)
    x_TD[num_tokens:] = 0
    chances = torch.rand(num_rows, num_experts, generator=generator)
    if hot is not None:
        chances[:, hot:] = -1
    return x_TD, chances.topk(top_k).indices, torch.rand(num_rows, top_k, generator=generator)


def without_experts(inputs, num_tokens, gone):
    """The local result with zeros for the rows of the experts in `gone`."""
    forward = make_experts(range(8))

    def with_zeros(layer, x_ND, counts):
        y_ND = forward(layer, x_ND, counts)
        expert_N = np.repeat(np.arange(8), counts)
        y_ND[np.isin(expert_N, list(gone))] = 0
        return y_ND

    return step(LocalDispatcher(with_zeros, 8), *inputs, num_tokens)
