# `make help` lists the targets. Each does its own set-up: a virtual environment in .venv/<Python version>.
#
#   make test PYTHON=python3.12      another Python, in an environment of its own beside the first
#   make test ARGS="-k priority -x"  a part of the suite

PYTHON ?= python3
ARGS ?=
SEED ?=
COVERAGE ?=

VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])" 2>/dev/null)
VENV := .venv/$(or $(VERSION),none)
RUN := $(VENV)/bin/python

# The suite starts hundreds of Pythons: without bytecode each would compile silbo, and every worker all tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-long cluster test-every-redis test-newest test-oldest test-services test-harp check chaos chaos-mutants chaos-shards chaos-cluster soak docs bench bench-quick bench-all bench-million bench-memory bench-plots bench-check api release lock venv format lint types imports wheel clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## list the targets
	@echo "make <target> [PYTHON=python3.12]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## a host with a plugin, a second program, real Redis; all three killed in the middle, and 0 lost
	@$(RUN) -m examples.meetings

test: $(VENV)/.test ## the whole suite on real Redis, in parallel (COVERAGE=yes: with the coverage gate, in half as much time again)
	$(RUN) -m pytest $(or $(ARGS),--numprocesses=auto $(if $(COVERAGE),--cov --cov-report=term))

test-long: $(VENV)/.test ## what runs whole programs for many seconds, and is left out of the others
	$(RUN) -m pytest -m long $(or $(ARGS),--numprocesses=auto)
	SILBO_FUZZ_MUTATIONS=200000 $(RUN) -m pytest tests/wire/test_codec_fuzz.py --numprocesses=auto

test-every-redis: $(VENV)/.test ## what depends on the Redis version, on 6.2, 7.0, 8.2 and each server on the PATH: on all but the one of `make test`
	-@$(RUN) -m tools.redis_package
	$(RUN) -m pytest -m every_redis --every-redis $(or $(ARGS),--numprocesses=auto)

cluster: $(VENV)/.test ## the tests of the brokers, the relay, consumers, inbox, dead letters and commands on a Redis Cluster of 3 + 3 nodes
	$(RUN) -m pytest --cluster tests/brokers/redis tests/outbox tests/consumer tests/stores tests/cli tests/operations $(or $(ARGS),--numprocesses=2)
	$(RUN) -m pytest -m cluster $(or $(ARGS),--numprocesses=2)

test-newest: ## the suite with the newest release of everything, no lock; installs them each time
	@$(PYTHON) tools/make_venv.py $(VENV)-newest newest
	$(VENV)-newest/bin/python -m pytest $(or $(ARGS),--numprocesses=auto)

test-oldest: $(VENV)-oldest/.oldest ## the suite with the oldest releases that pyproject.toml allows, on Python 3.11
	$(VENV)-oldest/bin/python -m pytest $(or $(ARGS),--numprocesses=auto)

test-services: $(VENV)/.services ## PostgreSQL, RabbitMQ and Chromium, which pip can't bring: runs what it has servers for, says what it left out
	$(RUN) -m pytest tests/services --timeout=240 $(or $(ARGS),--numprocesses=auto --dist=loadgroup)

test-harp: $(VENV)/.test .venv/harp/.harp ## a plugin of the HARP proxy on silbo's dispatcher; needs a Python 3.13, and finds pyenv's
	$(RUN) -m pytest tests/examples/test_harp_plugin.py -m harp $(ARGS)

check: $(VENV)/.check ## everything that needs no test: lint, types, imports, wheel, bench-check; all of it, even if one fails
	@$(MAKE) --no-print-directory --keep-going lint types imports wheel bench-check
	@echo "check: all good"

chaos: $(VENV)/.test ## the proof: real programs and servers, killed and frozen in all ways; about 5 minutes (SEED=1 repeats one)
	$(RUN) -m chaos all $(if $(SEED),--seed $(SEED))

chaos-mutants: $(VENV)/.test ## take each safeguard out of a copy, and see that a battery of faults notices
	$(RUN) -m chaos.mutants $(if $(SEED),--seed $(SEED))

chaos-shards: $(VENV)/.test ## 4, 12, then 3 members of a group over 16 shards, joined, stopped, killed and frozen; 5 minutes (SEED=1 repeats one)
	$(RUN) -m chaos shards $(if $(SEED),--seed $(SEED))

chaos-cluster: $(VENV)/.test ## a Redis Cluster of 3 + 3 nodes: slots moved, replicas promoted, masters killed and frozen under load (SEED=1 repeats one)
	$(RUN) -m chaos cluster $(if $(SEED),--seed $(SEED))

soak: $(VENV)/.test ## ten minutes without Redis at 1,000 events a second
	$(RUN) -m chaos soak $(if $(SEED),--seed $(SEED))

docs: $(VENV)/.docs ## the documentation, into docs/_build/html; warnings are errors
	$(RUN) -m sphinx -W --keep-going -b html docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

bench: $(VENV)-bench/.bench ## silbo against its peers, under 20 minutes; goes on where it was cut short (ARGS=--again: anew)
	$(VENV)-bench/bin/python -m benchmarks.run $(ARGS)

bench-quick: $(VENV)-bench/.bench ## a part of it, rougher, in under 2 minutes
	$(VENV)-bench/bin/python -m benchmarks.run --tier quick --again $(ARGS)

bench-all: $(VENV)-bench/.bench ## all that is measured, for hours
	$(VENV)-bench/bin/python -m benchmarks.run --tier all $(ARGS)

bench-million: $(VENV)-bench/.bench ## how many events a minute go through an outbox and Redis to a listener (ARGS="--seconds 60": shorter)
	$(VENV)-bench/bin/python -m benchmarks.million $(ARGS)

bench-memory: $(VENV)/.test ## a Redis of 20 MB takes 1,000 messages a second for half an hour (ARGS="--seconds 60": shorter)
	$(RUN) -m benchmarks.memory $(ARGS)

bench-plots: $(VENV)-bench/.bench ## draw the plots of the documentation from benchmarks/results/
	$(VENV)-bench/bin/python -m benchmarks.plots

bench-check: $(VENV)/.check ## count the instructions of the core paths (valgrind); red if one grew by 3 % (ARGS=--refresh: new ratios)
	$(RUN) -m benchmarks.instructions $(ARGS)

lock: $(VENV)/.lock ## write requirements/ again after a change of pyproject.toml (ARGS=--upgrade: newest versions)
	$(RUN) -m tools.lock $(ARGS)

venv: $(VENV)/.dev ## one environment with every tool, for an editor

format: $(VENV)/.check ## let ruff rewrite the code
	$(RUN) -m ruff format
	$(RUN) -m ruff check --fix

lint: $(VENV)/.check ## ruff: format and rules
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check

types: $(VENV)/.check ## mypy and pyright, on silbo/, tools/ and tests/typing/
	$(RUN) -m mypy
	MYPYPATH=$$(echo examples/proxy/host examples/proxy/plugins/* | tr " " :) $(RUN) -m mypy -p small_proxy -m small_proxy_tenant -m small_proxy_gate -m small_proxy_unruly
	$(RUN) -m basedpyright --warnings --pythonpath $(RUN)

imports: $(VENV)/.check ## the arrows between modules (setup.cfg)
	$(VENV)/bin/lint-imports --no-logo

api: $(VENV)/.check ## write the public API of this version to tests/docs/api.txt, before a release
	$(RUN) -m tools.api --write

release: $(VENV)/.check ## build what would be published, check it, install it; publishes nothing
	$(RUN) -m tools.release

wheel: $(VENV)/.check ## build sdist and wheel, then install and import that wheel
	$(RUN) -m tools.check_wheel

clean: ## remove the environments, the caches and everything built
	rm -rf .venv build dist docs/_build *.egg-info .coverage .coverage.* .hypothesis
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# demo, test, services, check, docs, lock or dev: the dependency group of that name in pyproject.toml, in the versions
# of requirements/.
$(VENV)/.%: pyproject.toml setup.cfg tools/make_venv.py $(wildcard requirements/*.txt)
	@$(PYTHON) tools/make_venv.py $(VENV) $*

$(VENV)-oldest/.oldest: pyproject.toml setup.cfg tools/make_venv.py $(wildcard requirements/*.txt)
	@$(PYTHON) tools/make_venv.py $(VENV)-oldest oldest

$(VENV)-bench/.bench: pyproject.toml setup.cfg tools/make_venv.py requirements/bench.txt requirements/demo.txt requirements/silbo.txt requirements/build.txt
	@$(PYTHON) tools/make_venv.py $(VENV)-bench bench

# HARP runs on Python 3.13 alone, and pins some of what silbo's tests use.
.venv/harp/.harp: pyproject.toml setup.cfg tools/make_venv.py tools/find_python.py requirements/harp.txt requirements/build.txt
	@python=$$($(PYTHON) tools/find_python.py 3.13) && "$$python" tools/make_venv.py .venv/harp harp
