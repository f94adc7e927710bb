# Everything a user or the test machine runs. Needs Python 3.11 or newer, git and make; the rest is installed here.
#   make demo    the main job on phantoms, from nothing to runs/demo/evaluation/report.html
#   make test    the whole test suite          make lint    ruff, format check, pyright
#   make bench   the benchmarks                make setup   only the installation
#   make gallery the pictures of docs/methods.md, docs/corruptions.md and docs/evaluation-protocol.md
#   make results the phantoms' experiment, docs/results/phantoms.md and the README's table
# Another interpreter or environment: make test PYTHON=python3.13 VENV=.venv-3.13; without torch: make test TORCH=0

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 1
WORKERS ?= 2
RESULTS ?= runs/results
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test lint bench gallery results clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

demo: setup
	$(BIN)/python -m launch.demo --workdir=runs/demo

test: $(VENV)/.tests-$(TORCH)
	$(BIN)/python -m pytest -n $(WORKERS) --dist=loadfile

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.tests-$(TORCH)
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.encoder --models=vit_b
	$(BIN)/python -m benchmarks.fisher_penalty
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.metrics
	$(BIN)/python -m benchmarks.data_pipeline

gallery: setup
	$(BIN)/python docs/gallery.py

results: setup
	test -d $(RESULTS)/Dataset001_Phantom || $(BIN)/python -m launch.make_phantoms --root=$(RESULTS)/Dataset001_Phantom
	start=$$(date +%s); $(BIN)/python -m launch.experiment --config=configs/phantoms.yaml \
	  --data=$(RESULTS)/Dataset001_Phantom --workdir=$(RESULTS)/phantoms && $(BIN)/python docs/results.py \
	  $(RESULTS)/phantoms "$$(( ($$(date +%s) - start + 59) / 60 )) minutes of $$(nproc) CPU cores"

clean:
	rm -rf $(VENV) .cache build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: calsegx needs Python 3.11 or newer; $$($(PYTHON) --version) is $(PYTHON): set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

$(VENV)/.tests-0: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.tests-1: $(VENV)/.installed
	$(PIP) --editable '.[test,torch,oracles]'
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(PIP) --editable '.[lint]'
	@touch $@
