# `make run`   a prefill node, a decode node and a router on this machine, with a tiny model
# `make test`  lint, types and every test that needs no GPU
# `make help`  the rest

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
RUN := $(VENV)/bin/python
PACKAGES := api benchmarks decode_node engine kernels kv_transfer model node prefill_node proto router runtime tools
CHECKPOINT := .cache/tiny-v4
# Most of what the packages bring is never imported: to compile all of it would take longer than to unpack it. What is
# imported is compiled then, and kept, whatever the caller's environment says.
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile

export PYTHONUNBUFFERED := 1
unexport PYTHONDONTWRITEBYTECODE
# Tests run several processes on few cores; threads of one would only wait for those of another.
test pytest: export OMP_NUM_THREADS := 1

.PHONY: run test pytest check lint types proto setup setup-test clean help

help:
	@echo "make run         start everything on this machine with a tiny model, serve on 127.0.0.1:30000"
	@echo "make test        lint, types, every test (no GPU needed)"
	@echo "make check       lint and types only"
	@echo "make pytest      the tests only"
	@echo "make proto       regenerate proto/*_pb2*"
	@echo "make setup       only the environment and the system libraries"
	@echo "make clean       remove the environment and the tiny checkpoint"
	@echo "PYTHON=...       the interpreter to use (3.11 or 3.12; now: $(PYTHON))"

run: setup $(CHECKPOINT)/config.json
	@exec $(RUN) -m tools.up --config configs/local/cluster.yaml --demo

# Types are checked beside the tests: the one is short and needs one core.
test: setup-test
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory -j2 types pytest

pytest: setup-test
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: lint types

lint: setup-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup-test
	$(VENV)/bin/mypy $(PACKAGES)

proto: setup-test
	$(RUN) -m tools.proto

$(CHECKPOINT)/config.json:
	$(RUN) -m tools.make_checkpoint --preset tiny --out $(CHECKPOINT) --seed 0

setup: $(VENV)/.cpu
	@deploy/system-libraries.sh

setup-test: $(VENV)/.test
	@deploy/system-libraries.sh

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Tandem needs Python 3.11 or 3.12; none was found. Set PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv module: as root, run: apt-get install -y python3-venv"; exit 1; }

$(VENV)/.cpu: requirements/base.txt requirements/cpu.txt | $(VENV)/bin/python
	$(INSTALL) -r requirements/cpu.txt
	@touch $@

# All in one go, with what .cpu stands for.
$(VENV)/.test: requirements/base.txt requirements/cpu.txt requirements/test.txt | $(VENV)/bin/python
	$(INSTALL) -r requirements/test.txt
	@touch $(VENV)/.cpu $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache
