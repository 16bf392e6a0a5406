# Each target sets up what it needs: .venv is made on first use and again whenever pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
WORKERS ?= 2

.PHONY: demo test test-hub-1 test-gpu sanitize-gpu lint format types space clean
.DEFAULT_GOAL := test

# torch goes first, by its exact version, so that nothing else pulls another build of it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# Threads that spin while they wait cost a busy machine most of SLA's speed: it is many small steps, dense is one.
demo: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/diffusers-sla demo --out outputs/demo

# Kernel tests run under Triton's interpreter, on CPU tensors.
test: $(READY)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not gpu and not slow"

# What talks to the Hub, under the oldest huggingface_hub that pyproject.toml allows; all else comes from .venv.
.hub-1/ready: $(READY)
	rm -rf .hub-1
	$(BIN)/python -m pip install --quiet --no-deps --target .hub-1 huggingface_hub==1.32.0
	touch .hub-1/ready

test-hub-1: .hub-1/ready
	PYTHONPATH=.hub-1 EXPECT_HUB=1.32.0 TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) \
		-m "not gpu and not slow" tests/test_hub.py tests/test_push.py tests/test_cards.py tests/test_export_kernel.py

# The kernel tests on a real GPU, with whatever torch and triton the environment has.
test-gpu:
	$(PYTHON) -m pytest tests/kernel -m "gpu or not gpu"

# A small set of them under compute-sanitizer: reads and writes out of bounds, and races in shared memory.
SANITIZED := $(addprefix tests/kernel/test_,sparse.py selection.py prepare.py projection.py hopper.py) -k "match or definition or tile or inverse or averaged or sums or added or whole"
sanitize-gpu:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest $(SANITIZED)
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m pytest $(SANITIZED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

space: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python space_app/app.py

clean:
	rm -rf $(VENV) .hub-1 outputs dist build .pytest_cache .mypy_cache .ruff_cache
