# `make demo`, `make test`, `make quick`: each sets up .venv first if need be.
PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/demo

.PHONY: demo test quick check lint clean

$(VENV)/installed: setup.py
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev,export,decode]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/nasray run jobs/demo.toml $(RUN_DIR)

# All tests but the long ones and those that need a GPU; starts Ray.
test: check
	$(VENV)/bin/pytest

# What to run after every change: no test that starts Ray.
quick: check
	$(VENV)/bin/pytest -m 'not ray and not slow and not gpu'

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

lint: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache nasray.egg-info
