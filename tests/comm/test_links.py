from __future__ import annotations

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1_cluster.comm import links, wire
from r1_cluster.comm.links import STALL_S, LocalLink, TcpLink, Traffic, recv_epoch, stay_awake, wait_any
from r1_cluster.comm.wire import (
    Flags,
    Header,
    Kind,
    LinkClosed,
    LinkError,
    LinkTimeout,
    Message,
    StaleEpoch,
    Unsendable,
    WireError,
)

# Every wait here would end by itself after 10 s or more, or never: whoever needs less has noticed. A loaded
# machine may need some tenths.
NOTICED_S = 5.0
SHAPES = st.lists(st.integers(0, 9), max_size=4)
FIXTURE_ONCE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_bytes_tensor(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).copy_(torch.randint(0, 100, shape))


@FIXTURE_ONCE
@given(
    st.lists(st.tuples(st.sampled_from(wire._dtypes()), SHAPES), max_size=5),
    st.binary(max_size=2000),
    st.integers(0, 2**64 - 1),
)
def test_messages_arrive_as_sent(pair, kinds, body, epoch):
    left, right = pair
    tensors = [random_bytes_tensor(dtype, shape) for dtype, shape in kinds]
    header = Header(Kind.HIDDEN, epoch, 2, 3, 4, 5, Flags.TAINTED)
    left.send(header, tensors, body)
    message = right.recv(5)
    assert message.header == header
    assert message.body == body
    assert len(message.tensors) == len(tensors)
    for sent, received in zip(tensors, message.tensors):
        assert received.dtype == sent.dtype
        assert received.shape == sent.shape
        assert wire.tensor_bytes(received) == wire.tensor_bytes(sent)


def test_both_ends_count_what_went_over(pair):
    left, right = pair
    messages = [
        Message(Header(1)),
        Message(Header(2, rows=4), [torch.randn(4, 7), torch.arange(3)], b"body"),
        Message(Header(3), [torch.randn(700, 7168), torch.empty(0, 5)]),  # 20 MB: in many pieces
    ]
    sizes = [wire.message_bytes(message) for message in messages]
    assert sizes[1] == wire.HEADER_SIZE + 2 * wire.SPEC_SIZE + 4 * 7 * 4 + 3 * 8 + 4
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(lambda: [left.send(*message) for message in messages])
        assert [wire.message_bytes(right.recv(5)) for _ in messages] == sizes
        sent.result()
    right.send_announcement(messages[1].header, messages[1].tensors, b"body")
    left.recv_announcement(5)
    announced = sizes[1] - 4 * 7 * 4 - 3 * 8
    assert left.traffic == Traffic(3, sum(sizes), 1, announced)
    assert right.traffic == Traffic(1, announced, 3, sum(sizes))
    with pytest.raises(LinkTimeout):
        right.recv(0)
    with pytest.raises(Unsendable):
        left.send(Header(1), [torch.zeros(1, dtype=torch.complex64)])
    assert (left.traffic.sent_messages, right.traffic.received_messages) == (3, 3)


def test_messages_larger_than_all_buffers_go_both_ways(pair):
    left, right = pair
    x = torch.randn(3000, 7168)  # 86 MB
    with ThreadPoolExecutor(1) as pool:
        echoed = pool.submit(lambda: right.send(*right.recv(30)))
        left.send(Header(1), [x, x[:7].t()], b"b" * 1_000_000)
        message = left.recv(30)
        echoed.result()
    assert torch.equal(message.tensors[0], x)
    assert torch.equal(message.tensors[1], x[:7].t())
    assert message.body == b"b" * 1_000_000


@settings(FIXTURE_ONCE, max_examples=60)
@given(st.binary(min_size=1, max_size=300), st.booleans())
def test_rubbish_ends_the_link_and_never_hangs(data, after_a_good_prefix):
    near, far = socket.socketpair()
    link = TcpLink(near, "rubbish")
    if after_a_good_prefix:
        # Two tensors and a body announced; their descriptors are rubbish.
        header = wire._HEADER.pack(wire.MAGIC, wire.VERSION, 1, 0, 2, 0, 0, 0, 0, 0, 10)
        data = header + data
    with far:
        far.sendall(data)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises((WireError, LinkClosed)):
            link.recv(2)
    assert link.closed
    assert link.fileno() == -1


def test_nothing_to_receive_is_a_timeout_that_keeps_the_link(pair):
    left, right = pair
    for timeout_s in (0.05, 0.0, 0.2):
        start = time.monotonic()
        with pytest.raises(LinkTimeout):
            right.recv(timeout_s)
        assert timeout_s * 0.9 <= time.monotonic() - start < timeout_s + 0.5
    left.send(Header(1))
    assert right.recv(0.0).header == Header(1)


def test_a_message_that_breaks_off_ends_the_link():
    near, far = socket.socketpair()
    link = TcpLink(near, "stalls")
    with far:
        data = wire.encode_prefix(Header(1), [torch.zeros(100)], 0)
        far.sendall(data + b"\0" * 50)
        start = time.monotonic()
        with pytest.raises(LinkTimeout, match="in the midst"):
            link.recv(0.1)
        assert STALL_S * 0.9 < time.monotonic() - start < STALL_S + 1
        assert link.closed
        assert link.traffic == Traffic(received_bytes=len(data) + 50)
        with pytest.raises(LinkClosed):
            link.recv(0.1)


def test_a_message_that_dribbles_in_time_is_received():
    near, far = socket.socketpair()
    link = TcpLink(near, "dribbles")
    x = torch.randn(6)
    data = wire.encode_prefix(Header(1, rows=6), [x], 3) + b"abc" + bytes(wire.tensor_bytes(x))

    def dribble():
        for byte in data:
            far.sendall(bytes([byte]))
            time.sleep(0.001)

    with far, ThreadPoolExecutor(1) as pool:
        pool.submit(dribble)
        message = link.recv(5)
    assert (message.header.rows, message.body) == (6, b"abc")
    assert torch.equal(message.tensors[0], x)
    link.close()


def test_a_peer_that_does_not_read_times_the_sender_out():
    near, far = socket.socketpair()
    link = TcpLink(near, "deaf", send_timeout_s=0.3)
    with far:
        start = time.monotonic()
        with pytest.raises(LinkTimeout):
            link.send(Header(1), [torch.zeros(20 << 20)])
        assert time.monotonic() - start < 2
    assert link.closed


@pytest.mark.parametrize("blocked_in", ["recv", "send"])
def test_close_wakes_whoever_is_blocked(pair, blocked_in):
    left, right = pair

    def block():
        if blocked_in == "recv":
            left.recv(None)
        else:
            left.send(Header(1), [torch.zeros(100 << 20, dtype=torch.uint8)])

    with ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(block)
        time.sleep(0.1)
        assert not blocked.done()
        left.close()
        with pytest.raises(LinkClosed):
            blocked.result(NOTICED_S)
    with pytest.raises(LinkClosed):
        right.recv(5) if blocked_in == "recv" else [right.recv(5) for _ in range(2)]


def test_many_closes_and_receivers_do_not_disturb_other_links(pair):
    """A closed descriptor's number must not be read through by a thread that still holds the old link."""
    left, right = pair
    pool = ThreadPoolExecutor(1)
    for i in range(200):
        near, far = socket.socketpair()
        victim = TcpLink(near, "victim")
        receiving = pool.submit(victim.recv, None)
        victim.close()
        with pytest.raises(LinkClosed):
            receiving.result(5)
        far.close()
        left.send(Header(1, step=i))
        assert right.recv(1).header.step == i
    pool.shutdown()


def test_a_dead_peer_is_noticed_at_once(start_peer):
    process, link = start_peer("time.sleep(60)")
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(link.recv, 30)
        time.sleep(0.1)
        process.kill()
        process.wait()  # by then its sockets are closed
        with pytest.raises(LinkClosed):
            receiving.result(NOTICED_S)


@pytest.mark.slow
def test_a_peer_that_dies_in_mid_message_is_noticed_at_once(start_peer):
    process, link = start_peer("link.send(Header(1), [torch.zeros(1 << 28, dtype=torch.uint8)])")
    with ThreadPoolExecutor(1) as pool:
        os.kill(process.pid, signal.SIGSTOP)
        receiving = pool.submit(link.recv, 30)
        time.sleep(0.3)
        assert not receiving.done()
        process.kill()
        process.wait()
        with pytest.raises(LinkClosed):
            receiving.result(NOTICED_S)


def test_wait_any_names_those_that_have_something(pair):
    left, right = pair
    near, far = (TcpLink(sock, "other") for sock in socket.socketpair())
    assert wait_any([right, far], 0.05) == []
    near.send(Header(1))
    assert wait_any([right, far], 5) == [far]
    left.send(Header(2))
    assert wait_any([right, far], 5) == [right, far]
    far.recv(1)
    left.close()
    assert wait_any([right, far], 5) == [right]  # the message, then the end
    right.recv(1)
    assert wait_any([right, far], 5) == [right]
    near.close()
    far.close()
    assert wait_any([right, far], 5) == [far]


def test_whoever_stays_awake_does_so_until_something_comes_or_for_a_while(pair, monkeypatch):
    left, right = pair
    stay_awake(right)  # nothing came
    monkeypatch.setattr(links, "AWAKE_S", 600.0)
    with ThreadPoolExecutor(1) as pool:
        for wakes in (lambda: left.send(Header(1)), right.close):
            waiting = pool.submit(stay_awake, right)
            time.sleep(0.01)
            assert not waiting.done()
            wakes()
            waiting.result(10)
            if not right.closed:
                right.recv(1)


def test_messages_of_former_epochs_are_dropped_and_counted(pair):
    left, right = pair
    for epoch in (3, 4, 5):
        left.send(Header(1, epoch))
    assert recv_epoch(right, 5, 1).header.epoch == 5
    assert right.stale_dropped == 2
    left.send(Header(1, 4))
    with pytest.raises(LinkTimeout):
        recv_epoch(right, 5, 0.1)
    assert right.stale_dropped == 3
    left.send(Header(1, 6))
    with pytest.raises(StaleEpoch):
        recv_epoch(right, 5, 1)


def test_only_cpu_tensors_and_plain_messages(pair):
    left, right = pair
    with pytest.raises(Unsendable, match="CPU"):
        left.send(Header(1), [torch.empty(1, device="meta")])
    with pytest.raises(Unsendable):
        left.send(Header(1), [torch.zeros(1, dtype=torch.complex64)])
    left.send(Header(1, step=1))  # a refused message left nothing on the stream
    assert right.recv(1).header.step == 1
    left.send_announcement(Header(1), [torch.zeros(1)], b"")
    with pytest.raises(WireError):
        right.recv(1)
    assert right.closed


def test_local_link_answers_in_order_and_passes_errors_on():
    def handler(message: Message) -> Message:
        if message.header.step == 9:
            raise LinkError("nine")
        return Message(message.header._replace(kind=2), [tensor + 1 for tensor in message.tensors])

    link = LocalLink("local", handler)
    link.send(Header(1, step=1), [torch.zeros(2)])
    link.send(Header(1, step=2))
    first, second = link.recv(1), link.recv(1)
    assert (first.header.step, second.header.step) == (1, 2)
    assert first.tensors[0].tolist() == [1, 1]
    num_bytes = 2 * wire.HEADER_SIZE + wire.SPEC_SIZE + 2 * 4
    assert link.traffic == Traffic(2, num_bytes, 2, num_bytes)
    with pytest.raises(LinkTimeout):
        link.recv(0)
    with pytest.raises(LinkError, match="nine"):
        link.send(Header(1, step=9))
    link.close()
    with pytest.raises(LinkClosed):
        link.send(Header(1))
    with pytest.raises(LinkClosed):
        link.recv(1)
