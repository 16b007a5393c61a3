"""`r1-cluster status`: who runs where, and how busy it is."""

from __future__ import annotations

import json
from collections import Counter
from itertools import groupby
from typing import Annotated, Any

import typer

from r1_cluster.cli.options import ServiceName
from r1_cluster.cli.weights import size


def status(
    service: ServiceName = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> int:
    """Shows who runs where, and how busy it is.

    Of each of a service's engines: its stages, routers and experts with the node and process they run in, and
    what each has sent to others and received, by kind of peer (with --json by peer).
    """
    from r1_cluster.cli.running import find, require_token

    running = find(service)
    if running.local:
        require_token()
    from actors.cluster import attach, engines_status

    with attach(running.address):
        engines = engines_status(running.name)
    if as_json:
        print(json.dumps({"service": running.name, "url": running.url, "engines": engines}, indent=2))
        return 0
    print(f"{running.name}: {running.url}/v1, model {running.model!r}")
    for engine in engines:
        if engine["standby"]:
            print(f"\nstandby, process {engine['pid']} on {engine['host']}")
        else:
            _show(engine)
    return 0


def _words(health: dict[str, Any]) -> str:
    words = str(health["status"])
    if health.get("missing"):
        words += f", missing {', '.join(health['missing'])}"
    return words + (f": {health['reason']}" if "reason" in health else "")


def _last(log: list[dict[str, Any]]) -> str:
    if not log:
        return ""
    last = log[-1]
    return f", the last of {', '.join(last['lost'])} in {last['took_s']:.2f} s"


def _show(engine: dict[str, Any]) -> None:
    print(
        f"\n{engine['engine']}  {engine['layout']}, epoch {engine['epoch']}, process {engine['pid']} on "
        f"{engine['host']}: {engine['running']} running, {engine['waiting']} waiting, "
        f"{engine['pages_used']}/{engine['pages']} pages, "
        f"{engine['tokens']} tokens in {engine['steps']} steps"
    )
    print(f"  {_words(engine['health'])}; {engine['recoveries']} recoveries{_last(engine['recovery_log'])}")
    if len(ranks := engine.get("data_ranks", [])) > 1:
        each = ", ".join(f"{rank['running']} running in {rank['pages_used']} pages" for rank in ranks)
        print(f"  data ranks: {each}")
    if engine["step_ms"] is not None:
        step_ms, overhead_ms = engine["step_ms"], engine["overhead_ms"]
        print(f"  one sequence: {step_ms:.2f} ms a step, {overhead_ms:.2f} ms of it overhead")
    print(f"  {'worker':12} {'roles':24} {'state':7} {'process':>8}  {'loaded':18} bubble {'host':16} node")
    for worker in engine["workers"]:
        print(
            f"  {worker['name']:12} {'+'.join(worker.get('roles', [])):24} {worker['state']:7} "
            f"{worker.get('pid', ''):>8}  {_loaded(worker):18} {_bubble(worker):>6} "
            f"{worker.get('host', ''):16} {worker.get('node', '')[:12]}"
        )
    _show_traffic(engine["workers"])


def _show_traffic(workers: list[dict[str, Any]]) -> None:
    """Messages and bytes of each worker's links since it started, and for how long it waited for others in
    steps."""
    print(f"  {'links of':17} {'to':7} {'sent':>10} {'':9} {'received':>10} {'':9} {'waited':>9}")
    for worker in workers:
        waited_s = worker.get("waited_s")
        waited = f"{waited_s:.2f} s" if waited_s else ""
        peers = sorted(worker.get("traffic", {}).items())
        for kind, same in groupby(peers, lambda peer: peer[0].split("-")[0]):
            total: Counter[str] = Counter()
            for _, traffic in same:
                total.update(traffic)
            print(
                f"  {worker['name']:17} {kind:7} {total['sent_messages']:>10} {size(total['sent_bytes']):>9} "
                f"{total['received_messages']:>10} {size(total['received_bytes']):>9} {waited:>9}"
            )
            waited = ""


def _bubble(worker: dict[str, Any]) -> str:
    """How much of the latest time in which steps were in flight a worker had nothing to compute."""
    bubble = worker.get("bubble")
    return "" if bubble is None else f"{100 * bubble:.0f} %"


def _loaded(worker: dict[str, Any]) -> str:
    """How much a worker has read, and how fast it was there."""
    if not worker.get("read_bytes"):
        return ""
    read, seconds = worker["read_bytes"] / 1e9, worker["read_s"]
    return f"{read:.2f} GB, {read / seconds:.2f} GB/s"
