"""The process-group link with gloo and host memory, and with CUDA IPC where there is a GPU; all but the backends'
few lines is what NCCL runs as well."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from r1_cluster.comm.dispatch import LinkDispatcher, LocalDispatcher, StepTag
from r1_cluster.comm.links import Traffic, wait_any
from r1_cluster.comm.process_group import ProcessGroupLink, ProcessGroups
from r1_cluster.comm.shared_memory import SLOT_BYTES, SLOTS
from r1_cluster.comm.transports import backend_for
from r1_cluster.comm.wire import (
    Flags,
    Header,
    Kind,
    LinkClosed,
    LinkTimeout,
    Message,
    Unsendable,
    WireError,
    message_bytes,
)

JOIN = """
from r1_cluster.comm.dispatch import handle
from r1_cluster.comm.process_group import ProcessGroups
from r1_cluster.comm.transports import backend_for
groups = ProcessGroups(backend_for(sys.argv[3], "127.0.0.1"), 20)
link = groups.join(link, 1)
"""
ECHO = (
    JOIN
    + """
while True:
    message = link.recv(None)
    link.send(*message)
"""
)
EXPERTS = (
    JOIN
    + """
while True:
    link.send(*handle(link.recv(None), lambda layer, x_ND, counts: x_ND * 2 + layer))
"""
)
# From the peer's death on. Every wait here would end by itself after 20 s or more, so whoever needs less has
# noticed the death and not run out of time; a loaded machine may need some tenths.
NOTICED_S = 5.0
Join = Callable[[str], tuple[subprocess.Popen[bytes], ProcessGroupLink]]


def make_groups(transport: str) -> ProcessGroups:
    backend = backend_for(transport, "127.0.0.1")
    assert backend is not None
    return ProcessGroups(backend, 20)


def die(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and waits until the kernel has closed what it held, which takes a while with a device."""
    process.kill()
    process.wait()


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(
    params=[
        pytest.param("gloo", marks=pytest.mark.system),
        "host memory",
        pytest.param("device", marks=NEEDS_GPU),
    ]
)
def transport(request) -> str:
    return request.param


@pytest.fixture
def groups(transport) -> Iterator[ProcessGroups]:
    groups = make_groups(transport)
    yield groups
    groups.close()


@pytest.fixture
def join(groups, transport, start_peer) -> Iterator[Join]:
    """join(script) → a process that runs it, and our end of the process-group link to it."""
    links = []

    def join(script: str) -> tuple[subprocess.Popen[bytes], ProcessGroupLink]:
        process, header_link = start_peer(script, transport)
        links.append(groups.join(header_link, 0))
        return process, links[-1]

    yield join
    for link in links:
        link.close()


@pytest.mark.slow
def test_messages_arrive_as_sent(join):
    _, link = join(ECHO)
    tensors = [
        torch.randn(8, 128),
        torch.randn(5, 3).to(torch.bfloat16),
        torch.arange(7),
        torch.randn(3, 4).t(),
        torch.empty(0, 9),
        torch.randn(64, 7168),
        torch.arange(SLOTS * SLOT_BYTES // 4 + 5),  # twice a ring of shared memory, and some
        torch.randn(4, 2).to(torch.float8_e4m3fn),
        torch.randn(3).as_strided((1,), (0,)),  # contiguous in torch's eyes
        torch.randn(9).as_strided((1, 1), (7, 3)),
        torch.tensor(5).expand(4),
        torch.tensor(True).to(torch.int8),
    ]
    tensors = [tensor.to(link.device) for tensor in tensors]
    header = Header(Kind.DISPATCH, 1, 2, 3, 4, 5, Flags.TAINTED)
    to_join = replace(link.traffic)
    for _ in range(3):
        link.send(header, tensors, b"body")
        assert wait_any([link], 5) == [link]
        message = link.recv(10)
        assert message.header == header
        assert message.body == b"body"
        for sent, received in zip(tensors, message.tensors, strict=True):
            assert received.dtype == sent.dtype
            assert received.shape == sent.shape
            assert torch.equal(received.float(), sent.float())
    to_join.add(Traffic(*[3, 3 * message_bytes(Message(header, tensors, b"body"))] * 2))
    assert link.traffic == to_join
    with pytest.raises(LinkTimeout):
        link.recv(0.05)
    assert not link.closed
    with pytest.raises(Unsendable, match="this link carries tensors of"):
        link.send(header, [torch.empty(1, device="meta")])
    link.send(header)
    assert link.recv(5).header == header


@pytest.mark.slow
def test_dispatch_over_process_groups_equals_local(join):
    _, first = join(EXPERTS)
    _, second = join(EXPERTS)
    shards = [range(3), range(3, 8)]
    dispatcher = LinkDispatcher([first, second], shards, 10)
    local = LocalDispatcher(lambda layer, x_ND, counts: x_ND * 2 + layer, 8)
    for layer in range(4):
        inputs = torch.randn(16, 32), torch.rand(16, 2), torch.rand(16, 8).topk(2).indices
        for each in (dispatcher, local):
            each.dispatch(StepTag(1, 1, layer, 0), *(tensor.to(each.device) for tensor in inputs), 13)
        assert torch.equal(dispatcher.combine().cpu(), local.combine())
    assert dispatcher.lost == []


@pytest.mark.slow
def test_a_killed_peer_is_noticed_by_whoever_waits_and_the_others_go_on(join):
    victim, lost = join(ECHO)
    _, other = join(ECHO)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lost.recv, 30)
        time.sleep(0.1)
        die(victim)
        with pytest.raises(LinkClosed):
            waiting.result(NOTICED_S)
    with pytest.raises(LinkClosed):
        lost.send(Header(1), [torch.zeros(4, device=lost.device)])
    other.send(Header(1), [torch.ones(4, device=other.device)])
    assert other.recv(5).tensors[0].tolist() == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_killed_peer_is_noticed_though_nobody_waits(join):
    victim, link = join(ECHO)
    die(victim)
    deadline = time.monotonic() + NOTICED_S
    while not link.closed:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_peer_that_dies_before_its_payload_is_noticed(join):
    """The header is here, the payload never comes: gloo's own error, or the watch, ends the wait."""
    victim, link = join(
        JOIN
        + "link._header_link.send_announcement(Header(1), [torch.zeros(4, device=link.device)], b''); time.sleep(60)"
    )
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(link.recv, 30)
        time.sleep(0.2)
        assert not waiting.done()
        die(victim)
        with pytest.raises(LinkClosed):
            waiting.result(NOTICED_S)
    assert link.closed


@pytest.mark.slow
def test_a_lost_peer_joins_again_in_a_new_group(join):
    victim, lost = join(ECHO)
    victim.kill()
    with pytest.raises(LinkClosed):
        lost.recv(5)
    start = time.monotonic()
    _, again = join(ECHO)
    again.send(Header(1, step=5), [torch.ones(2, device=again.device)])
    assert again.recv(5).header.step == 5
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_close_wakes_whoever_is_blocked(join):
    _, link = join(ECHO)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(link.recv, None)
        threading.Timer(0.1, link.close).start()
        with pytest.raises(LinkClosed):
            waiting.result(NOTICED_S)


def test_a_peer_that_joins_no_group_is_an_error(groups, pair):
    left, right = pair
    right.send(Header(Kind.PLAN))
    with pytest.raises(WireError, match="did not start a group"):
        groups.join(left, 1)
    assert left.closed


@pytest.mark.slow
def test_a_plain_message_on_a_group_link_ends_it(join):
    _, link = join(JOIN + "link._header_link.send(Header(1), [torch.zeros(1)]); time.sleep(60)")
    with pytest.raises(WireError, match="announcement"):
        link.recv(10)
    assert link.closed


@pytest.mark.slow
def test_a_peer_that_dies_while_it_is_sent_to(join):
    """More than any buffer takes, to somebody who does not read."""
    victim, link = join(JOIN + "time.sleep(60)")
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(
            link.send, Header(1), [torch.zeros(64 << 20, dtype=torch.uint8, device=link.device)]
        )
        time.sleep(0.2)
        assert not sending.done()
        die(victim)
        with pytest.raises(LinkClosed):
            sending.result(NOTICED_S)
    assert link.closed


REJOIN = """
import gc
from r1_cluster.comm.process_group import ProcessGroups
from r1_cluster.comm.transports import backend_for
groups = ProcessGroups(backend_for(sys.argv[3], "127.0.0.1"), 20)
while True:
    link = groups.join(link, 1)
    header, tensors, _ = link.recv(20)
    gc.collect()
    link.send(header, tensors, str(len(os.listdir("/proc/self/fd"))).encode())
    try:
        link.recv(20)
    except LinkClosed:
        link.close()
    link = connect(endpoint, Hello(sys.argv[2], "1", 0, "tensor"), bytes(range(32)), 20)
"""


@pytest.mark.slow
def test_nothing_is_left_of_links_that_ended(groups, transport, listener, start_peer):
    """On either side. The first two links are not counted: libraries open what they keep with them."""
    _, header_link = start_peer(REJOIN, transport)
    ours, theirs = [], []
    for _ in range(5):
        link = groups.join(header_link, 0)
        link.send(Header(1), [torch.ones(3, device=link.device)])
        message = link.recv(20)
        assert message.tensors[0].tolist() == [1, 1, 1]
        theirs.append(int(message.body))
        link.close()
        _, header_link = listener.accept(60)
        gc.collect()
        ours.append(len(os.listdir("/proc/self/fd")))
    header_link.close()
    assert max(ours[2:]) <= ours[1]
    assert max(theirs[2:]) <= theirs[1]
