# make demo   fine-tune a small language model into a click predictor, measure it, and rank films for one person
# make test   lint, types and every test
# make lint   the first two of these
# make bench  measure side by side with what people would use instead, and write docs/benchmarks.md
# make clean  remove .venv, .venv-peers and caches; runs/ stays
#
# All of them work in .venv, which is built when it is missing or older than pyproject.toml or constraints.txt.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers
DEMO := recipes/configs/ml-100k/click_lora_demo.yaml

.PHONY: demo test lint bench clean

# Without a number of threads accelerate prints a warning; the recipe uses every core whatever the number.
demo: $(STAMP)
	@set -e; \
	kind=$$($(BIN)/python -c 'import torch; print("single_gpu" if torch.cuda.is_available() else "cpu")'); \
	set -x; \
	$(BIN)/accelerate launch --quiet --config_file recipes/accelerate/$$kind.yaml --num_cpu_threads_per_process 1 \
	    recipes/finetune.py --config $(DEMO) --overwrite
	@echo
	@echo 'Next, with films that you know:'
	@echo '  $(BIN)/peftrec recommend runs/ml-100k-click-lora-demo/adapter --history "Toy Story (1995):yes" "Heat (1995):no"'

# A file's tests share what they set up, so they stay together; tests/conftest.py gives each worker cores of its own.
test: lint
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) $(PEERS)/.installed
	$(BIN)/python benchmarks/peers.py --peers-python $(PEERS)/bin/python --write

# In an environment of their own, so that neither side's versions bind the other's.
$(PEERS)/.installed: benchmarks/requirements-peers.txt
	@rm -f $@
	@$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install -r $<
	@touch $@

# The stamp is written last, so that an install that was cut short is done again.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@command -v $(PYTHON) >/dev/null || { \
	    echo "make: '$(PYTHON)' not found; expected Python 3.10 or newer: install it, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("make: $(PYTHON) is Python %d.%d; expected 3.10 or newer: install one, or name one with PYTHON=..." % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)*/*' -prune -exec rm -rf {} +
