"""`r1-cluster weights`: what is in a checkpoint, whether it is sound, and other forms of it."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r1_cluster.config import ASSETS, BUILTIN_PREFIX, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from r1_cluster.models.config import ModelConfig
    from r1_cluster.weights.cast import To
    from r1_cluster.weights.inventory import Line, Stored
    from r1_cluster.weights.rewrite import Outcome
    from r1_cluster.weights.tensors import Part, TensorSpec
    from r1_cluster.weights.verify import Report

app = typer.Typer(
    help="Downloads checkpoints, checks them, and makes others of them. No service has to run for it.",
    no_args_is_help=False,
    rich_markup_mode="markdown",
)

_MAX_FAULTS_SHOWN = 30
_BROKEN_OFF = "\nbroken off; the same command goes on from here"
_WORDS: dict[Part | None, str] = {
    "norm": "norms",
    "mlp": "dense MLPs",
    "gate": "gates",
    "shared_experts": "shared experts",
    "experts": "routed experts",
    "mtp": "projection",
    None: "not in config.json",
}


@app.command()
def show(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PATH|PRESET", help="A checkpoint's folder, or a published name such as DeepSeek-R1."
        ),
    ],
) -> int:
    """Shows parameters, bytes and types of a model, part by part.

    Of a folder, its files' headers are read and nothing else. The ten published models are known by name and
    need no download: what they hold follows from their config.json.
    """
    from rich.console import Console

    from r1_cluster.models.config import ModelConfigError
    from r1_cluster.models.family import load_config, mtp_table, parse_config, tensor_table
    from r1_cluster.weights.inventory import as_published

    folder, preset = _find(model)
    try:
        config = load_config(folder) if preset is None else parse_config(preset)
    except ModelConfigError as error:
        raise ConfigError(f"{model}: {error}") from None
    tables = tensor_table(config), mtp_table(config)
    if preset is None:
        main, module, others = _stored(folder, *tables)
    else:
        main, module = (as_published(table, config.dtype, config.fp8_block) for table in tables)
        others = []
    print(f"{model}: {config.architecture}, {config.num_hidden_layers} layers")
    Console().print(_table(config, main, module, others))
    print(_sentence(config, main))
    return 0


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="The checkpoint's folder.")],
    data: Annotated[
        bool, typer.Option("--data/--no-data", help="Read every number, or headers and the index alone.")
    ] = True,
) -> int:
    """Checks a checkpoint before anything is loaded, and says all that is wrong with it.

    Files and their index in both directions, every tensor's shape and type against config.json (those of the
    MTP module too), FP8 scales, NaN and infinity, and each file's hash, where the hub's metadata is there.
    Nothing is changed. Ends with 0 for a sound checkpoint, with 1 for another.
    """
    from r1_cluster.models.config import ModelConfigError
    from r1_cluster.models.family import load_config, mtp_table, read_config, tensor_table
    from r1_cluster.weights.verify import verify as check

    folder = _folder(path)
    table, module, block, integers, broken = None, [], None, None, []
    stores_tied_head = False
    try:
        config = load_config(folder)
        stores_tied_head = config != read_config(folder)
        table, module = tensor_table(config), mtp_table(config)
        block, integers = config.fp8_block, config.int_format
    except ModelConfigError as error:
        broken = [f"{error}; until that is put right, no tensor can be held against it"]
    with progress_bar("reading") as progress:
        report = check(folder, table, module, block, int_format=integers, progress=progress if data else None)
    if stores_tied_head:
        report.notes.append(_tied_head(folder, compare=data and not report.faults))
    _print_report(path, replace(report, faults=broken + report.faults), data)
    return 1 if broken or report.faults else 0


def _tied_head(folder: Path, *, compare: bool) -> str:
    """What to say of a head that is stored where config.json says that it is the embedding."""
    from r1_cluster.models.family import EMBEDDING, HEAD
    from r1_cluster.weights.verify import are_equal

    what = f"config.json says that the head is the embedding (tie_word_embeddings), and {HEAD} is stored, too"
    if not compare:
        return f"{what}: it is used."
    if are_equal(folder, EMBEDDING, HEAD):
        return f"{what}, with the same numbers: it is used, and could be left out."
    return (
        f"{what}, with other numbers: it is used, as transformers 5 has it; other engines use the embedding. "
        "If it is what is meant, set tie_word_embeddings to false."
    )


def _print_report(path: str, report: Report, data: bool) -> None:
    count = len(report.faults)
    if count:
        things = "one thing is" if count == 1 else f"{count:,} things are"
        print(f"{path} is not sound: {things} wrong with it.\n")
        for i, fault in enumerate(report.faults[:_MAX_FAULTS_SHOWN], 1):
            print(f"{i:4}. {fault}.")
        if count > _MAX_FAULTS_SHOWN:
            print(f"      … and {count - _MAX_FAULTS_SHOWN:,} more; most of them have one cause.")
        print(
            "\nWhere a tensor is missing, is one too many, or has another shape or type than expected, the "
            "files and\nconfig.json are of different models or revisions: fetch them again together. Nothing "
            "was changed."
        )
    else:
        files = f"{report.files:,} file{'s' * (report.files != 1)}"
        print(f"{path} is sound: {files}, {report.tensors:,} tensors, {size(report.num_bytes)}.")
        print("Checked: the index and every header, shapes and types against config.json", end="")
        hashes = f"; the hashes of {report.hashed:,} files" if report.hashed else ""
        print(f"; that every number is finite and every scale positive{hashes}." if data else ".")
    if not data:
        print("The data was not read: damaged numbers would not have been seen. Without --no-data it is.")
    for note in report.notes:
        print(note)


@app.command("cast")
def cast_command(
    source: Annotated[
        str | None, typer.Argument(metavar="SRC", help="The checkpoint's folder.", show_default=False)
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="DST", help="An empty or a new folder.", show_default=False)
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="bf16|fp8", help="What to cast to (default: what SRC is not).")
    ] = None,
    input_fp8_hf_path: Annotated[
        str | None, typer.Option(metavar="SRC", help="As DeepSeek's fp8_cast_bf16.py has it.")
    ] = None,
    output_bf16_hf_path: Annotated[
        Path | None, typer.Option(metavar="DST", help="As DeepSeek's fp8_cast_bf16.py has it.")
    ] = None,
) -> int:
    """Casts a checkpoint from FP8 to BF16, or back, into another folder.

    FP8 is multiplied by its scales as DeepSeek does it, bit for bit; to FP8 go the matrices that DeepSeek
    keeps so, in blocks of 128×128. Memory stays below 2 GiB whatever the model's size. A cast that was broken
    off, even killed, goes on when the same command is given again; config.json comes last, so that nothing
    takes an unfinished folder for a checkpoint.
    """
    from r1_cluster.models.family import load_config, mtp_table, tensor_table
    from r1_cluster.weights.cast import cast

    if input_fp8_hf_path is not None or output_bf16_hf_path is not None:
        if source is not None or target is not None or to not in (None, "bf16"):
            raise ConfigError("name SRC and DST either in DeepSeek's way or in ours")
        source, target, to = input_fp8_hf_path, output_bf16_hf_path, "bf16"
    if source is None or target is None:
        raise ConfigError("both SRC and DST are needed: r1-cluster weights cast SRC DST")
    folder, started = _folder(source), time.monotonic()
    with _rewriting():
        config = _in_floats(source, load_config(folder))
        wanted: To = "fp8" if (to or "").lower() == "fp8" else "bf16"
        if to is None and config.fp8_block is None:
            wanted = "fp8"
        elif to is not None and to.lower() != wanted:
            raise ConfigError(f"--to: {to!r} is neither bf16 nor fp8")
        table, module, block = tensor_table(config), mtp_table(config), config.fp8_block
        with progress_bar(f"casting to {wanted.upper()}") as progress:
            done = cast(folder, target, wanted, table, fp8_block=block, module=module, progress=progress)
    print(f"{target} is {source} in {wanted.upper()}: {_words(done, started)}.")
    return 0


@app.command("convert")
def convert_command(
    source: Annotated[
        str | None, typer.Argument(metavar="SRC", help="The checkpoint's folder.", show_default=False)
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="DST", help="An empty or a new folder.", show_default=False)
    ] = None,
    service: Annotated[
        Path | None, typer.Option("--for", metavar="SERVICE.yaml", help="Whose layout the files are for.")
    ] = None,
    hf_ckpt_path: Annotated[
        str | None, typer.Option(metavar="SRC", help="As DeepSeek's convert.py has it.")
    ] = None,
    save_path: Annotated[
        Path | None, typer.Option(metavar="DST", help="As DeepSeek's convert.py has it.")
    ] = None,
    n_experts: Annotated[
        int | None, typer.Option(help="As DeepSeek's: how many routed experts a layer has; checked.")
    ] = None,
    model_parallel: Annotated[
        int | None, typer.Option(min=1, help="As DeepSeek's: how many ranks, and so how many files.")
    ] = None,
) -> int:
    """Converts a checkpoint to other files: one for each worker of a service, or for each rank of DeepSeek's
    own inference code.

    With --for, each worker's file has the tensors that it loads, in the order in which it loads them, so that
    it reads one file from front to back. All types stay as they are, and with its index DST is a checkpoint
    like any other: every other layout can load it, too.

    With DeepSeek's flags, names, cuts and files are those of its convert.py (model0-mp16.safetensors, …): the
    MTP module is left out, FP8 stays FP8.

    Goes on where an earlier run was broken off.
    """
    theirs = (hf_ckpt_path, save_path, n_experts, model_parallel)
    if service is not None and any(value is not None for value in theirs):
        raise ConfigError("name either --for SERVICE.yaml or DeepSeek's flags")
    if service is not None:
        if source is None or target is None:
            raise ConfigError("SRC and DST are needed: r1-cluster weights convert SRC DST --for SERVICE.yaml")
        return _convert_for(source, target, service)
    if source is not None:
        raise ConfigError("SRC DST is converted --for a SERVICE.yaml; DeepSeek's form has flags alone")
    if hf_ckpt_path is None or save_path is None or n_experts is None or model_parallel is None:
        raise ConfigError(
            "name SRC DST --for SERVICE.yaml, or all four of DeepSeek's flags: "
            "--hf-ckpt-path SRC --save-path DST --n-experts N --model-parallel N"
        )
    return _convert_for_ranks(hf_ckpt_path, save_path, n_experts, model_parallel)


def _convert_for(source: str, target: Path, service: Path) -> int:
    from r1_cluster.config import read_service
    from r1_cluster.engine.parts import worker_tensors
    from r1_cluster.models.family import load_config, mtp_table, tensor_table
    from r1_cluster.planning.layout import build_layout
    from r1_cluster.weights.per_worker import convert_for_workers

    folder, started = _folder(source), time.monotonic()
    asked = read_service(service)
    with _rewriting():
        config = load_config(folder)
        layout = build_layout(asked.layout, config)
        with progress_bar(f"converting for {asked.name}") as progress:
            done = convert_for_workers(
                folder,
                target,
                tensor_table(config),
                worker_tensors(config, layout),
                module=mtp_table(config),
                fp8_block=config.fp8_block,
                int_format=config.int_format,
                progress=progress,
            )
    print(f"{target} is {source} for the workers of {asked.name}: {_words(done, started)}.")
    return 0


def _convert_for_ranks(source: str, target: Path, num_experts: int, ranks: int) -> int:
    from r1_cluster.models.deepseek import ARCHITECTURE
    from r1_cluster.models.deepseek_names import inference_name
    from r1_cluster.models.family import load_config, tensor_table
    from r1_cluster.weights.convert import convert

    folder, started = _folder(source), time.monotonic()
    with _rewriting():
        config = _in_floats(source, load_config(folder))
        if config.architecture != ARCHITECTURE or config.moe is None:
            raise ConfigError(f"{source} is {config.architecture}; DeepSeek's code runs {ARCHITECTURE}")
        if num_experts != config.moe.n_routed_experts:
            raise ConfigError(f"--n-experts is {num_experts}, config.json has {config.moe.n_routed_experts}")
        with progress_bar(f"converting for {ranks} ranks") as progress:
            done = convert(
                folder,
                target,
                tensor_table(config),
                ranks,
                rename=inference_name,
                fp8_block=config.fp8_block,
                progress=progress,
            )
    print(f"{target} is {source} for {ranks} ranks: {_words(done, started)}.")
    return 0


@app.command("quantize")
def quantize_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The checkpoint's folder, in floats or FP8.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="An empty or a new folder.")],
    to: Annotated[str, typer.Option(metavar="int8|int4", help="INT8 by rows, or INT4 by 128 columns.")],
) -> int:
    """Quantizes a checkpoint's matrices to INT8 or INT4, and shows by part how far they are off.

    Activations are not quantized. What is written is compressed-tensors' pack-quantized format, which other
    engines read as well. Streams, and goes on where an earlier run was broken off, as `cast` does.
    """
    from r1_cluster.cli.quantize import FORMATS, error_table
    from r1_cluster.models.family import load_config, mtp_table, tensor_table
    from r1_cluster.weights.quantize import quantize_checkpoint

    how = FORMATS.get(to.lower())
    if how is None:
        raise ConfigError(f"--to: {to!r} is neither {' nor '.join(FORMATS)}")
    folder, started = _folder(source), time.monotonic()
    with _rewriting():
        config = _in_floats(source, load_config(folder))
        table, module, block = tensor_table(config), mtp_table(config), config.fp8_block
        with progress_bar(f"quantizing to {to.upper()}") as progress:
            done, errors = quantize_checkpoint(
                folder, target, table, how, fp8_block=block, module=module, progress=progress
            )
    print(error_table(errors, {spec.name: spec.part for spec in (*table, *module)}))
    print(f"{target} is {source} in {to.upper()}: {_words(done, started)}.")
    return 0


@app.command("download")
def download_command(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Such as deepseek-ai/DeepSeek-R1.")],
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", help="Where to (default: the hub's cache; with --for, its model.path)."
        ),
    ] = None,
    service: Annotated[
        Path | None, typer.Option("--for", metavar="SERVICE", help="Only what this service's workers need.")
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Only what this worker of --for needs, such as stage-0; may be repeated."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit (default: main).")] = None,
) -> int:
    """Downloads a checkpoint from the hub: weights, configuration, tokenizer and template, and nothing else.

    A download that was broken off, even killed, goes on when the same command is given again. Each file's
    hash is held against the hub's before the file gets its name. With --for and --part a node gets only the
    files that its own workers read. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they always
    do.
    """
    from r1_cluster.cli.download import download

    if part and service is None:
        raise ConfigError("--part names a worker of a service: name the service's file with --for")
    with _rewriting():
        return download(repo, folder, service, part or [], revision)


def _in_floats(name: str, config: ModelConfig) -> ModelConfig:
    """Raises ConfigError for a model in integers, of which no other form can be made."""
    if config.int_format is not None:
        raise ConfigError(
            f"{name} is in INT{config.int_format.bits}: take the checkpoint that it was made from"
        )
    return config


@contextmanager
def _rewriting() -> Iterator[None]:
    """What all rewritings say where they cannot be done, and where they are broken off."""
    from r1_cluster.models.config import ModelConfigError
    from r1_cluster.weights.checkpoint import CheckpointError
    from r1_cluster.weights.rewrite import RewriteError

    try:
        yield
    except (ModelConfigError, CheckpointError, RewriteError) as error:
        raise ConfigError(str(error)) from None
    except KeyboardInterrupt:
        print(_BROKEN_OFF, file=sys.stderr)
        raise


def _words(done: Outcome, started: float) -> str:
    files = f"{done.files:,} file{'s' * (done.files != 1)}, {size(done.num_bytes)}"
    kept = f", {done.kept:,} of them by an earlier run" if done.kept else ""
    return f"{files}{kept}, in {time.monotonic() - started:.0f} s"


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """For a `with` block: what to tell how many bytes are done, and of how many. Shows rate and time left
    on a terminal's stderr, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Rate

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Rate(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _folder(path: str) -> Path:
    """Of a checkpoint, or of one that comes with the package. Raises ConfigError where there is none."""
    builtin = path.startswith(BUILTIN_PREFIX)
    folder = ASSETS / path.removeprefix(BUILTIN_PREFIX) if builtin else Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{path} is not a folder; name one with config.json and safetensors")
    return folder


def _find(model: str) -> tuple[Path, Mapping[str, object] | None]:
    """A folder, or the config.json of a published model. Raises ConfigError where it is neither."""
    from r1_cluster.models.presets import presets

    if model.startswith(BUILTIN_PREFIX) or Path(model).is_dir():
        return _folder(model), None
    for name, values in presets().items():
        if model.removeprefix("deepseek-ai/").lower() == name.lower():
            return Path(), values
    raise ConfigError(f"{model} is neither a folder nor a published model; those are: {', '.join(presets())}")


def _stored(
    folder: Path, table: list[TensorSpec], module: list[TensorSpec]
) -> tuple[list[Stored], list[Stored], list[Stored]]:
    """What a folder's files hold: the model's own, the MTP module's, and what is neither's."""
    from r1_cluster.weights.headers import read_headers
    from r1_cluster.weights.inventory import from_headers
    from r1_cluster.weights.tensors import SCALE_SUFFIX

    entries, faults = read_headers(folder)
    for fault in faults:
        typer.echo(f"r1-cluster: {fault}", err=True)
    if not entries:
        raise ConfigError(f"{folder} has no safetensors file that can be read")
    of_module = {name for spec in module for name in (spec.name, spec.name + SCALE_SUFFIX)}
    everything = from_headers(entries, [*table, *module])
    return (
        [tensor for tensor in everything if tensor.part is not None and tensor.name not in of_module],
        [tensor for tensor in everything if tensor.name in of_module],
        [tensor for tensor in everything if tensor.part is None],
    )


def _table(config: ModelConfig, main: list[Stored], module: list[Stored], others: list[Stored]) -> Table:
    from rich.table import Table

    from r1_cluster.weights.inventory import by_part, total

    table = Table()
    for name in ("part", "tensors", "parameters", "bytes", "types"):
        table.add_column(name, justify="left" if name in ("part", "types") else "right")
    sums = {
        "the model": total(by_part(main).values()),
        f"MTP module (layer {config.num_hidden_layers})": total(by_part(module).values()),
        "others": total(by_part(others).values()),
    }
    for part, line in by_part(main).items():
        table.add_row(*_cells(_WORDS.get(part) or str(part), line))
    table.add_section()
    for name, line in sums.items():
        if line.tensors:
            table.add_row(*_cells(name, line))
    table.add_section()
    table.add_row(*_cells("all files", total(sums.values())))
    return table


def _cells(name: str, line: Line) -> Iterable[str]:
    return name, f"{line.tensors:,}", billions(line.parameters), size(line.num_bytes), _types(line.dtypes)


def _types(dtypes: Counter[str]) -> str:
    """Those that make up the most bytes first."""
    return ", ".join(dtype for dtype, _ in dtypes.most_common())


def _sentence(config: ModelConfig, main: list[Stored]) -> str:
    from r1_cluster.weights.inventory import active_parameters, by_part, total

    lines = by_part(main)
    parameters = total(lines.values()).parameters
    moe = config.moe
    if moe is None:
        return f"{billions(parameters)} parameters, all of them active for each token."
    active = active_parameters(lines, Fraction(moe.num_experts_per_tok, moe.n_routed_experts))
    return (
        f"{billions(parameters)} parameters, {billions(active)} of them active for each token "
        "(without the input embedding and the MTP module)."
    )


def billions(count: int) -> str:
    """Of parameters: 671.0B, 23.5M."""
    for unit, word in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.2f}{word}" if count < 10 * unit else f"{count / unit:.1f}{word}"
    return str(count)


def size(num_bytes: int) -> str:
    """In decimal units, as disks and hubs count."""
    for unit, word in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {word}"
    return f"{num_bytes} B"
