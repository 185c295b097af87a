# Each target does all of its own set-up; it needs git, make and a Python with venv.
PYTHON ?= python3
TOX := build/tools/bin/tox
TORCHLESS := torchless-py310,torchless-py312,torchless-py313

.PHONY: test demo bench clean

# The first that fails is the last that runs, so that what it says ends the log.
test: build/tools/.stamp
	$(TOX) run --fail-fast -e $(TORCHLESS),check

# make demo ARGS="..." and make bench ARGS="..." hand their arguments on.
demo: build/demo/.stamp
	build/demo/bin/python examples/train_head.py --cache-dir build/demo-cache $(ARGS)

bench: build/tools/.stamp
	$(TOX) run -e bench -- $(ARGS)

# tox leaves .venv as a file; as a folder it is somebody's own.
clean:
	rm -rf build .tox dist .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	[ -d .venv ] || rm -f .venv

# A stamp is written last, so an installation that was cut off is made again from nothing.
build/tools/.stamp: tox.ini
	$(PYTHON) -m venv --clear build/tools
	build/tools/bin/python -m pip install --quiet "tox>=4.36"
	touch $@

# pip first: 21.3 is the first with editable installations that need no setup.py, and Python 3.10.0 brings 21.2.
# Then torch, so that no other requirement chooses its version. Editable: it follows the sources.
build/demo/.stamp: requirements-tested.txt pyproject.toml
	$(PYTHON) -m venv --clear build/demo
	build/demo/bin/python -m pip install --quiet "pip>=21.3"
	build/demo/bin/python -m pip install --quiet --requirement requirements-tested.txt
	build/demo/bin/python -m pip install --quiet --editable ".[examples]"
	touch $@
