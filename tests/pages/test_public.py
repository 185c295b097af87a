"""The public face: what can be imported, and errors that travel between processes."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest

import torchcache
import torchcache.errors

ERRORS = [
    value
    for value in vars(torchcache.errors).values()
    if inspect.isclass(value) and value.__module__ == torchcache.errors.__name__
]


def test_all_is_sorted():
    assert torchcache.__all__ == sorted(torchcache.__all__)


def test_all_is_what_can_be_imported():
    names = {}
    exec("from torchcache import *", names)
    assert set(torchcache.__all__) == names.keys() - {"__builtins__"}


def test_every_public_name_is_in_all():
    for name in dir(torchcache):
        value = getattr(torchcache, name)
        is_ours = getattr(value, "__module__", "").startswith("torchcache")
        if is_ours and not name.startswith("_") and not isinstance(value, types.ModuleType):
            assert name in torchcache.__all__ or name in {"configure_from_environment", "note_registrations"}, name


def test_the_decorator_is_no_module_of_the_same_name():
    assert callable(torchcache.torchcache)


IMPORTS_OF_0_6 = """
for line in ("from torchcache.torchcache import torchcache", "import torchcache.torchcache",
             "from torchcache.logging import set_logger_config", "import torchcache.logging"):
    try:
        exec(line)
    except ImportError as error:
        remedy = str(error).rpartition("write: ")[2]
        exec(remedy)
        print(remedy)
from torchcache import torchcache
assert callable(torchcache)
"""


@pytest.mark.slow
def test_what_is_imported_from_where_0_6_had_it_says_where_it_is_now():
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS_OF_0_6], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.stdout.splitlines() == [
        *["from torchcache import torchcache"] * 2, *["from torchcache import set_logger_config"] * 2
    ], result.stderr  # fmt: skip


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = torchcache.nonsense
    assert not hasattr(torchcache, "nonsense")


def test_dir_lists_every_public_name():
    assert set(torchcache.__all__) <= set(dir(torchcache))


def test_every_public_name_is_documented():
    for name in torchcache.__all__:
        assert inspect.getdoc(getattr(torchcache, name)), name


def test_types_are_marked():
    assert (Path(torchcache.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_pickles_with_its_evidence(error):
    original = error("what went wrong")
    for name in vars(original):
        setattr(original, name, "evidence")
    twin = pickle.loads(pickle.dumps(original))
    assert type(twin) is error
    assert (str(twin), twin.args, vars(twin)) == (str(original), original.args, vars(original))


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_one_root_and_is_public(error):
    assert issubclass(error, torchcache.TorchcacheError)
    assert error.__name__ in torchcache.__all__
    assert error.__name__ in torchcache.errors.__doc__


def test_errors_are_what_callers_catch():
    assert issubclass(torchcache.ConfigError, (ValueError, TypeError))
    assert issubclass(torchcache.ConfigError, ValueError)
    assert issubclass(torchcache.ConfigError, TypeError)
    assert issubclass(torchcache.UncacheableError, ValueError)
    assert issubclass(torchcache.UncacheableError, TypeError)
    assert issubclass(torchcache.StoreError, OSError)
    assert issubclass(torchcache.CacheMissError, LookupError)


# -- the reference page ----------

REFERENCE = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()


def test_the_reference_has_every_public_name():
    for name in torchcache.__all__:
        assert f":: torchcache.{name}\n" in REFERENCE, name
