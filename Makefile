# Each target makes what it needs: a virtual environment with the dependencies of setup.cfg.
# Another interpreter: make test PYTHON=python3.12      Another place: make test VENV=/tmp/venv
#
# make reproduce [DATA=data] [PROFILE=full|quick] [DATASETS=a,b] [RESULTS=results] [ARGS=...]
# DATA holds the raw logs; PROFILE=quick has RESULTS/quick; ARGS go to bench/reproduce.py:
# --dry-run, --models, --seeds, --epochs.

PYTHON ?= python3
VENV ?= .venv
DATA ?= data
PROFILE ?= full
DATASETS ?=
RESULTS ?= results
# Not among the results of a full run.
QUICK := $(if $(filter quick,$(PROFILE)),/quick)
ARGS ?=
NVCC ?= nvcc
GPUS := sm_75 sm_80 sm_90
WORKERS := --numprocesses auto --maxprocesses 4 --dist loadfile

help:
	@echo 'make demo         train on a built-in data set and compare with the lowest attainable error'
	@echo 'make test         run the tests'
	@echo 'make reproduce    the tables and figures of the paper from the data at hand (hours;'
	@echo '                  ARGS=--dry-run prints the plan, PROFILE=quick takes minutes)'
	@echo 'make gradcheck    check all gradients, one row for each block of parameters'
	@echo 'make kernels      compile the CUDA kernels, where there is nvcc'
	@echo 'make lint         check the style'
	@echo 'make test-oldest  run the tests with the oldest dependencies (needs Python 3.11)'
	@echo 'make install      only make the virtual environment, $(VENV)'
	@echo 'make clean        remove what was built and cached, except $(VENV)'

# $(call install,VENV,OPTIONS). Without --use-pep517 an old pip leaves out the package of kernels/.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	    "crnn_np needs Python 3.11 or later, and '$(PYTHON)' is not. Try: make PYTHON=python3.12" \
	    >&2; exit 1; }
	@test -x '$(1)/bin/pip' || $(PYTHON) -m venv --clear '$(1)' || { echo \
	    "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv" \
	    >&2; exit 1; }
	'$(1)/bin/python' -m pip install --quiet --use-pep517 --editable '.[test]' $(2)
endef

$(VENV)/.installed: setup.cfg setup.py
	$(call install,$(VENV))
	@touch '$@'

install: $(VENV)/.installed

demo: $(VENV)/.installed
	'$(VENV)/bin/crnn-np' demo

test: $(VENV)/.installed
	'$(VENV)/bin/python' -m pytest $(WORKERS)

reproduce: $(VENV)/.installed
	'$(VENV)/bin/python' bench/reproduce.py --data '$(DATA)' --out '$(RESULTS)$(QUICK)' \
	    --profile '$(PROFILE)' --datasets '$(DATASETS)' $(ARGS)

gradcheck: $(VENV)/.installed
	'$(VENV)/bin/python' -m crnn_np.gradcheck

# Only to see that they compile: the package compiles them on first use, for the device it finds.
kernels:
	@command -v '$(NVCC)' > /dev/null || { echo 'kernels: NOT COMPILED, no nvcc'; exit 0; }; \
	work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && \
	for file in kernels/*.cu; do for real in float double; do \
	    '$(NVCC)' -std=c++17 -DREAL=$$real -Werror all-warnings --threads 0 -fatbin -o "$$work/fatbin" \
	        $(foreach gpu,$(GPUS),-gencode arch=$(gpu:sm_%=compute_%),code=$(gpu)) "$$file" \
	        || { echo "kernels: $$file does not compile for $$real" >&2; exit 1; }; \
	done; done; \
	echo "kernels: $$(cat kernels/*.cu | grep -c 'extern "C" __global__') compiled for" \
	    "$$(echo '$(GPUS)' | sed 's/ /, /g')"

lint: $(VENV)/.installed
	'$(VENV)/bin/ruff' check .

test-oldest:
	@mkdir -p build
	sed -n 's/^    \([a-z-]*\) >= \([0-9.]*\)$$/\1==\2/p' setup.cfg > build/oldest.txt
	$(call install,build/oldest,--constraint build/oldest.txt)
	build/oldest/bin/python -m pytest $(WORKERS)

clean:
	rm -rf build dist crnn_np.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find . -path './$(VENV)' -prune -o -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help install demo test reproduce gradcheck kernels lint test-oldest clean
