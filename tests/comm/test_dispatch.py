"""Rows to experts and back: the same bits by whatever way, and what makes no sense is refused."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from expert_shards import TAG, D, draw_step, local_links, make_experts, naive, split, step
from hypothesis import given, settings
from hypothesis import strategies as st

from r1_cluster.comm import dispatch
from r1_cluster.comm.dispatch import ExpertMap, LinkDispatcher, LocalDispatcher, handle, sort_rows
from r1_cluster.comm.links import LocalLink, TcpLink, wait_any
from r1_cluster.comm.wire import Flags, Header, Kind, Message, Unsendable, WireError
from r1_cluster.records import pack_int32


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


@pytest.mark.parametrize("num_bytes", [1, 5 * 3 * D * 4, 21 * 3 * D * 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_some_tokens_at_a_time_have_the_same_bits(monkeypatch, num_bytes, dtype):
    """One token, five, and all of them."""
    monkeypatch.setattr(dispatch, "SUM_BYTES", num_bytes)
    inputs = draw_step(24, 21, 8, 3, 0, dtype=dtype)
    y_TD = step(LocalDispatcher(make_experts(range(8)), 8), *inputs, 21)
    assert torch.equal(y_TD, naive(*inputs, 21, 8))


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
