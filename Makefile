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

install: $(INSTALLED)  ## make .venv with gteopt, the tested versions and the packages for tests

# torch is installed first: its CPU build satisfies all later requirements, so pip does not download
# gigabytes of CUDA packages. With a GPU: make install TORCH="torch==2.13.0 --index-url ...".
TORCH ?= torch==2.13.0
# Tests read only the vocabularies in these packages, so their dependencies are not installed.
VOCABULARIES := dashscope==2.0.2 mistral-common==1.13.1
# The demo needs neither test tools nor Ray, which are half of the download.
$(PROGRAM): pyproject.toml constraints.txt
	@echo "Installing gteopt into .venv: 2 GB with torch's CPU build, a few minutes"
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) install $(TORCH)
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(INSTALLED): $(PROGRAM)
	@echo "Installing the packages that tests need: 2 GB more, a few minutes"
	$(PIP) install --quiet -c constraints.txt -e '.[test,ray]'
	$(PIP) install --quiet --no-deps $(VOCABULARIES)
	@touch $@

fuzz: $(INSTALLED)  ## test 10,000 broken inputs of every kind, which takes hours
	GTEOPT_FUZZ=10000 $(BIN)/python -m pytest tests/fuzz -q --timeout 0

demo: $(PROGRAM)  ## build, measure and score five variants of the embedded model
	@echo "The demo takes a few minutes on two cores, and about 100 MB in artifacts/demo"
	$(BIN)/gteopt run recipes/plans/demo.yaml

# Other quantizers that gteopt is compared with. Some exclude the newest versions of others, so they
# have their own environment. benchmarks/peers_quality.py runs in it too.
PEERS := llmcompressor optimum gptqmodel compressed-tensors bitsandbytes torchao hqq
interop:  ## make .venv-interop with other quantizers, and test exchange with them
	test -d .venv-interop || $(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --quiet $(TORCH)
	.venv-interop/bin/python -m pip install --quiet -c constraints-interop.txt -e '.[test]' $(PEERS)
	.venv-interop/bin/python -m pytest -n 2 --dist loadfile \
		tests/interop tests/encoder/test_architectures.py

# The ONNX and OpenVINO backends of sentence-transformers need optimum-onnx and optimum-intel, which
# exclude the pinned transformers. So the engines below those backends are installed.
SPEED_PEERS := torchao bitsandbytes onnx onnxruntime openvino nncf
speed-peers:  ## make .venv-speed with other engines for benchmarks/peers_speed.py
	test -d .venv-speed || $(PYTHON) -m venv .venv-speed
	.venv-speed/bin/python -m pip install --quiet $(TORCH)
	.venv-speed/bin/python -m pip install --quiet -c constraints-interop.txt -e '.[test]' $(SPEED_PEERS)

test: $(INSTALLED)  ## run all tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: $(INSTALLED)  ## format, lint, types and tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(INSTALLED)  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)  ## write the generated pages and tables of the docs
	$(BIN)/python -m typer gteopt.cli.app utils docs --name gteopt > docs/cli.md
	$(BIN)/python docs/generate.py

clean:  ## remove .venv and all that was built
	rm -rf .venv dist build artifacts/*/ artifacts/.[a-z]*
