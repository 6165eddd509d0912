# `make study` runs the default study, `make test` the quick tests. `make` alone lists the rest.
# Whatever else is active, everything is installed into .venv of this checkout and runs from there.
PYTHON ?= python3
STUDY ?= .
JOBS ?=
TORCH ?=
ARGS ?=

VENV := $(CURDIR)/.venv
SYSTEM_PATH := $(PATH)
export PATH := $(VENV)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)
export DVC_NO_ANALYTICS := 1
unexport VIRTUAL_ENV PYTHONHOME

.PHONY: help install study test test-all lint bench lab lock
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/installed  ## install everything into .venv

study: .venv/installed  ## run the default study; STUDY=studies/NAME for another, JOBS=N runs at a time
	@[ -e .git ] || (cd $(STUDY) && dvc config --local core.no_scm true)
	cd $(STUDY) && (dvc status --quiet dvc.yaml || (python -m equilab submit $(if $(JOBS),--jobs $(JOBS)) && dvc commit --force --quiet))
	cd $(STUDY) && dvc repro

test: .venv/installed  ## run the quick tests; ARGS="-k NAME" for some of them
	python -m pytest -m "not slow" $(ARGS)

test-all: .venv/installed  ## run every test
	python -m pytest $(ARGS)

lint: .venv/installed  ## check the formatting and the code
	ruff format --check .
	ruff check .

bench: .venv/installed  ## measure speed and memory on this machine
	python -m equilab.bench $(ARGS)

lab: .venv/installed  ## open the notebooks in JupyterLab; ARGS=--allow-root as root
	jupyter lab notebooks $(ARGS)

lock: .venv/installed  ## pin the versions again, after a change of pyproject.toml
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.10 \
	    --extra dev --custom-compile-command "make lock" -o requirements.lock pyproject.toml

# An environment keeps the path of its checkout: one that was copied or moved is made anew.
ifneq ($(shell cat .venv/installed 2>/dev/null),$(CURDIR))
.PHONY: .venv/installed
CLEAR := --clear
endif
# TORCH=cpu: the versions of the lock, with torch's build for CPUs, which is in an index of torch's own, and not among its hashes
ifeq ($(TORCH),)
LOCKED := --require-hashes -r requirements.lock
else
LOCKED := --torch-backend $(TORCH) --no-verify-hashes --constraint requirements.lock -r pyproject.toml --extra dev
endif
# pip goes where it is told here, wherever the user's settings (`user`, `target`, `prefix`) send it
.venv/installed: requirements.lock pyproject.toml
	PATH="$(SYSTEM_PATH)" $(PYTHON) -m venv $(CLEAR) .venv
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-user --target= --prefix=$(VENV) uv
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --compile-bytecode $(LOCKED)
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --compile-bytecode --no-deps -e .
	@echo $(CURDIR) > $@
