# make demo   set everything up and go the whole road on a real model; leaves demo/index.html
# make test   set everything up and run all tests, but the long ones
# make long   tests that take minutes: a cluster whose nodes are killed, another processor's emulator
# make check  lint, types and the quick tests; nothing is built but the package itself
# make fuzz   the property tests with other examples each time, ROUNDS times over
# make attack mutated streams, stores, certificates and requests: ATTACK="streams --count 1000000"
# make lint   ruff and mypy, strict
# make bench  the codec benchmark, a table on the terminal
# make peers  set up what the benchmarks compare with: SZ3, ZFP, HQQ, llama.cpp; lm-eval and Ray too
#
# Needed beforehand: Python 3.11 to 3.13 with venv, and a C++20 compiler. Everything else goes into
# .venv. PYTHON=python3.12 picks another interpreter, VENV=dir another place, TEST_OPTIONS=... are
# pytest's. LLAMA_NATIVE=ON builds llama.cpp for this machine's processor, as figures need it.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
TEST_JOBS ?= auto
TEST_OPTIONS ?=
LLAMA_NATIVE ?= OFF
ROUNDS ?= 10
ATTACK ?= all

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Many test processes with one thread each finish sooner than one with many. Each takes tests that
# stand together, which share what is made for them, and in the end some of another's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal
# Each stamp stands for one step that is done; it is redone when what it depends on changes.
STAMPS := $(VENV)/.stamps
NATIVE := CMakeLists.txt $(shell find native -type f)

.PHONY: demo test long check fuzz attack lint bench peers llama install clean

demo: install
	$(BIN)/moebound demo -o $(DEMO)

test: peers
	$(PYTEST) -m "not long" $(TEST_OPTIONS)

long: peers
	$(PYTEST) -m long $(TEST_OPTIONS)

check: lint
	$(PYTEST) -m "not slow and not long" $(TEST_OPTIONS)

fuzz: install
	for round in $$(seq $(ROUNDS)); do \
	  $(PYTEST) -m hypothesis --hypothesis-profile=fuzz $(TEST_OPTIONS) || exit 1; \
	done

attack: install
	$(BIN)/python -m tests.attack $(ATTACK)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check src tests bench recipes
	$(BIN)/mypy

bench: install
	$(BIN)/moebound bench codec

install: $(STAMPS)/package

peers: $(STAMPS)/package $(STAMPS)/peers

llama: $(STAMPS)/llama-$(LLAMA_NATIVE)

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "moebound needs Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 1; }
	@command -v $${CXX:-c++} > /dev/null \
	  || { echo "moebound needs a C++20 compiler, such as g++ or clang++" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch alone and first: a looser request, made together with others, may choose a CUDA build. simde-py is
# source alone and asks for a build tool of its own, which --no-build-isolation below would keep from it.
$(STAMPS)/tools: $(STAMPS)/venv constraints.txt
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt scikit-build-core nanobind cmake ninja simde-py
	@touch $@

# Editable: Python files are used where they are, the native module is built again when it changes.
$(STAMPS)/package: $(STAMPS)/tools pyproject.toml $(NATIVE)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@

# llama.cpp without what nothing here calls, and past pip's cache, which would hand out what was built
# for another processor. Building it takes longest: it goes on while the package is installed.
$(STAMPS)/llama-$(LLAMA_NATIVE)-wheel: $(STAMPS)/tools bench/llama-cpp.cmake
	CMAKE_ARGS="-DGGML_NATIVE=$(LLAMA_NATIVE) -DLLAVA_BUILD=OFF \
	  -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/bench/llama-cpp.cmake" \
	  $(PIP) wheel -c constraints.txt --no-cache-dir --no-build-isolation --no-deps \
	  --wheel-dir $(STAMPS)/$(LLAMA_NATIVE) llama-cpp-python
	@touch $@

$(STAMPS)/llama-$(LLAMA_NATIVE): $(STAMPS)/llama-$(LLAMA_NATIVE)-wheel | $(STAMPS)/package
	$(PIP) install --force-reinstall --no-deps $(STAMPS)/$(LLAMA_NATIVE)/*.whl
	@rm -f $(STAMPS)/llama-ON $(STAMPS)/llama-OFF && touch $@

$(STAMPS)/peers: $(STAMPS)/package $(STAMPS)/llama-$(LLAMA_NATIVE)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build $(DEMO)
