# `make demo` and `make test` need Python >= 3.10 and a package index, nothing else: they make .venv by themselves.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo photographs test long slow gpu lint types site screenshots format kernels-contract kernels-static audit torture readme clean

demo: $(INSTALLED)
	$(RUN)/lowmem-db train configs/demo.yaml --resume
	$(RUN)/python -m benchmarks.demo.picture runs/demo --output runs/demo/demo.png

# Four photographed subjects with the demo's recipe; goes on where it was stopped.
photographs: $(INSTALLED)
	$(RUN)/python -m benchmarks.demo.photographs --work runs/photographs --output runs/photographs/photographs.jpg

test: $(INSTALLED)
	$(RUN)/python -m pytest -n 2 --dist worksteal

# Whole runs of every kind, and plans of large models.
long: $(INSTALLED)
	$(RUN)/python -m pytest -n 2 --dist worksteal -m long

slow: $(INSTALLED)
	$(RUN)/python -m pytest -m slow

gpu: $(INSTALLED)
	$(RUN)/python -m pytest -m gpu

lint: $(INSTALLED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/lint-imports
	$(RUN)/codespell

types: $(INSTALLED)
	$(RUN)/basedpyright --project pyproject.toml --pythonpath $(RUN)/python

format: $(INSTALLED)
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

# The documentation as a site, in build/site; a broken link is an error.
site: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

# Pictures of the page for the documentation, from a finished run of the demo; needs Chromium.
screenshots: $(INSTALLED)
	$(RUN)/python -m tools.screenshots runs/demo docs/images

# All contract tests of the kernels in Triton's interpreter; `make test` runs those that take it a few seconds.
kernels-contract: $(INSTALLED)
	LOWMEM_DB_KERNELS=interpret TRITON_INTERPRET=1 $(RUN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow" \
		tests/kernels/contract

# What the compiler makes of every kernel on seven architectures, held to bars; needs Triton and no GPU.
kernels-static: $(INSTALLED)
	$(RUN)/python -m tools.kernels_static --check --output benchmarks/static/kernels.json

# Every attack on a run, part by part, for hours; what is done for this version is not repeated.
torture: $(INSTALLED)
	$(RUN)/python -m tools.torture

# Known vulnerabilities of the installed packages, from the service of PyPI.
audit: $(INSTALLED)
	$(RUN)/python -m tools.audit

# Builds the wheel and follows README.md with it in a fresh environment; about five minutes, needs a package index.
readme: $(INSTALLED)
	$(RUN)/python -m tools.follow_readme

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs
