# Everything is installed into .venv, made when first needed. PYTHON chooses its interpreter (delete .venv to change
# it); a torch that is in .venv already, such as a CPU build, stays.
PYTHON ?= python3
BIN := .venv/bin
SITE := NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/mkdocs
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
# After `make test` there is nothing more to install for the quickstart.
INSTALLED := $(firstword $(wildcard .venv/dev.stamp) .venv/report.stamp)

.DEFAULT_GOAL := help
.PHONY: help quickstart demo docs test test-slow lint
.NOTPARALLEL:

help:
	@echo "make quickstart   teacher and student learn 50 classes in 5 tasks, on the data in this folder"
	@echo "make demo         a page with the quickstart's student as it was after each task"
	@echo "make docs         builds the documentation and serves it at http://127.0.0.1:8000"
	@echo "make test         the fast tests"
	@echo "make test-slow    the slow ones: kill and resume, two processes, whole runs"
	@echo "make lint         ruff and pyright"
	@echo "Each installs what it needs into .venv first. Another Python: make test PYTHON=python3.12"

quickstart: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(CORES)} $(BIN)/accelerate launch \
	  --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/train.py

demo: quickstart $(firstword $(wildcard .venv/dev.stamp) .venv/demo.stamp)
	HF_HUB_OFFLINE=1 $(BIN)/hf-cdl demo runs/quickstart

docs: $(firstword $(wildcard .venv/dev.stamp) .venv/docs.stamp)
	$(SITE) build --strict
	$(SITE) serve

# One thread a process: two workers with one thread each are faster than one with two.
test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo \
	  "hf_cdl needs Python 3.10 or newer, but '$(PYTHON)' is none. Name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo \
	  "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	@echo "Making the virtual environment .venv"
	@$(PYTHON) -m venv .venv

# The stamp's name is the extra that is installed: report, demo, docs or dev.
.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "Installing torch into .venv"; \
	  $(BIN)/python -m pip install torch -c constraints.txt; }
	@{ grep -v '^torch==' constraints.txt; $(BIN)/python -c \
	  'from importlib.metadata import version; print("torch==" + version("torch"))'; } > .venv/constraints.txt
	@echo "Installing hf_cdl and what it needs into .venv"
	@$(BIN)/python -m pip install -e '.[$*]' -c .venv/constraints.txt
	@touch $@
