# Every target sets up what it needs; nothing has to be installed or exported beforehand but Python >= 3.11.
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PARITY := $(VENV)/.parity
DEMO := runs/demo
SHORT := runs/demo-short
# How many tests run at a time; each process takes a core and up to 3 GB.
JOBS := 2
PARALLEL := -n $(JOBS) --dist loadgroup --durations=20

.DEFAULT_GOAL := help
.PHONY: help install demo demo-short test test-slow test-all test-parity evidence tables-smoke lint format clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## Make .venv with the project and its pinned dependencies (every other target calls this)

$(STAMP): pyproject.toml constraints.txt tools/install.sh
	@sh tools/install.sh $(VENV)
	@touch $(STAMP)

demo: $(STAMP)  ## Train a small byte-level model on text that ships with Python, then generate (about 5 minutes)
	@echo "demo: training in $(DEMO); stop it whenever you like, the same command goes on from there"
	@$(PYTHON) -m experiments.train demo --workdir $(DEMO)
	@echo "demo: generating from $(DEMO)"
	@$(PYTHON) -m experiments.generate $(DEMO) --prompt "def read_"

demo-short: $(STAMP)  ## The demo with a few steps from scratch, to see that everything runs (about a minute)
	@echo "demo-short: a few training steps in $(SHORT), then generation"
	@rm -rf $(SHORT)
	@$(PYTHON) -m experiments.train demo --workdir $(SHORT) --steps 20 --log-every 5 --checkpoint-every 10
	@$(PYTHON) -m experiments.generate $(SHORT) --prompt "def read_"

test: $(STAMP)  ## Run the quick tests (about 10 minutes on 2 cores)
	@echo "test: the quick tier; make test-all adds the slow one"
	@$(PYTHON) -m pytest $(PARALLEL)

test-slow: $(STAMP)  ## Run the slow tests (about 13 minutes)
	@echo "test-slow: the slow tier"
	@$(PYTHON) -m pytest -m "slow and not parity" $(PARALLEL)

test-all: test test-slow  ## Run the quick and the slow tests (about 25 minutes)

test-parity: $(PARITY)  ## Compare with transformers' models on tiny random ones (installs torch and transformers)
	@echo "test-parity: logits, states and gradients beside transformers'"
	@$(PYTHON) -m pytest -m parity $(PARALLEL) tests/parity

evidence: $(PARITY)  ## Measure the errors against oracles again and write them into the README's tables (about 10 minutes)
	@echo "evidence: tests of oracles and parity, then the README's tables"
	@$(PYTHON) -m pytest -m "not slow" -q tests/oracles tests/layers/test_moe.py tests/parity --evidence docs/evidence.json
	@$(PYTHON) tools/mixers.py

$(PARITY): $(STAMP)
	@echo "test-parity: installing torch and transformers into $(VENV)"
	@$(PYTHON) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[parity]'
	@touch $(PARITY)

tables-smoke: $(STAMP)  ## Run every paper table with a few steps, to see that all of it runs (some minutes)
	@rm -rf runs/smoke runs/tables/*/smoke
	@tables=$$($(PYTHON) -m experiments.report --list) && printf '%s\n' $$tables | xargs -P $(JOBS) -I TABLE sh -c \
		'echo "tables-smoke: TABLE" && $(PYTHON) -m experiments.TABLE --scale smoke || exit 255'

lint: $(STAMP)  ## Check style, formatting, the direction of imports and types
	@echo "lint: ruff check"
	@$(PYTHON) -m ruff check .
	@echo "lint: ruff format"
	@$(PYTHON) -m ruff format --check .
	@echo "lint: import-linter"
	@$(VENV)/bin/lint-imports --no-logo
	@echo "lint: mypy"
	@$(PYTHON) -m mypy

format: $(STAMP)  ## Rewrite the sources in the project's format
	@echo "format: ruff"
	@$(PYTHON) -m ruff check --fix-only --quiet .
	@$(PYTHON) -m ruff format .

clean:  ## Remove the environments and caches; runs/ stays
	@echo "clean: removing environments and caches, keeping runs/"
	@rm -rf .venv .venv312 build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
