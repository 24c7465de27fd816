PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/quickstart.yaml
ARGS ?=
# A test is on one thread (tests/conftest.py); worksteal leaves most tests of a file, and what they share, together.
WORKERS = -n auto --maxprocesses 4 --dist worksteal
# Of two calls with ARGS="-k ..." one may find nothing to do, which pytest calls 5.
OR_NONE = || [ $$? -eq 5 ]

.DEFAULT_GOAL := help
.PHONY: help train test test-slow lint clean

help:
	@echo "make train      train with CONFIG (default $(CONFIG)), on a GPU if there is one"
	@echo "make test       the tests, a few minutes on a laptop"
	@echo "make test-slow  the tests that take minutes, which make test leaves out"
	@echo "make lint       flake8"
	@echo "make clean      remove $(VENV), build products and caches; runs/ and data/ stay"
	@echo "Each installs what it needs into VENV=$(VENV) with PYTHON=$(PYTHON); ARGS=\"...\" is passed on, for example"
	@echo "make train ARGS=\"train.max_minutes=2\"   make test ARGS=\"-n 0 -s -k rir\""

train: $(VENV)/.installed
	$(VENV)/bin/python -m ssl_gpu.train $(CONFIG) $(ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest $(WORKERS) -m "not slow and not alone and not gpu" $(ARGS) $(OR_NONE)
	$(VENV)/bin/python -m pytest -m "not slow and (alone or gpu)" $(ARGS) $(OR_NONE)

test-slow: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest $(WORKERS) -m slow $(ARGS)

lint: $(VENV)/.installed-lint
	$(VENV)/bin/python -m flake8 $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An installation is done again only when what it consists of has changed: setup.cfg or pyproject.toml.
$(VENV)/.installed: EXTRA =
$(VENV)/.installed-test: EXTRA = [test]
$(VENV)/.installed-lint: EXTRA = [lint]
$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-lint: setup.cfg pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "error: $(PYTHON) is not there; install Python 3.10 or newer, or set PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed, $(PYTHON) is $$("$(PYTHON)" -V 2>&1); set PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "error: $(PYTHON) lacks the venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing ssl_gpu$(EXTRA) into $(VENV); torch with CUDA is some gigabytes"
	"$(PYTHON)" -m venv "$(VENV)"
	"$(VENV)/bin/python" -m pip install --disable-pip-version-check --editable ".$(EXTRA)"
	@touch "$@"
