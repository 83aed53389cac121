# Needs only python3 (3.10 or newer) and make. Everything that is installed goes into .venv; delete it to start over.
#
#   make demo     the synchronization gap of the bundled model: table, sentence, pictures in gap-digits/
#   make test     all checks: ruff, mypy, every test, with nnsight, TransformerLens, zarr and Ray installed
#   make quick    the same without the slow tests: for every day
#   make bench    what hook points cost, and exact sweeps against loops of full runs
#   make attack   attempts to break it, twenty minutes or more; docs/reliability.md says what must hold
#   make docs     the site, in site/, with warnings as errors
#   make notebooks   docs/notebooks/*.ipynb from their scripts, with what they show
#   make checks   the long checks against exact answers, half an hour; their table goes to docs/checks.md

PYTHON ?= python3
# Where the CPU build of torch lies, for machines that are not offered it already; PyPI's own build for Linux brings CUDA.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

export OMP_NUM_THREADS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
IN := .venv/bin/python -m
LINT = $(IN) ruff check && $(IN) ruff format --check && $(IN) mypy

.PHONY: demo test quick bench attack docs notebooks checks
demo: .venv/core.stamp
	.venv/bin/dit-lens gap --out gap-digits

test: .venv/dev.stamp
	$(LINT)
	$(IN) pytest -n 2

quick: .venv/dev.stamp
	$(LINT)
	$(IN) pytest -n 2 -m "not slow"

bench: .venv/dev.stamp
	.venv/bin/python tests/benchmarks/bench.py
	.venv/bin/python tests/benchmarks/bench_patching.py --scale 7

attack: .venv/dev.stamp
	DIT_LENS_ATTACK=1 DIT_LENS_ATTACK_FUZZ=300 DIT_LENS_ATTACK_RACES=500 DIT_LENS_ATTACK_LINES=250 DIT_LENS_ATTACK_INTERRUPTS=1200 DIT_LENS_ATTACK_KILLS=24 \
		$(IN) pytest -s -W ignore tests/test_attack_*.py tests/test_every_family.py tests/test_elsewhere.py tests/test_pieces.py tests/test_storage.py tests/test_arguments.py

docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(IN) mkdocs build --quiet

notebooks: .venv/docs.stamp
	$(IN) jupytext --quiet --set-kernel python3 --to ipynb --execute docs/notebooks/*.py

checks: .venv/dev.stamp
	.venv/bin/python tests/checks.py --store .checks

TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.venv/torch.stamp:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("dit_lens needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(IN) pip install -c constraints.txt 'torch==$(TORCH)+cpu' || $(IN) pip install torch==$(TORCH) --index-url $(TORCH_INDEX)
	touch $@

.venv/core.stamp: .venv/torch.stamp pyproject.toml constraints.txt
	rm -rf dit_lens.egg-info  # an old one would hide new entry points
	$(IN) pip install -c constraints.txt -e .
	touch $@

.venv/dev.stamp: .venv/core.stamp
	$(IN) pip install -c constraints.txt -e '.[dev,all]'
	touch $@

.venv/docs.stamp: .venv/core.stamp
	$(IN) pip install -c constraints.txt -e '.[docs]'
	touch $@
