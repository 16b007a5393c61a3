"""One YAML file describes a service: which model, in which layout, with which engine, served where.

Everything is frozen and validated when it is read; a message names the key it is about. What depends on
the checkpoint (does the layout cover all layers and experts?) is checked by `planning.layout`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml
from pydantic import Field

Device = Literal["cpu", "cuda", "npu"]
"""What workers compute on: torch's names, of which cuda is AMD's as well, and npu is Huawei's Ascend."""

KvCacheDtype = Literal["fp8"]
"""What KV pages may be kept in beside the compute dtype: E4M3 with float32 scales."""

BUILTIN_PREFIX = "builtin:"
ASSETS = Path(__file__).parent / "assets"


class ConfigError(Exception):
    """A service file that cannot be used; the text is one sentence for the person who wrote it."""


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(_Section):
    """`path`: a folder in Hugging Face format, relative to the service file, or `builtin:NAME`.

    `dtype` is what is computed in where weights are not FP8: if nothing is said, float32 on the CPU and
    bfloat16 on other devices, where nothing else is possible.
    """

    path: str
    name: str = ""
    dtype: Literal["float32", "bfloat16"] | None = None


class LayoutConfig(_Section):
    """Which roles share a process.

    `stages` and `expert_shards` are a count (split evenly) or a list of inclusive ranges such as
    ["0-1", "2-3"]. `redundant_experts` is how many further workers hold each expert shard; `spares` how many
    loaded-but-idle workers stand by for whoever dies. `tensor_parallel` is how many workers, its ranks, share
    each stage's weights and heads. In kind expert-parallel there are `data_parallel` data ranks, each with
    requests and KV pages of its own, all attention weights, and its part of the experts; `redundant_experts`
    is how many further ones hold each part. `spread` puts every worker of a stage, and every expert shard, on
    a node of its own.
    """

    kind: Literal["colocated", "disaggregated", "expert-parallel"] = "colocated"
    stages: Annotated[int, Field(ge=1)] | list[str] = 1
    expert_shards: Annotated[int, Field(ge=1)] | list[str] = 1
    redundant_experts: Annotated[int, Field(ge=0)] = 0
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    data_parallel: Annotated[int, Field(ge=1)] = 1
    spares: Annotated[int, Field(ge=0)] = 0
    spread: bool = False
    device: Device = "cpu"
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0


class Engine(_Section):
    """The scheduler's limits, which hold for each data rank. `page_size` counts tokens, `num_pages` pages per
    stage and layer.

    `kv_cache_dtype: fp8` keeps KV in FP8 with scales, in about half of BF16's memory or a quarter of
    float32's, and rounds it (docs/kernels.md); if nothing is said, it is kept as it is computed.
    `standby` keeps one more engine process that takes over within a second when one dies. Workers leave
    `lease_s` after the last word of an engine; a worker that is silent for `step_timeout_s` is replaced.
    `micro_batches` is how many steps may be in flight, of different sequences; if nothing is said, the layout
    and the number of sequences decide (docs/layouts.md).
    """

    replicas: Annotated[int, Field(ge=1)] = 1
    standby: bool = False
    deterministic: bool | None = None
    threads: Annotated[int, Field(ge=1)] = 1
    page_size: Annotated[int, Field(ge=1)] = 16
    num_pages: Annotated[int, Field(ge=1)] = 2048
    kv_cache_dtype: KvCacheDtype | None = None
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    max_batch_tokens: Annotated[int, Field(ge=1)] = 512
    max_queued: Annotated[int, Field(ge=0)] = 256
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    micro_batches: Annotated[int, Field(ge=1)] | None = None
    lease_s: Annotated[float, Field(gt=0)] = 10.0
    step_timeout_s: Annotated[float, Field(gt=0)] = 10.0


class Sampling(_Section):
    """What a chat request gets where it is silent (DeepSeek's recommendation for R1)."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_tokens: Annotated[int, Field(ge=1)] = 32768


class Serve(_Section):
    """The HTTP edge. `drain_s` must exceed the longest answer: so long a replica may finish its streams.

    A longer body than `max_body_bytes` is refused (413), as is one that is not there whole after
    `body_timeout_s` (408). `cors_origins` are those whose web pages may ask (`["*"]`: all).
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    ingress_replicas: Annotated[int, Field(ge=1)] = 1
    drain_s: Annotated[float, Field(gt=0)] = 1800.0
    max_body_bytes: Annotated[int, Field(ge=1024)] = 2**24
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    cors_origins: list[str] = []
    defaults: Sampling = Sampling()


class Cluster(_Section):
    """`address`: null starts a local Ray cluster, anything else is passed to `ray.init`."""

    address: str | None = None
    link_ports: tuple[int, int] = (21000, 23999)

    @pydantic.field_validator("link_ports", mode="before")
    @classmethod
    def _as_range(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Cluster:
        low, high = self.link_ports
        if not 1024 <= low <= high <= 65535:
            raise ValueError("link_ports must be two ports, low then high, between 1024 and 65535")
        return self


class Service(_Section):
    """A whole service file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    model: Model
    layout: LayoutConfig = LayoutConfig()
    engine: Engine = Engine()
    serve: Serve = Serve()
    cluster: Cluster = Cluster()

    @pydantic.model_validator(mode="after")
    def _dtypes_fit_device(self) -> Service:
        device = self.layout.device
        if device != "cpu" and self.model.dtype == "float32":
            raise ValueError(
                f"model.dtype: float32 is the CPU's; layout.device: {device} computes in bfloat16"
            )
        if device == "npu" and self.engine.kv_cache_dtype == "fp8":
            raise ValueError(
                "engine.kv_cache_dtype: fp8 is for the CPU and GPUs; layout.device: npu has no FP8"
            )
        return self

    @property
    def dtype(self) -> str:
        """What is computed in: `model.dtype`, or the device's own."""
        return self.model.dtype or ("float32" if self.layout.device == "cpu" else "bfloat16")

    @property
    def served_name(self) -> str:
        return self.model.name or self.name


def load_service(path: Path) -> Service:
    """Reads a service file, and finds the folder of its model; raises ConfigError as `read_service`."""
    service = read_service(path)
    folder = resolve_model_path(service.model.path, path.parent)
    return service.model_copy(update={"model": service.model.model_copy(update={"path": str(folder)})})


def read_service(path: Path) -> Service:
    """Reads and validates a service file alone, whose model need not be there yet; raises ConfigError with
    one sentence that names the key."""
    if not path.is_file():
        raise ConfigError(f"service file {path} does not exist")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"service file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"service file {path} must be a mapping with the keys name, model, layout, …")
    try:
        return Service.model_validate(data)
    except pydantic.ValidationError as error:
        raise ConfigError(f"service file {path}: {_first_faults(error)}") from None


def model_folder(text: str, base: Path) -> Path:
    """The folder that `builtin:NAME`, an absolute path, or one relative to `base` means, there or not."""
    if text.startswith(BUILTIN_PREFIX):
        return ASSETS / text.removeprefix(BUILTIN_PREFIX)
    return (base / Path(text).expanduser()).resolve()


def resolve_model_path(text: str, base: Path) -> Path:
    """`model_folder`, where there is a checkpoint; raises ConfigError where there is none."""
    folder = model_folder(text, base)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {text} is no checkpoint: there is no {folder / 'config.json'}")
    return folder


def _first_faults(error: pydantic.ValidationError) -> str:
    faults = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"]) or "the file"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "is not a known key"
        elif fault["type"] == "missing":
            message = "is required"
        faults.append(f"{key}: {message}")
    return "; ".join(faults)
