"""Imports run one way: kernels <- r1_cluster <- actors, and within r1_cluster from the ground floor up."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "r1_cluster", "actors")

# Each room may import from itself, from those on lower floors, and from those named beside it.
FLOORS = [
    {"records", "config", "text", "weights"},
    {"models", "comm", "api"},
    {"planning", "evaluation", "edge"},
    {"engine"},
    {"cli"},
]
# Nothing on a floor needs its neighbour, but for these.
NEIGHBOURS = {("text", "records"), ("api", "records")}


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(path):
    """Module names that a file imports, wherever in it, but for type checking alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def tops(path):
    return {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", sources("kernels"), ids=str)
def test_kernels_know_torch_and_triton_alone(path):
    assert tops(path) <= set(sys.stdlib_module_names) | {"torch", "triton", "kernels"}


@pytest.mark.parametrize("path", sources("r1_cluster"), ids=str)
def test_r1_cluster_knows_no_ray(path):
    forbidden = {"ray", "fastapi", "starlette", "transformers"}
    if path.relative_to(ROOT).parts[:2] == ("r1_cluster", "cli"):
        forbidden = {"transformers", "fastapi", "starlette"}
    elif path.relative_to(ROOT).parts[:2] == ("r1_cluster", "edge"):
        forbidden = {"ray", "actors", "transformers"}
    else:
        forbidden.add("actors")
    assert not tops(path) & forbidden


def room(name):
    parts = name.split(".")
    return parts[1] if parts[0] == "r1_cluster" and len(parts) > 1 else None


@pytest.mark.parametrize("path", sources("r1_cluster"), ids=str)
def test_rooms_import_downwards(path):
    parts = path.relative_to(ROOT / "r1_cluster").with_suffix("").parts
    here = parts[0]
    level = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    for name in imported(path):
        there = room(name)
        if there is None or there == here or here == "__init__":
            continue
        assert (here, there) in NEIGHBOURS or level[there] < level[here], f"{here} imports {there}"


def test_cli_imports_actors_inside_its_commands_only():
    for path in sources("r1_cluster/cli"):
        for node in ast.parse(path.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] in ("actors", "ray") for name in names), path


@pytest.mark.slow
def test_nothing_imports_in_a_circle():
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in sources(package)
        if path.name != "__main__.py"
    ]
    result = subprocess.run(
        [sys.executable, "-c", script, *modules], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "r1_cluster.cli.main",
        "r1_cluster.engine.core",
        "r1_cluster.engine.streams",
        "r1_cluster.text.tokenizer",
        "actors.engine",
        "actors.ingress",
        "r1_cluster.planning.limits",
    ],
)
def test_light_processes_import_no_torch(module):
    """The ingress, the engine and the command line must start fast and stay small."""
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_help_imports_neither_torch_nor_ray():
    script = (
        "import sys; from r1_cluster.cli.main import main; [main(words.split()) for words in sys.argv[1:]]\n"
        "sys.exit(','.join({'torch', 'ray', 'numpy', 'httpx'} & set(sys.modules)) or 0)"
    )
    asked = ["--help", "serve --help", "weights --help", "weights cast --help", "weights show DeepSeek-R1"]
    result = subprocess.run([sys.executable, "-c", script, *asked], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
