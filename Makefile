# Everything runs in .venv, which the first target that needs it makes; nothing else of the machine changes.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= experiments/luong_general.py
WORKDIR ?=
ARGS ?=
DATA ?=
# The tested versions; empty for the newest ones that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# Each test process holds its own compiled programs, about 1 GB: more than 8 gain nothing.
WORKERS ?= $(shell $(PYTHON) -c "import os; n = os.cpu_count() or 1; \
	n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else n; print(min(n, 8))" 2>/dev/null)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help train test gallery bench lint format pins clean

help:
	@echo 'make train   train $(CONFIG) (CONFIG=FILE for another, WORKDIR=FOLDER to keep it elsewhere,'
	@echo '             ARGS="--config.run.epochs=2" to override fields)'
	@echo 'make test    run every test (ARGS="-k attention" for some of them, WORKERS=1 in one process)'
	@echo 'make gallery  train three small models and build pages that show them at work, in gallery/'
	@echo 'make bench   time s2s beside PyTorch, yoyodyne and JoeyNMT, half an hour (DATA=FOLDER with multi30k'
	@echo '             and sigmorphon2020_g2p, else made data; ARGS="--quick", ARGS="--only pytorch")'
	@echo 'make lint    check style, types and the arrows between modules'
	@echo 'make format  format the code'
	@echo 'make pins    write $(CONSTRAINTS) anew, from the newest versions'
	@echo 'make clean   remove $(VENV), the environments of make bench and caches, but no trained model'

train: $(INSTALLED)
	$(BIN)/python -m s2s.main --config $(CONFIG) $(if $(WORKDIR),--workdir $(WORKDIR)) $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# One model a kind of attention, small enough to be trained in two minutes each.
GALLERY := general concat none
SENTENCE := Anna hat am Montag um halb acht abends zwölf Bücher gekauft.
REFERENCE := Anna bought twelve books at 7:30 pm on Monday.
EXPLAIN = $(BIN)/python -m s2s.explain --text "$(SENTENCE)" --reference "$(REFERENCE)"

gallery: $(INSTALLED)
	for kind in $(GALLERY); do \
		$(BIN)/python -m s2s.main --config experiments/luong_general.py --workdir runs/gallery/$$kind \
			--config.model.attention=$$kind --config.model.hidden=128 --config.model.embedding=64 $(ARGS) || exit; \
	done
	$(EXPLAIN) --workdir runs/gallery/general --output gallery/general.html \
		--heatmap gallery/general.png --walk gallery/general.gif --curve gallery/general.svg
	$(EXPLAIN) --workdir runs/gallery/concat runs/gallery/general --output gallery/concat_beside_general.html
	$(EXPLAIN) --workdir runs/gallery/none runs/gallery/general --output gallery/without_beside_with_attention.html
	$(EXPLAIN) --workdir runs/gallery/general --language zh --output gallery/general_zh.html
	@ls -l gallery

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.compare $(if $(DATA),--data $(DATA)) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py -k "arrow or module"

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pins:
	rm -rf .venv-pins
	$(MAKE) --no-print-directory VENV=.venv-pins CONSTRAINTS= .venv-pins/.installed
	@echo '# The exact versions s2s is tested with; `make` installs these, `make pins` renews them.' > constraints.txt
	.venv-pins/bin/python -m pip freeze --exclude-editable >> constraints.txt
	rm -rf .venv-pins

clean:
	rm -rf $(VENV) .venv-pins .bench .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find s2s tests experiments benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@command -v $(PYTHON) > /dev/null || { \
		echo 's2s needs Python 3.11 or newer, but there is no "$(PYTHON)" here. Install it, or name it:' \
			'make PYTHON=python3.12 $(MAKECMDGOALS)'; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "s2s needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			'Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)'; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo 'This Python cannot make virtual environments. On Debian and Ubuntu:' \
			'sudo apt install python3-venv, then again: make $(MAKECMDGOALS)'; exit 1; } >&2
	@echo 'Installing s2s into $(VENV): a few minutes and about 1 GB, once.'
	@# An unfinished or moved environment has no working pip: start over.
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	@touch $@
