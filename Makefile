# make demo and make test set up what they need first, in .venv; VENV= (empty) uses the Python at hand as it is.
PYTHON ?= python3
VENV ?= .venv
export PIP_CONSTRAINT := $(CURDIR)/constraints-dev.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait should sleep: on a busy machine, spinning ones take the cores from those they wait for.
demo test: export OMP_WAIT_POLICY := passive

NATIVE := $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
SANITIZED := build/sanitize

ifeq ($(VENV),)
PY := $(PYTHON)
BIN :=
READY := build/.ready
else
PY := $(VENV)/bin/python
BIN := $(VENV)/bin/
READY := $(VENV)/.ready
endif
PIP := $(PY) -m pip install --quiet --no-compile

.PHONY: setup demo test lint format bench sanitize clean

setup: $(READY)

ifeq ($(VENV),)
$(READY): setup.py pyproject.toml $(NATIVE)
	$(PY) setup.py build_ext --inplace
	@mkdir -p $(@D) && touch $@
else
# The kernels are built while packages are unpacked; the last line then has little to do, and says if anything lacks.
$(READY): setup.py pyproject.toml constraints-dev.txt $(NATIVE)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools pybind11 cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(PY) setup.py --quiet build_ext --inplace & native=$$!; \
	  trap "kill $$native" INT TERM; \
	  $(PIP) --requirement constraints-dev.txt; packages=$$?; wait $$native && exit $$packages
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable '.[demo,test,bench,dev]'
	@touch $@
endif

demo: $(READY)
	$(PY) -m gradvac_kernels.demo $(ARGS)

test: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m benchmarks.report --check
	$(BIN)clang-format --dry-run --Werror $(CXX_FILES)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)clang-format -i $(CXX_FILES)

bench: $(READY)
	$(PY) -m pytest benchmarks/ --benchmark-only --results benchmarks/results/cpu.json $(ARGS)
	$(PY) -m benchmarks.report

# A build of its own under AddressSanitizer and UndefinedBehaviorSanitizer, and the tests that run native code in it.
sanitize: $(READY)
	rm -rf $(SANITIZED)
	GRADVAC_SANITIZE=address,undefined $(PY) setup.py --quiet build --build-base $(SANITIZED)
	cd $(SANITIZED) && PYTHONPATH=$$(echo $(CURDIR)/$(SANITIZED)/lib.*) ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libubsan.so)" \
	  $(if $(VENV),$(abspath $(PY)),$(PY)) -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -p no:cacheprovider -q -k cpu \
	  $(addprefix $(CURDIR)/tests/,test_gram.py test_cross_gram.py test_coefficients.py test_combine.py test_numerics.py test_bits.py test_order.py test_traps.py) $(ARGS)

clean:
	rm -rf build dist *.egg-info $(VENV) gradvac_kernels/*.so demo-output
