# The same commands for people and for CI. Everything below sets up what it needs.
#
#   make demo        the main job: install, fetch the model, serve, stream a few dozen prompts, stop
#   make test        every test that needs no GPU, in under ten minutes on two cores
#   make serve       the server, until it is interrupted
#   make bench       throughput, latency and their ratios (docs/performance.md)
#   make gpu-suite   what needs a GPU: the kernels' tests and benchmarks (ARGS="--only norm --dry-run")
#   make check       format, lint and types
#   make proto       the generated stubs, after a change of a .proto file
#   make slow        the tests that take too long for `make test`

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARTS := engine scheduler kernels perf client
LINKS := build/typing/millrace
# Threads of torch that spin while they wait starve the servers which the tests start.
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo test test-engine test-kernels serve bench gpu-suite check format proto slow clean
.DELETE_ON_ERROR:

demo: $(VENV)/.run
	$(BIN)/python -m millrace.perf.demo

serve: $(VENV)/.run
	$(BIN)/millrace serve $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/millrace bench $(ARGS)

gpu-suite: $(VENV)/.dev
	$(BIN)/python -P -u -m millrace.perf.gpu_suite --out build/gpu_suite $(ARGS)

# Side by side, as Triton's interpreter and its compiler need one core. One thread each: a pool of
# threads that waits for one without a core takes many times as long as the work itself.
test test-engine test-kernels: export OMP_NUM_THREADS := 1
test: $(VENV)/.dev
	$(MAKE) --no-print-directory -j2 test-engine test-kernels

test-engine: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" --ignore=tests/kernels

# What it printed is shown when it has ended, not in between the others.
test-kernels: $(VENV)/.dev
	@mkdir -p build
	{ TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not slow" tests/kernels/interpreter \
	        tests/engine/models/test_interpreted.py tests/engine/runner/test_interpreted.py && \
	    $(BIN)/python -m pytest -m "not slow" tests/kernels --ignore=tests/kernels/interpreter; \
	    } > build/test-kernels.log 2>&1; status=$$?; cat build/test-kernels.log; exit $$status

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow --ignore=tests/kernels/interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m slow tests/kernels/interpreter

check: $(VENV)/.dev $(LINKS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(PARTS:%=$(LINKS)/%)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto:
	PYTHON=$(PYTHON) sh proto/generate.sh

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# mypy and editors can't follow the mapping of packages to folders: give them a tree of links.
$(LINKS): Makefile
	mkdir -p $@
	for part in $(PARTS); do ln -sfn ../../../$$part $@/$$part; done
	ln -sfn ../../../proto/millrace/v1 $@/v1
	touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Millrace needs Python 3.11 or later; PYTHON=$(PYTHON) is" \
	      "$$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
