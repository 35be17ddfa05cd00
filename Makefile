# `make demo` and `make test` do all the set-up on a fresh machine: Python 3.11 and pip are enough, a GPU is not needed.
#
#   make test PYTHON=python3.12 VENV=.venv-3.12     another Python, 3.11 to 3.13
#   make test LIBRARIES=newest                      the newest release of every library, in .venv-newest
PYTHON ?= python3.11
LIBRARIES ?= pinned

ifeq ($(LIBRARIES),pinned)
VENV ?= .venv
TORCH = torch==2.13.0
listed = $(addprefix -r ,$(1))
TYPES = $(VENV)/bin/mypy
else ifeq ($(LIBRARIES),newest)
# The same names without their releases. ruff and mypy keep theirs, since they judge this code and not the libraries, and
# types are checked against the pinned libraries alone: an annotation that changes elsewhere breaks no run.
VENV ?= .venv-newest
TORCH = torch
listed = --upgrade $$(sed -nE -e '/^(ruff|mypy)==/p' -e '/^(ruff|mypy)==/!s/^([A-Za-z0-9_-]+)==.*/\1/p' $(1))
TYPES = @echo "types are checked with LIBRARIES=pinned"
else
$(error LIBRARIES is "$(LIBRARIES)"; expected pinned or newest)
endif
INSTALL = $(VENV)/bin/python -m pip install --quiet

.PHONY: demo test lint bench clean

demo: $(VENV)/.run
	PYTHON=$(VENV)/bin/python bash sft.sh

test: lint
	$(VENV)/bin/python -m pytest

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

$(VENV)/.run: requirements.txt | $(VENV)/bin/python
	$(INSTALL) $(TORCH)
	$(INSTALL) $(call listed,requirements.txt)
	touch $@

$(VENV)/.dev: requirements-dev.txt rq/requirements.txt $(VENV)/.run
	$(INSTALL) $(call listed,requirements-dev.txt rq/requirements.txt)
	touch $@

clean:
	rm -rf $(VENV) output
