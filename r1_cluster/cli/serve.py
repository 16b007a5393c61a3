"""`r1-cluster serve`: starts a service and, where none is named, a local Ray cluster for it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r1_cluster.config import ConfigError, Service, load_service

if TYPE_CHECKING:
    import torch

    from r1_cluster.models.config import ModelConfig
    from r1_cluster.planning.layout import Layout


def serve(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="SERVICE", help="The service file, such as cluster_configs/services/nano.yaml."
        ),
    ],
    address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster ('auto' or HOST:PORT); overrides the file."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; overrides the file.")] = None,
) -> int:
    """Starts the service that a YAML file describes, and stays until Ctrl-C.

    Ctrl-C stops all that it started; SIGTERM does so once the answers under way have ended. Without
    cluster.address (and without --address) it starts a Ray cluster on this machine; with one it deploys
    there.
    """
    from r1_cluster.cli.running import forget

    started = time.monotonic()
    service = _overridden(load_service(file), address, port)
    layout, model = _check(service)
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(number: int, _: object) -> None:
        if number == signal.SIGINT or stop.is_set():
            hurry.set()
        stop.set()

    _on_signals(on_signal)
    print(f"{service.name}: {_describe(service, layout, model)}")
    with _cluster(service, layout, model), _quiet(service):
        _on_signals(on_signal)  # again: ray.init has put its own in their place
        from actors.app import build_app
        from actors.cluster import drain, remove_service

        try:
            failure = _deploy(service, build_app(service), started)
            if failure is None and not stop.is_set():
                _wait(service, stop, started)
                if not hurry.is_set():
                    _say("draining: no new requests; answers under way may end (Ctrl-C: stop at once)")
                    drain(service.name, service.serve.drain_s, hurry)
        finally:
            _on_signals(signal.SIG_IGN)
            _say("stopping")
            remove_service(service.name)
    forget(service.name)
    _say("stopped")
    if failure is not None:
        raise ConfigError(failure)
    return 0


def _on_signals(handler: Callable[..., object] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _say(text: str, started: float | None = None) -> None:
    clock = f"[{time.monotonic() - started:5.1f} s] " if started is not None else ""
    with contextlib.suppress(OSError):  # who reads this may be gone, and the service must still be removed
        print(f"{clock}{text}", flush=True)


def _overridden(service: Service, address: str | None, port: int | None) -> Service:
    if address is not None:
        cluster = service.cluster.model_copy(update={"address": address})
        service = service.model_copy(update={"cluster": cluster})
    if port is not None:
        if not 1 <= port <= 65535:
            raise ConfigError(f"--port: {port} is no port; it must be between 1 and 65535")
        service = service.model_copy(update={"serve": service.serve.model_copy(update={"port": port})})
    return service


def _check_text(folder: str) -> None:
    """Raises ConfigError where the checkpoint's tokenizer or chat template cannot be used."""
    from r1_cluster.text.template import ChatTemplate, TemplateError
    from r1_cluster.text.tokenizer import Tokenizer, TokenizerError

    try:
        ChatTemplate.from_folder(folder, Tokenizer.from_folder(folder))
    except (TokenizerError, TemplateError) as error:
        raise ConfigError(f"model.path: {error}") from None


def _check(service: Service) -> tuple[Layout, ModelConfig]:
    """Everything that can be known before something is started; raises ConfigError."""
    import torch

    from kernels.devices import NoDevice, find_device
    from kernels.ops import for_device
    from r1_cluster.models.config import ModelConfigError
    from r1_cluster.models.family import load_config, tensor_table
    from r1_cluster.models.fitting import check_fits, check_fp8
    from r1_cluster.planning.layout import build_layout
    from r1_cluster.planning.limits import check_messages
    from r1_cluster.planning.placement import check_placement
    from r1_cluster.weights.checkpoint import Checkpoint, CheckpointError, tensors_here

    # A cluster that runs elsewhere may have devices that this machine has not: there, Ray's resources decide.
    name = service.layout.device
    try:
        device = find_device(name) if service.cluster.address is None else None
    except NoDevice as error:
        raise ConfigError(f"layout.device: {name} is asked for, but {error}") from None
    try:
        model = load_config(service.model.path)
        check_fits(model, for_device(name), getattr(torch, service.dtype), service.engine.page_size)
        table = tensor_table(model)
        needed = {spec.name for spec in table}  # and no module that predicts further tokens
        if device is not None:
            check_fp8(model, device, fp8_cache=service.engine.kv_cache_dtype == "fp8")
        else:  # each worker looks for what it needs itself, on its own node
            here = tensors_here(Path(service.model.path))
            needed = needed if here is None else needed & here
        Checkpoint(service.model.path, table, model.fp8_block, model.int_format, needed=needed).close()
    except (ModelConfigError, CheckpointError) as error:
        raise ConfigError(f"model.path: {error}") from None
    layout = build_layout(service.layout, model)
    check_messages(service, model)
    _check_text(service.model.path)
    if device is not None:
        check_placement(service, layout, [_resources(device)], partial(build_layout, model=model))
        from r1_cluster.cli.running import services

        if services(service.name):
            raise ConfigError(f"{service.name} is running already; stop it with: r1-cluster stop")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((service.serve.host, service.serve.port))
            except OSError as error:
                raise ConfigError(
                    f"serve.port: {service.serve.host}:{service.serve.port} cannot be used "
                    f"({os.strerror(error.errno or 0).lower()}); free it, or pick another with --port"
                ) from None
    return layout, model


def _resources(device: torch.device) -> dict[str, float]:
    """What Ray will offer on this machine, known before it is started."""
    from kernels.devices import num_devices
    from r1_cluster.planning.placement import ACCELERATORS

    resources: dict[str, float] = {"CPU": os.cpu_count() or 1}
    if device.type in ACCELERATORS:
        resources[ACCELERATORS[device.type]] = num_devices(device)
    return resources


def _describe(service: Service, layout: Layout, model: ModelConfig) -> str:
    roles = ", ".join(worker.name for worker in layout.workers)
    experts = f"{model.moe.n_routed_experts} experts" if model.moe is not None else "no experts"
    return (
        f"{model.num_hidden_layers} layers, {experts}, "
        f"{service.layout.kind} in {len(layout.workers)} worker(s): {roles}"
    )


def _quiet(service: Service) -> contextlib.AbstractContextManager[None]:
    """Of what Ray prints about processes that die: a line of ours, and the rest in a file."""
    from actors.cluster import process_name
    from r1_cluster.cli.quiet import quiet
    from r1_cluster.cli.running import private_folder

    return quiet(sys.stdout, private_folder() / f"{service.name}.log", process_name)


@contextlib.contextmanager
def _cluster(service: Service, layout: Layout, model: ModelConfig) -> Iterator[None]:
    """A Ray cluster that can hold the service: a local one of our own, or the one at `address`."""
    from r1_cluster.cli.running import require_token

    # Ray's own defaults report usage and warn about things that a person who types `serve` cannot change.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Each of several deaths has a line: we count repeats ourselves (`quiet`).
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # How long Ray asks an actor to end before its process is killed: one that hangs does not listen.
    os.environ.setdefault("RAY_kill_worker_timeout_milliseconds", "1000")
    # Read by Serve's proxies when they start: see `actors.gate`.
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "actors.gate:middlewares")
    if service.cluster.address is None:
        require_token()
    import ray

    from actors.cluster import NAMESPACE, attach, check_capacity
    from r1_cluster.planning.layout import build_layout

    build = partial(build_layout, model=model)

    if service.cluster.address is not None:
        with attach(service.cluster.address):
            check_capacity(service, layout, build)
            yield
        return
    _say("starting Ray on this machine")
    try:
        ray.init(
            address="local",
            namespace=NAMESPACE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=True,
        )
    except Exception as error:  # Ray's own words are a traceback
        ray.shutdown()
        raise ConfigError(f"Ray could not be started on this machine: {str(error).splitlines()[0]}") from None
    try:
        check_capacity(service, layout, build)
        yield
    finally:
        ray.shutdown()  # ends all of the cluster's processes, Serve's controller and proxy too


def _deploy(service: Service, app: Any, started: float) -> str | None:
    """Deploys and waits until the application runs; returns why it could not, or None."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    _say("starting Serve, the engine and its workers", started)
    serve.start(
        http_options={"host": service.serve.host, "port": service.serve.port},
        logging_config=quiet,
    )
    try:
        serve.run(app, name=service.name, route_prefix="/", logging_config=quiet, blocking=False)
    except RuntimeError as error:
        states = serve.status().applications[service.name].deployments.values()
        reasons = [state.message.strip().splitlines()[-1] for state in states if state.message.strip()]
        return f"the service could not start: {'; '.join(reasons) or error}"
    return None


def _wait(service: Service, stop: threading.Event, started: float) -> None:
    import ray

    from r1_cluster.cli.running import Running, remember, start_time

    pid = os.getpid()
    started_at = start_time(pid)
    assert started_at is not None
    url = f"http://{service.serve.host}:{service.serve.port}"
    remember(
        Running(
            name=service.name,
            pid=pid,
            started=started_at,
            address=ray.get_runtime_context().gcs_address,
            url=url,
            model=service.served_name,
            local=service.cluster.address is None,
        )
    )
    _say(f"ready: {url}/v1  (model {service.served_name!r})", started)
    print(
        f"""
  curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{service.served_name}", "messages": [{{"role": "user", "content": "What is 12 + 30?"}}]}}'

  r1-cluster chat      from another terminal
  Ctrl-C               stops everything
""",
        flush=True,
    )
    stop.wait()
    with contextlib.suppress(OSError):
        sys.stdout.write("\r")
