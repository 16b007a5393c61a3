"""`download`: a checkpoint from the hub, whole or what some workers of a service need."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from r1_cluster.cli.weights import progress_bar, size, verify
from r1_cluster.config import BUILTIN_PREFIX, ConfigError, Service, model_folder, read_service

if TYPE_CHECKING:
    from r1_cluster.models.config import ModelConfig
    from r1_cluster.weights.download import Download


def download(
    name: str, folder: Path | None, service_file: Path | None, parts: Sequence[str], revision: str | None
) -> int:
    """Downloads the repository `name` into `folder`, where the service's model is or, without either, the
    hub's cache; only what the `parts` of the service need, without any all of them. Returns the exit code.

    Raises ConfigError, ModelConfigError or CheckpointError where it cannot be done.
    """
    from r1_cluster.models.family import load_config, tensor_table
    from r1_cluster.weights.checkpoint import Checkpoint, files_of
    from r1_cluster.weights.download import BESIDE, Download, DownloadError, open_repo

    started = time.monotonic()
    service = None if service_file is None else read_service(service_file)
    if service is not None and service_file is not None and folder is None:
        if service.model.path.startswith(BUILTIN_PREFIX):
            raise ConfigError(f"{service_file}: model.path is {service.model.path}; name a FOLDER")
        folder = model_folder(service.model.path, service_file.parent)
    try:
        repo = open_repo(name, revision)
        here = Download(repo, folder)
        print(f"{name} at {repo.commit[:12]} → {here.folder}", flush=True)
        fetched = here.fetch(file for file in BESIDE if file in repo.files)
        config = load_config(here.folder)
        needed = None if service is None else _needed(config, service, parts)
        index = _index(here, {spec.name for spec in tensor_table(config)})
        files = sorted(files_of(index, needed))
        total = size(sum(repo.files[file].num_bytes for file in files))
        what = f" of {len(set(index.values())):,}" if needed is not None else ""
        print(f"{len(files):,}{what} files of weights, {total}", flush=True)
        with progress_bar("downloading") as progress:
            fetched += here.fetch(files, progress)
    except DownloadError as error:
        raise ConfigError(str(error)) from None
    print(f"There, and with the hub's hashes: {size(fetched)} came in {time.monotonic() - started:.0f} s.")
    if needed is None:
        if verify(str(here.folder), data=False):
            return 1
    else:
        Checkpoint(
            here.folder, tensor_table(config), config.fp8_block, config.int_format, needed=needed
        ).close()
        whose = " and ".join(parts) or "all workers"
        print(f"Headers, shapes and types are those that {whose} of {service_file} need.")
    _say_what_is_next(here.folder, service, service_file)
    return 0


def _say_what_is_next(folder: Path, service: Service | None, service_file: Path | None) -> None:
    if service is None or service_file is None:
        print(f"To serve it: `model: {{path: {folder}}}` in a service file, and r1-cluster serve.")
    elif model_folder(service.model.path, service_file.parent) != folder.resolve():
        print(f"{service_file} reads another folder: put `path: {folder}` under `model:`.")
    else:
        print(f"To serve it, once every node has its parts: r1-cluster serve {service_file}")


def _needed(config: ModelConfig, service: Service, parts: Sequence[str]) -> set[str]:
    """The tensors that some workers of a service load, without any all of them. Raises ConfigError."""
    from r1_cluster.engine.parts import worker_tensors
    from r1_cluster.models.family import tensor_table
    from r1_cluster.planning.layout import build_layout

    layout = build_layout(service.layout, config)
    known = {worker.name for worker in layout.workers}
    for part in parts:
        if part in {spare.name for spare in layout.spares}:
            raise ConfigError(
                f"--part {part}: a spare takes the place of whoever dies, and needs what all others need: "
                "leave --part out"
            )
        if part not in known:
            listed = ", ".join(worker.name for worker in layout.workers)
            raise ConfigError(f"--part {part}: the service has no such worker; it has {listed}")
    if not parts:
        return {spec.name for spec in tensor_table(config)}
    chosen = replace(layout, workers=tuple(worker for worker in layout.workers if worker.name in parts))
    return {name for names in worker_tensors(config, chosen).values() for name in names}


def _index(here: Download, table: set[str]) -> dict[str, str]:
    """Which file of the repository has which tensor. Raises DownloadError for an index that does not fit the
    repository or the model."""
    from r1_cluster.weights.checkpoint import weight_map
    from r1_cluster.weights.download import DownloadError
    from r1_cluster.weights.headers import INDEX, SINGLE
    from r1_cluster.weights.tensors import listed_name

    repo = here.repo
    if INDEX not in repo.files:
        return dict.fromkeys(table, SINGLE)
    index = weight_map(here.folder) or {}
    strangers = sorted(
        file for file in {*index.values()} if file not in repo.files or not file.endswith(".safetensors")
    )
    missing = sorted(table - {listed_name(name) for name in index} - index.keys())
    if strangers:
        raise DownloadError(
            f"{INDEX} of {repo.name} names {len(strangers)} files that are not there: {strangers[0]!r}"
        )
    if missing:
        raise DownloadError(
            f"{INDEX} of {repo.name} lacks {len(missing)} tensors that its config.json needs, such as "
            f"{missing[0]}; nothing of the weights was fetched"
        )
    return index
