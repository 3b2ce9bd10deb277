# Two commands on a fresh machine: `make demo` and `make test`. Both set up what they need and then touch no network.
#
# The environment's stamp is named after the content of what it was made from and of where it lies, so that a second
# `make` finds it at once, and a changed pyproject.toml or a moved checkout is noticed whatever the clocks say.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export PATH := $(CURDIR)/.venv/bin:$(PATH)

KEY := $(shell (pwd; cat pyproject.toml tools/environment.sh) | sha256sum | cut -c 1-16)
RUNTIME := .venv/.installed-$(KEY)
DEVELOPMENT := .venv/.installed-$(KEY)-dev
BENCH := .venv/.installed-$(KEY)-bench

OLD := .cache/readers/4.57
INT8 := .cache/readers/int8
READER_KEY := $(shell (echo '$(KEY)'; cat tests/readers/environment.sh) | sha256sum | cut -c 1-16)
READER := .cache/readers/.installed-4.57-$(READER_KEY)
INT8_READER := .cache/readers/.installed-int8-$(READER_KEY)

# As many tests side by side as there are cores; of those that start processes at most two (tests/conftest.py).
# One thread for each: sums of tiny tensors gain nothing from more, and threads that spin slow the other tests down.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n logical --maxprocesses 8 --dist loadscope

.PHONY: help demo demo-tasks fast test test-all test-readers test-slurm bench check clean distclean

help:
	@echo 'make demo       set up, then train a small GPT on real text, kill it, resume it elsewhere, let it talk'
	@echo 'make demo-tasks  pretrain a small encoder, fine-tune it to a sentiment classifier, evaluate and explain it'
	@echo 'make test       set up, then lint, types and the tests'
	@echo 'make fast       the tests that start no process and take no seconds: a minute and a half'
	@echo 'make test-all   the same with the long matrices (PART=2/4: the second of four parts of them)'
	@echo 'make test-slurm   a real Slurm on this machine, as root (SELECT=quick: less than ten minutes)'
	@echo 'make bench      set up what benchmarks need beside (python -m bench.step, ...)'
	@echo 'make test-readers  what convert writes, read by the oldest transformers that is supported and by the newest'
	@echo 'make clean      remove what demo and tests left; make distclean: the environment, too'

demo: $(RUNTIME)
	@.venv/bin/python -m tools.demo

demo-tasks: $(DEVELOPMENT)
	@.venv/bin/python -m tools.demo.tasks

test: check
	@echo '== pytest'
	@$(PYTEST) -m 'not matrix and not slurm'

fast: $(DEVELOPMENT)
	@$(PYTEST) -m 'not matrix and not ranks and not slow' --durations=5 --durations-min=2

test-all: check
	@echo '== pytest, long matrices included'
	@$(PYTEST) -m 'not slurm'

# Two clusters at a time: each has up to four ranks, and Slurm's clocks do not wait for a busy machine.
test-slurm: $(DEVELOPMENT)
	@echo '== pytest, on simulated Slurm clusters'
	@$(PYTEST) --maxprocesses 2 --durations=12 tests/slurm -m 'slurm$(if $(filter quick,$(SELECT)), and not matrix)'

test-readers: export HF_HUB_OFFLINE := 1
test-readers: export OMP_NUM_THREADS := 1
test-readers: $(DEVELOPMENT) $(READER) $(INT8_READER)
	@echo '== exports of every form and tokenizer'
	@rm -rf build/readers
	@.venv/bin/python -m tests.readers.write build/readers
	@$(OLD)/bin/python tests/readers/read.py build/readers
	@.venv/bin/python tests/readers/read.py build/readers
	@echo '== int8 folders, read by torchao'
	@$(INT8)/bin/python -m pytest -q -p no:cacheprovider tests/engine/serve/test_deployment.py -k int8

check: $(DEVELOPMENT)
	@echo '== ruff check, ruff format, pyright'
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check .
	@.venv/bin/pyright

$(RUNTIME):
	@bash tools/environment.sh '$@'

$(DEVELOPMENT): $(RUNTIME)
	@bash tools/environment.sh '$@' dev

bench: $(BENCH)

$(BENCH): $(RUNTIME)
	@bash tools/environment.sh '$@' bench

$(READER): $(RUNTIME)
	@bash tests/readers/environment.sh '$(OLD)' '$@' 'transformers==4.57.*'

$(INT8_READER): $(RUNTIME)
	@bash tests/readers/environment.sh '$(INT8)' '$@' 'torchao>=0.16'

clean:
	rm -rf .demo .demo-tasks .pytest_cache .ruff_cache build dist
	find engine launcher tools tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf .venv .cache/readers palimpsest.egg-info
