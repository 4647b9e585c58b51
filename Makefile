# One line a task. `make` prints the list; `make ci` is what CI runs.
.DEFAULT_GOAL := help
.PHONY: help install test slow alone faults lint types gate bench rehearse report hub-kernels hooks ci

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):  *##  *\(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install:  ## everything that a developer needs, at the tested versions
	pip install -c constraints.txt -e ".[dev]" && pre-commit install

test:  ## the tests, one worker a core
	pytest -n auto

slow:  ## the heavier cases
	pytest -n auto --slow -m slow

alone:  ## speed tests, which need an idle machine
	pytest -m alone

faults:  ## every fault at 1, 2 and 4 processes; rewrites the table in docs/training.md
	pytest --full tests/train/run/test_faults.py

lint:  ## ruff
	ruff check .

types:  ## mypy
	mypy

gate:  ## the compile gate: no kernel is stale or worse than the committed table
	phi1 bench static --check

bench:  ## one case an operation, beside its peers
	phi1 bench --quick

rehearse:  ## the GPU script on a CPU, with tiny shapes
	PYTHON=python bench/gpu.sh --rehearse

report:  ## rewrite the tables and plots of docs/benchmarks.md from bench/results/
	phi1 bench report

hub-kernels:  ## dist/hub-kernels: four operations for the kernels package of Hugging Face
	python phi1/integrations/hub_kernels.py --out dist/hub-kernels

hooks:  ## every pre-commit hook on every file, mypy included
	pre-commit run --all-files && pre-commit run --all-files --hook-stage manual mypy

ci:  ## the whole check in a fresh virtual environment: about 20 minutes on two cores
	.ci/run
