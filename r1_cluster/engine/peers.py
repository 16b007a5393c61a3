"""A worker's links to its peers: those that it opens, and those that are opened to it."""

from __future__ import annotations

from collections.abc import Callable

from kernels.ops import for_device
from r1_cluster.comm.dispatch import LinkDispatcher
from r1_cluster.comm.exchange import Exchange, ExpertSpan
from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import Link, LocalLink, TcpLink, Traffic
from r1_cluster.comm.listener import connect
from r1_cluster.comm.process_group import ProcessGroups
from r1_cluster.comm.transports import backend_for
from r1_cluster.comm.wire import LinkError, Message
from r1_cluster.engine.boot import Topology, WorkerBoot
from r1_cluster.engine.roles import BROADCAST_TOKENS, RouterRole
from r1_cluster.models.moe import ExpertModel
from r1_cluster.planning.layout import Layout, WorkerSpec


class Peers:
    """The tensor links of one worker, by the name of whoever is at the other end. `traffic` is what they have
    carried, by the same name, over all links to it that there have been."""

    def __init__(self, boot: WorkerBoot, links: dict[str, Link], host: str) -> None:
        """`links` is filled here and read by the worker's roles; `host` is where the worker listens."""
        self.links = links
        self.traffic: dict[str, Traffic] = {}
        self._boot = boot
        self._incarnations: dict[str, str] = {}
        self._openers: dict[str, str] = {}
        self._groups: ProcessGroups | None = None
        backend = backend_for(boot.transport, host)
        if backend is not None:
            self._groups = ProcessGroups(backend, boot.step_timeout_s)

    def accept(self, hello: Hello, link: TcpLink) -> None:
        """Takes a link that a peer opened. Raises LinkError."""
        self._keep(hello.peer, hello.incarnation, self._grouped(link, 1))

    def count(self, peer: str, link: Link) -> None:
        """Goes on with a new link where the former one to its peer has stopped counting."""
        if (former := self.traffic.get(peer)) is not None:
            link.traffic.add(former)
        self.traffic[peer] = link.traffic

    @property
    def awaited(self) -> bool:
        """Whether a peer has opened a link by now that was not accepted yet."""
        return any(
            name not in self.links or self._incarnations[name] != incarnation
            for name, incarnation in self._openers.items()
        )

    def drop(self, link: Link) -> None:
        """Forgets a closed link."""
        if self.links.get(link.peer) is link:  # its successor may be here already
            del self.links[link.peer]

    def connect(self, topology: Topology, layout: Layout, spec: WorkerSpec) -> list[str]:
        """Opens the links that `spec` opens, but for those that stand already, and closes those to peers that
        are not there now; returns the peers that could not be reached."""
        self._openers = {
            worker.name: topology.incarnations[worker.name]
            for worker in layout.workers
            if worker.name in topology.endpoints and spec.name in layout.connects_to(worker)
        }
        unreachable = []
        for peer in layout.connects_to(spec):
            standing = self.links.get(peer)
            if standing is not None:
                if not standing.closed and self._incarnations[peer] == topology.incarnations.get(peer):
                    continue
                standing.close()
                del self.links[peer]
            if peer not in topology.endpoints:
                continue
            hello = Hello(spec.name, self._boot.incarnation, topology.epoch, "tensor")
            try:
                # Well before the engine gives up waiting for us, so that it hears who hangs.
                timeout_s = max(1.0, self._boot.step_timeout_s / 3)
                link = connect(topology.endpoints[peer], hello, self._boot.secret, timeout_s)
                link.peer = peer  # a spare still listens under the name that it had
                self._keep(peer, topology.incarnations[peer], self._grouped(link, 0))
            except LinkError:
                unreachable.append(peer)
        return unreachable

    def link_experts(
        self, router: RouterRole, layout: Layout, spec: WorkerSpec, own: Callable[[Message], Message]
    ) -> None:
        """Gives the router of `spec` a dispatcher over the expert shards to which links stand; `own` answers
        for the shard in this process, if there is one."""
        links: list[Link] = []
        spans: list[range] = []
        device = "cpu" if self._groups is None else self._groups.backend.device
        for shard in layout.shards:
            if shard is spec:
                links.append(LocalLink(shard.name, own, device))
            elif shard.name in self.links:
                links.append(self.links[shard.name])
            else:
                continue
            assert shard.experts is not None
            spans.append(range(*shard.experts))
        try:
            on_device = self._groups is not None and for_device(router.model.shard.device).HAS_MOE
            broadcast = BROADCAST_TOKENS if on_device and not self._boot.deterministic else 0
            router.dispatcher = LinkDispatcher(links, spans, self._boot.step_timeout_s, broadcast)
        except ValueError:  # somebody is missing; there will be another topology before the next step
            router.dispatcher = None

    def exchange(
        self, router: RouterRole, topology: Topology, layout: Layout, spec: WorkerSpec, own: list[ExpertModel]
    ) -> None:
        """Gives the router of `spec` an exchange with those of its peers that take part; none where `spec`
        itself takes no part. `own` are its experts."""
        there = layout.takes_part([w.name for w in layout.workers if w.name not in topology.endpoints])
        group = [worker for worker in layout.exchange_of(spec) if worker in there]
        router.dispatcher = None
        if spec in group:
            router.dispatcher = Exchange(
                [worker.name for worker in group],
                group.index(spec),
                self.links,
                # Longer than the ranks of a stage wait for each other, so that each blames who is silent.
                self._boot.step_timeout_s + 0.5,
                num_experts=own[0].num_experts,
                hosts=[[range(*span) for span in (w.experts, *w.copies) if span is not None] for w in group],
                own=[ExpertSpan(model.experts, model.forward) for model in own],
                device="cpu" if self._groups is None else self._groups.backend.device,
            )

    def close(self) -> None:
        """Closes every link; peers notice at once."""
        for link in self.links.values():
            link.close()
        if self._groups is not None:
            self._groups.close()
        self.links.clear()
        self._groups = None

    def _grouped(self, link: TcpLink, rank: int) -> Link:
        """The link itself, or, where tensors go another way than its socket, the group of its two ends."""
        return link if self._groups is None else self._groups.join(link, rank)

    def _keep(self, peer: str, incarnation: str, link: Link) -> None:
        former = self.links.get(peer)
        if former is not None:
            former.close()
        self.links[peer] = link
        self.count(peer, link)
        self._incarnations[peer] = incarnation
