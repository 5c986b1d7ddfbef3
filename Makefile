# make demo | make test | make check | make bench | make bench-engine | make bench-cold | make bench-micro | make bench-fleet | make bench-load | make docs | make demo-model | make clean
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
WORKERS ?= 2
JOBS   ?= 2
PY      = $(VENV)/bin/python

.PHONY: setup demo test hostile check format bench bench-growth bench-engine bench-cold bench-micro bench-fleet bench-load oracle screenshots docs demo-model lock sbom clean

setup:
	@deploy/setup.sh $(VENV) dev

# One gateway and WORKERS vLLM workers with the demo model and its adapters, until Ctrl-C.
demo: setup
	@VLLM_LOGGING_LEVEL=$${VLLM_LOGGING_LEVEL:-ERROR} exec $(VENV)/bin/loraplex serve examples/demo.yaml --host $(HOST) --port $(PORT) --workers $(WORKERS)

# All tests, the ones on real vLLM included; JOBS processes side by side.
test: setup
	@$(PY) -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

# Attacks beside honest streams, and mutated requests and messages, twenty times as many as in `make test`.
hostile: setup
	@LORAPLEX_FUZZ=$${LORAPLEX_FUZZ:-20} $(PY) -m pytest tests/hostile $(ARGS)

check: setup
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy

format: setup
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

# The table in README: a gateway and two workers are started, loaded and stopped.
bench-load: setup
	@$(PY) -m bench.readme

# Gateways side by side: every peer that can be installed, one mock engine, interleaved.
bench: setup
	@$(PY) -m bench.gateways $(ARGS)

# The building blocks: wire, slots, SSE, metrics, routing.
bench-micro: setup
	@$(PY) -m pytest bench/micro --benchmark-enable --benchmark-columns=min,median,iqr,rounds --benchmark-sort=fullname $(ARGS)

# How the gateway's cost grows with streams, workers, adapters and processes.
bench-growth: setup
	@$(PY) -m bench.gateways.growth $(ARGS)

# The worker's front end beside vLLM's own server, on the demo model.
bench-engine: setup
	@$(PY) -m bench.engine --out bench/results $(ARGS)

# Every module of every architecture, served and compared with PEFT: the table of docs/ADAPTERS.md.
oracle: setup
	@$(PY) -m tests.engine.oracle.matrix $(ARGS)
	@$(PY) -m tests.engine.oracle.merged

# What a cold adapter costs: one taken apart, 64 at once, a bucket of 10,000.
bench-cold: setup
	@$(PY) -m bench.engine.cold $(ARGS)

# One gateway and a worker per GPU: throughput on 2, 4, 8 of them, policies, a worker's death. ARGS="--engine sim" rehearses it without a GPU.
bench-fleet: setup
	@$(PY) -m bench.fleet $(ARGS)

# The pictures of docs/UI.md; needs Chromium.
screenshots: setup
	@$(PY) -m tests.screenshots

# The documentation site, into build/site; a broken link or anchor fails.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet && echo "build/site/index.html"

# Trains the demo model and its adapters again (they are shipped in examples/demo).
demo-model: setup
	@$(PY) examples/demo/make_model.py

# Tools for the two below, in an environment of their own.
TOOLS   = .cache/tools
$(TOOLS)/.done:
	@python3 -m venv $(TOOLS) && $(TOOLS)/bin/python -m pip --disable-pip-version-check install -q uv cyclonedx-bom && touch $@

# What the images install, with hashes: every dependency but the engine's.
lock: $(TOOLS)/.done
	@$(TOOLS)/bin/uv pip compile -q --upgrade --generate-hashes --python-version 3.12 --no-emit-index-url \
	  --custom-compile-command "make lock" pyproject.toml -o deploy/requirements.lock

# The software bill of materials of the gateway's image (CycloneDX).
sbom: $(TOOLS)/.done
	@mkdir -p build && $(TOOLS)/bin/cyclonedx-py requirements deploy/requirements.lock --pyproject pyproject.toml \
	  --output-reproducible -o build/sbom.json && echo build/sbom.json

clean:
	rm -rf $(VENV) .cache/tools .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
