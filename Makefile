# Every target works from a fresh clone: what it needs is made first. `make` alone prints help.

PROFILE ?= pocket
MODELS ?=
STUDIES ?=
QUICK ?=
TORCH_INDEX ?=
PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)

# Where the programs lie: in .venv, which is made first; or in another environment, to which nothing but setup-gpu adds
# anything: the one that BIN= names, or that of environment.yml if it is active.
BIN := $(if $(filter mamba-shedder,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)/bin,.venv/bin)
VENV := .venv/.ready
READY := $(if $(filter .venv/bin,$(BIN)),$(VENV))
POCKET_MODELS := pocket-mamba pocket-mamba2 pocket-falcon-mamba pocket-zamba2 pocket-hymba

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu plan doctor reproduce report verify record test rehearse lint bench lab book models clean

help:  ## print this help
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'
	@echo
	@echo "  PROFILE=pocket     the profile (pocket, smoke, laptop, paper): a name or the path of a YAML file"
	@echo "  MODELS= STUDIES=   only these of the profile, separated by commas"
	@echo "  PYTHON=            the interpreter to set up with, 3.11 to 3.13"
	@echo "  BIN=               the bin folder of an environment to use as it is, without .venv (now $(BIN))"
	@echo "  TORCH_INDEX=       address of a package index to take PyTorch from, such as PyTorch's own for CPUs"

setup: $(READY)  ## create .venv with the exact versions of requirements/cpu.txt, once

setup-gpu: $(READY)  ## add the GPU kernels of requirements/gpu.txt to it (needs nvcc, CUDA's compiler; up to an hour)
	@$(BIN)/python -c "import torch; assert torch.version.cuda" 2> /dev/null \
	  || { echo "torch in $(BIN) is missing or has no CUDA: make clean, then make setup-gpu, without an index for CPUs"; exit 1; }
	@$(BIN)/python -c "from torch.utils.cpp_extension import CUDA_HOME; assert CUDA_HOME" 2> /dev/null \
	  || { echo "nvcc is missing: install the CUDA toolkit that torch was built with, or set CUDA_HOME to it"; exit 1; }
	@$(BIN)/python -c "import causal_conv1d, mamba_ssm" 2> /dev/null \
	  || $(BIN)/pip uninstall -qq --yes causal-conv1d mamba-ssm
	@$(BIN)/pip install --no-cache-dir --no-build-isolation --no-deps -r requirements/gpu.txt -c requirements/cpu.txt
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .

plan: $(READY)  ## say what a profile downloads, computes and holds in memory, and how long it takes
	@$(BIN)/python -m shedder_utils plan --profile "$(PROFILE)" --models "$(MODELS)" --studies "$(STUDIES)" > /dev/null

doctor: $(READY)  ## say what is installed, which scan will run, and what the profile lacks
	@$(BIN)/python -m shedder_utils doctor --profile "$(PROFILE)" > /dev/null

reproduce: $(READY)  ## run the studies that are not done yet, then tables, figures and notebooks
	@$(BIN)/python -m shedder_utils run --profile "$(PROFILE)" --models "$(MODELS)" --studies "$(STUDIES)" > /dev/null

report: $(READY)  ## draw tables and figures again from the records, without a model
	@$(BIN)/python -m shedder_utils report --profile "$(PROFILE)" > /dev/null

verify: $(READY)  ## check your records against the recorded ones and the paper, and that those are whole
	@$(BIN)/python -m shedder_utils verify --profile "$(PROFILE)" > /dev/null

record: $(READY)  ## for maintainers: make a finished run of committed code the recorded one
	@$(BIN)/python -m shedder_utils record --profile "$(PROFILE)" > /dev/null

test: lint  ## check style and types, then run the tests
	@$(BIN)/python -m pytest -q

rehearse: $(READY)  ## run all of the paper profile on a stand-in for the Hub, with small models (some three hours; QUICK=1: under one; goes on where it stopped)
	@$(BIN)/python -m tests.hub --models "$(MODELS)" --studies "$(STUDIES)" $(if $(QUICK),--quick)

lint: $(READY)  ## check style and types only
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(READY)  ## measure speed: ratios within one run, on this machine
	@$(BIN)/python -m tests.benchmarks

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=notebooks

book: $(READY)  ## make a web page of README, notebooks, tables and figures: site/html/index.html
	@rm -rf site
	@$(BIN)/python -m sphinx -q -W --keep-going -c docs -d site/doctrees . site/html
	@echo site/html/index.html

models: $(READY)  ## train the pocket models from nothing (hours; goes on where it stopped)
	@$(BIN)/python -m shedder_utils.pocket.build
	@for model in $(POCKET_MODELS); do $(BIN)/python -m shedder_utils.pocket.training $$model || exit 1; done

clean:  ## remove .venv, the web page and caches; runs/ stays
	@rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache *.egg-info
	@find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV): requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null \
	  || { echo "$(PYTHON) is missing or not Python 3.11 to 3.13: name another, make setup PYTHON=python3.12"; exit 1; }
	@echo "Setting up .venv: some 210 packages, a few minutes, once"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -r requirements/cpu.txt
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
