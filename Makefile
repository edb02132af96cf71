# make help lists the targets. Everything installs into .venv; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
SUPPORTED := 5.12 5.17
SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
TOWERS := build/minilm-efficientnet-lite0-96
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# a process a core, four at most: each takes up to 2 GB
PYTEST := -m pytest -q -m "not gpu and not slow and not wheel" -n logical --maxprocesses 4 --dist loadfile
DOORS := tests/publishing/test_doors.py tests/conversion/test_to_clip.py tests/publishing/test_push.py \
	tests/publishing/test_adapter.py
# models, checkpoints and a short training: on the oldest version of all
ALSO_ON_5.12 := tests/modeling_gcl tests/publishing/test_hub_folder.py tests/conversion/test_towers.py \
	tests/training/test_trainer.py tests/training/test_arguments.py tests/test_train.py \
	--ignore-glob "*/modeling_gcl/test_*loss.py" --ignore-glob "*/modeling_gcl/test_tiles.py" \
	--ignore-glob "*/modeling_gcl/test_kernels.py"
export TOKENIZERS_PARALLELISM := false

.PHONY: help quickstart install test test-wheel test-supported $(SUPPORTED:%=test-on-%) lint site bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

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
	$(TEST_ENV) $(BIN)/python $(PYTEST)

test-wheel: $(VENV)/installed  ## install the wheel in an empty environment and use it from there; needs a package index
	$(TEST_ENV) $(BIN)/python -m pytest -q -m wheel tests/test_wheel.py

test-supported: $(SUPPORTED:%=test-on-%)  ## test every door into a checkpoint on older transformers, models and training on the oldest

$(SUPPORTED:%=test-on-%): test-on-%: build/transformers-%/installed
	$(TEST_ENV) build/transformers-$*/bin/python $(PYTEST) $(DOORS) $(ALSO_ON_$*)

# sees the packages of .venv behind its own, so that torch is not installed twice
$(SUPPORTED:%=build/transformers-%/installed): build/transformers-%/installed: constraints-transformers-%.txt | $(VENV)/installed
	$(BIN)/python -m venv --clear --without-pip $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_PACKAGES))')" > \
		"$$($(@D)/bin/python $(SITE_PACKAGES))/first.pth"
	$(BIN)/pip --python $(@D)/bin/python install --quiet -r $<
	touch $@

site: $(VENV)/installed  ## build the docs pages and the API reference as build/site/index.html
	HF_HUB_OFFLINE=1 $(BIN)/python -m docs.site.build

lint: $(VENV)/installed  ## check style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/installed  ## measure speed and memory against peers (half an hour of a quiet machine); writes docs/performance.md
	$(BIN)/pip install --quiet -c constraints-cpu.txt -e ".[bench]"
	$(BIN)/python -m benchmarks.loss --threads $(THREADS)
	$(BIN)/python -m benchmarks.loss --threads $(THREADS) --sizes 4096 --out results/benchmarks/loss-sentence-transformers.json \
		--variants tiles tiles_bf16_all_kept sentence_transformers_1024 sentence_transformers_gcl_1024
	$(BIN)/python -m benchmarks.step --threads $(THREADS)
	$(BIN)/python -m benchmarks.adapters --threads $(THREADS)
	$(BIN)/python -m benchmarks.pipeline --rounds 3
	$(BIN)/python -m benchmarks.search --threads $(THREADS)
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.report

clean:  ## remove what the targets made
	rm -rf $(VENV) build outputs
