# The face of the project's tools: `make help` lists what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# Options for pytest, such as: make test ARGS="-m 'not inductor'"
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) ## Create .venv and install everything into it (nothing to do the second time)

# torch first and alone, under its pin: see constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[dev,examples]'
	touch $@

.PHONY: demo
demo: setup ## Train Burgers' equation as written and rewritten, side by side
	$(BIN)/python examples/burgers.py --quick

# One thread per test process: two processes share the machine, and what is left of the work.
.PHONY: test
test: setup ## Run the tests, two at a time (options for pytest: ARGS="-k name")
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

.PHONY: test-slow
test-slow: setup ## Run the tests that take long: a C++ program that trains, every layer under every loss
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

# Libraries that only these tests and examples/clients.py need; without them the tests are skipped.
$(VENV)/.clients: $(STAMP)
	$(PIP) install --constraint constraints.txt --editable '.[clients]'
	touch $@

.PHONY: clients
clients: $(VENV)/.clients ## Train networks by DeepXDE, SchNetPack, zuko and torchdiffeq as towers
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/clients $(ARGS)

# How many random programs `make fuzz` runs, shared out among the families in tests/programs.py and
# tests/host_programs.py.
N ?= 1000

.PHONY: fuzz
fuzz: setup ## Compare random programs with themselves as written, others each time (N=5000)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PROGRAMS_PER_FAMILY=$$(($(N) / 13)) \
		$(BIN)/python -m pytest tests/test_fuzz.py -s -m "not slow" --hypothesis-profile=fuzz $(ARGS)

# What builds the documentation site; without it the test that does so is skipped.
$(VENV)/.docs: $(STAMP)
	$(PIP) install --constraint constraints.txt --editable '.[docs]'
	touch $@

.PHONY: docs
docs: $(VENV)/.docs ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "build/site/index.html"

.PHONY: conformance
conformance: setup ## Compare PyTorch's operator database with eager, into docs/conformance.md
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.conformance
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.degenerate
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.narrowed

.PHONY: wrong
wrong: setup ## Measure what PyTorch gets wrong, into docs/wrong_in_pytorch.md
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.wrong_in_pytorch $(ARGS)

.PHONY: zoo
zoo: setup ## Check and time losses as people write them, into docs/zoo.md (ARGS="--no-times")
	$(BIN)/python -W ignore -m tests.zoo $(ARGS)

.PHONY: bench
bench: setup ## Time the workloads beside PyTorch, into docs/benchmarks.md (ARGS="--quick")
	$(BIN)/python -m examples.benchmark $(ARGS)

$(VENV)/.jax: $(STAMP)
	$(PIP) install --constraint constraints.txt --editable '.[jax]'
	touch $@

.PHONY: jax
jax: $(VENV)/.jax ## Install JAX, which make bench then times too

# A wheel in an empty environment, with nothing but what it declares.
WHEEL := build/wheel
WHEEL_BIN := $(WHEEL)/venv/bin

.PHONY: wheel
wheel: export PYTHONPATH :=
wheel: ## Build the wheel, install it alone into an empty environment, and try it there
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)/empty
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL_BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt torch
	$(WHEEL_BIN)/python -m pip --disable-pip-version-check wheel --no-deps --wheel-dir $(WHEEL) .
	$(WHEEL_BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt $(WHEEL)/*.whl
	awk '/^```python/ { on = 1; next } /^```/ && on { exit } on' README.md > $(WHEEL)/readme.py
	cd $(WHEEL)/empty && ../venv/bin/optimize-nested --help
	cd $(WHEEL)/empty && ../venv/bin/optimize-nested doctor
	cd $(WHEEL)/empty && ../venv/bin/python ../readme.py

.PHONY: lint
lint: setup ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

.PHONY: format
format: setup ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## Remove .venv, caches and build output
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
