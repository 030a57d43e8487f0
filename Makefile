# The commands for people and CI. `make demo` needs Python 3.11 or newer and nothing else.

VENV := .venv
BIN := $(VENV)/bin
# The first of these interpreters with a supported version. PYTHON=/path/to/python3.12 replaces the list.
FOUND := $(shell for p in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && echo $$p && break; done)
# One more worker than cores, since tests wait for processes a third of the time, but at most four: each has its own
# Prefect server and S3 servers, about 2 GB. The tests of a file share a worker, so that shared set-up runs once.
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 3 ? n + 1 : 4)))
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# MinIO's last source, with the fix of conditional puts. The build takes 3 minutes, so each version's binary is cached.
MINIO := github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c
KEPT := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gpt2-pipeline/tools/$(lastword $(subst @, ,$(MINIO)))

.PHONY: demo test test-full nightly stress check lock minio chromium env clean

demo: $(VENV)/.runtime
	@$(BIN)/gpt2 demo

# The quick tests, in minutes.
test: $(VENV)/.dev
	$(PYTEST) -m "not full and not nightly"

# The tests that need a real MinIO or a browser, and the long tests. CI runs `test` and `test-full`.
test-full: $(VENV)/.dev minio chromium
	$(PYTEST) -m "full and not nightly"

# Random faults and kills, more combinations, and every command of the README as written.
nightly: $(VENV)/.dev minio
	$(PYTEST) -m nightly

stress: $(VENV)/.dev minio
	$(BIN)/python tests/stress.py --faults 500 --server minio
	$(BIN)/python tests/stress.py --faults 500 --server seaweedfs
	$(BIN)/python tests/stress_training.py --kills 100 --server seaweedfs

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/test_house.py

lock:
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade --extra trackio pyproject.toml -o requirements.lock
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --all-extras -c requirements.lock pyproject.toml -o requirements-dev.lock

minio: .tools/minio
.tools/minio: $(KEPT)/minio
	@mkdir -p .tools && cp $(KEPT)/minio $@

$(KEPT)/minio:
	@command -v go >/dev/null || { echo "go was not found; make minio needs it to build a MinIO server. Install Go 1.24 or newer (https://go.dev)."; exit 2; }
	CGO_ENABLED=0 GOTOOLCHAIN=auto GOBIN=$(KEPT) go install -trimpath -tags kqueue $(MINIO)

chromium:
	@command -v chromium chromium-browser google-chrome >/dev/null || { command -v apt-get >/dev/null && [ $$(id -u) = 0 ] && \
		apt-get -q update && apt-get -qy install --no-install-recommends chromium; } || \
		{ echo "Chromium was not found; a test drives it. Install it (Debian: apt install chromium), then run this again."; exit 2; }

# Writes random secrets, one file each, and the settings for docker-compose.yml. Existing files stay. Files have mode 444,
# since containers read them as other users; their folder has mode 700, here and in the image.
env:
	@umask 077; mkdir -p .secrets; for name in postgres s3_root s3_pipeline s3_trainer trackio prefect; do \
		[ -s .secrets/$$name ] || { value=$$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n'); \
		[ $$name = prefect ] && value=gpt2:$$value; printf %s "$$value" > .secrets/$$name; chmod 444 .secrets/$$name; }; done
	@[ -e .env ] || printf '%s\n' '# Settings of docker-compose.yml; its secrets are files in this folder:' SECRETS=./.secrets \
		'# UI_PORT=4200' '# S3_PORT=9000' '# S3_CONSOLE_PORT=9001' '# TRACKIO_PORT=7860' \
		'# preset, or configuration file in the image, that fills the forms:' '# GPT2_CONFIG=gpt2-124m' \
		'# notification block for failed runs and alerts:' \
		'# GPT2_NOTIFY=slack-webhook/team' '# DATA_MEMORY=8g' '# TRAIN_MEMORY=16g' > .env
	@echo "next: docker compose up --wait, then http://127.0.0.1:4200 with the login that cat .secrets/prefect shows"

clean:
	rm -rf $(VENV) .tools

# Recreates the environment if its Python is missing or too old; updates it if a lock file or pyproject.toml is newer.
$(VENV)/.runtime: requirements.lock pyproject.toml
	@$(call install,requirements.lock)
	@touch $@

$(VENV)/.dev: requirements-dev.lock pyproject.toml
	@$(call install,requirements-dev.lock)
	@touch $@ $(VENV)/.runtime

define install
set -e; \
if [ -z "$(FOUND)" ]; then \
	echo "Python 3.11 to 3.14 is required, found $$($(or $(PYTHON),python3) --version 2>&1). Install it, then: make demo PYTHON=/path/to/python3.12"; exit 2; fi; \
if [ -e $(VENV) ] && ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	echo "$(VENV) has no Python 3.11 or newer: recreating it"; rm -rf $(VENV); fi; \
if command -v uv >/dev/null; then uv=uv; else uv=$(BIN)/uv; fi; \
if [ ! -e $(VENV) ]; then \
	if [ $$uv = uv ]; then uv venv -q --python $(FOUND) $(VENV); else \
		$(FOUND) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); \
		echo "$(FOUND) cannot create a virtual environment: its venv module is missing. Install it (Debian: apt install python3-venv) or uv (https://docs.astral.sh/uv), then run this again."; exit 2; }; fi; fi; \
if [ $$uv != uv ] && [ ! -x $$uv ]; then $(BIN)/python -m pip install -q "uv>=0.9,<1" || { echo "uv could not be installed into $(VENV): see pip's message above; a network or a package mirror is needed once."; exit 2; }; fi; \
echo "installing $(1) into $(VENV)"; \
{ $$uv pip install -q --python $(BIN)/python --require-hashes --compile-bytecode -r $(1) && $$uv pip install -q --python $(BIN)/python --no-deps -e .; } || \
{ echo "installation failed: see the message above. It needs 10 GB of disk and a network; free some space or check the network, then run this again (make clean removes the environment)."; exit 2; }
endef
