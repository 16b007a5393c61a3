from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1_cluster.comm import wire
from r1_cluster.comm.dispatch import (
    ExpertMap,
    LinkDispatcher,
    LocalDispatcher,
    StepTag,
    handle,
    sort_rows,
)
from r1_cluster.comm.links import LocalLink, TcpLink, wait_any
from r1_cluster.comm.wire import Flags, Header, Kind, LinkError, Message, Unsendable, WireError
from r1_cluster.records import pack_int32

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


@pytest.fixture
def shards():
    """make(ranges) → shards behind sockets."""
    made = []

    def make(ranges):
        made.extend(Shard(f"expert{i}", experts) for i, experts in enumerate(ranges))
        return made[-len(ranges) :]

    yield make
    for shard in made:
        shard.stop()


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


@settings(max_examples=60)
@given(
    num_tokens=st.integers(0, 21),
    padding=st.integers(0, 7),
    num_shards=st.integers(1, 4),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 1000),
    few=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_links_give_the_same_bits_as_local(num_tokens, padding, num_shards, top_k, seed, few, dtype):
    num_experts = 10
    hot = top_k if few else None  # most experts, and some shards, without tokens
    inputs = draw_step(num_tokens + padding, num_tokens, num_experts, top_k, seed, hot, dtype)
    local = step(LocalDispatcher(make_experts(range(num_experts)), num_experts), *inputs, num_tokens)
    shards = split(num_experts, num_shards)
    dispatcher = LinkDispatcher(local_links(shards), shards, 5)
    y_TD = step(dispatcher, *inputs, num_tokens)
    assert y_TD.dtype == dtype
    assert torch.equal(y_TD, local)
    assert not y_TD[num_tokens:].any()
    assert dispatcher.lost == []
    assert torch.equal(local, naive(*inputs, num_tokens, num_experts))


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_sockets_give_the_same_bits_as_local(shards, num_shards):
    ranges = split(8, num_shards)
    behind = shards(ranges)
    dispatcher = LinkDispatcher([shard.link for shard in behind], ranges, 5)
    local = LocalDispatcher(make_experts(range(8)), 8)
    for seed in range(20):
        inputs = draw_step(8, 5, 8, 2, seed)
        tag = TAG._replace(step=seed)
        assert torch.equal(step(dispatcher, *inputs, 5, tag), step(local, *inputs, 5, tag))


def test_a_tokens_result_does_not_depend_on_its_batch():
    x_TD, ids_TK, weights_TK = draw_step(16, 16, 8, 2, 0)
    local = LocalDispatcher(make_experts(range(8)), 8)
    together = step(local, x_TD, ids_TK, weights_TK, 16)
    for t in range(16):
        alone = step(local, x_TD[t : t + 1], ids_TK[t : t + 1], weights_TK[t : t + 1], 1)
        assert torch.equal(alone[0], together[t])


def test_a_shard_without_rows_is_not_contacted(shards):
    ranges = [range(4), range(4, 8)]
    behind = shards(ranges)
    dispatcher = LinkDispatcher([shard.link for shard in behind], ranges, 5)
    step(dispatcher, *draw_step(8, 8, 8, 2, 0, hot=4), 8)
    assert [shard.num_served for shard in behind] == [1, 0]


def without_experts(inputs, num_tokens, gone):
    """The local result with zeros for the rows of the experts in `gone`."""
    forward = make_experts(range(8))

    def with_zeros(layer, x_ND, counts):
        y_ND = forward(layer, x_ND, counts)
        expert_N = np.repeat(np.arange(8), counts)
        y_ND[np.isin(expert_N, list(gone))] = 0
        return y_ND

    return step(LocalDispatcher(with_zeros, 8), *inputs, num_tokens)


def test_a_lost_shard_leaves_zeros_and_is_not_asked_again(shards):
    ranges = split(8, 3)
    behind = shards(ranges)
    dispatcher = LinkDispatcher([shard.link for shard in behind], ranges, 5)
    inputs = draw_step(8, 8, 8, 2, 1)
    step(dispatcher, *inputs, 8)

    # First it is found out while sending, later it is known.
    behind[1].stop()
    assert torch.equal(step(dispatcher, *inputs, 8), without_experts(inputs, 8, ranges[1]))
    assert dispatcher.lost == ["expert1"]
    dispatcher.lost.clear()
    assert torch.equal(step(dispatcher, *inputs, 8), without_experts(inputs, 8, ranges[1]))
    assert dispatcher.lost == ["expert1"], "each step that needed it says so"
    dispatcher.lost.clear()
    others_only = (inputs[0], torch.tensor([[0, 7]] * 8), inputs[2])
    assert torch.equal(step(dispatcher, *others_only, 8), without_experts(others_only, 8, ()))
    assert dispatcher.lost == [], "a step that did not need it is whole"


def test_a_shard_that_dies_between_dispatch_and_combine():
    ranges = split(8, 2)
    near, far = (TcpLink(sock, "dying") for sock in socket.socketpair())
    dispatcher = LinkDispatcher([near, local_links(ranges)[1]], ranges, 5)
    inputs = draw_step(8, 8, 8, 2, 1)
    dispatcher.dispatch(TAG, inputs[0], inputs[2], inputs[1], 8)
    assert dispatcher.lost == []
    far.recv(1)
    far.close()
    assert torch.equal(dispatcher.combine(), without_experts(inputs, 8, ranges[0]))
    assert dispatcher.lost == ["dying"]


def test_a_silent_shard_is_given_up_after_the_timeout_and_the_others_are_heard():
    ranges = split(8, 3)
    near, far = socket.socketpair()
    links = [*local_links(ranges)]
    links[1] = TcpLink(near, "silent")
    dispatcher = LinkDispatcher(links, ranges, 0.2)
    inputs = draw_step(8, 8, 8, 2, 1)
    with far:
        assert torch.equal(step(dispatcher, *inputs, 8), without_experts(inputs, 8, ranges[1]))
        assert dispatcher.lost == ["silent"]
        assert links[1].closed


def test_two_deaths_in_one_step(shards):
    ranges = split(8, 3)
    behind = shards(ranges)
    dispatcher = LinkDispatcher([shard.link for shard in behind], ranges, 5)
    inputs = draw_step(8, 8, 8, 2, 2)
    behind[0].stop()
    behind[2].stop()
    gone = [*ranges[0], *ranges[2]]
    assert torch.equal(step(dispatcher, *inputs, 8), without_experts(inputs, 8, gone))
    assert dispatcher.lost == ["expert0", "expert2"]


def test_a_link_closed_by_its_watcher_taints_the_step():
    ranges = split(8, 2)
    links = local_links(ranges)
    dispatcher = LinkDispatcher(links, ranges, 5)
    step(dispatcher, *draw_step(8, 8, 8, 2, 2), 8)
    assert dispatcher.lost == []
    links[1].close()
    assert dispatcher.lost == ["expert1"]


def test_replicas_take_over():
    ranges = [range(0, 4), range(4, 8), range(2, 6)]
    near, far = socket.socketpair()
    far.close()
    links = local_links(ranges)
    links[0] = TcpLink(near, "expert0")
    dispatcher = LinkDispatcher(links, ranges, 5)
    inputs = (torch.randn(8, D), torch.tensor([[2, 5], [3, 7]] * 4), torch.rand(8, 2))
    assert torch.equal(step(dispatcher, *inputs, 8), without_experts(inputs, 8, ranges[0]))
    assert dispatcher.lost == ["expert0"]
    dispatcher.lost.clear()
    assert torch.equal(step(dispatcher, *inputs, 8), without_experts(inputs, 8, ()))
    assert dispatcher.lost == []


def test_an_expert_that_raises_answers_in_lock_step(shards, caplog):
    ranges = split(8, 2)
    (good,) = shards([ranges[0]])

    def broken(layer, x_ND, counts):
        raise RuntimeError("out of memory")

    links = [good.link, LocalLink("expert1", lambda message: handle(message, broken))]
    dispatcher = LinkDispatcher(links, ranges, 5)
    inputs = draw_step(8, 8, 8, 2, 1)
    assert torch.equal(step(dispatcher, *inputs, 8), without_experts(inputs, 8, ranges[1]))
    assert dispatcher.lost == ["expert1"]
    assert dispatcher.errors == {"expert1": "RuntimeError: out of memory"}
    assert not links[1].closed
    assert "experts failed" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        lambda reply: reply._replace(header=reply.header._replace(step=99)),
        lambda reply: reply._replace(header=reply.header._replace(kind=int(Kind.DISPATCH))),
        lambda reply: reply._replace(tensors=[tensor[:-1] for tensor in reply.tensors]),
        lambda reply: reply._replace(tensors=[tensor.double() for tensor in reply.tensors]),
        lambda reply: reply._replace(tensors=[]),
        lambda reply: reply._replace(body=b"no duration"),
        lambda reply: reply._replace(header=reply.header._replace(epoch=99)),
    ],
)
def test_an_answer_that_does_not_fit_loses_the_shard(answer):
    forward = make_experts(range(8))
    link = LocalLink("expert0", lambda message: answer(handle(message, forward)))
    dispatcher = LinkDispatcher([link], [range(8)], 5)
    assert not step(dispatcher, *draw_step(8, 8, 8, 2, 1), 8).any()
    assert dispatcher.lost == ["expert0"]
    assert link.closed


def test_two_routers_and_two_shards_never_wait_in_a_circle():
    """Messages that no socket buffer takes. Shard 0 serves router B first and answers while B still sends to shard
    1; shard 1 serves router A first and answers while A still waits for shard 0."""
    width, many, few = 1024, 6000, 4  # rows of 4 KiB
    pairs = {(router, i): socket.socketpair() for router in "AB" for i in range(2)}
    near = {key: TcpLink(ends[0], f"shard {key[1]}") for key, ends in pairs.items()}
    far = {key: TcpLink(ends[1], f"router {key[0]}") for key, ends in pairs.items()}
    go_on, computing = threading.Event(), threading.Event()

    def serve(i, order):
        def double(layer, x_ND, counts):
            if i == 0 and len(x_ND) == many:
                computing.set()
                assert go_on.wait(20)
            return x_ND * 2

        links = [far[router, i] for router in order]
        for _ in order:
            link = wait_any(links, 20)[0]
            link.send(*handle(link.recv(20), double))
            links.remove(link)

    def ask(router, rows_of_0):
        ids_T1 = torch.tensor([0] * rows_of_0 + [1] * many)[:, None]
        x_TD = torch.randn(len(ids_T1), width)
        dispatcher = LinkDispatcher([near[router, 0], near[router, 1]], [range(1), range(1, 2)], 10)
        y_TD = step(dispatcher, x_TD, ids_T1, torch.ones(len(ids_T1), 1), len(ids_T1))
        return torch.equal(y_TD, x_TD * 2)

    with ThreadPoolExecutor(4) as pool:
        shards = [pool.submit(serve, 0, "BA")]
        routers = [pool.submit(ask, "B", many)]
        assert computing.wait(20)
        routers.append(pool.submit(ask, "A", few))
        assert wait_any([far["A", 1]], 20)  # A has sent to shard 0 and is sending to shard 1
        shards.append(pool.submit(serve, 1, "AB"))
        go_on.set()
        for done in (*shards, *routers):
            done.result(30)
    assert all(router.result() for router in routers)
    for link in (*near.values(), *far.values()):
        link.close()


def limit_messages(monkeypatch, num_tokens, top_k=2):
    """No message takes the rows of more tokens than that."""
    monkeypatch.setattr(wire, "MAX_PAYLOAD_BYTES", num_tokens * top_k * D * 4)


@pytest.mark.parametrize("num_tokens", [5, 6, 7, 20])
def test_a_step_larger_than_a_message_goes_in_pieces(shards, monkeypatch, num_tokens):
    """As R1's would on one shard from 9,363 tokens a step: 8 rows a token of 14 KiB, 1 GiB a message."""
    ranges = split(8, 2)
    behind = shards(ranges)
    inputs = draw_step(24, num_tokens, 8, 2, 4)
    expected = without_experts(inputs, num_tokens, ())
    limit_messages(monkeypatch, 3)
    with pytest.raises(Unsendable):  # all rows at once
        behind[0].link.send(Header(1), [torch.zeros(num_tokens * 2, D)])
    dispatcher = LinkDispatcher([shard.link for shard in behind], ranges, 5)
    for _ in range(2):
        assert torch.equal(step(dispatcher, *inputs, num_tokens), expected)
    assert dispatcher.lost == []
    assert all(shard.num_served <= 2 * -(-num_tokens // 3) for shard in behind)
    assert max(shard.num_served for shard in behind) > 2


def test_a_shard_lost_between_two_pieces_leaves_zeros_in_the_later_ones(monkeypatch):
    limit_messages(monkeypatch, 4)
    ranges = split(8, 2)
    near, far = (TcpLink(sock, "dying") for sock in socket.socketpair())
    dispatcher = LinkDispatcher([near, local_links(ranges)[1]], ranges, 5)
    inputs = draw_step(12, 12, 8, 2, 1)

    def answer_once():
        far.send(*handle(far.recv(5), make_experts(ranges[0])))
        far.recv(5)
        far.close()

    with ThreadPoolExecutor(1) as pool:
        dying = pool.submit(answer_once)
        y_TD = step(dispatcher, *inputs, 12)
        dying.result(10)
    assert torch.equal(y_TD[:4], without_experts(inputs, 12, ())[:4])
    assert torch.equal(y_TD[4:], without_experts(inputs, 12, ranges[0])[4:])
    assert dispatcher.lost == ["dying"]


def test_a_large_step_is_broadcast_in_no_piece(shards, monkeypatch):
    limit_messages(monkeypatch, 5)
    ranges = split(8, 2)
    behind = shards(ranges)  # which refuse a broadcast
    dispatcher = LinkDispatcher([shard.link for shard in behind], ranges, 5, broadcast_tokens=4)
    inputs = draw_step(8, 8, 8, 2, 1)
    assert torch.equal(step(dispatcher, *inputs, 8), without_experts(inputs, 8, ()))
    assert dispatcher.lost == []


def test_two_routers_and_two_shards_never_wait_in_a_circle_in_pieces(monkeypatch):
    """Each piece larger than a socket's buffers, from two routers at once."""
    width, many, rounds = 1024, 18000, 3
    monkeypatch.setattr(wire, "MAX_PAYLOAD_BYTES", width * 4 * many // rounds)
    pairs = {(router, i): socket.socketpair() for router in "AB" for i in range(2)}
    near = {key: TcpLink(ends[0], f"shard {key[1]}") for key, ends in pairs.items()}
    far = {key: TcpLink(ends[1], f"router {key[0]}") for key, ends in pairs.items()}

    def serve(i):
        links = [far[router, i] for router in "AB"]
        for _ in range(2 * rounds):
            link = wait_any(links, 20)[0]
            link.send(*handle(link.recv(20), lambda layer, x_ND, counts: x_ND * 2))

    def ask(router):
        ids_T1 = (torch.arange(many) % 2)[:, None]
        x_TD = torch.randn(many, width)
        dispatcher = LinkDispatcher([near[router, 0], near[router, 1]], [range(1), range(1, 2)], 20)
        return torch.equal(step(dispatcher, x_TD, ids_T1, torch.ones(many, 1), many), x_TD * 2)

    with ThreadPoolExecutor(4) as pool:
        shards = [pool.submit(serve, i) for i in range(2)]
        routers = [pool.submit(ask, router) for router in "AB"]
        for done in (*shards, *routers):
            done.result(40)
    assert all(router.result() for router in routers)
    for link in (*near.values(), *far.values()):
        link.close()


def test_what_cannot_be_sent_is_no_shards_death(shards):
    ranges = split(8, 2)
    links = [shard.link for shard in shards(ranges)]
    dispatcher = LinkDispatcher(links, ranges, 5)
    x_TD, ids_TK, weights_TK = draw_step(8, 8, 8, 2, 1)
    with pytest.raises(Unsendable, match="complex"):
        step(dispatcher, x_TD.to(torch.complex64), ids_TK, weights_TK, 8)
    assert dispatcher.lost == []
    assert not any(link.closed for link in links)


def test_an_answer_that_cannot_be_sent_is_no_shards_death():
    def refuse(message):
        header = message.header._replace(kind=int(Kind.COMBINE), flags=Flags.REFUSED, rows=0)
        return Message(header, (), b"payload of 3 bytes; at most 2")

    dispatcher = LinkDispatcher([LocalLink("expert0", refuse)], [range(8)], 5)
    with pytest.raises(Unsendable, match="expert0: payload of 3 bytes; at most 2"):
        step(dispatcher, *draw_step(8, 8, 8, 2, 1), 8)
    assert dispatcher.lost == []


@pytest.mark.parametrize(("slow", "computed"), [("experts", True), ("link", False)])
def test_experts_count_as_work_and_links_as_idle(slow, computed):
    ranges = split(8, 2)

    def experts(layer, x_ND, counts):
        time.sleep(0.1 * (slow == "experts"))
        return x_ND

    pairs = [socket.socketpair() for _ in ranges]
    near = [TcpLink(ends[0], f"expert{i}") for i, ends in enumerate(pairs)]
    far = [TcpLink(ends[1], "router") for ends in pairs]

    def serve(link):
        reply = handle(link.recv(10), experts)
        time.sleep(0.1 * (slow == "link"))
        link.send(*reply)

    dispatcher = LinkDispatcher(near, ranges, 10)
    with ThreadPoolExecutor(2) as pool:
        served = [pool.submit(serve, link) for link in far]
        began = time.perf_counter()
        step(dispatcher, *draw_step(8, 8, 8, 2, 1), 8)
        took_s = time.perf_counter() - began
        for done in served:
            done.result(10)
    assert took_s > 0.1
    # Of two shards that work side by side the slower one's time counts, not the sum.
    assert (took_s - dispatcher.idle_s > 0.1) == computed
    assert (dispatcher.idle_s > 0.1) != computed
    for link in (*near, *far):
        link.close()


def make_share(experts):
    """What a shard adds to a broadcast step, token by token."""
    forwards = {expert: make_experts([expert]) for expert in experts}

    def share(layer, x_TD, weights_TK, ids_TK, asked):
        assert asked is None or len(asked) == len(forwards)
        chosen = {e for i, e in enumerate(experts) if asked is None or asked[i]}
        y_TD = torch.zeros_like(x_TD)
        for t, k in np.ndindex(*ids_TK.shape):
            expert = int(ids_TK[t, k])
            if expert in chosen:
                y_TD[t] += weights_TK[t, k] * forwards[expert](layer, x_TD[t : t + 1], [1])[0]
        return y_TD

    return share


def broadcast_links(shards):
    return [
        LocalLink(f"expert{i}", lambda message, shard=shard: handle(message, None, make_share(shard)))
        for i, shard in enumerate(shards)
    ]


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_a_broadcast_step_is_a_sorted_one_in_another_order(num_shards):
    shards = split(8, num_shards)
    inputs = draw_step(8, 5, 8, 2, 3)
    dispatcher = LinkDispatcher(broadcast_links(shards), shards, 5, broadcast_tokens=5)
    y_TD = step(dispatcher, *inputs, 5)
    local = step(LocalDispatcher(make_experts(range(8)), 8), *inputs, 5)
    torch.testing.assert_close(y_TD, local, atol=1e-4, rtol=1e-5)
    assert not y_TD[5:].any()
    assert dispatcher.lost == []


def test_steps_of_more_tokens_or_without_a_host_for_all_experts_are_sorted(shards):
    ranges = split(8, 2)
    behind = shards(ranges)  # which refuse a broadcast
    dispatcher = LinkDispatcher([shard.link for shard in behind], ranges, 5, broadcast_tokens=4)
    inputs = draw_step(8, 8, 8, 2, 1)
    assert torch.equal(step(dispatcher, *inputs, 8), without_experts(inputs, 8, ()))
    behind[1].link.close()
    assert dispatcher.lost == ["expert1"]
    dispatcher.lost.clear()
    assert torch.equal(step(dispatcher, *inputs, 3)[:3], without_experts(inputs, 3, ranges[1])[:3])
    assert dispatcher.lost == ["expert1"]


def test_a_copy_is_broadcast_to_when_its_twin_is_lost():
    ranges = [range(4), range(4, 8), range(4, 8)]
    links = broadcast_links(ranges)
    dispatcher = LinkDispatcher(links, ranges, 5, broadcast_tokens=8)
    inputs = draw_step(8, 8, 8, 2, 1)
    whole = step(dispatcher, *inputs, 8)
    links[1].close()
    assert dispatcher.lost == ["expert1"]
    dispatcher.lost.clear()
    assert torch.equal(step(dispatcher, *inputs, 8), whole)
    assert dispatcher.lost == []


def test_a_shard_that_dies_in_a_broadcast_leaves_zeros():
    ranges = split(8, 2)
    near, far = (TcpLink(sock, "dying") for sock in socket.socketpair())
    dispatcher = LinkDispatcher([broadcast_links(ranges)[0], near], ranges, 5, broadcast_tokens=8)
    x_TD, ids_TK, weights_TK = draw_step(8, 8, 8, 2, 1)
    dispatcher.dispatch(TAG, x_TD, weights_TK, ids_TK, 8)
    assert far.recv(1).header.kind == Kind.BROADCAST
    far.close()
    expected = without_experts((x_TD, ids_TK, weights_TK), 8, ranges[1])
    torch.testing.assert_close(dispatcher.combine(), expected, atol=1e-4, rtol=1e-5)
    assert dispatcher.lost == ["dying"]


def test_a_late_answer_of_a_former_epoch_is_dropped_and_counted():
    near, far = (TcpLink(sock, "peer") for sock in socket.socketpair())
    dispatcher = LinkDispatcher([near], [range(8)], 5)
    inputs = draw_step(8, 8, 8, 2, 1)
    far.send(Header(Kind.COMBINE, 0, 2, 3, 0, 16), [torch.full((16, D), 7.0)], wire.pack_seconds(0.0))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: far.send(*handle(far.recv(5), make_experts(range(8)))))
        y_TD = step(dispatcher, *inputs, 8)
    assert torch.equal(y_TD, without_experts(inputs, 8, ()))
    assert near.stale_dropped == 1
    near.close()
    far.close()


@pytest.mark.parametrize(
    "message",
    [
        Message(Header(Kind.PLAN, rows=2), [torch.zeros(2, D)], pack_int32(np.array([1, 1]))),
        Message(Header(Kind.DISPATCH, rows=2), [], pack_int32(np.array([1, 1]))),
        Message(Header(Kind.DISPATCH, rows=2), [torch.zeros(2, D)], b"abc"),
        Message(Header(Kind.DISPATCH, rows=2), [torch.zeros(2, D)], pack_int32(np.array([1, 2]))),
        Message(Header(Kind.DISPATCH, rows=2), [torch.zeros(2, D)], pack_int32(np.array([3, -1]))),
        Message(Header(Kind.DISPATCH, rows=3), [torch.zeros(2, D)], pack_int32(np.array([1, 1]))),
        Message(Header(Kind.DISPATCH, rows=2), [torch.zeros(2)], pack_int32(np.array([1, 1]))),
        Message(Header(Kind.DISPATCH, rows=2), [torch.tensor(2.0)], pack_int32(np.array([1, 1]))),
        Message(Header(Kind.BROADCAST, rows=2), [torch.zeros(2, D)], pack_int32(np.array([1]))),
        Message(Header(Kind.BROADCAST, rows=2), [torch.zeros(2, D)] * 2 + [torch.zeros(2, 3)], b"abcd"),
        Message(Header(Kind.BROADCAST, rows=3), [torch.zeros(2, D)] * 3, b"abcd"),
        Message(Header(Kind.BROADCAST, rows=2), [torch.zeros(2, D)] * 3, b"abc"),
    ],
)
def test_a_shard_refuses_what_is_no_dispatch(message):
    with pytest.raises(WireError):
        handle(message, lambda layer, x_ND, counts: x_ND, lambda layer, *whole: whole[0])


def test_a_shard_without_a_device_refuses_a_broadcast():
    message = Message(Header(Kind.BROADCAST, rows=2), [torch.zeros(2, D)] * 3, pack_int32(np.array([1])))
    with pytest.raises(WireError):
        handle(message, lambda layer, x_ND, counts: x_ND)


def test_taint_is_passed_on():
    header = Header(Kind.DISPATCH, rows=1, flags=Flags.TAINTED)
    message = Message(header, [torch.zeros(1, D)], pack_int32(np.array([1])))
    assert handle(message, lambda layer, x_ND, counts: x_ND).header.flags == Flags.TAINTED


def test_maps_and_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match=r"no shard holds the experts \[2\]"):
        ExpertMap([range(2), range(3, 5)])
    with pytest.raises(ValueError, match="ascending"):
        ExpertMap([[1, 0]])
    with pytest.raises(ValueError, match="no shard"):
        ExpertMap([])
    with pytest.raises(ValueError, match="1 links for 2 shards"):
        LinkDispatcher(local_links([range(2)]), [range(2), range(2, 4)], 5)
    with pytest.raises(ValueError, match="expert 4 of 4"):
        sort_rows(torch.tensor([[0, 4]]), 1, np.zeros(4, dtype=np.int64))
    dispatcher = LinkDispatcher(local_links([range(2)]), [range(2)], 5)
    with pytest.raises(RuntimeError, match="combine without a dispatch"):
        dispatcher.combine()
