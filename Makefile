# `make demo` and `make test` need python3 (3.10 or newer) with pip, g++ and make, nothing else; everything goes into .venv.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
# Modules are compiled when they are first imported: most never are.
PIP := $(PYTHON) -m pip --python $(VENV)/bin/python
# One test worker per core with one thread of torch; whoever is done first takes from the others.
WORKERS := -n auto --maxprocesses 8 --dist worksteal
NATIVE := setup.py pyproject.toml $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

CPP = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-trainers test-trl check fuzz lint docs dist wheel gpu clean

demo: $(VENV)/.built
	$(VENV)/bin/tokenrl demo

test: $(VENV)/.built $(VENV)/.rivals build/hosts/.done
	$(VENV)/bin/python -m pytest -q $(WORKERS) --durations=20 tests

# The hooks of tokenrl.integrations beside the trainers that they stand in for.
test-trainers: $(VENV)/.built $(VENV)/.rivals build/hosts/.done
	$(VENV)/bin/python -m pytest -q $(WORKERS) tests/integrations

# The loss with another version of TRL (1.15's own head needs TRITON_INTERPRET=1 on a CPU, 1.10 a package it does not name).
TRL ?= 1.10.0
test-trl: $(VENV)/.built $(VENV)/.rivals
	$(PYTHON) -m pip install -q --target build/trl/$(TRL) requests
	$(PYTHON) -m pip install -q --no-deps --target build/trl/$(TRL) "trl==$(TRL)"
	PYTHONPATH=build/trl/$(TRL) $(VENV)/bin/python -m pytest -q $(WORKERS) tests/integrations/test_trl.py -k numbers_are

# The inner loop: of every room a few, in less than a minute (tests/support/order.py says which and why).
check: $(VENV)/.built
	$(VENV)/bin/python -m pytest -q $(WORKERS) --check tests

# Random calls against the reference for so long; a case that fails is saved in build/fuzz as a script.
SECONDS ?= 600
fuzz: $(VENV)/.built
	$(VENV)/bin/python tests/fuzz --seconds $(SECONDS)

lint: $(VENV)/.tools
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(VENV)/bin/python -m mypy

# The pages, from docs/index.md, in docs/_build.
docs: $(VENV)/.built
	$(VENV)/bin/python -m sphinx -W -n -q docs docs/_build
	@echo docs/_build/index.html

# In dist/: the source distribution, and a wheel of pure Python made of it.
dist: $(VENV)/.release
	rm -rf dist
	TOKENRL_NATIVE=0 $(VENV)/bin/python -m build -n
	$(VENV)/bin/python -m twine check --strict dist/*

# In dist/: the wheel with the C++ kernels for this Python, made of the source distribution. It takes torch's libraries as
# torch has them; what else it links to decides for which Linux it is.
wheel: $(VENV)/.release
	test -e dist/*.tar.gz || $(VENV)/bin/python -m build -n --sdist
	rm -rf build/wheel
	TOKENRL_CUDA=0 $(PIP) wheel -q --no-build-isolation --no-deps -w build/wheel dist/*.tar.gz
	PATH="$(VENV)/bin:$$PATH" $(VENV)/bin/python -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
	    -w dist build/wheel/*.whl
	$(VENV)/bin/python -m twine check --strict dist/*

# On a machine with a GPU, its own Python, torch and nvcc; no network: three calls of less than ten minutes each, which
# bench/gpu.sh makes by name too. Tables go to bench/results/.
gpu:
	bash bench/gpu.sh

# The virtual environment needs no ensurepip: this machine's pip fills it. Triton comes with a CUDA torch, beside a CPU torch it is
# the version that the GPU tables were made with.
$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PIP) install -q --no-compile -r requirements.txt
	$(VENV)/bin/python -c "import triton" 2>/dev/null || $(PIP) install -q --no-compile "triton==3.6.0"
	touch $@

# What the hooks of tokenrl.integrations and the drop-ins of tokenrl.compat are compared with.
$(VENV)/.rivals: $(VENV)/.installed
	$(PIP) install -q --no-compile -r requirements.txt "trl==1.16.0" "peft==0.21.2"
	$(PIP) install -q --no-compile --no-deps "verl==0.9.1" "liger-kernel==0.8.5"
	touch $@

# Trainers that exclude each other's dependencies: their wheels, unpacked, for tests that run the text of a function of theirs.
build/hosts/.done: Makefile
	rm -rf build/hosts
	$(PYTHON) -m pip install -q --no-deps --no-compile --ignore-requires-python --target build/hosts \
	    "openrlhf==0.11.2" "skyrl==0.3.0" "ms-swift==4.6.0" "areal==1.0.4"
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(PIP) install -q --no-compile --no-build-isolation --no-deps -e .
	touch $@

# The pinned tools of the extra dev; they need no build of the package.
$(VENV)/.tools: $(VENV)/.installed pyproject.toml
	$(PIP) install -q --no-compile $(shell sed -n 's/^dev = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
	touch $@

# The tools of the extra release.
$(VENV)/.release: $(VENV)/.installed pyproject.toml
	$(PIP) install -q --no-compile $(shell sed -n 's/^release = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build tokenrl/*.so *.egg-info
