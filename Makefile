# make help lists the targets. Everything installs into .venv; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
OLDEST := build/oldest
SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
TOWERS := build/minilm-efficientnet-lite0-96
export TOKENIZERS_PARALLELISM := false

.PHONY: help quickstart install test test-oldest lint bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/installed  ## make .venv with CPU torch and all extras

$(VENV)/installed: setup.cfg pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints-cpu.txt -e ".[dev]"
	touch $@

$(TOWERS)/model.safetensors: | $(VENV)/installed
	$(BIN)/gcl convert towers $(TOWERS) --image-size 96

quickstart: $(VENV)/installed $(TOWERS)/model.safetensors  ## train, evaluate and save a real model on this machine
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --config_file hub_configs/accelerate/one_process.yaml \
		--num_cpu_threads_per_process $(THREADS) train.py hub_configs/quickstart.yaml

test: $(VENV)/installed  ## run the whole test suite, without network and GPU
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not gpu and not slow"

test-oldest: $(OLDEST)/installed  ## test models, checkpoints and a short training on the oldest transformers supported
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -q -m "not gpu and not slow" \
		tests/modeling_gcl tests/publishing/test_hub_folder.py tests/publishing/test_towers.py \
		tests/publishing/test_doors.py tests/publishing/test_to_clip.py \
		tests/training/test_trainer.py tests/training/test_arguments.py tests/test_train.py \
		--ignore-glob "*/test_*loss_gcl.py" --ignore-glob "*/test_t*_gcl.py"

# sees the packages of .venv behind its own, so that torch is not installed twice
$(OLDEST)/installed: constraints-oldest.txt | $(VENV)/installed
	$(BIN)/python -m venv --clear --without-pip $(OLDEST)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_PACKAGES))')" > \
		"$$($(OLDEST)/bin/python $(SITE_PACKAGES))/first.pth"
	$(BIN)/pip --python $(OLDEST)/bin/python install --quiet -r constraints-oldest.txt
	touch $@

lint: $(VENV)/installed  ## check style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(VENV)/installed  ## measure speed and memory against peers (half an hour of a quiet machine); writes docs/performance.md
	$(BIN)/pip install --quiet -c constraints-cpu.txt -e ".[bench]"
	$(BIN)/python benchmarks/loss.py --threads $(THREADS)
	$(BIN)/python benchmarks/loss.py --threads $(THREADS) --sizes 4096 --out results/benchmarks/loss-sentence-transformers.json \
		--variants tiles tiles_bf16_all_kept sentence_transformers_1024 sentence_transformers_gcl_1024
	$(BIN)/python benchmarks/step.py --threads $(THREADS)
	$(BIN)/python benchmarks/adapters.py --threads $(THREADS)
	$(BIN)/python benchmarks/pipeline.py --rounds 3
	$(BIN)/python benchmarks/search.py --threads $(THREADS)
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/report.py

clean:  ## remove what the targets made
	rm -rf $(VENV) build outputs
