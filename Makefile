# `make demo` and `make test` do all the set-up on a fresh machine: Python 3.11 and pip are enough, a GPU is not needed.
#
#   make test PYTHON=python3.12 VENV=.venv-3.12     another Python, 3.11 to 3.13
#   make test LIBRARIES=newest                      the newest release of every library, in .venv-newest
#   make test LIBRARIES=oldest                      the oldest that requirements.txt states, in .venv-oldest
PYTHON ?= python3.11
LIBRARIES ?= pinned

# What pip is told beside the names: the releases of requirements.lock, no bound, or the lower bounds. ruff and mypy always
# keep theirs, since they judge this code and not the libraries; types are checked against the pinned libraries alone, as an
# annotation that changes elsewhere breaks no run.
ifeq ($(LIBRARIES),pinned)
VENV ?= .venv
BOUNDS = cat requirements.lock
TYPES = $(VENV)/bin/mypy
else ifeq ($(LIBRARIES),newest)
VENV ?= .venv-newest
BOUNDS = sed -nE '/^(ruff|mypy)==/p' requirements.lock
UPGRADE = --upgrade
else ifeq ($(LIBRARIES),oldest)
VENV ?= .venv-oldest
BOUNDS = sed -nE 's/^([a-zA-Z0-9_-]+)>=([0-9.]+).*/\1==\2.*/p' requirements.txt rq/requirements.txt; \
	sed -nE '/^(ruff|mypy|hypothesis|pytest|pytest-xdist|peft|torchao|bitsandbytes|vector-quantize-pytorch)==/p' requirements.lock
else
$(error LIBRARIES is "$(LIBRARIES)"; expected pinned, newest or oldest)
endif
TYPES ?= @echo "types are checked with LIBRARIES=pinned"
INSTALL = $(VENV)/bin/python -m pip install --quiet $(UPGRADE) -c $(VENV)/bounds.txt

.PHONY: demo test lint bench clean

demo: $(VENV)/.run
	PYTHON=$(VENV)/bin/python bash sft.sh

test: lint
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(TYPES)

bench: $(VENV)/.dev
	$(VENV)/bin/python tests/benchmarks/bench_data.py
	$(VENV)/bin/python tests/benchmarks/bench_freeze.py

# ---- set-up: two stamps in $(VENV) say what is installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/bounds.txt: requirements.lock requirements.txt rq/requirements.txt | $(VENV)/bin/python
	($(BOUNDS)) > $@

$(VENV)/.run: requirements.txt $(VENV)/bounds.txt
	$(INSTALL) torch
	$(INSTALL) -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt rq/requirements.txt $(VENV)/.run
	$(INSTALL) -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) output
