"""`convert --for`: a checkpoint like any other, of which each worker reads one file from front to back."""

import json
import math
import signal
from itertools import pairwise

import pytest
import torch
from dying_cast import NO_ROOM, DyingCasts, run
from r1_files import FP8_CONFIG, write_r1
from safetensors.torch import load_file
from small_model import config_values, dense_values, write_stored

from r1_cluster.cli.main import main
from r1_cluster.config import LayoutConfig
from r1_cluster.engine.parts import load_parts
from r1_cluster.models.family import EMBEDDING, load_config, mtp_table, parse_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.presets import presets
from r1_cluster.planning.layout import build_layout
from r1_cluster.weights.checkpoint import Checkpoint
from r1_cluster.weights.headers import INDEX, ITEM_BYTES
from r1_cluster.weights.inventory import as_published
from r1_cluster.weights.reading import FilesReader
from r1_cluster.weights.tensors import INT4, INT8
from r1_cluster.weights.verify import verify

LAYOUTS = {
    "colocated": {"kind": "colocated"},
    "stages": {"kind": "disaggregated", "stages": 2},
    "shards": {"kind": "disaggregated", "stages": 2, "expert_shards": 3, "redundant_experts": 1},
}
MODELS = {
    "deepseek": config_values(),
    "llama": dense_values("LlamaForCausalLM"),
    "qwen2": dense_values("Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen3": dense_values("Qwen3ForCausalLM"),
}
CASES = [
    (model, layout) for model in MODELS for layout in LAYOUTS if model == "deepseek" or layout != "shards"
]
# Every matrix has an even number of scales, and so whole multiples of 8 bytes of them, as published ones have.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "head_dim": 64,
    "quantization_config": FP8_CONFIG,
}


@pytest.fixture(scope="module")
def casts():
    made = DyingCasts()
    yield made
    made.close()


def reads(folder, layout, monkeypatch):
    """Worker → file → (offset, size) of each read, as its weights are loaded."""
    config, found = load_config(folder), {}
    read_into = FilesReader.read_into
    for worker in build_layout(LayoutConfig(**layout), config).workers:
        files = found[worker.name] = {}

        def noting(self, file, offset, into, files=files):
            files.setdefault(file, []).append((offset, len(into)))
            read_into(self, file, offset, into)

        monkeypatch.setattr(FilesReader, "read_into", noting)
        with Checkpoint(folder, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
            loader = Loader(checkpoint, Shard(torch.device("cpu"), torch.float32, True))
            load_parts(config, loader, worker)
    monkeypatch.setattr(FilesReader, "read_into", read_into)
    return found


@pytest.mark.parametrize("form", ["float", "fp8", INT8, INT4], ids=str)
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_worker_reads_its_file_from_front_to_back(tmp_path, monkeypatch, model, layout, form):
    source = write_stored(tmp_path / "source", MODELS[model] | (WIDE if form == "fp8" else {}), form)
    run(source, tmp_path / "out", layout=LAYOUTS[layout])
    for worker, files in reads(tmp_path / "out", LAYOUTS[layout], monkeypatch).items():
        own = f"{worker.partition('-copy')[0]}.safetensors"  # an expert shard's copies read the shard's
        if (model, worker) == ("qwen2", "stage-1"):  # its head is the embedding, which the first stage has
            ((offset, size),) = files.pop("stage-0.safetensors")
            with Checkpoint(tmp_path / "out") as checkpoint:
                entry = checkpoint.entries[EMBEDDING]
            assert (offset, size) == (entry.offset, entry.num_bytes)
        assert [*files] == [own]
        for (offset, size), (following, _) in pairwise(files[own]):
            assert following == offset + size  # nothing is left out, nothing read twice
        offset, size = files[own][-1]
        assert offset + size == (tmp_path / "out" / own).stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("name", presets())
def test_published_tensors_can_all_follow_one_another(name):
    config = parse_config(presets()[name])
    table = [*tensor_table(config), *mtp_table(config)]
    assert all(tensor.num_bytes % 8 == 0 for tensor in as_published(table, config.dtype, config.fp8_block))


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_a_checkpoint_like_any_other(tmp_path, layout):
    """Of shapes where not every tensor could follow any other."""
    config, given = write_r1(tmp_path / "hf", qk_nope_head_dim=10, q_lora_rank=None, n_routed_experts=6)
    source, target = tmp_path / "hf", tmp_path / "out"
    (source / "config.json").rename(tmp_path / "config.json")
    (source / "config.json").symlink_to("../config.json")
    run(source, target, layout=LAYOUTS[layout])
    found = tensors(target)
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    report = verify(
        target, tensor_table(config), mtp_table(config), config.fp8_block, progress=lambda done, total: None
    )
    assert not report.faults
    with Checkpoint(target) as checkpoint:
        for entry in checkpoint.entries.values():
            assert entry.offset % ITEM_BYTES[entry.dtype] == 0
    for name in ("config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not (target / "config.json").is_symlink()
    metadata = json.loads((target / INDEX).read_text())["metadata"]
    assert metadata == json.loads((source / INDEX).read_text())["metadata"]
    files = {path.stem for path in target.glob("*.safetensors")}
    workers = [worker.name for worker in build_layout(LayoutConfig(**LAYOUTS[layout]), config).workers]
    assert files == {name for name in workers if "copy" not in name} | {"mtp"}
    odd = [tensor for tensor in given.values() if math.prod(tensor.shape) * tensor.itemsize % 8]
    assert len(odd) > 10  # else this has tested nothing


@pytest.mark.slow
def test_for_another_layout_it_is_converted_again(tmp_path):
    """From what was converted for one layout comes, byte for byte, what comes from the first checkpoint."""
    source = write_stored(tmp_path / "source", MODELS["deepseek"], INT4)
    run(source, tmp_path / "direct", layout=LAYOUTS["stages"])
    run(source, tmp_path / "shards", layout=LAYOUTS["shards"])
    run(tmp_path / "shards", tmp_path / "again", layout=LAYOUTS["stages"])
    for path in (tmp_path / "direct").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert sorted(tensors(source)) == sorted(tensors(tmp_path / "again"))


@pytest.mark.slow
def test_killed_it_goes_on_worker_by_worker(tmp_path, casts):
    write_r1(tmp_path / "hf", n_routed_experts=6)
    how = {"layout": LAYOUTS["shards"]}
    run(tmp_path / "hf", tmp_path / "whole", **how)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    kept, at = [], 1
    code = -signal.SIGKILL
    while code:
        target = tmp_path / str(at)
        code = casts.cast(tmp_path / "hf", target, at=at, **how)
        assert code in (0, -signal.SIGKILL)
        if code:
            for path in target.glob("*.safetensors"):  # a worker's file is whole, or not there
                assert path.read_bytes() == expected[path.name]
            if (target / "config.json").exists():  # nor does what is not whole look like a checkpoint
                assert all((target / name).read_bytes() == content for name, content in expected.items())
            kept.append(run(tmp_path / "hf", target, **how).kept)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == expected
        at += 1 + at // 2
    assert kept == sorted(kept)
    assert kept[0] == 0 < kept[-1]


@pytest.mark.slow
def test_a_full_disk_a_changed_source_and_another_layout(tmp_path, casts):
    write_r1(tmp_path / "hf", n_routed_experts=6)
    how, target = {"layout": LAYOUTS["shards"]}, tmp_path / "out"
    run(tmp_path / "hf", tmp_path / "whole", **how)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    largest = max(map(len, expected.values()))
    assert casts.cast(tmp_path / "hf", target, largest=largest - 1, **how) == NO_ROOM
    assert not (target / "config.json").exists()
    # Another layout's files are not this one's: what was finished for it is removed.
    assert run(tmp_path / "hf", target, layout=LAYOUTS["stages"]).kept == 0
    assert not (target / "experts-1.safetensors").exists()
    for path in target.iterdir():
        path.unlink()
    target.rmdir()
    casts.cast(tmp_path / "hf", target, largest=largest - 1, **how)
    write_r1(tmp_path / "other", n_routed_experts=6, seed=1)
    for path in (tmp_path / "other").iterdir():
        path.replace(tmp_path / "hf" / path.name)
    assert run(tmp_path / "hf", target, **how).kept == 0
    found, given = tensors(target), tensors(tmp_path / "hf")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def service_file(folder, **layout):
    path = folder / "service.yaml"
    values = {"name": "nano-cut", "model": {"path": "not-there-yet"}, "layout": layout}
    path.write_text(json.dumps(values))  # which is YAML
    return str(path)


@pytest.mark.slow
def test_by_command_for_a_service_whose_model_is_yet_to_be_written(tmp_path, capsys):
    write_r1(tmp_path / "hf")
    source, target = str(tmp_path / "hf"), str(tmp_path / "not-there-yet")
    command = ["weights", "convert", source, target, "--for", service_file(tmp_path, **LAYOUTS["stages"])]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"{target} is {source} for the workers of nano-cut: 5 files, ")
    assert main(["weights", "verify", target]) == 0
    assert main(command) == 2
    assert "is not empty, and holds nothing that could go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name SRC DST --for SERVICE.yaml, or all four of DeepSeek's flags"),
        (["SRC", "DST"], "SRC DST is converted --for a SERVICE.yaml"),
        (["SRC", "--for", "FILE"], "SRC and DST are needed"),
        (
            ["SRC", "DST", "--for", "FILE", "--n-experts", "4"],
            "either --for SERVICE.yaml or DeepSeek's flags",
        ),
        (["--hf-ckpt-path", "SRC", "--save-path", "DST"], "or all four of DeepSeek's flags"),
        (["nowhere", "DST", "--for", "FILE"], "nowhere is not a folder"),
        (["SRC", "DST", "--for", "nowhere.yaml"], "service file nowhere.yaml does not exist"),
        (["SRC", "SRC", "--for", "FILE"], "are one folder"),
        (["SRC", "DST", "--for", "MANY"], "layout.stages: 9 parts are asked for, but the model has only 3"),
    ],
)
def test_conversions_that_cannot_begin(tmp_path, capsys, arguments, words):
    write_r1(tmp_path / "hf")
    many = tmp_path / "many"
    many.mkdir()
    meant = {
        "SRC": str(tmp_path / "hf"),
        "DST": str(tmp_path / "out"),
        "FILE": service_file(tmp_path),
        "MANY": service_file(many, kind="disaggregated", stages=9),
    }
    assert main(["weights", "convert", *(meant.get(word, word) for word in arguments)]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
