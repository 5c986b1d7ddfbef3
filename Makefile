# make demo | test | test-long | conformance | clients | scaling | chaos | soak | hostile
# make check | format
# make bench | bench-growth | bench-micro | bench-engine | bench-cold | bench-fleet
# make docs | demo-model | oracle | screenshots | chart-page | lock | sbom | clean
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
WORKERS ?= 2
JOBS   ?= 3
PY      = $(VENV)/bin/python

.PHONY: setup demo test test-long conformance clients scaling chaos soak hostile check format \
  bench bench-growth bench-engine bench-cold bench-micro bench-fleet oracle screenshots \
  chart-page docs demo-model lock sbom clean

setup:
	@deploy/setup.sh $(VENV) dev

# One gateway and WORKERS vLLM workers with the demo model and its adapters, until Ctrl-C.
demo: setup
	@VLLM_LOGGING_LEVEL=$${VLLM_LOGGING_LEVEL:-ERROR} exec $(VENV)/bin/loraplex serve \
	  examples/demo.yaml --host $(HOST) --port $(PORT) --workers $(WORKERS)

# All tests but the long forms, with real vLLM; JOBS processes side by side.
test: setup
	@$(PY) -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

# Further forms of tests, which boot real vLLM once more each: another start method, two ranks.
test-long: setup
	@$(PY) -m pytest -m long tests $(ARGS)

# Load steps 1x -> 4x -> 1x -> 0 -> 1x over real processes; ARGS="--engine vllm" on real vLLM. Five
# minutes.
scaling: setup
	@$(PY) -m bench.steps $(ARGS)

# Clusters under load while their processes are killed, stopped, cut off and replaced: the table of
# docs/RELIABILITY.md. ARGS="--engine vllm" on real vLLM; `make soak` for half an hour of churn.
chaos: setup
	@$(PY) -m bench.chaos $(ARGS)

soak: setup
	@$(PY) -m bench.chaos.soak $(ARGS)

# More than 1,200 requests to Loraplex and to vLLM's own server: where the answers differ, by kind.
# Five minutes.
conformance: setup
	@AUTOSCALING_TRACES=$${AUTOSCALING_TRACES:-100000} $(PY) -m pytest -k random \
	  tests/unit/gateway/supervisor/autoscaling/test_ray_equal.py
	@$(PY) -m tests.conformance $(ARGS)

# The field's clients, newest versions, on real vLLM with base and adapters: a table. A minute, once
# they are installed.
clients: setup
	@$(PY) -m tests.clients $(ARGS)

# Attacks beside honest streams, twenty times as many mutations as in `make test`, then ten million
# messages and a million requests to real processes: ten minutes on two idle cores.
hostile: setup
	@LORAPLEX_FUZZ=$${LORAPLEX_FUZZ:-20} $(PY) -m pytest tests/hostile $(ARGS)
	@$(PY) -m tests.hostile.fuzz

check: setup
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy

format: setup
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

# Gateways side by side: every peer that can be installed, one mock engine, interleaved.
bench: setup
	@$(PY) -m bench.gateways $(ARGS)

# The building blocks: wire, slots, SSE, metrics, routing.
bench-micro: setup
	@$(PY) -m pytest bench/micro --benchmark-enable --benchmark-sort=fullname \
	  --benchmark-columns=min,median,iqr,rounds $(ARGS)

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
	@$(PY) -m tests.engine.oracle.every_layer

# What a cold adapter costs: one taken apart, 64 at once, a bucket of 10,000.
bench-cold: setup
	@$(PY) -m bench.engine.cold $(ARGS)

# One gateway and a worker per GPU: throughput on 2, 4, 8 of them, policies, a worker's death.
# ARGS="--engine sim" rehearses it without a GPU.
bench-fleet: setup
	@$(PY) -m bench.fleet $(ARGS)

# The pictures of docs/UI.md; needs Chromium.
screenshots: setup
	@$(PY) -m tests.screenshots

# docs/CHART.md from the schema of the chart's values; alerts and dashboard into the chart.
chart-page: setup
	@$(PY) deploy/chart_page.py

# The documentation site, into build/site; a broken link or anchor fails.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet && echo "build/site/index.html"

# Trains the demo model and its adapters again (they are shipped in examples/demo).
demo-model: setup
	@$(PY) examples/demo/make_model.py

# Tools for the two below, in an environment of their own.
TOOLS   = .cache/tools
$(TOOLS)/.done:
	@python3 -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip --disable-pip-version-check install -q uv cyclonedx-bom && touch $@

# What the images install, with hashes: every dependency but the engine's.
lock: $(TOOLS)/.done
	@$(TOOLS)/bin/uv pip compile -q --upgrade --generate-hashes --python-version 3.12 \
	  --no-emit-index-url --custom-compile-command "make lock" \
	  pyproject.toml -o deploy/requirements.lock

# The software bill of materials of the gateway's image (CycloneDX).
sbom: $(TOOLS)/.done
	@mkdir -p build && $(TOOLS)/bin/cyclonedx-py requirements deploy/requirements.lock \
	  --pyproject pyproject.toml --output-reproducible -o build/sbom.json && echo build/sbom.json

clean:
	rm -rf $(VENV) .cache/tools .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
