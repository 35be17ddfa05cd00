# `make demo` and `make test` do all the set-up on a fresh machine: Python 3.11 and pip are enough, a GPU is not needed.
VENV ?= .venv
PYTHON ?= python3.11

.PHONY: demo test lint bench clean

demo: $(VENV)/.run
	bash sft.sh

test: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest

bench: $(VENV)/.dev
	$(VENV)/bin/python tests/benchmarks/bench_data.py
	$(VENV)/bin/python tests/benchmarks/bench_freeze.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt rq/requirements.txt $(VENV)/.run
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt -r rq/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) output
