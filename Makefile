# One verb for each thing; every verb makes what it needs. `make help` lists them.
# Variables: PYTHON (the interpreter of new environments), PYTEST_ARGS, FAST=1 (a smaller demo), BANK (where the
# demo keeps its bank, such as s3://bucket/demo), JOBS (test processes),
# COUNT and SEED (of `make faults`), QUICK=1 (of `make bench-peers`, `bench-questions`, `removal` and `editing`), OUT (of `bench-peers`),
# SEEDS (of `make removal`).

PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
PROGRAMS ?= 1000
COUNT ?= 200
SEED ?=
SEEDS ?= 1

VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-proto
PEERS_VENV := .venv-peers
OUT := runs/peers.json

# An old generator on purpose: its version is the floor of every user's protobuf and grpcio.
# grpcio-tools imports pkg_resources, which setuptools dropped.
PROTO_TOOLS := grpcio-tools==1.66.2 mypy-protobuf==3.7.0 "setuptools<81"
export BUF_VERSION := 1.75.0

# The suites: what is not slow runs on every change. A Ray test is always slow.
QUICK_SUITE := -m "not slow and not ray" -n $(JOBS)
SLOW_SUITE := -m "slow or ray"

.DEFAULT_GOAL := help
.PHONY: help setup s3-server bench-peers bench-questions fmt lint type test test-slow test-all faults proto proto-check wheel demo study removal editing clean ci

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp ## make .venv with the service, the trainer and the development tools

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "membank needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[service,trainer,dev]'
	@touch $@

# Beside `setup`: what membank is compared with is no part of it.
$(PEERS_VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --editable '.[service,bench-peers]'
	@touch $@

$(PROTO_VENV)/.stamp: Makefile
	$(PYTHON) -m venv --clear $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet $(PROTO_TOOLS)
	@touch $@

fmt: setup ## format the code and apply the safe fixes
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lint: setup ## formatting, rules, docstrings, import direction
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/numpydoc lint $$(git ls-files 'client/*.py' 'bank_service/*.py' 'trainer/*.py' 'proto/membank/wire/*.py')
	$(BIN)/lint-imports

type: setup ## mypy, strict
	$(BIN)/mypy

s3-server: ## install the S3 server that tests run against (Debian, as root; elsewhere it says why not)
	scripts/s3/install.sh

test: setup s3-server ## the quick suite
	$(BIN)/pytest $(QUICK_SUITE) $(PYTEST_ARGS)

test-slow: setup s3-server ## the slow and the Ray tests
	$(BIN)/pytest $(SLOW_SUITE) $(PYTEST_ARGS)

test-all: test test-slow ## both suites

faults: setup s3-server ## kill -9 a served bank COUNT times on disk and COUNT times on S3; report in runs/faults.json
	PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(BIN)/python tests/faults/campaign.py --count $(COUNT) $(if $(SEED),--seed $(SEED))

stateful: setup ## random programs on whole banks against a model (PROGRAMS=1000); report in runs/stateful.json
	PYTHONPATH=tests/support $(BIN)/python scripts/stateful.py --programs $(PROGRAMS) --jobs $(JOBS)

bench-peers: $(PEERS_VENV)/.stamp ## membank beside Redis, Flight, torch rpc, Ray, Mooncake; report in runs/peers.json (QUICK=1: shorter)
	scripts/peers/install.sh
	$(PEERS_VENV)/bin/python -m benchmarks.peers --out $(OUT) --plot $(OUT:.json=.svg) $(if $(QUICK),--quick)

bench-questions: setup ## measure the paper's open questions; fills in docs/questions.md (QUICK=1: in runs/, no claim)
	mkdir -p runs && cp docs/questions.md runs/
	$(BIN)/python -m benchmarks.questions \
		$(if $(QUICK),--quick --out runs/questions.json --plots runs/plots --answers runs/questions.md,--out benchmarks/results/questions.json --plots docs/plots --answers docs/questions.md)

proto: $(PROTO_VENV)/.stamp ## regenerate the code of proto/membank/v1
	scripts/generate_proto.sh $(PROTO_VENV)

proto-check: $(PROTO_VENV)/.stamp ## fail if the generated code is stale or the schema has faults
	scripts/check_proto.sh $(PROTO_VENV)

wheel: setup ## build the wheel into dist/
	rm -rf dist
	$(BIN)/python -m hatchling build --target wheel

demo: setup ## the whole story on this machine, report in runs/demo (FAST=1: smaller; BANK=URL)
	$(BIN)/membank demo --out runs/demo $(if $(FAST),--fast) $(if $(BANK),--bank $(BANK))

study: setup ## the demo's questions at length, with the longer-trained controls; report in runs/study
	$(BIN)/membank demo --study --out runs/study

removal: setup ## what a deletion leaves, beside retraining and unlearning; report in runs/removal (SEEDS=3; QUICK=1: tiny, in runs/removal-quick)
	$(BIN)/membank eval removal --seeds $(SEEDS) $(if $(QUICK),--quick --run runs/removal-quick,--run runs/removal)

editing: setup ## change 100 facts of the demo one after another and measure; report in runs/editing (QUICK=1: 12 facts)
	$(BIN)/membank demo --out runs/demo
	$(BIN)/membank eval edit --run runs/demo $(if $(QUICK),--quick --dir runs/editing-quick,--dir runs/editing)

ci: ## what continuous integration runs
	.ci/run

clean: ## remove environments, caches and builds; runs/ is kept
	rm -rf $(VENV) $(PROTO_VENV) $(PEERS_VENV) dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
