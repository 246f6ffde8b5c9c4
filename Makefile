# Every target sets up what it needs in a virtual environment of its own; nothing outside the checkout is
# touched. PYTHON is the interpreter to build it with (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest supported versions, which are those of the GPU machines that the kernels are measured on. The
# interpreter of Triton 3.6 needs numpy below 2.4, and this torch does not hold its compiler's parts together.
OLDEST := torch==2.11.0 torchvision==0.26.0 triton==3.6.0 "numpy<2.4" \
	"nvidia-nvvm==13.0.*" "nvidia-cuda-crt==13.0.*"
# Kernels are compiled for the GPUs of this machine; where there is none, for one architecture that stands for
# all. FUSED_OPS_CUDA_ARCHS=all makes a library for every one.
export FUSED_OPS_CUDA_ARCHS ?= $(if $(wildcard /dev/nvidia0),,90+PTX)
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --progress-bar off
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
SOURCES := csrc fused_ops models train bench tests setup.py

.PHONY: setup train test test-oldest test-extended test-gpu resources build bench lint format clean help

help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed ## set up the virtual environment: the package, its extras, the CUDA compiler

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.py csrc/*/*.cu csrc/*/*.h)
	@echo "Setting up $(VENV) (downloads about 3 GB the first time; takes a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip "setuptools>=64" wheel
	@# torch and the compiler come first: building the library needs both.
	@$(PIP) "torch>=2.11" "cuda-toolkit[nvcc]" ninja $(EXTRA_REQUIREMENTS)
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable ".[dev]" $(EXTRA_REQUIREMENTS)
	@touch $@

train: setup ## train a small DS-Net on handwritten digits, on the GPU or else the CPU
	$(BIN)/fused-ops train --data digits

test: setup ## set up and pass every test (those that need a GPU are skipped where there is none)
	$(PYTEST)

test-oldest: ## the same under the oldest supported torch and Triton
	$(MAKE) --no-print-directory test VENV=.venv-oldest EXTRA_REQUIREMENTS='$(OLDEST)'

test-extended: setup ## the long tests that the others leave out
	$(PYTEST) -m extended

test-gpu: setup ## only the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

resources: setup ## bring the committed report of registers and spills up to date
	$(BIN)/fused-ops bench resources --write

build: setup ## compile the CUDA library again
	$(BIN)/python csrc/build.py library

lint: setup ## check style
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cpp')

format: setup ## put style right
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cpp')

clean: ## remove build results (not the virtual environments)
	rm -rf build *.egg-info fused_ops/_native*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
