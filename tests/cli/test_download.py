"""`r1-cluster weights download`, from a stand-in of the hub."""

import json

import pytest
import yaml
from hub_server import HubServer
from huggingface_hub import constants
from make_checkpoint import make_checkpoint

from r1_cluster.cli.main import main
from r1_cluster.cli.serve import _check
from r1_cluster.config import ConfigError, load_service
from r1_cluster.models.family import load_config, mtp_table
from r1_cluster.weights import download as module
from r1_cluster.weights.checkpoint import weight_map
from r1_cluster.weights.headers import INDEX

LAYOUT = {"kind": "disaggregated", "stages": 2, "expert_shards": 2, "spares": 1}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A whole small R1, a file for each layer or two, with its MTP module, and what else repositories have."""
    folder = make_checkpoint(tmp_path_factory.mktemp("published"), max_shard_bytes=300_000)
    for name in ("pytorch_model.bin", "figure.png", "README.md", "modeling_deepseek.py", "LICENSE"):
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path, published):
    with HubServer() as server:
        server.commit(published)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture
def service(tmp_path):
    def write(path="model", **sections):
        file = tmp_path / "service.yaml"
        values = {"name": "tiny", "model": {"path": str(path)}, "layout": LAYOUT, **sections}
        file.write_text(yaml.safe_dump(values))
        return file

    return write


def shards(folder):
    return {path.name for path in folder.glob("*.safetensors")}


def run(*arguments):
    return main(["weights", "download", *map(str, arguments)])


def says(capsys, *arguments):
    """The one line in which the command says why it ends."""
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_whole_download(hub, published, tmp_path, capsys):
    folder = tmp_path / "model"
    assert run(hub.name, folder) == 0
    out = capsys.readouterr().out
    assert f"{folder} is sound: {len(shards(published))} files" in out
    assert out.splitlines()[-1].startswith("To serve it: `model: {path: ")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {path.name for path in published.iterdir()} - {
        "pytorch_model.bin",
        "figure.png",
        "README.md",
        "modeling_deepseek.py",
    }
    assert main(["weights", "verify", str(folder)]) == 0
    assert f"the hashes of {len(shards(published))} files" in capsys.readouterr().out
    assert run(hub.name, folder) == 0
    assert "0 B came in" in capsys.readouterr().out


def test_a_whole_download_to_the_cache_is_a_checkpoint_too(hub, capsys):
    assert run(hub.name, "--revision", "main") == 0
    out = capsys.readouterr().out
    folder = out.splitlines()[0].split(" → ")[1]
    assert folder.endswith(f"/snapshots/{list(hub.commits)[-1]}")
    assert main(["weights", "verify", folder]) == 0
    assert "the hashes of" in capsys.readouterr().out


def test_all_that_a_service_needs_is_all_but_the_mtp_module(hub, published, service, tmp_path, capsys):
    file = service()
    assert run(hub.name, "--for", file) == 0
    folder = tmp_path / "model"  # which the service file names
    module_names = {spec.name for spec in mtp_table(load_config(published))}
    index = weight_map(published)
    assert shards(folder) == {file for name, file in index.items() if name not in module_names}
    assert shards(folder) < shards(published)
    out = capsys.readouterr().out
    assert f"those that all workers of {file} need" in out
    assert out.splitlines()[-1] == f"To serve it, once every node has its parts: r1-cluster serve {file}"
    small = LAYOUT | {"cpus_per_worker": 0.1}
    _check(load_service(service(serve={"port": 8399}, layout=small)))  # and it is enough to serve it here


@pytest.mark.slow
def test_what_one_part_needs(hub, published, service, tmp_path, capsys):
    file = service()
    folder = tmp_path / "other"
    assert run(hub.name, folder, "--for", file, "--part", "stage-1", "--part", "router-1") == 0
    config, index = load_config(published), weight_map(published)
    last = range(config.num_hidden_layers // 2, config.num_hidden_layers)
    needed = {
        file
        for name, file in index.items()
        if ".experts." not in name
        and (name in ("model.norm.weight", "lm_head.weight") or any(f"layers.{i}." in name for i in last))
    }
    assert shards(folder) == needed < shards(published)
    out = capsys.readouterr().out
    assert f"{len(needed)} of {len(shards(published))} files of weights" in out
    assert f"{file} reads another folder: put `path: {folder}` under `model:`." in out

    assert main(["weights", "verify", "--no-data", str(folder)]) == 1
    out = capsys.readouterr().out
    missing = len(shards(published)) - len(needed)
    assert f"{missing} of {len(shards(published))} files are not here. A node that hosts some parts" in out

    # On one machine all is needed; on a cluster each node looks for its own.
    with pytest.raises(ConfigError, match=r"is listed in model.safetensors.index.json, but not there"):
        _check(load_service(service(folder)))
    elsewhere = service(folder, cluster={"address": "auto"})
    _check(load_service(elsewhere))
    damaged = folder / sorted(needed)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="it is cut off or broken"):
        _check(load_service(elsewhere))

    assert run(hub.name, folder, "--for", file) == 0  # the others come to them, and the damaged one again
    capsys.readouterr()
    assert run(hub.name, folder) == 0
    assert f"{folder} is sound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            "stage-2",
            "--part stage-2: the service has no such worker; it has stage-0, stage-1, router-0, router-1,",
        ),
        ("spare-0", "--part spare-0: a spare takes the place of whoever dies"),
    ],
)
def test_parts_that_are_none(hub, service, tmp_path, capsys, part, words):
    assert words in says(capsys, hub.name, "--for", service(), "--part", part)
    assert shards(tmp_path / "model") == set()


def test_command_lines_that_cannot_be_meant(hub, service, capsys):
    assert "name the service's file with --for" in says(capsys, hub.name, "--part", "stage-0")
    assert "nowhere.yaml does not exist" in says(capsys, hub.name, "--for", "nowhere.yaml")
    assert "model.path is builtin:nano_r1; name a FOLDER" in says(
        capsys, hub.name, "--for", service("builtin:nano_r1")
    )
    assert "has no revision 'v9'" in says(capsys, hub.name, "--revision", "v9")
    assert "the model has only 4 layers" in says(
        capsys, hub.name, "--for", service(layout={"kind": "disaggregated", "stages": 9})
    )
    assert hub.fetched().keys() <= set(module.BESIDE)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", b'{"architectures": ["GPT2LMHeadModel"]}', "GPT2LMHeadModel is not supported"),
        ("config.json", b"{", "cannot be read"),
        (INDEX, b"{", "has no readable weight_map"),
        (INDEX, b'{"weight_map": {"a": "../b"}}', "names 1 files that are not there: '../b'"),
        (INDEX, b'{"weight_map": {"a": "pytorch_model.bin"}}', "names 1 files that are not there: 'pytorch_"),
    ],
)
def test_models_that_cannot_be_served_are_refused_before_their_weights_come(
    hub, published, tmp_path, capsys, file, content, words
):
    hub.commit({path.name: path.read_bytes() for path in published.iterdir()} | {file: content})
    assert words in says(capsys, hub.name, tmp_path / "model")
    assert not shards(tmp_path / "model")


def test_an_index_that_lacks_tensors_is_refused_before_any_comes(hub, published, tmp_path, capsys):
    index = {name: file for name, file in weight_map(published).items() if ".layers.2." not in name}
    files = {path.name: path.read_bytes() for path in published.iterdir()}
    hub.commit(files | {INDEX: json.dumps({"weight_map": index}).encode()})
    missing = len(weight_map(published)) - len(index)
    words = (
        f"lacks {missing} tensors that its config.json needs, such as model.layers.2.input_layernorm.weight"
    )
    assert words in says(capsys, hub.name, tmp_path / "model")
    assert not shards(tmp_path / "model")


def test_a_model_of_one_file(hub, service, tmp_path, capsys):
    hub.commit(make_checkpoint(tmp_path / "one"))
    (tmp_path / "one" / INDEX).unlink(missing_ok=True)
    names = {path.name for path in (tmp_path / "one").glob("*.safetensors")}
    assert len(names) == 1
    data = (tmp_path / "one" / names.pop()).read_bytes()
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.json")}
    hub.commit(files | {"model.safetensors": data})
    assert run(hub.name, "--for", service(), "--part", "experts-0") == 0
    assert shards(tmp_path / "model") == {"model.safetensors"}
    assert "1 of 1 files of weights" in capsys.readouterr().out


def test_a_download_that_is_interrupted_says_how_to_go_on(hub, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_in_threads", interrupted)
    assert run(hub.name, tmp_path / "model") == 130
    assert "broken off; the same command goes on from here" in capsys.readouterr().err


def test_help_names_what_it_needs(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    for word in ("REPO", "--for", "--part", "--revision", "HF_TOKEN"):
        assert word in out
