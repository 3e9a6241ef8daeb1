# make demo   set everything up and go the whole road on a real model; leaves demo/index.html
# make test   set everything up and run all tests
# make lint   ruff and mypy, strict
# make bench  the codec benchmark, a table on the terminal
#
# Needed beforehand: Python 3.11 to 3.13 with venv, and a C++20 compiler. Everything else goes into
# .venv. PYTHON=python3.12 picks another interpreter, VENV=dir another place.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
TEST_JOBS ?= auto

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Each stamp stands for one step that is done; it is redone when what it depends on changes.
STAMPS := $(VENV)/.stamps
NATIVE := CMakeLists.txt $(shell find native -type f)

.PHONY: demo test lint bench install clean

demo: install
	$(BIN)/moebound demo -o $(DEMO)

# Many test processes with one thread each finish sooner than one with many.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check src tests bench recipes
	$(BIN)/mypy

bench: install
	$(BIN)/moebound bench codec

install: $(STAMPS)/package

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "moebound needs Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 1; }
	@command -v $${CXX:-c++} > /dev/null \
	  || { echo "moebound needs a C++20 compiler, such as g++ or clang++" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch alone and first: a looser request, made together with others, may choose a CUDA build.
$(STAMPS)/tools: $(STAMPS)/venv constraints.txt
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt scikit-build-core nanobind cmake ninja
	@touch $@

# Editable: Python files are used where they are, the native module is built again when it changes.
$(STAMPS)/package: $(STAMPS)/tools pyproject.toml $(NATIVE)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build $(DEMO)
