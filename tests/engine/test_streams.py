"""The way of tokens from an engine to its ingresses, when one of them does not read."""

import time

from r1_cluster.comm.listener import Listener
from r1_cluster.engine.scheduler import Finished
from r1_cluster.engine.streams import SEND_TIMEOUT_S, TokenFan, TokenSink
from r1_cluster.records import TokenDelta

SECRET = b"a secret for tests only"


def test_an_ingress_that_reads_nothing_holds_nobody_up():
    heard = []
    sink = TokenSink(
        Listener("reads", SECRET, "127.0.0.1", (21000, 23999)),
        lambda engine, deltas: heard.extend(deltas),
        lambda engine, silent: None,
    )
    hung = Listener("hangs", SECRET, "127.0.0.1", (21000, 23999))  # shakes hands, and nobody takes the link
    fan = TokenFan("engine-0", SECRET)
    for name, endpoint in (("reads", sink.endpoint), ("hangs", hung.address)):
        fan.attach(name, endpoint)
    tokens = list(range(100_000))
    longest, gone, sent = 0.0, [], 0
    while not gone:
        assert sent < 1000
        began = time.monotonic()
        gone = fan.emit([Finished(name, TokenDelta("r", sent, tokens)) for name in ("hangs", "reads")])
        longest = max(longest, time.monotonic() - began)
        sent += 1
    assert gone == ["hangs"]
    assert longest < SEND_TIMEOUT_S + 2
    assert not fan.attached("hangs")
    deadline = time.monotonic() + 10
    while len(heard) < sent:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [delta.position for delta in heard] == list(range(sent))
    fan.close()
    hung.close()
    sink.close()
