# Each target does all of its own set-up; it needs git, make and a Python with venv.
PYTHON ?= python3
TOX := build/tools/bin/tox
TORCHLESS := torchless-py310,torchless-py312,torchless-py313
CHECK := .tox/check
# By measured time; those marked slow in them are left out. tests/pages/test_map.py sees to it that no room is missing.
CORE := $(addprefix tests/, test_options.py \
    doors/test_usage.py \
    call/test_explain.py call/test_flights.py call/test_modes.py \
    tiers/test_contract.py \
    checks/test_verify_hits.py checks/test_draws.py \
    inputs/test_sample_keys.py \
    results/test_tree.py results/test_whole_calls.py \
    keys/test_digest.py keys/test_code.py keys/test_calls.py keys/test_attributes.py \
    storage/test_record.py storage/test_filesystems.py \
    report/test_stats_and_log.py \
    pages/test_public.py pages/test_map.py)

.PHONY: test quick demo bench clean

# The first that fails is the last that runs, so that what it says ends the log.
test: build/tools/.stamp
	$(TOX) run --fail-fast -e $(TORCHLESS),check

# For after each change: the static checks, and of every room the tests that take seconds. ARGS="tests/..." adds others.
quick: $(CHECK)/.stamp
	$(CHECK)/bin/ruff check
	$(CHECK)/bin/ruff format --check
	$(CHECK)/bin/lint-imports
	$(CHECK)/bin/mypy
	$(CHECK)/bin/pytest -q -n 2 --dist loadfile --maxfail 5 -m "not slow" $(CORE) $(ARGS)

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

# The environment of make test, which tox makes anew, without the stamp, when what it installs has changed.
$(CHECK)/.stamp: build/tools/.stamp tox.ini pyproject.toml requirements-tested.txt requirements-clients.txt
	$(TOX) run --notest -e check
	touch $@

# pip first: 21.3 is the first with editable installations that need no setup.py, and Python 3.10.0 brings 21.2.
# Then torch, so that no other requirement chooses its version. Editable: it follows the sources.
build/demo/.stamp: requirements-tested.txt pyproject.toml
	$(PYTHON) -m venv --clear build/demo
	build/demo/bin/python -m pip install --quiet "pip>=21.3"
	build/demo/bin/python -m pip install --quiet --requirement requirements-tested.txt
	build/demo/bin/python -m pip install --quiet --editable ".[examples]"
	touch $@
