# `make demo` and `make test` do all their own set-up; tools/setup_env.py says what it keeps and what it installs.
# The active environment's Python is asked first; another one: make test PYTHON=python3.12
PYTHON ?= python3
VIDEO ?=
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))

RUN := .venv/bin/python
# One OpenMP thread in each test worker: the workers share the cores, not oversubscribe them.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal
# The Triton kernels in the interpreter, in a process of its own: Triton decides at its import.  Then everything else,
# whether that passed or not; pytest's line on the rest is the last one.
define both_runs
echo "test: the Triton kernels, interpreted, in $(WORKERS) workers"; \
TRITON_INTERPRET=1 $(PYTEST) $(1) -q --no-header tests/ops; interpreted=$$?; \
echo "test: everything else in $(WORKERS) workers, one thread each"; \
$(PYTEST) $(1) && exit $$interpreted
endef
# Not .venv/bin/clang-format: on top of an active environment the command may stand there instead.
CLANG_FORMAT := $(RUN) -c "from clang_format import clang_format; clang_format()"
CPP = $(wildcard csrc/*.h csrc/*.cpp $(addprefix csrc/*/*.,h cpp cu cuh))

.PHONY: help demo test test-all lint format build clean distclean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

demo:  ## stream a synthetic endoscopy, or VIDEO=path, through EndoMamba frame by frame, with all outputs
	@$(PYTHON) tools/setup_env.py video
	@echo "demo: $(if $(VIDEO),endomamba_tiny on $(VIDEO),a small trained model on a synthetic endoscopy), frame by frame"
	@$(RUN) -m endomamba demo $(if $(VIDEO),"$(VIDEO)")

test:  ## the tests, without the exhaustive grids
	@$(PYTHON) tools/setup_env.py dev
	@$(call both_runs,)

test-all:  ## the tests with the exhaustive grids
	@$(PYTHON) tools/setup_env.py dev
	@$(call both_runs,-m "slow or not slow")

lint:  ## ruff and clang-format, without changing a file
	@$(PYTHON) tools/setup_env.py dev
	@echo "lint: ruff check, ruff format, clang-format"
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(CLANG_FORMAT) --dry-run --Werror $(CPP)

format:  ## let ruff and clang-format rewrite what they would complain about
	@$(PYTHON) tools/setup_env.py dev
	@echo "format: ruff check --fix, ruff format, clang-format -i"
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .
	@$(CLANG_FORMAT) -i $(CPP)

build:  ## compile the CPU kernels again where a source changed
	@$(PYTHON) tools/setup_env.py video
	@echo "build: endomamba/_build_info.json says" && cat endomamba/_build_info.json

clean:  ## remove compiled files and caches
	@echo "clean: removing compiled files and caches"
	@rm -rf build dist *.egg-info endomamba/_C*.so endomamba/_build_info.json
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	@echo "distclean: removing .venv"
	@if [ -e .venv/endomamba-setup.json ]; then rm -rf .venv; fi
