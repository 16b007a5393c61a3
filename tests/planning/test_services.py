"""The service files that the package comes with: each is read, and its layout built."""

from pathlib import Path

import pytest

from r1_cluster.config import load_service
from r1_cluster.models.family import load_config
from r1_cluster.planning.layout import build_layout
from r1_cluster.planning.limits import check_messages

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "nano": ["stage+router+experts"],
    "nano-tensor-parallel": ["stage+router+experts"] * 2,
    "nano-stages": ["stage"] * 2 + ["router"] * 2 + ["experts"],
    "nano-disaggregated": ["stage"] * 2 + ["router"] * 2 + ["experts"] * 3,
    "nano-expert-parallel": ["stage+router+experts"] * 2,
}


def files():
    return sorted((ROOT / "cluster_configs/services").glob("*.yaml"))


def test_every_file_is_listed():
    assert {file.stem for file in files()} == LAYOUTS.keys()
    page = (ROOT / "docs/layouts.md").read_text()
    assert [name for name in LAYOUTS if f"| `{name}.yaml` |" not in page] == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_says_when_to_use_it_and_its_layout_is_built(name):
    file = ROOT / "cluster_configs/services" / f"{name}.yaml"
    assert [line[:2] for line in file.read_text().splitlines()[:3]] == ["# ", "# ", "na"]
    service = load_service(file)
    assert service.name == name
    config = load_config(service.model.path)
    check_messages(service, config)
    layout = build_layout(service.layout, config)
    assert ["+".join(worker.roles) for worker in layout.workers] == LAYOUTS[name]
    # A machine of two cores runs them beside the engine and the edge.
    assert len(layout.workers) * service.layout.cpus_per_worker < 2
