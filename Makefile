# Two commands do everything: `make study` and `make test`. Both install into .venv first.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
STUDY ?= .
JOBS ?= 2
EACH ?= 1
# the runs of a study wait for the stages without runs before them, not for each other; DVC itself takes one after another.
# JOBS runs at a time, EACH of them to a start of DVC
RUNS = dvc stage list --name-only | grep -E "^($(1))@" | xargs -r -n $(EACH) -P $(JOBS) dvc --wait-for-lock repro --single-item

.PHONY: study test bench lab lock

study: .venv/installed  ## run the study (STUDY=studies/NAME for another one)
	@git rev-parse --git-dir >/dev/null 2>&1 || { cd $(STUDY) && dvc config --local core.no_scm true; }
	cd $(STUDY) && python -m equilab check && { dvc status --quiet dvc.yaml || \
	    { dvc stage list --name-only | grep -xE "evaluator|teacher|pairs|latents|features" | xargs -r dvc repro && $(call RUNS,distill|diffusion|gan|consistency) && $(call RUNS,evaluate); }; } && dvc repro

test: .venv/installed  ## run the tests
	python -m pytest

bench: .venv/installed  ## measure speed and memory on this machine
	python -m equilab.bench

lab: .venv/installed  ## open the notebooks
	jupyter lab notebooks

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --disable-pip-version-check uv
	uv pip install --quiet --compile-bytecode --require-hashes -r requirements.lock
	uv pip install --quiet --compile-bytecode --no-deps -e .
	touch $@

lock: .venv/installed  ## pin the versions anew, after a change of pyproject.toml
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.10 \
	    --extra dev --custom-compile-command "make lock" -o requirements.lock pyproject.toml
