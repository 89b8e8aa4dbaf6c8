# Two commands: `make demo` and `make test`. Each sets up .venv first if need be.
PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/demo

.PHONY: demo test lint clean

$(VENV)/installed: setup.py
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev,export]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/nasray run jobs/demo.toml $(RUN_DIR)

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache nasray.egg-info
