# Each verb sets up first, once; `make quickstart SEED=1` and `make test ARGS="-k plan"` pass something on.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
GOLDEN_VENV := .golden-venv
LOWEST_VENV := .lowest-venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SEED ?= 0
ARGS ?=
# Test workers use one thread each; more than eight gain nothing.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup

.PHONY: setup quickstart finetune world world-report test test-all test-lowest lowest slurm slurm-test lint type format golden golden-torchscale docs bench bench-costs bench-data bench-evaluation bench-generation bench-gpu bench-index bench-loop bench-images bench-plan bench-shared bench-step check clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (PyTorch with its CUDA libraries is some 5 GB: minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...")'
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $(READY)

quickstart: $(READY)
	rm -rf runs/quickstart
	$(BIN)/python main.py fit -c configs/quickstart.yaml --seed_everything $(SEED)

finetune: $(READY)
	$(BIN)/python benchmarks/finetune_world.py $(ARGS)

# Half an hour on two cores for the model, minutes for the baseline that is trained on text alone; both resume.
WORLD := -c configs/world.yaml
WORLD_TEXT := $(WORLD) -c configs/world_text_only.yaml

world: runs/world/trained runs/world_text/trained

runs/world/trained: | $(READY)
	$(BIN)/python main.py fit $(WORLD) --ckpt_path last $(ARGS)
	@touch $@

runs/world_text/trained: runs/world/trained
	$(BIN)/python main.py fit $(WORLD_TEXT) --ckpt_path last $(ARGS)
	@touch $@

# The model; the same with each other's images; the baseline. Results that are there are not asked for again.
world-report: world
	$(BIN)/python main.py test $(WORLD) -c configs/eval/world.yaml --ckpt_path last
	$(BIN)/python main.py test $(WORLD) -c configs/eval/world.yaml --ckpt_path last --eval.image_control shuffled
	$(BIN)/python main.py test $(WORLD_TEXT) -c configs/eval/world.yaml --ckpt_path last --eval.image_control none
	$(BIN)/python main.py report eval runs/world/eval runs/world/eval-shuffled runs/world_text/eval-none \
		--names "model,images shuffled,text only" --output runs/world/report

test: $(READY)
	$(PYTEST) $(ARGS)

test-all: $(READY)
	$(PYTEST) -m "" $(ARGS)

# Debian's Slurm and munge, as root; the tests start a cluster of this machine alone, and are skipped without these.
slurm:
	@command -v sbatch munged >/dev/null || { \
		export DEBIAN_FRONTEND=noninteractive; \
		timeout 300 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends slurm-wlm munge; \
	}

slurm-test: slurm $(READY)
	$(BIN)/python -m pytest -m "" tests/test_slurm.py $(ARGS)

# The lowest versions that pyproject.toml allows: on $(PYTHON), and on Python 3.12 where it runs beside that.
test-lowest: lowest
	@if python3.12 -c '' 2>/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] == (3, 12))'; then \
		$(MAKE) lowest PYTHON=python3.12 LOWEST_VENV=$(LOWEST_VENV)-3.12; \
	fi

lowest: $(LOWEST_VENV)/.ready
	$(LOWEST_VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

# pip takes the highest versions only, uv the lowest of what we ask for ourselves.
$(LOWEST_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST_VENV)/bin/uv pip install --quiet --python $(LOWEST_VENV)/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

type: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(READY)
	$(BIN)/python -m pytest -q -m "" --regenerate-golden tests/test_golden.py
	@echo "torchscale_*.json are recorded in an environment of their own: make golden-torchscale"

# torchscale's pins clash with ours (tests/golden/README.md); the script's first lines are the list of them.
golden-torchscale: $(GOLDEN_VENV)/.ready
	OMP_NUM_THREADS=1 $(GOLDEN_VENV)/bin/python tests/golden/make_torchscale.py

$(GOLDEN_VENV)/.ready: tests/golden/make_torchscale.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "torchscale needs Python 3.11: make golden-torchscale PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(GOLDEN_VENV)
	sed -n '/^# \/\/\/ script/,/^# \/\/\/$$/s/^#   "\(.*\)",$$/\1/p' $< > $(GOLDEN_VENV)/requirements.txt
	$(GOLDEN_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(GOLDEN_VENV)/requirements.txt
	@touch $@

bench: $(READY)
	$(BIN)/python benchmarks/full_size_step.py $(ARGS)

bench-costs bench-evaluation bench-generation bench-gpu bench-loop bench-images bench-plan bench-shared bench-step: $(READY)
	$(BIN)/python -m benchmarks.$(@:bench-%=%) $(ARGS)

# Beside the libraries that they are compared with.
bench-data bench-index: $(VENV)/.bench-ready
	$(BIN)/python -m benchmarks.$(@:bench-%=%) $(ARGS)

$(VENV)/.bench-ready: $(READY)
	@if command -v uv >/dev/null; then \
		uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[bench]'; \
	else \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'; \
	fi
	@touch $@

# The pages as a site in dist/site; a broken link is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)

check: lint type test-all

clean:
	rm -rf $(VENV) $(GOLDEN_VENV) $(LOWEST_VENV) $(LOWEST_VENV)-3.12 .pytest_cache .mypy_cache .ruff_cache .hypothesis
