"""The command line: its help, and one clear sentence for whatever cannot be started."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from make_checkpoint import make_checkpoint

from r1_cluster import __version__

R1_CLUSTER = Path(sys.executable).with_name("r1-cluster")


def run(*arguments):
    return subprocess.run([R1_CLUSTER, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, size="nano", seed=3)
    return folder


@pytest.fixture
def write(tmp_path, checkpoint):
    def write_service(**sections):
        file = tmp_path / "service.yaml"
        data = {"name": "cli-test", "model": {"path": str(checkpoint)}, **sections}
        file.write_text(yaml.safe_dump(data))
        return file

    return write_service


def fails_with(result, *words):
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("r1-cluster: ")
    for word in words:
        assert word in line


@pytest.mark.slow
@pytest.mark.parametrize("command", [(), ("serve",), ("chat",), ("status",), ("drain",), ("stop",)])
def test_help_teaches(command):
    result = run(*command, "--help")
    assert result.returncode == 0
    assert "Usage: r1-cluster" in result.stdout
    assert len(result.stdout.splitlines()) > 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "r1-cluster: Missing command."),
        (("severe",), "r1-cluster: No such command 'severe'"),
        (("serve",), "r1-cluster serve: Missing argument 'SERVICE'."),
        (("serve", "--prot", "1"), "r1-cluster serve: No such option"),
        (("serve", "x.yaml", "--port", "eighty"), "r1-cluster serve: Invalid value for '--port'"),
        (("stop", "now"), "r1-cluster stop: Got unexpected extra argument"),
    ],
)
def test_a_command_line_that_is_wrong_is_two_lines(arguments, words):
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    usage, fault = result.stderr.splitlines()
    assert usage.startswith("Usage: r1-cluster")
    assert words in fault


def test_the_version():
    assert run("--version").stdout == f"r1-cluster {__version__}\n"


def test_commands_without_a_service_say_how_to_start_one():
    for command in ("chat", "status", "drain", "stop"):
        result = run(command, "--service", "none-of-that-name")
        fails_with(result, "'none-of-that-name' is running here", "r1-cluster serve SERVICE.yaml")


def test_a_missing_file_and_an_unknown_key(write):
    fails_with(run("serve", "nothing.yaml"), "nothing.yaml does not exist")
    fails_with(run("serve", str(write(layout={"stagess": 2}))), "layout.stagess: is not a known key")


@pytest.mark.slow
def test_a_layout_that_does_not_fit_the_model(write):
    layout = {"kind": "disaggregated", "stages": 9}
    fails_with(run("serve", str(write(layout=layout))), "layout.stages: 9 parts", "only 4 layers")
    layout = {"kind": "disaggregated", "expert_shards": ["0-3"]}
    fails_with(run("serve", str(write(layout=layout))), "cover 4 experts, but the model has 16")


@pytest.mark.slow
def test_a_checkpoint_that_is_not_there_or_not_supported(write, tmp_path):
    fails_with(run("serve", str(write(model={"path": "/nowhere"}))), "model.path: /nowhere is no checkpoint")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    fails_with(run("serve", str(write(model={"path": "gpt"}))), "GPT2LMHeadModel", "DeepseekV3ForCausalLM")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there(write):
    fails_with(run("serve", str(write(layout={"device": "cuda"}))), "layout.device: cuda is asked for, but")


@pytest.mark.slow
def test_an_npu_without_torch_npu(write):
    words = (
        "layout.device: npu is asked for, but torch_npu cannot be imported here (No module named 'torch_npu')"
    )
    fails_with(run("serve", str(write(layout={"device": "npu"}))), words)


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_float32_is_refused_on_devices(write, device):
    file = write(layout={"device": device}, model={"path": "builtin:nano_r1", "dtype": "float32"})
    fails_with(run("serve", str(file)), f"float32 is the CPU's; layout.device: {device} computes in bfloat16")


@pytest.mark.slow
def test_a_damaged_checkpoint(write, tmp_path):
    make_checkpoint(tmp_path / "broken", size="nano")
    (file,) = (tmp_path / "broken").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    fails_with(run("serve", str(write(model={"path": "broken"}))), "model.path", file.name)


@pytest.mark.slow
def test_a_checkpoint_whose_tokenizer_or_template_cannot_be_used(write, tmp_path):
    folder = make_checkpoint(tmp_path / "other", size="nano")
    service = str(write(model={"path": "other"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}")
    fails_with(run("serve", service), "model.path: the checkpoint's chat template is broken")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:-9])
    fails_with(run("serve", service), "model.path", "tokenizer.json cannot be read")


@pytest.mark.slow
def test_a_port_in_use(write):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        fails_with(
            run("serve", str(write(serve={"port": port}))), f"serve.port: 127.0.0.1:{port} cannot be used"
        )


@pytest.mark.slow
def test_a_machine_too_small(write):
    layout = {"kind": "disaggregated", "stages": 4, "expert_shards": 16, "cpus_per_worker": 50}
    # 4 stages, of which 3 have MoE layers and a router, and 16 shards.
    words = "layout: 23 workers of 50 CPUs each, with the engine and the ingress, need 1150.2 CPUs, this machine has"
    fails_with(run("serve", str(write(layout=layout))), words, "; what fits is layout.cpus_per_worker: ")
