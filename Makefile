# Two commands are all that a fresh machine needs: `make serve` and `make test`.
# Each makes its own environment first (.venv), from the versions pinned in constraints.txt.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SERVICE ?= cluster_configs/services/nano.yaml
# Python itself compiles what is imported, and so a tenth of what is installed.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -q install --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

STALLS ?= benchmarks/results/failures.jsonl

# As many tests at a time as a small machine has cores; what starts a cluster or measures time runs by itself.
ALONE := cluster or serial
LATER := system or matrix or models
IN_PARALLEL := -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: serve test test-fast test-system test-models test-faults goldens check format clean

serve: $(VENV)/.serve
	@$(BIN)/r1-cluster serve $(SERVICE)

# Took 14 minutes on two quiet cores in a fresh clone, nearly two of them installation.
test: $(VENV)/.test
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not ($(ALONE) or $(LATER))"
	$(BIN)/python -m pytest -m "($(ALONE)) and not ($(LATER))"

# Takes 1:40 on two cores: what needs over a second or two is `slow`.
test-fast: $(VENV)/.test
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not (slow or $(ALONE) or $(LATER))"

# What needs root, packages of Debian, or long clusters. Installs what is missing, where that can be.
test-system: $(VENV)/.test
	tests/system_packages.sh
	$(BIN)/python -m pytest -m "system and not matrix"

# Architectures, dtypes and layouts, every two of them together, served and asked: 12 minutes.
test-models: $(VENV)/.test
	$(BIN)/python -m pytest -m models

# Every death of the matrix (most of an hour), and the table of their stalls.
test-faults: $(VENV)/.test
	tests/system_packages.sh
	rm -f $(STALLS)
	$(BIN)/python -m pytest tests/faults -m "" --stalls $(STALLS)
	$(BIN)/python benchmarks/failures.py $(STALLS)

# What is shown and reported of the embedded model, anew after it was trained: some minutes.
goldens: $(VENV)/.test
	$(BIN)/python -m benchmarks.transcript
	$(BIN)/python tools/quantize_nano_r1.py --samples 1
	$(BIN)/python -m benchmarks.kv_cache --samples 0

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first, pinned and alone: asked for by another package, pip would fetch gigabytes of CUDA wheels.
$(VENV)/.torch: constraints.txt
	@test -x $(BIN)/pip || { echo "== making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "== installing torch"
	@$(INSTALL) pip  # the one that came with Python takes minutes to choose among what an index lists
	@$(INSTALL) torch numpy
	@touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml
	@echo "== installing r1-cluster and what it needs"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo "== installing r1-cluster and what its tests need"
	@$(INSTALL) -e '.[test]'
	@touch $(VENV)/.serve $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info
