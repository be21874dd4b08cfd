# Two commands set everything up on a fresh machine: make demo, make test.
PYTHON ?= python3
# The CPU wheel where the package index offers it under this pin; any torch that pyproject.toml allows will do.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# What may contact nothing but what it is told to; tested where there is nothing else.
SERVERS := tests/release tests/deployment tests/serving tests/test_delivery.py
INSTALLED := $(VENV)/.installed

.PHONY: demo test release-test fuzz lint clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/glmexport build demo --target host --force

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest $(PARALLEL) $(addprefix --ignore=,$(SERVERS))
	$(BIN)/python tests/offline.py $(BIN)/pytest $(PARALLEL) $(SERVERS)

# The wheel in an environment of its own, a hundred killed deployments, 20,000 changed signatures: a quarter of an hour.
release-test: $(INSTALLED)
	$(BIN)/pytest -m release

# A minute each of whatever reads bytes that strangers wrote, with limits of time and memory for each input; what is
# found is written to build/fuzz.
FUZZED := manifest report loop genai_config config hazards quantization compressed awq index safetensors \
	adapter_config tokenizer tokenizer_config special_tokens chat_template result archive job reference release layout image credentials \
	signature tasks corpus site fleet target policy template body
fuzz: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check "atheris>=3,<4"
	for name in $(FUZZED); do \
		mkdir -p build/fuzz/$$name tests/fuzz/seeds/$$name && \
		$(BIN)/python tests/fuzz/fuzz_readers.py $$name build/fuzz/$$name tests/fuzz/seeds/$$name \
			-max_total_time=60 -artifact_prefix=build/fuzz/ || exit 1; \
	done
	$(BIN)/python tests/fuzz/fuzz_grammar.py -max_total_time=60 -artifact_prefix=build/fuzz/

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
