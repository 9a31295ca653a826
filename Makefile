# `make test` and `make demo` set themselves up: from a fresh clone they need only make and Python >= 3.10.
#   PYTHON=/path/to/python3   the interpreter to build .venv with (default: the first suitable one on PATH)
#   TORCH_INDEX_URL=URL       the package index to take torch from (default: see the stamp rule below)
#   PYTEST_ARGS="-n 2"        arguments to pytest
#   TRANSFORMERS=5.10.1       another transformers than the tested one (`newest` takes what the index has)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check
TESTED := requirements-tested.txt
PYTEST_ARGS ?= -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup lint types check fast test test-all docs wheel demo gpu gpu-wheels format clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(STAMP)  ## build .venv with the tested versions

# 1. An interpreter: 3.11 and newer first, because current transformers no longer supports 3.10. Each is run,
#    not just looked up: version managers leave shims on PATH that do not start.
# 2. torch before all else, so that nothing pulls the CUDA packages onto a machine without a GPU. On Linux the
#    plain wheel of the public index is the CUDA build; the CPU build is taken from the configured index where
#    that has it, then from PyTorch's own. Elsewhere the plain wheel is the right one.
# 3. The rest, at the tested versions.
# 4. MegaBlocks' Triton kernels, which the tests run interpreted; Triton exists for Linux only.
$(STAMP): pyproject.toml $(TESTED)
	@set -eu; \
	python="$${PYTHON:-}"; \
	for minor in 11 10; do \
	  for candidate in python3 python3.13 python3.12 python3.11 python3.10; do \
	    [ -z "$$python" ] || break; \
	    if $$candidate -c "import sys; sys.exit(sys.version_info < (3, $$minor))" 2>/dev/null; then python=$$candidate; fi; \
	  done; \
	done; \
	[ -n "$$python" ] || { echo "No Python >= 3.10 found: set PYTHON=/path/to/python3" >&2; exit 1; }; \
	echo "Setting up $(VENV) with $$($$python --version) (once; takes a few minutes)"; \
	$$python -m venv $(VENV)
	@set -eu; \
	torch=$$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(TESTED)); \
	if [ -n "$${TORCH_INDEX_URL:-}" ]; then $(PIP) install -q --index-url "$$TORCH_INDEX_URL" "$$torch"; \
	elif [ "$$(uname)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then $(PIP) install -q "$$torch"; \
	else \
	  $(PIP) install -q "$$torch+cpu" 2>/dev/null || \
	  $(PIP) install -q --index-url https://download.pytorch.org/whl/cpu "$$torch" || \
	  { echo "No CPU build of $$torch in reach: installing the default one" >&2; $(PIP) install -q "$$torch"; }; \
	fi
	$(PIP) install -q -c $(TESTED) -e ".[test]"
	@[ -z "$(TRANSFORMERS)" ] || $(PIP) install -q -U transformers$(if $(filter newest,$(TRANSFORMERS)),,==$(TRANSFORMERS))
	@[ "$$(uname)" != Linux ] || $(BIN)/python -m patches.install --level triton
	@touch $@

lint: $(STAMP)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy on the package, the recipes and the patches
	$(BIN)/mypy

# One thread per worker: two workers with a thread per core each would fight over the cores.
# The tests need nothing from the Hub; offline, a slip shows at once and the same way everywhere.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

check: lint types fast  ## lint, types and the fast tests: before every commit, 3 to 5 minutes on 2 cores

fast: $(STAMP)  ## the fast tests alone
	$(PYTEST) -m "not slow and not all_families and not long and not gpu" $(PYTEST_ARGS)

test: lint types  ## everything CI checks
	$(PYTEST) -m "not all_families and not long" $(PYTEST_ARGS)

test-all: lint types  ## the same for every family, and rehearsals: 12 minutes more on 2 cores
	$(PYTEST) $(PYTEST_ARGS)

docs: $(STAMP)  ## the API reference, from docstrings, into build/docs
	HF_HUB_OFFLINE=1 $(BIN)/python -m docs.build build/docs

wheel: $(STAMP)  ## the wheel, into dist
	$(BIN)/python -m build --wheel --outdir dist

demo: $(STAMP)  ## tune a small base, carry its numbers to four times the width, beside a search at full size
	$(BIN)/moe-param tune recipes/configs/demo.yaml --output_dir demo/base
	$(BIN)/moe-param transfer demo/base/tuned.yaml --axes width=4 --specs moe-completep --octaves -3 -2 -1 0 \
		--extend 1 --seeds 0 --init_stds 0.03 0.06 --output_dir demo/transfer

# On the machine with the GPU: with the Python and torch that are there, and no set-up of ours.
#   MINUTES=9 GPU_ARGS="--only a b"   see python -m recipes.bench.gpu --help
MINUTES ?= 25
gpu:  ## everything that waits for a GPU, with the Python that is there (docs/experts.md)
	$${PYTHON:-python3} -m recipes.bench.gpu --minutes $(MINUTES) --out build/gpu --wheels build/gpu-wheels $(GPU_ARGS)

gpu-wheels: $(STAMP)  ## what a GPU machine without network may lack, into build/gpu-wheels: take it along
	$(BIN)/python -m recipes.bench.gpu.wheels --out build/gpu-wheels

format: $(STAMP)  ## rewrite the code the way `make lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and builds
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist
	find moe_param recipes tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
