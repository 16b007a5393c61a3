"""Steps whose rows no message takes: they go in pieces."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expert_shards import D, draw_step, local_links, make_experts, split, step, without_experts

from r1_cluster.comm import wire
from r1_cluster.comm.dispatch import LinkDispatcher, handle
from r1_cluster.comm.links import TcpLink, wait_any
from r1_cluster.comm.wire import Header, Unsendable


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
