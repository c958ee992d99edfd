# fusedmerge from a fresh clone, with python3, a C++ compiler and make:
#   make demo       install into .venv and run the main job on real adapters
#   make test       install and run everything that needs no GPU; make test-fast leaves the slow tests out
#   make lint       ruff, mypy, clang-format
#   make bench      the benchmarks in perf/
#   make cpp        the C++ library: build, test, install, and a program that uses it; without nvcc, what can be built without it
#   make gpu        what needs a GPU, part by part: PART=tests|sanitize|micro|switch|decode|sgmv|accuracy (perf/gpu.py tells more);
#                   BUDGET= seconds for each, ONLY= some of its steps, RESULTS= and LOG= where its figures and output go;
#                   FUSEDMERGE_COMMIT= the commit that figures name where there is no repository
# PYTHON=      the interpreter to start from
# VENV=        the environment to install into; none: the current one as it is (no pins, nothing downloaded)
# TORCH_INDEX= the package index to take torch from
# CMAKE_FLAGS= more options for `make cpp`
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PART ?=
BUDGET ?= 530

ifeq ($(VENV),none)
BIN :=
PY := $(PYTHON)
STAMP := build/installed
else
BIN := $(VENV)/bin/
PY := $(BIN)python
STAMP := $(VENV)/installed
endif

# One thread per test process: the processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 4 --benchmark-disable
CPP_FILES := $(shell find $(wildcard python cuda tests examples perf) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-fast lint bench cpp clean gpu
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(PY) -m fusedmerge demo

test: $(STAMP)
	$(PYTEST)

test-fast: $(STAMP)
	$(PYTEST) -m "not slow"

lint: $(STAMP)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy
	$(BIN)clang-format --dry-run -Werror $(CPP_FILES)

bench: $(STAMP)
	$(PY) -m fusedmerge bench

# cmake comes from PATH, or from pip.
CMAKE ?= $(or $(shell command -v cmake 2>/dev/null),$(BIN)cmake)
CMAKE_FLAGS ?=

cpp: $(filter $(VENV)/bin/cmake,$(CMAKE))
	$(CMAKE) --preset release $(CMAKE_FLAGS)
	$(CMAKE) --build --preset release --parallel $(shell nproc)
	CTEST_OUTPUT_ON_FAILURE=1 $(CMAKE) --build --preset release --target test
	$(CMAKE) --install build/cpp --prefix build/cpp/prefix
	$(CMAKE) -S examples/cpp -B build/cpp/example -DCMAKE_PREFIX_PATH=$(CURDIR)/build/cpp/prefix
	$(CMAKE) --build build/cpp/example
	build/cpp/example/mixture

gpu:
	$(PYTHON) perf/gpu.py $(PART) --budget $(BUDGET) --python "$(PY)" --install "make $(STAMP)" $(if $(filter none,$(VENV)),--as-is) \
	    $(if $(ONLY),--only "$(ONLY)") $(if $(RESULTS),--results "$(RESULTS)") $(if $(LOG),--log "$(LOG)")

$(VENV)/bin/cmake:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install "cmake>=3.24"

-include tests/sim/sim.mk

clean:
	rm -rf build .venv

# An editable install knows the package's files by name: it is made again when one comes or goes.
SOURCES := build/sources.txt
$(shell mkdir -p build; find fusedmerge -name '*.py' | sort | cmp -s - $(SOURCES) || find fusedmerge -name '*.py' | sort > $(SOURCES))

$(STAMP): $(SOURCES) pyproject.toml constraints.txt CMakeLists.txt $(wildcard cmake/*.cmake python/*.cpp python/*.h cuda/src/* cuda/include/*/*/*)
ifeq ($(VENV),none)
	$(PY) -m pip install --no-build-isolation --no-deps --editable .
	@mkdir -p $(@D)
else
	@$(PYTHON) -c "import ensurepip, venv" || { echo "make: $(PYTHON) cannot make environments: install python3-venv, or give VENV=none" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PY) -m pip install torch --constraint constraints.txt --index-url $(TORCH_INDEX))
	$(PY) -m pip install --editable ".[test,bench,dev]" --constraint constraints.txt
endif
	@touch $@
