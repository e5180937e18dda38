# make serve     install what is missing and serve serve_config.yaml on 127.0.0.1:8000 (Ctrl-C stops everything);
#                make serve MODEL=<source> serves another model instead: a directory, or <org>/<name> on the Hub
# make test      ruff, mypy and every test, in two lanes: make test TEST_ARGS="-k gate"
# make fuzz      send 20,000 odd requests to a server of every task: make fuzz FUZZ_ARGS="--seed 7"
# make examples  make a tiny model of every task and serve deploy/examples/all-tasks.yaml
# make bench     measure a server started for the purpose: make bench BENCH_ARGS="--scenarios 32x1 --seconds 30"
# make soak      does a server grow under 15 minutes of mixed load? make soak SOAK_SECONDS=3600 CONFIG=serve_config.yaml
#
# PYTHON chooses the interpreter of the virtual environment. pip's own variables choose where packages come from:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the CPU build of torch, which is a tenth of the size.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= serve_config.yaml
MODEL ?=
BENCH_ARGS ?=
SOAK_SECONDS ?= 900
SOAK_ARGS ?=
FUZZ_ARGS ?=
TEST_ARGS ?=

bin := $(VENV)/bin
# torch goes first, so that its version is settled before any package asks for "some torch".
install = $(bin)/python -m pip install --constraint constraints.txt

.PHONY: serve examples test fuzz bench soak
.DELETE_ON_ERROR:

serve: $(VENV)/.installed-serve
ifneq ($(MODEL),)
	$(bin)/serve-app init --force --output $(VENV)/serve_config.yaml $(MODEL)
	exec $(bin)/serve-app serve $(VENV)/serve_config.yaml
else
	exec $(bin)/serve-app serve $(CONFIG)
endif

examples: $(VENV)/.installed-serve
	$(bin)/python deploy/examples/make_tiny_models.py
	exec $(bin)/serve-app serve deploy/examples/all-tasks.yaml

test: $(VENV)/.installed-dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/python -m tests $(TEST_ARGS)

fuzz: export OMP_NUM_THREADS := 1
fuzz: $(VENV)/.installed-dev
	$(bin)/python -m tests.fuzz --live $(FUZZ_ARGS)

bench: $(VENV)/.installed-serve
	$(bin)/serve-app bench --serve $(CONFIG) $(BENCH_ARGS)

soak: $(VENV)/.installed-serve
	$(bin)/serve-app bench --serve $(CONFIG) --soak $(SOAK_SECONDS) --texts 24576 $(SOAK_ARGS)

$(bin)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-serve: pyproject.toml constraints.txt deploy/serve-app-haproxy | $(bin)/python
	$(install) torch
	$(install) --editable '.[default-model]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt deploy/serve-app-haproxy | $(bin)/python
	$(install) torch
	$(install) --editable '.[dev]'
	touch $@
