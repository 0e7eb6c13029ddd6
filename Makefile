# make demo: environment, then the whole chain on the demo world.   make test: the same environment, then every check.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all install export clean help

help:
	@echo "make demo      install what is missing, run the chain on the demo world (runs/demo/report.html)"
	@echo "make test      install what is missing, check export, notebooks, floors, tests"
	@echo "make test-all  make test, then the long proofs (evidence/*.json)"
	@echo "make export    notebooks -> fields/"

$(INSTALLED): constraints.txt settings.ini setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; install Python 3.11 with venv (Debian: python3.11 python3.11-venv)"; exit 1; }
	@echo "installing the pinned packages into $(VENV) (a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --prefer-binary -q -c constraints.txt -e '.[all]'
	@touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/fields chain --profile demo --run runs/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q tests/test_house.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" --durations 15 tests

test-all: test
	$(BIN)/python -m pytest -q -m slow --durations 15 tests

export: $(INSTALLED)
	$(BIN)/nbdev_export

clean:
	rm -rf runs build dist *.egg-info
