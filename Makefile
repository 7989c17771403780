# Each target sets up .venv on first use and again when pyproject.toml changes. PYTHON=python3.12 picks another Python.
# To use a Python that already has every package, without a .venv:  make test PY=python3 READY= NEWEST=
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/ready
NEWEST := .venv/newest
HAS_GPU := $(shell command -v nvidia-smi)
JOBS ?= $(if $(HAS_GPU),4,auto)

# One thread a test process: the processes already fill the cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

.PHONY: demo test check bench aot gallery

# Threads that wait give up their core: on 2 busy cores the training runs 500 -> 4,000 tokens/s.
demo: $(READY)
	OMP_WAIT_POLICY=passive $(PY) examples/packed_training.py

test: $(READY) $(NEWEST)
	$(PYTEST)

check: $(READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PYTEST) -m "not slow and not gpu"

bench: $(READY)
	$(PY) benchmarks/cpu.py
ifneq ($(HAS_GPU),)
	$(PY) benchmarks/gpu.py
	$(PY) benchmarks/maps.py
	$(PY) benchmarks/host.py
endif

aot: $(READY) $(NEWEST)
	$(PY) benchmarks/aot.py
	PYTHONPATH=$(NEWEST) $(PY) benchmarks/aot.py --sample --kernels \
		hopper_forward rows dq_of_sum hopper_dkdv hopper_lone hopper_dq hopper_lone_dq

# One thread: what else runs on the machine disturbs the times least.
gallery: $(READY)
	OMP_NUM_THREADS=1 $(PY) docs/gallery.py

# A second Triton, which only compiles.
.venv/newest: requirements/newest.txt | $(READY)
	$(PY) -m pip install --no-deps --upgrade --target $@ -r $<
	touch $@

ifeq ($(HAS_GPU),)
# torch first and from the CPU index, so that no CUDA package is ever resolved; where that index can't be reached, pip
# takes the wheel its own configuration offers.
.venv/ready: pyproject.toml requirements/cpu.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu -c requirements/cpu.txt torch
	$(PY) -m pip install -c requirements/cpu.txt -e '.[dev]'
	touch $@
else
# An image that brings its own CUDA build of torch keeps it.
HAS_TORCH := $(shell $(PYTHON) -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null)
.venv/ready: pyproject.toml
	$(PYTHON) -m venv $(if $(HAS_TORCH),--system-site-packages) .venv
	$(PY) -m pip install -e '.[dev]'
	touch $@
endif
