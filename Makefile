# `make` says what there is.
PYTHON ?= python3
RUN ?= runs/demo
BENCH ?= --quick
BENCH_OUT ?= bench.json
BIN := .venv/bin
# onnxruntime-gpu has wheels for Linux on x86-64 and for Windows only.
EXTRAS := all,dev,peers,$(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),onnx-gpu,onnx)

.PHONY: help setup demo test test-long test-versions sanitize lint format static bench report gpu clean

help:
	@echo "make demo       train on digits and sample them into $(RUN) (minutes)"
	@echo "make test       the tests, under 5 minutes on two idle cores"
	@echo "make test-long  kills, the demo's quality, long statistics, sanitizers"
	@echo "make test-versions  as old and as new packages as pyproject.toml allows"
	@echo "make sanitize   of test-long the C++ under the address and the thread sanitizer (minutes)"
	@echo "make lint       ruff: lint and format check"
	@echo "make static     what the kernels compile to on five architectures (no GPU), against the baseline"
	@echo "make bench      the quick benchmarks (or BENCH=...): parity, then times against eager, into $(BENCH_OUT)"
	@echo "make report     the figures in README.md and docs/ from the stored records"
	@echo "make gpu        on a machine with one: tests and times into OUT=$(OUT)"
	@echo "make format     ruff: fix and format"
	@echo "make setup      .venv with the pinned packages (the others call it)"
	@echo "make clean      remove .venv and caches"

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), needs Python 3.11 or newer (make PYTHON=...)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

demo: setup
	$(BIN)/ddpm train --data digits --out $(RUN) --n-feat 32 --epochs 20 --batch-size 64 \
		--schedule cosine --prediction v --overwrite
	$(BIN)/ddpm sample $(RUN) --context all --n 100 --guidance 2 --solver dpmpp_2m --steps 30 \
		--out $(RUN)/samples.png --gif $(RUN)/trajectory.gif
	@echo
	@echo "Look at  $(RUN)/samples.png  $(RUN)/trajectory.gif  $(RUN)/loss.png"
	@echo "Next:    $(BIN)/ddpm sample $(RUN) --context 7 --guidance 3 --seed 1 --n 25 --out sevens.png"
	@echo "         $(BIN)/ddpm sample $(RUN) --context 0,0,0,.5,0,0,0,0,.5,0 --n 25 --out between_3_and_8.png"
	@echo "         $(BIN)/ddpm evaluate $(RUN) --guidance 2"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not long" -n auto --dist loadfile --benchmark-disable

test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "long and not alone" -n auto --dist loadfile
	$(BIN)/pytest -m alone

test-versions: setup
	PYTHONPATH=. $(BIN)/python tests/environments.py oldest newest

sanitize: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/kernels/test_sanitizers.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

static: setup
	$(BIN)/ddpm-bench static --check

bench: setup
	$(BIN)/ddpm-bench run $(BENCH) --out $(BENCH_OUT)

report: setup
	$(BIN)/ddpm-bench report

# On a machine without .venv (and without a network) the system's Python serves: it needs torch, triton, pytest, hypothesis, scipy, typer, rich,
# safetensors, matplotlib, pillow and scikit-learn.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
OUT ?= bench/results/gpu

# All parts in under nine minutes, or some: make gpu PARTS=step BUDGET=520 OUT=runs/step
gpu:
	PYTHONPATH=. $(GPU_PYTHON) -m bench gpu --out $(OUT) $(if $(PARTS),--parts $(PARTS)) $(if $(BUDGET),--budget $(BUDGET))

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
