# make demo: environment, then the whole chain on the demo world.   make test: the same environment, then every check.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS := .venv-docs

.PHONY: demo test test-all install hooks lab docs export clean help

help:
	@echo "make demo      install what is missing, run the chain on the demo world (runs/demo/report.html)"
	@echo "make lab       install what is missing, open the notebooks in JupyterLab"
	@echo "make test      install what is missing, check export, notebooks, floors, tests"
	@echo "make test-all  make test, then the long proofs (evidence/*.json) and the browser"
	@echo "make docs      build the site of the documentation (_docs/html/index.html)"
	@echo "make export    notebooks -> fields/"

$(INSTALLED): constraints.txt settings.ini setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; install Python 3.11 with venv (Debian: python3.11 python3.11-venv)"; exit 1; }
	@echo "installing the pinned packages into $(VENV) (a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --prefer-binary -q -c constraints.txt -e '.[all]'
	@touch $@

install: $(INSTALLED) hooks

# merges of notebooks by cell (.gitattributes asks for it); nothing outside of this clone is changed
hooks: $(INSTALLED)
	@if git rev-parse --git-dir >/dev/null 2>&1; then \
	  git config --local merge.nbdev-merge.name "resolve conflicts of notebooks by cell"; \
	  git config --local merge.nbdev-merge.driver "$(abspath $(BIN))/nbdev_merge %O %A %B %P"; \
	fi

lab: install
	JUPYTER_CONFIG_DIR=$(CURDIR)/lab $(BIN)/jupyter lab --notebook-dir=$(CURDIR)/nbs index.ipynb

demo: $(INSTALLED)
	$(BIN)/fields chain --profile demo --run runs/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q tests/test_house.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" --durations 15 tests

test-all: test
	$(BIN)/python -m pytest -q -m slow --durations 15 tests

$(DOCS)/.installed: docs/constraints.txt
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check -q -c docs/constraints.txt jupyter-book==1.0.4
	@touch $@

docs: $(DOCS)/.installed
	$(DOCS)/bin/python docs/build.py

export: $(INSTALLED)
	$(BIN)/nbdev_export

clean:
	rm -rf runs build dist _docs *.egg-info
