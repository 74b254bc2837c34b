# The two commands of the README. Both set up .venv from the lock first, if it is not there yet.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check figures clean

demo: $(STAMP)
	$(BIN)/onnxpress demo -o artifacts/demo

test: check
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	./scripts/typecheck $(BIN)/mypy

figures: demo
	$(BIN)/python benchmarks/demo.py --write
	$(BIN)/python benchmarks/bert_base.py --write

# torch first: its pinned CPU build keeps the others from pulling gigabytes of CUDA
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "onnxpress needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,openvino,demo,serve,sign,vision,sentencepiece,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
