# Two commands for a new machine: `make demo` and `make test`. Each makes its own environment in .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint .constraints.txt

# Linux without an NVIDIA driver takes PyTorch's CPU build; with one, the ordinary wheel brings CUDA.
# macOS wheels carry no CUDA. Override with: make demo TORCH="torch==2.13.0"
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH ?= torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu --retries 1
else
TORCH ?= torch==2.13.0
endif

.PHONY: demo test lint bench zoo wheel clean

demo: $(VENV)/.runtime
	$(BIN)/hub-router demo

# One thread per worker: on two cores, threads of two workers would wait for each other half of the time.
test: $(VENV)/.dev
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests/benchmarks -m "" --override-ini addopts= -s

zoo: $(VENV)/.runtime
	$(BIN)/python examples/zoo/train.py

wheel: $(VENV)/.dev
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, got $$($(PYTHON) --version); set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first, alone, so that no other package can draw in another build of it.
$(VENV)/.runtime: pyproject.toml .constraints.txt | $(BIN)/python
	$(PIP) --quiet $(TORCH)
	$(PIP) --quiet hatchling editables
	$(PIP) --quiet --no-build-isolation --editable '.[offline]'
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) --quiet --no-build-isolation --editable '.[offline,dev]'
	touch $@
