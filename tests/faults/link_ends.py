"""Two ends of links for `test_hosts.py`, each a process on a host; they print a line of JSON for every event.

`serve HOST` tells its endpoint, takes two links and reads nothing. `connect ENDPOINT` opens an idle link and one
with a message under way, and tells when each was found dead.
"""

import json
import sys
import threading
import time

import msgspec

from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import TcpLink
from r1_cluster.comm.listener import Endpoint, Listener, connect
from r1_cluster.comm.wire import Header, Kind, LinkError

SECRET = b"s" * 32
HEARTBEAT = Header(Kind.HEARTBEAT, 1)


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def serve(host: str) -> None:
    listener = Listener("server", SECRET, host, (21000, 21010))
    say(endpoint=msgspec.msgpack.encode(listener.address).hex())
    links = [listener.accept(60)[1] for _ in range(2)]
    threading.Event().wait()
    del links


def watch(name: str, link: TcpLink) -> None:
    try:
        link.recv(60)
    except LinkError as error:
        say(link=name, dead_at=time.monotonic(), why=str(error))


def main() -> None:
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
        return
    endpoint = msgspec.msgpack.decode(bytes.fromhex(sys.argv[2]), type=Endpoint)
    links = {name: connect(endpoint, Hello(name, name, 1, "control"), SECRET) for name in ("idle", "busy")}
    threads = [threading.Thread(target=watch, args=item) for item in links.items()]
    for thread in threads:
        thread.start()
    say(linked=True)
    sys.stdin.readline()  # the cable is out
    links["busy"].send(HEARTBEAT)
    say(sent_at=time.monotonic())
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
