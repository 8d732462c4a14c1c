# `make demo` and `make test` set up all that they need in .venv; a second call finds it there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.lorakit-installed
TRAINERS := $(VENV)/.trainers-installed
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(PY) -m pip --disable-pip-version-check install -qq --no-deps
# Three processes share the suite, a group of tests to each at a time: tests/conftest.py says which. One more than the
# two cores that it is made for, as many tests wait.
SHARED := -n 3 --dist loadgroup --no-loadscope-reorder
# The CPU stack needs no network once it is installed, and no test may use one.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 VLLM_NO_USAGE_STATS=1

.PHONY: help setup setup-trainers setup-browser setup-programs demo docs test test-all test-vllm lint format bench clean

help:
	@echo 'make demo    train, merge, mix and serve tiny adapters on real vLLM, and watch it happen'
	@echo 'make test    the test suite        make test-all   with the slow ones'
	@echo 'make test-vllm VLLM=0.28.0   what the tests say of vLLM, on another version of it (0.28.0 to 0.32.0)'
	@echo 'make lint    ruff, mypy, and what is in serving/        make format   apply ruff'
	@echo 'make bench   measure beside the peers'
	@echo 'make docs    the documentation as a site: site/index.html'
	@echo 'make setup   only the .venv        make clean      remove it and all that was built'
	@echo 'make setup-trainers   what the tests run besides: trainers, a bucket, Ray'
	@echo 'make setup-browser    a Chromium for the tests of the page, from Debian'
	@echo 'make setup-programs   promtool, fish and zsh for other tests and for make lint, from Debian'

setup: $(STAMP)

$(STAMP): requirements/torch-cpu.txt requirements/cpu.txt requirements/page.txt requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo 'lorakit needs Python 3.11 to 3.13; name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; exit 1; }
	@echo 'Setting up .venv with the CPU stack (3.4 GB, some minutes) ...'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements/torch-cpu.txt 2>/dev/null || $(PIP) --index-url $(TORCH_INDEX) -r requirements/torch-cpu.txt
	@$(PIP) -r requirements/cpu.txt -r requirements/page.txt -r requirements/dev.txt
	@$(PIP) --no-build-isolation --editable .
	@touch $(STAMP)

# Trainers, a bucket and Ray, which the tests run as programs of their own, where nothing else sees them.
setup-trainers: $(TRAINERS) $(VENV)/docs/.installed

$(TRAINERS): requirements/trainers.txt requirements/deepspeed.txt requirements/services.txt \
		requirements/lorax-client.txt requirements/schemathesis.txt requirements/ray.txt | $(STAMP)
	@echo 'Setting up the trainers that the tests run, and Ray (700 MB, a minute) ...'
	@rm -rf $(VENV)/trainers $(VENV)/deepspeed $(VENV)/services $(VENV)/lorax-client $(VENV)/schemathesis $(VENV)/ray
	@$(PIP) --target $(VENV)/trainers -r requirements/trainers.txt
	@$(PIP) --target $(VENV)/services -r requirements/services.txt
	@$(PIP) --target $(VENV)/lorax-client -r requirements/lorax-client.txt
	@$(PIP) --target $(VENV)/schemathesis -r requirements/schemathesis.txt
	@$(PIP) --target $(VENV)/ray -r requirements/ray.txt
	@$(PIP) --no-build-isolation --target $(VENV)/deepspeed -r requirements/deepspeed.txt || \
		{ rm -rf $(VENV)/deepspeed; echo 'DeepSpeed could not be built here: its tests will be skipped' >&2; }
	@touch $(TRAINERS)

# Where there is none, and none can be had, the tests of the page are skipped, and say so.
setup-browser:
	@for browser in chromium chromium-browser google-chrome; do command -v $$browser >/dev/null && exit 0; done; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo 'No Chromium here, and only root can apt-get one: the tests of the page will be skipped' >&2; exit 0; \
	fi; \
	echo 'Installing Chromium for the tests of the page (120 MB) ...'; \
	{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } \
		>/dev/null 2>&1 || echo 'Chromium could not be installed: the tests of the page will be skipped' >&2

# promtool comes with Prometheus, whose service is not to run: neither now, for which policy-rc.d is asked, nor later.
POLICY := /usr/sbin/policy-rc.d

setup-programs:
	@missing=''; \
	for program in promtool fish zsh; do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	test -n "$$missing" || exit 0; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "Not here, and only root can apt-get it:$$missing: tests that need it will be skipped" >&2; exit 0; \
	fi; \
	echo "Installing$$missing for the tests (130 MB) ..."; \
	test -e $(POLICY) || { trap 'rm -f $(POLICY)' EXIT; trap 'exit 130' INT TERM; \
		printf '#!/bin/sh\nexit 101\n' >$(POLICY); chmod 755 $(POLICY); }; \
	{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
		$$(echo $$missing | sed 's/promtool/prometheus/'); } >/dev/null 2>&1 || \
		echo "Could not be installed:$$missing: tests that need it will be skipped" >&2; \
	case "$$missing" in *promtool*) systemctl disable prometheus >/dev/null 2>&1 || :;; esac

demo: setup
	@$(OFFLINE) $(PY) examples/demo.py

# The site, of docs/ and of what the code says of itself.
docs: setup $(VENV)/docs/.installed
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(CURDIR)/$(VENV)/docs $(PY) -m mkdocs build
	@echo 'site/index.html'

$(VENV)/docs/.installed: requirements/docs.txt | $(STAMP)
	@rm -rf $(@D)
	@$(PIP) --target $(@D) -r $<
	@touch $@

test: setup setup-trainers setup-browser setup-programs
	@$(OFFLINE) $(PY) -m pytest $(SHARED) -m 'not slow'

test-all: setup setup-trainers setup-browser setup-programs
	@$(OFFLINE) HYPOTHESIS_PROFILE=search $(PY) -m pytest $(SHARED)

# One vLLM, laid over the stack: only what it wants otherwise than the stack's own is beside it.
VLLM ?= 0.32.0
OVER := $(CURDIR)/$(VENV)/vllm-$(VLLM)

test-vllm: setup $(VENV)/vllm-$(VLLM)/.installed
	@$(OFFLINE) PYTHONPATH=$(OVER) $(PY) -m pytest $(SHARED) -m 'not slow' tests/server/test_real_*.py tests/server/test_probe.py

$(VENV)/vllm-%/.installed: requirements/vllm-%.txt | $(STAMP)
	@rm -rf $(@D)
	@$(PIP) --target $(@D) -r $<
	@touch $@

lint: setup setup-programs
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/hadolint serving/containers/*.Containerfile
	@$(VENV)/bin/shellcheck serving/slurm/*.sbatch
	@$(PY) -m tests.serving.chart
	@if command -v promtool >/dev/null; then \
		promtool check rules serving/prometheus/alerts.yml && promtool test rules serving/prometheus/alerts_test.yml; \
	else echo 'Not checked, as promtool is not installed: serving/prometheus' >&2; fi
	@# It asks whether the program can be run, and a key that it does not know is no error for it, only said.
	@if command -v systemd-analyze >/dev/null; then \
		folder=$$(mktemp -d) && trap 'rm -r "$$folder"' EXIT; \
		sed 's|/opt/lorakit/bin/lorakit|/bin/true|' serving/lorakit.service >"$$folder/lorakit.service"; \
		said=$$(systemd-analyze verify --man=no "$$folder/lorakit.service" 2>&1) || { echo "$$said" >&2; exit 1; }; \
		! echo "$$said" | grep 'lorakit\.service' >&2; \
	else echo 'Not checked, as systemd-analyze is not installed: serving/lorakit.service' >&2; fi

format: setup
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

bench: setup
	@for program in benchmarks/*.py; do echo "== $$program"; $(OFFLINE) $(PY) $$program || exit 1; done

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lorakit tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
