# Every target sets up .venv itself, once.  Needs: Python 3.11 or newer, make, and g++ for the compiled CPU kernels.
# Tests run in a process for each core: most are too small for more than one thread.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
READY := .venv/.ready

.PHONY: train test test-all smoke check prove bench new list docs

train: $(READY)
	$(BIN)/kernel-index train $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not thorough" $(ARGS)

# The other tests: the same questions in more sizes, dtypes and compilers.
test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m thorough $(ARGS)

# Imports, dispatch, masks, and the values and gradients of every kernel on a CPU without Triton: a minute on two cores.
smoke: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto tests/test_imports.py tests/test_dispatch.py \
		tests/masks/test_mask_contract.py tests/test_conformance.py -k "not test_conformance or \
		(values_and_gradients and not triton and not inductor and not chunked and (float32 or bfloat16))" $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.budgets
	$(BIN)/pyrefly check

prove: $(READY)
	$(BIN)/kernel-index prove numerics
	$(BIN)/kernel-index prove aot
	$(BIN)/kernel-index prove traffic

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

new: $(READY)  # make new FAMILY=experts NAME=fused_swish
	$(BIN)/python -m tools.scaffold $(FAMILY) $(NAME)

docs: $(READY) .venv/.docs-ready
	$(BIN)/python -m docs

list: $(READY)
	$(BIN)/kernel-index list

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	-$(BIN)/kernel-index build
	touch $(READY)

.venv/.docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
