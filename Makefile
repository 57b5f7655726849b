# Everything runs in .venv/, which the first target that needs it makes, once.
# Works with GNU make 3.81, the one that macOS has. Without make: see CONTRIBUTING.md.

PYTHON ?= python3
CPU ?=
TORCH_INDEX ?= $(if $(CPU),https://download.pytorch.org/whl/cpu)
JOBS ?= 2
TUNE ?=
FAMILY ?=
PAGED ?=
DTYPE ?=
DATA ?=
SCORER ?=
SEEDS ?=
ROWS ?=
NB ?=
ARGS ?=

BIN := .venv/bin
PIP_VERSION := 26.3
INSTALL := $(BIN)/python -m pip install
# Each of the two is written last: what an interrupted set-up leaves is not taken for
# finished.
READY := .venv/ready
MODEL := .venv/model-ready
# What pip's report of a resolution says, as the lines of constraints.txt.
PINS := import json, sys; \
    found = [p["metadata"] for p in json.load(sys.stdin)["install"]]; \
    pin = "{0[name]}=={0[version]}".format; \
    print(*sorted(pin(p).lower().replace("_", "-").split("+")[0] for p in found), \
        sep="\n")
NOT_PINNED := ^(cuda-|nvidia-|setuptools=|peft-from-scratch=)
# What the pinned torch wants in its builds for CUDA, and so what it is everywhere.
TRITON := triton==3.7.1

# SEEDS=3: 0,1,2
FIRST_SEEDS := awk 'BEGIN { for (; i < ARGV[1] + 0; i++) printf(i ? ",%d" : "%d", i) }'

.PHONY: help compare test lab notebooks bench lint lock
.DEFAULT_GOAL := help

help: ## this list
	@echo 'make TARGET [VARIABLE=value …]'
	@echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1@\2/p' Makefile \
	    | awk -F@ '{ printf "  %-18s%s\n", $$1, $$2 }'
	@echo
	@echo '  PYTHON=python3    the Python, 3.11 or later, that .venv/ is made with'
	@echo '  CPU=1             set-up: the CPU build of torch; spares gigabytes on Linux'
	@echo '  TORCH_INDEX=URL   set-up: the package index to take torch from'
	@echo '  TUNE=1            compare: search the settings instead of using the shipped'
	@echo '  FAMILY=1          compare: DoRA, PiSSA, LoRA+ and other relatives too'
	@echo '  PAGED=0.25        compare: this share of the optimizer states in memory'
	@echo '  DTYPE=float32     compare: not the dtype in which this machine is fastest'
	@echo '  DATA=rows.jsonl   compare: on your own rows, {"prompt": …, "completion": …}'
	@echo '  SCORER=label      compare: what is right: exact, json, label, rouge-l, a .py'
	@echo '  SEEDS=3           compare: train that often, with seeds 0, 1 and 2; once by default'
	@echo '  ROWS=300          compare: how many test rows are answered; by default 100'
	@echo '  JOBS=2            test: how many processes share the work'
	@echo '  NB=04             notebooks: only those whose names start so'
	@echo '  ARGS=…            compare, bench: further arguments'

compare: $(MODEL) ## the main job: every method on one task, as a table and a page
	@$(BIN)/python -m peft_from_scratch compare $(if $(TUNE),--tune) \
	    $(if $(FAMILY),--family) $(if $(PAGED),--paged $(PAGED)) \
	    $(if $(DTYPE),--dtype $(DTYPE)) \
	    $(if $(DATA),--data '$(DATA)') $(if $(SCORER),--scorer '$(SCORER)') \
	    $(if $(SEEDS),--seeds "$$($(FIRST_SEEDS) '$(SEEDS)')") $(if $(ROWS),--rows $(ROWS)) $(ARGS)

test: $(MODEL) ## all tests, then all notebooks
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal
ifneq ($(wildcard notebooks/*.ipynb),)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --nbval-lax \
	    --numprocesses $(JOBS) --dist loadfile notebooks
endif

lab: $(MODEL) ## your own copies of the notebooks, in work/, in JupyterLab
	$(BIN)/python -m peft_from_scratch work
	$(BIN)/python -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/work

notebooks: $(MODEL) ## run the notebooks' text forms, store what comes out
	$(BIN)/python notebooks/build.py $(NB)
	$(BIN)/python tests/helpers/try_answers.py --write

bench: $(MODEL) ## the benchmarks: ratios, measured side by side
	@set -e; for file in $$(grep -l __main__ benchmarks/*.py); do \
	    echo "$$file"; \
	    $(BIN)/python "$$file" $(ARGS); \
	done

lint: $(READY) ## the rules and the format (ruff), the walls between rooms (import-linter)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

lock: $(READY) ## newest versions within the ranges, into constraints.txt
	@echo 'Resolving for the oldest Python that is supported …'
	@$(INSTALL) --quiet --dry-run --ignore-installed --report .venv/lock.json \
	    --python-version 3.11.0 --only-binary=:all: --target .venv/lock \
	    '.[test,lab,reference,kernels,serve]' '$(TRITON)'
	@{  grep '^#' constraints.txt; \
	    $(BIN)/python -c '$(PINS)' < .venv/lock.json | grep -Ev '$(NOT_PINNED)'; \
	} > .venv/lock.txt
	@mv .venv/lock.txt constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
	    echo "Python 3.11 or later is needed; $(PYTHON) is:"; \
	    $(PYTHON) --version; \
	    echo 'Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12'; \
	    exit 1; \
	}
	@echo 'Set-up, once: the packages of constraints.txt go into .venv/.'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 \
	    || $(PYTHON) -m venv --clear .venv || { \
	    echo 'No environment could be made. On Debian and Ubuntu, first:'; \
	    echo '    sudo apt install python3-venv'; \
	    exit 1; \
	}
	$(INSTALL) --upgrade pip==$(PIP_VERSION)
	$(if $(TORCH_INDEX),$(INSTALL) --no-deps --index-url $(TORCH_INDEX) \
	    --constraint constraints.txt torch)
	$(INSTALL) --constraint constraints.txt --editable '.[test,lab,reference,kernels,serve]'
	@touch $@

$(MODEL): $(READY)
	@echo 'Set-up, once: the base model, SmolLM2-135M-Instruct.'
	@$(BIN)/python -c 'from peft_from_scratch.models import load; load.prepare()'
	@echo 'Set-up is done.'
	@touch $@
