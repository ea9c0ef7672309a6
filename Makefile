# Every target sets up all it needs in one `.venv` of this clone; all are safe to repeat.
# Options: PYTHON=python3.12, SELECT=<pytest -m expression>, ARGS=<more arguments for the tool>,
# PROCESSES=<of the tests; 0: in this one, as a debugger wants it>.

PYTHON ?= python3
SELECT = not slow
PROCESSES = auto
ARGS =

EXTRAS = test,demo,laplace,zoo,docs,report,safetensors,sklearn,botorch,lightning,transformers,tensorboard
VENV = .venv
BIN = $(VENV)/bin
# Touched last: an interrupted installation starts again, and so does one whose versions changed.
STAMP = $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL = help
.PHONY: help install demo test test-slow test-all coverage lint types format hooks site notebooks clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## the environment alone

# The last step is for torchvision, which the tests, timm and laplace-torch import, and torchmetrics
# where it finds it. Beside a CPU build of torch, pip picks a CUDA build of torchvision, and its
# import fails ("operator torchvision::nms does not exist") and takes the others down with it. The
# script makes the import work in this environment. Builds of torch and torchvision that match need
# none of it, and there it leaves nothing behind.
$(STAMP): setup.cfg pyproject.toml constraints.txt .ci/torchvision_operators.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is not Python 3.10 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.11"; \
		exit 1; }
	@echo "Installing into $(VENV): a few minutes where there is no cache."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[$(EXTRAS)]'
	@$(BIN)/python .ci/torchvision_operators.py
	@touch $(STAMP)

demo: $(STAMP)  ## train with and without tuning: a table, plots and JSON (ARGS=--quick for a short run)
	@$(BIN)/kfac-laplace demo $(ARGS)

test: $(STAMP)  ## the tests, without the slow ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(SELECT)" -n $(PROCESSES) --dist loadfile $(ARGS)

test-slow:  ## the slow tests alone
	@$(MAKE) --no-print-directory test SELECT=slow

test-all:  ## every test
	@$(MAKE) --no-print-directory test SELECT=

coverage: $(STAMP)  ## which lines and branches the tests (not the slow ones) reach; coverage.xml
	@$(BIN)/python -m pytest -m "$(SELECT)" --cov --cov-report=term --cov-report=xml $(ARGS)

site: $(STAMP)  ## the documentation as a site, in site/; a warning ends it
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

notebooks: $(STAMP)  ## write docs/notebooks/ anew from the pages, with what they print
	@$(BIN)/python .ci/notebooks.py

lint: $(STAMP)  ## format and lint rules
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(STAMP)  ## static types
	@$(BIN)/mypy $(ARGS)

format: $(STAMP)  ## rewrite the files as `make lint` wants them, where that is safe
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

hooks: $(STAMP)  ## check style and types at every commit, by pre-commit
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt pre-commit
	@$(BIN)/pre-commit install

clean:  ## remove caches and build products
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache htmlcov .coverage* coverage.xml
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## and the environment
	rm -rf $(VENV)
