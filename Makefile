PYTHON ?= python3
PY := .venv/bin/python
TORCHRUN := OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 2
TARGETS := 0.02,0.03,0.05,0.07,0.10,0.13,0.15,0.18,0.20,0.23,0.26
SWEEP := $(TORCHRUN) -m sharded_phema sweep runs/demo/ema --targets $(TARGETS)
# DeepSpeed compiles these when they are first used, which takes minutes.
BUILD := from deepspeed.accelerator import get_accelerator as device; \
  [device().create_op_builder(op + 'Builder').load(verbose=False) for op in ('ShareMemComm', 'CPUAdam', 'FusedAdam')]

.DEFAULT_GOAL := help
.PHONY: help .venv demo test lint check bench fuzz clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: .venv ## train on two processes, measure eleven widths, report (into runs/demo)
	rm -rf runs/demo
	$(TORCHRUN) examples/digits/train.py --out runs/demo
	$(SWEEP) --metric examples/digits/metric.py:frechet --scores runs/demo/frechet.jsonl
	$(SWEEP) --metric examples/digits/metric.py:loss --scores runs/demo/loss.jsonl
	$(PY) -m sharded_phema plot sweep runs/demo/frechet.jsonl --out runs/demo/quality.png
	$(PY) examples/digits/report.py runs/demo

test: .venv .venv/.deepspeed ## all tests
	$(PY) -m pytest -q -n 2 --dist loadfile

lint: .venv ## format, lint rules, types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

check: lint test ## lint, then test: what a change must pass

bench: .venv ## benchmarks, one table each
	$(PY) benchmarks/reconstruct.py --size 10M
	$(PY) benchmarks/accuracy.py
	$(PY) benchmarks/retention.py
	$(PY) benchmarks/snapshots.py
	$(PY) benchmarks/update.py

fuzz: .venv ## give readers of run folders what a fuzzer makes up, for 3 minutes (failing inputs into runs/fuzz)
	@$(PY) -c 'import atheris' 2>/dev/null || $(PY) -m pip install --quiet -c constraints.txt -e '.[fuzz]'
	@mkdir -p runs/fuzz
	$(PY) tests/fuzz.py -max_total_time=180 -artifact_prefix=runs/fuzz/

clean: ## remove runs/demo, caches and build artefacts; .venv stays
	rm -rf runs/demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sharded_phema tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

.venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: $(PYTHON) is not installed. hint: apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $$($(PYTHON) -V) is too old, 3.10 or newer is needed. hint: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments. hint: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev,demo,plot]'
	@touch $@

# Apart from the rest, which needs no compiler. What an earlier build left is removed: one that was killed leaves a lock
# behind, on which the next would wait for ever.
.venv/.deepspeed: constraints.txt | .venv/.installed
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "error: the tests of DeepSpeed need a C++ compiler. hint: apt install g++" >&2; exit 1; }
	@$(PY) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || \
	  { echo "error: the tests of DeepSpeed need the headers of Python. hint: apt install python3-dev" >&2; exit 1; }
	$(PY) -m pip install --quiet -c constraints.txt -e '.[deepspeed]'
	rm -rf .venv/extensions
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv/extensions PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -c "$(BUILD)"
	@touch $@
