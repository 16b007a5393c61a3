"""Builds the Serve application of a service: an ingress deployment that calls an engine deployment.

`serve deploy` uses `actors.app:build` with `args: {service: path/of/service.yaml}`.
"""

from __future__ import annotations

from pathlib import Path

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from actors.cluster import ENGINE_DEPLOYMENT, INGRESS_DEPLOYMENT
from actors.engine import Engine, num_places
from actors.ingress import Ingress
from actors.routing import OfficeRouter
from r1_cluster.config import Service, load_service
from r1_cluster.planning.placement import ENGINE_CPUS, INGRESS_CPUS

ENGINE_GRACE_S = 1.0


def build(args: dict[str, str]) -> Application:
    """The application of the service file named by `args["service"]`; raises ConfigError."""
    return build_app(load_service(Path(args["service"])))


def build_app(service: Service) -> Application:
    """The application of a service. Serve's limits are set here, each with its reason."""
    engine, edge = service.engine, service.serve
    capacity = num_places(service)
    engines = serve.deployment(
        Engine,
        name=ENGINE_DEPLOYMENT,
        num_replicas=engine.replicas + engine.standby,
        # A replacement starts, and stands by, while its predecessor still runs.
        max_surge_percent=100,
        request_router_config=RequestRouterConfig(request_router_class=OfficeRouter),
        # One more than the engine's own bound, so that it is the engine that says "overloaded".
        max_ongoing_requests=capacity + 1,
        max_queued_requests=-1,
        # Its streams go on at whoever takes over, so there is nothing to wait for.
        graceful_shutdown_timeout_s=ENGINE_GRACE_S,
        # Three failures in a row and Serve replaces a process that hangs, where no standby has done so.
        health_check_period_s=1.0,
        health_check_timeout_s=2.0,
        ray_actor_options={"num_cpus": ENGINE_CPUS},
    )
    ingresses = serve.deployment(
        Ingress,
        name=INGRESS_DEPLOYMENT,
        num_replicas=edge.ingress_replicas,
        # An ingress only waits; requests beyond the engines' capacity must reach it to be refused, and bodies
        # that come slowly must leave room.
        max_ongoing_requests=2 * capacity * engine.replicas + 1024,
        max_queued_requests=-1,
        graceful_shutdown_timeout_s=edge.drain_s,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
    )
    return ingresses.bind(service, engines.bind(service))
