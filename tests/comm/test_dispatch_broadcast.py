"""Small steps that go whole to every shard, as they do on devices."""

import socket

import numpy as np
import pytest
import torch
from expert_shards import TAG, D, draw_step, make_experts, split, step, without_experts

from r1_cluster.comm.dispatch import LinkDispatcher, LocalDispatcher, handle
from r1_cluster.comm.links import LocalLink, TcpLink
from r1_cluster.comm.wire import Header, Kind, Message, WireError
from r1_cluster.records import pack_int32


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


@pytest.mark.slow
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


def test_a_shard_without_a_device_refuses_a_broadcast():
    message = Message(Header(Kind.BROADCAST, rows=2), [torch.zeros(2, D)] * 3, pack_int32(np.array([1])))
    with pytest.raises(WireError):
        handle(message, lambda layer, x_ND, counts: x_ND)
