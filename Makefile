# Each target does all the set-up that it needs, in .venv. PYTHON is any Python from 3.11 on.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0

.PHONY: help setup test test-slow lint docs edge sanitize fuzz soak demo benchmark gpu clean

help:
	@echo "make setup      the environment of all that follows, in .venv, and the kernels, where a source has changed"
	@echo "make demo       train, calibrate and run early exit on real sensor data (about 6 minutes on two cores)"
	@echo "make test       linters, type checker and tests"
	@echo "make test-slow  more cases of what the tests try too"
	@echo "make edge       ExecuTorch, LiteRT, TFLite Micro and OpenVINO in an environment of their own, and the tests of their files (10 minutes)"
	@echo "make docs       the pages as a site, into build/site; a warning is an error"
	@echo "make sanitize   tests of the kernels under the address and undefined-behaviour sanitizers"
	@echo "make fuzz       the kernels on random shapes, strides and dtypes (FUZZ_EXAMPLES=2000 per test: half an hour)"
	@echo "make soak       random use of models against every row alone (CET_SOAK_SECONDS=3600; 20 seconds in make test)"
	@echo "make benchmark  the figures of the README, into benchmarks/results/"
	@echo "make gpu        checks, tests, sanitizers and benchmarks on this machine's GPU, into OUT/gpu.tar.gz"
	@echo "make lint       linters and type checker alone"
	@echo "make clean      remove the environment and all that was built"

# torch comes first and pinned: whatever asks for a torch later finds this one. The stamp is younger than the
# files that decide what is installed, or the set-up runs again.
$(VENV)/.ready: pyproject.toml setup.py requirements/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "cet needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; run make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt --editable '.[dev]'
	touch $@

# The kernels, compiled again where a source has changed.
$(VENV)/.built: $(VENV)/.ready $(shell find csrc -type f)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

setup: $(VENV)/.built

demo: setup
	$(BIN)/cet demo --output runs/demo $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# On as many processes as there are cores; each test keeps to one thread, and threads of its own wait without turning,
# so that they do not slow each other.
test: lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

test-slow: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m slow --numprocesses auto --dist worksteal $(ARGS)

# Their packages ask for other versions than those of requirements/constraints.txt, and so have an environment of their own.
EDGE := build/edge

$(EDGE)/.ready: pyproject.toml setup.py requirements/edge.txt
	test -x $(EDGE)/bin/python || $(PYTHON) -m venv $(EDGE)
	$(EDGE)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(EDGE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements/edge.txt --editable '.[executorch,litert,tflite-micro,onnx]' pytest hypothesis transformers openvino triton matplotlib
	touch $@

edge: $(EDGE)/.ready
	OMP_NUM_THREADS=1 $(EDGE)/bin/python -m pytest -m "slow or not slow" tests/deploy/test_executorch.py tests/deploy/test_litert.py tests/deploy/test_tflite_micro.py tests/deploy/test_openvino.py tests/model/test_unusual_weights.py $(ARGS)

# Read from the files of the repository alone; no network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The kernels with address and undefined-behaviour sanitizers, built apart from those that are installed. Python itself
# leaks by design, and OpenMP's threads outlive the check.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g
OP_TESTS := tests/ops/test_exit_gate.py tests/ops/test_exit_step.py tests/ops/test_compact.py tests/ops/test_consistent_exit_loss.py

sanitize: setup
	CET_BUILD_CPP=1 CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	  $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_WAIT_POLICY=passive PYTHONPATH=build/sanitize/lib \
	  $(BIN)/python -m pytest --capture=no $(OP_TESTS) -k "not compiled and not promises and not memory" $(ARGS)

# New examples in each run; what fails is printed with the decorator that repeats it.
FUZZ_EXAMPLES := 2000

fuzz: setup
	CET_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --capture=no $(OP_TESTS) -k any --hypothesis-profile=fuzz $(ARGS)

# Threads, forks, shapes, adapters, hooks and modes in random order; what fails is printed with its seed.
CET_SOAK_SECONDS := 3600

soak: setup
	CET_SOAK_SECONDS=$(CET_SOAK_SECONDS) $(BIN)/python -m pytest --capture=no tests/model/test_soak.py $(ARGS)

benchmark: setup
	$(BIN)/python -m benchmarks.end_to_end
	$(BIN)/python -m benchmarks.quality --workers 2

# With the Python that is given, which has PyTorch: no virtual environment and no network.
OUT ?= runs/gpu

gpu:
	$(PYTHON) -m benchmarks.gpu_first $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) build dist runs src/*.egg-info
