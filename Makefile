# The commands of this repository. Each sets up what it needs, and is quick when nothing changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
QUICKSTART_DATA := data/quickstart
QUICKSTART_RUN := runs/quickstart

.PHONY: setup quickstart test soak slurm-test lint types format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "partialfc needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "python -m venv failed: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(QUICKSTART_DATA)/train/manifest.json: | setup
	$(BIN)/partialfc data synthesize --identities 10000 --images-per-identity 10 --verification-identities 300 \
	    --image-size 32 --seed 0 --out $(QUICKSTART_DATA)

quickstart: setup $(QUICKSTART_DATA)/train/manifest.json
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/torchrun.sh configs/quickstart.yaml

# A file of tests at a time in each of two processes: most of them have one thread, and wait for others a lot.
test: setup lint types
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

soak: setup
	$(BIN)/python -m pytest -m soak

# Needs Debian or Ubuntu, and root or sudo: Slurm is installed, and a cluster of three nodes runs on this host meanwhile.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
slurm-test: setup
	@dpkg-query --show $(SLURM_PACKAGES) >/dev/null 2>&1 || { \
	    if [ "$$(id -u)" = 0 ]; then root=; else root=sudo; fi; \
	    $$root apt-get update && $$root apt-get install --yes --no-install-recommends $(SLURM_PACKAGES); }
	PARTIALFC_SLURM=1 $(BIN)/python -m pytest -v tests/slurm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(QUICKSTART_DATA) $(QUICKSTART_RUN)
