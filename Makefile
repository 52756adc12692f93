# Every target sets up .venv itself, once.  Needs: Python 3.11 or newer, make, and g++ for the compiled CPU kernels.
# Tests run in a process for each core: most are too small for more than one thread.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
READY := .venv/.ready

.PHONY: train test check prove bench new list docs

train: $(READY)
	$(BIN)/kernel-index train $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal $(ARGS)

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
