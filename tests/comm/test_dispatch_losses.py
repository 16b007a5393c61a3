"""Expert shards that die, fall silent or answer nonsense: zeros in their rows, and a word of who was lost."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expert_shards import TAG, D, draw_step, local_links, make_experts, split, step, without_experts

from r1_cluster.comm import wire
from r1_cluster.comm.dispatch import LinkDispatcher, handle
from r1_cluster.comm.links import LocalLink, TcpLink
from r1_cluster.comm.wire import Header, Kind


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
