# `make run` and `make test` do all of their own set-up; `make help` lists the rest.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed
CLIENT := clients/miniprogram
CLIENT_INSTALLED := $(CLIENT)/node_modules/.package-lock.json
ENGINE ?= docker
TAG ?= kuaishang
# A file's tests run one after the other, so that they share what they start. (With pytest 9.2, xdist's loadgroup groups
# nothing.)
PYTEST := $(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile
# The envelope, settings, login, default-deny and orders.
CORE := tests/test_errors.py tests/test_settings.py $(patsubst %,tests/blueprints/test_%.py,api auth orders ownership)

export HOST PORT SIMULATOR_PORT LOG_FORMAT PATCHES PEERS PEERS_PYTHON
# Taken literally, so that neither make nor the shell interprets pasted text.
override ID := $(value ID)
override LOGS := $(value LOGS)
override FROM := $(value FROM)
export ID LOGS FROM
# Of these targets alone: every process would have an empty NAME.
resource migration: override export NAME := $(value NAME)
resource: override export ONE := $(value ONE)
resource: override export ZH := $(value ZH)

.PHONY: help run image trace patch rollback patch-status test browser screenshots smoke compatible release faults rehearsal fuzz bench bench-patch hundred-patches overload waiting soak lint format requirements resource migration openapi binary bench-binary client check-client clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

run: $(INSTALLED) ## serve on http://127.0.0.1:8000 with code reload (PORT=9000 for another port, HOST=0.0.0.0 for phones)
	@exec $(VENV)/bin/python -m dev.run

# podman would leave out the health check. Without a commit that says all of it, the release is named by its files.
image: ## build the container image kuaishang (ENGINE=podman, ARGS=--build-arg=PIP_INDEX_URL=…); see deploy/docker
	BUILDAH_FORMAT=docker $(ENGINE) build --file deploy/docker/Dockerfile --tag $(TAG) \
	  --build-arg VERSION="$$(sed -n 's/^VERSION = "\(.*\)"/\1/p' settings.py)" \
	  --build-arg COMMIT="$$([ -n "$$(git status --porcelain)" ] || git rev-parse --short=12 HEAD)" \
	  --build-arg BUILT="$$(date -u +%Y-%m-%dT%H:%M:%SZ)" $(ARGS) .

# With the standard library alone: it installs nothing where the service runs.
trace: ## print all lines of a trace, the failing span first (ID=… from X-Trace-Id; LOGS="files or folders", or - for stdin)
	@$(PYTHON) -m dev.trace

# These too: they run on a server.
patch: ## put this tree live without dropping a request, and go back if it is worse (FROM=folder, .tar.gz or git ref)
	@$(PYTHON) deploy/patch/patch.py patch

rollback: ## go back to the release before within a second; again, in some seconds, for the one before that
	@$(PYTHON) deploy/patch/patch.py rollback

patch-status: ## what serves, and what was deployed when, by whom, with what in it
	@$(PYTHON) deploy/patch/patch.py status

# Both halves run, also if the first one fails. What fails in the whole suite runs once more, alone, since the tests kill
# and freeze servers on a machine that may be busy. On MariaDB ARGS may select no test, for which pytest exits with 5.
test: $(INSTALLED) ## run all tests on SQLite, and on MariaDB if installed (ARGS="-k login" for a part, "-n 0 --pdb" to debug)
	@trap 'exit 130' INT; failed=0; \
	run() { \
	  $(PYTEST) $$1 $(ARGS) && return; status=$$?; \
	  $(if $(ARGS),return $$status,[ $$status = 1 ] || return $$status); \
	  echo "Once more, alone: what has failed."; \
	  $(VENV)/bin/python -m pytest $$1 --last-failed --maxfail=3; \
	}; \
	run || failed=1; \
	if PATH="$$PATH:/usr/sbin" command -v mariadbd >/dev/null; then \
	  run --database=mariadb || [ $$? = 5 ] || failed=1; \
	else echo "Skipped: the tests on MariaDB, as mariadbd is not installed."; fi; \
	exit $$failed

smoke: $(INSTALLED) ## what a patch must pass, in about ten seconds: style, contract, deploy/patch/check.py, core tests (ARGS="--old=DIR")
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --quiet --check .
	$(VENV)/bin/python -m dev.compatibility
	$(VENV)/bin/python deploy/patch/check.py $(ARGS)
	$(VENV)/bin/python -m pytest --quiet --numprocesses 2 --dist loadfile -k "not slow" $(CORE)

faults: $(INSTALLED) ## break everything in turn under load, count what was lost, and write bench/faults.md
	$(VENV)/bin/python -m tests.faults $(ARGS)

rehearsal: $(INSTALLED) ## let machines, sites and networks fail in turn under load, and write deploy/rehearsal.md (as root; ARGS=--quick)
	$(VENV)/bin/python -m tests.rehearsal $(ARGS)

fuzz: $(INSTALLED) ## call the live service as openapi.json says and as it forbids, on SQLite and MariaDB (MINUTES=30 for each, SEED=7)
	$(VENV)/bin/python -m tests.contract.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(ARGS)

binary: $(INSTALLED) ## build the service as one file, dist/kuaishang, for machines with nothing but glibc
	$(VENV)/bin/python -m deploy.binary.build $(ARGS)

bench-binary: binary ## size, start and memory of the one file, beside the source tree and a Go program (PEERS=folder)
	$(VENV)/bin/python -m bench.binary

bench: $(INSTALLED) ## what each kind of request costs, beside a constant response (PEERS=folder adds others, ARGS=--rounds=1)
	$(VENV)/bin/python -m bench.speed $(ARGS)

overload: $(INSTALLED) ## twice what a worker can serve, for a minute (ARGS=--seconds=20)
	$(VENV)/bin/python -m bench.overload $(ARGS)

waiting: $(INSTALLED) ## 2,000 logins at once on a WeChat that takes 3 s, and reads beside them (ARGS=--logins=500)
	$(VENV)/bin/python -m bench.waiting $(ARGS)

bench-patch: $(INSTALLED) ## the seconds of an emergency and the requests that it costs; writes bench/emergency.md (PEERS=folder)
	$(VENV)/bin/python -m bench.emergency

hundred-patches: $(INSTALLED) ## in a row under load, a fifth of them broken: no request may fail (PATCHES=10 for fewer)
	$(VENV)/bin/python -m pytest --capture=no tests/deploy/patch/hundred_patches.py

soak: $(INSTALLED) ## mixed load for ten minutes, and what grows (ARGS=--minutes=2)
	$(VENV)/bin/python -m bench.soak $(ARGS)

lint: $(INSTALLED) ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(INSTALLED) ## fix style and formatting
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

requirements: $(INSTALLED) ## compile requirements*.in to pinned, hashed requirements*.txt (ARGS=--upgrade for newer ones)
	for name in requirements requirements-dev; do \
	  $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes $(ARGS) \
	    --custom-compile-command "make requirements" --output-file $$name.txt $$name.in || exit 1; \
	done

resource: $(INSTALLED) $(if $(shell command -v npm),$(CLIENT_INSTALLED)) ## write a resource of your own: NAME=coupons (ONE=coupon ZH=优惠券 if you like); see docs/en/resource.md
	@$(VENV)/bin/python -m dev.resource

migration: $(INSTALLED) ## write the next migration from what storage/models.py has changed (NAME=coupons_have_a_price)
	@$(VENV)/bin/python -m dev.migration

openapi: $(INSTALLED) ## write openapi.json and openapi.en.json from the code
	$(VENV)/bin/python -m dev.openapi

compatible: $(INSTALLED) ## fail if openapi.json breaks clients of the last release, unless CHANGELOG.md names the break
	@$(VENV)/bin/python -m dev.compatibility

release: compatible ## keep openapi.json as what clients of this release rely on: dev/openapi.released.json
	cp openapi.json dev/openapi.released.json

# 50 MB that nothing else needs, so it is no requirement: those are installed before the first `make run`.
browser: $(INSTALLED) ## install what drives Chromium for the tests of /docs (apt-get install chromium fonts-noto-cjk)
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python playwright==1.65.2

screenshots: browser ## take the pictures of the READMEs
	$(VENV)/bin/python -m dev.screenshots

client: $(CLIENT_INSTALLED) ## write the mini-program client's types from openapi.json, and the sample's copies (needs node 18 and npm)
	cd $(CLIENT) && node types.mjs && cp kuaishang.js kuaishang.d.ts sample/

check-client: $(INSTALLED) $(CLIENT_INSTALLED) ## test the mini-program client, its types and its sample (needs node 18 and npm)
	$(PYTEST) tests/clients $(ARGS)

clean: ## remove the virtual environment, caches, and the data under var/
	rm -rf $(VENV) var dist .*_cache $(CLIENT)/node_modules .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON to one")'
	$(PYTHON) dev/install.py $(VENV) requirements.txt requirements-dev.txt
	@touch $@

# No package runs a script of its own at the installation.
$(CLIENT_INSTALLED): $(CLIENT)/package.json $(CLIENT)/package-lock.json
	@node --eval 'process.exit(+(parseInt(process.versions.node) < 18))' && npm --version >/dev/null || \
	  { echo "Node 18 or later and npm are needed." >&2; exit 1; }
	cd $(CLIENT) && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@
