# A fresh machine needs Python 3.11 and make; everything else is installed into .venv.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed

.PHONY: test gpu thorough demo coverage lint types wheel clean

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# On a GPU, which `make test` needs none of: Triton's kernels compiled, spconv, frozen networks.
gpu: $(INSTALLED)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu tests/test_triton.py

# The same properties on new examples, fifty times as many: hours.
thorough: $(INSTALLED)
	HYPOTHESIS_PROFILE=thorough OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

demo: $(INSTALLED)
	$(BIN)/python examples/ssd_voc.py

# Every model of torchvision and one of each of timm's files: about an hour. Interrupted, it goes on where it was; after a
# change of the library, remove coverage.json first.
coverage: $(INSTALLED)
	$(BIN)/sparsenet coverage --suite torchvision --json coverage.json --markdown docs/coverage.md
	$(BIN)/sparsenet coverage --suite timm --json coverage.json --markdown docs/coverage.md

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# Run where neither the working tree nor its editable install can stand in for the wheel.
define SMOKE_TEST
import importlib.util, pathlib
import sparsenet, sparsenet.adapters
site = pathlib.Path("site").resolve()
for module in (sparsenet, sparsenet.adapters):
    assert site in pathlib.Path(module.__file__).resolve().parents, module.__file__
assert importlib.util.find_spec("adapters") is None, "`adapters` belongs to another project"
endef
export SMOKE_TEST

# build/ goes before and after: setuptools packs what an earlier build left there, and ruff would read it.
wheel: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .
	rm -rf build
	outside=$$(mktemp -d) && trap 'rm -rf "$$outside"' EXIT && \
	$(BIN)/python -m pip install --no-deps --target "$$outside/site" dist/sparsenet-*.whl && \
	cd "$$outside" && PYTHONPATH=site $(BIN)/python -c "$$SMOKE_TEST"

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@
