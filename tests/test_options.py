"""Options: every wrong value is refused at once, by name and with the remedy."""

from __future__ import annotations

import logging
import math
import pwd
import warnings
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import torch
from torch import nn

from torchcache import CacheOptions, ConfigError, cache_of, torchcache
from torchcache.options import OPTION_NAMES, OptionArguments, parse_size
from torchcache.storage import environment, temporary

SIZES = ["max_memory_cache_size", "max_persistent_cache_size", "queue_bytes", "min_free_disk"]
SECONDS = ["queue_timeout_seconds", "lock_timeout_seconds", "flush_timeout_seconds"]

#: Another legal value than the default, for each option.
OTHER = {
    "enabled": False,
    "mode": "refresh",
    "persistent": True,
    "persistent_cache_dir": "/somewhere/else",
    "persistent_module_hash": "mine",
    "max_memory_cache_size": 5e6,
    "max_persistent_cache_size": 5e6,
    "memory_cache_device": None,
    "cache_dtype": torch.half,
    "zstd_compression": True,
    "zstd_compression_level": 9,
    "version": "2",
    "batch_dim": 1,
    "batch_size": 2,
    "progress": True,
    "unbatched": ("x",),
    "ignore": ("step",),
    "padded": {"x": "x"},
    "eviction": "none",
    "min_free_disk": "5GB",
    "shared": "group",
    "when_grad": "bypass",
    "check_rows": False,
    "verify_hits": 0.01,
    "queue_bytes": 1e6,
    "queue_timeout_seconds": 1.0,
    "lock_timeout_seconds": 1.0,
    "flush_timeout_seconds": 1.0,
}


def refusal_of(**options):
    with pytest.raises(ConfigError) as caught:
        torchcache(**options)
    (name,) = options
    assert caught.value.argument == name
    assert name in str(caught.value)
    return str(caught.value)


# -- defaults ----------


def test_the_defaults_are_those_of_the_design():
    options = CacheOptions()
    assert options.enabled
    assert not options.persistent
    assert options.persistent_cache_dir is options.persistent_module_hash is options.cache_dtype is None
    assert options.max_memory_cache_size == 1_000_000_000
    assert options.max_persistent_cache_size == 10_000_000_000
    assert options.memory_cache_device == torch.device("cpu")
    assert not options.zstd_compression
    assert options.zstd_compression_level == 3
    assert options.version is None
    assert (options.eviction, options.when_grad) == ("stale", "detach")
    assert options.min_free_disk is options.shared is None
    assert (options.check_rows, options.verify_hits) == (True, 0.0)
    assert (options.queue_timeout_seconds, options.lock_timeout_seconds) == (5, 2)


def test_options_are_keyword_only_and_do_not_change():
    with pytest.raises(TypeError):
        CacheOptions(True)
    with pytest.raises(FrozenInstanceError):
        CacheOptions().enabled = False


def test_the_typed_arguments_are_exactly_the_options():
    assert set(OptionArguments.__annotations__) == set(OPTION_NAMES) == {f.name for f in fields(CacheOptions)}


def test_every_option_is_documented_once():
    for name in OPTION_NAMES:
        assert CacheOptions.__doc__.count(f"\n        {name}: ") == 1, name


# -- what shapes the key ----------


def test_every_option_says_whether_it_shapes_the_key():
    for option in fields(CacheOptions):
        assert isinstance(option.metadata.get("shapes_key"), bool), option.name


def test_every_option_is_tried_here():
    assert set(OTHER) == set(OPTION_NAMES)


@pytest.mark.parametrize("name", [name for name in OTHER if name not in ("enabled", "persistent_module_hash")])
def test_exactly_the_options_that_shape_the_key_change_the_module_hash(name):
    def hash_with(**options):
        @torchcache(**options)
        class Module(nn.Module):
            def forward(self, x):
                return x + 1

        return cache_of(Module()).module_hash

    base = {"zstd_compression": {"persistent": True}, "progress": {"batch_size": 2}}.get(name, {})
    shapes_key = {f.name: f.metadata["shapes_key"] for f in fields(CacheOptions)}[name]
    assert (hash_with(**base) != hash_with(**base, **{name: OTHER[name]})) == shapes_key


def test_what_is_stored_otherwise_shapes_the_key():
    shaping = {f.name for f in fields(CacheOptions) if f.metadata["shapes_key"]}
    assert shaping == {"batch_dim", "cache_dtype", "ignore", "padded", "zstd_compression", "version"}


# -- names ----------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("persistant", "persistent"),
        ("cache_dir", "persistent_cache_dir"),
        ("max_memory_size", "max_memory_cache_size"),
        ("dtype", "cache_dtype"),
        ("zstd_level", "zstd_compression_level"),
        ("Enabled", "enabled"),
    ],
)
def test_an_unknown_option_gets_the_nearest_name(wrong, right):
    assert f"did you mean {right}?" in refusal_of(**{wrong: 1})


def test_an_option_like_no_other_gets_the_list():
    assert "zstd_compression_level" in refusal_of(xyz=1)


@pytest.mark.parametrize("gone", ["subsample_count", "use_mmap_on_load", "zstd_compression_threads"])
def test_options_of_the_old_version_that_are_gone_say_why(gone):
    message = refusal_of(**{gone: 1})
    assert "0.6" in message
    assert "drop it" in message


def test_an_unknown_attribute_gets_the_nearest_name_at_construction():
    @torchcache()
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.torchcache_persistant = True

    with pytest.raises(ConfigError, match=r"torchcache_persistant .*did you mean torchcache_persistent\?"):
        Module()


def test_an_attribute_of_the_old_version_says_why_it_is_gone():
    @torchcache()
    class Module(nn.Module):
        torchcache_subsample_count = 10

    with pytest.raises(ConfigError, match=r"torchcache_subsample_count .*gone"):
        Module()


# -- values ----------


@pytest.mark.parametrize("name", ["enabled", "persistent", "zstd_compression"])
@pytest.mark.parametrize("value", [1, 0, "yes", None, 1.0], ids=repr)
def test_a_flag_must_be_a_bool(name, value):
    assert "True or False" in refusal_of(**{name: value})


def test_a_level_given_as_the_flag_is_sent_to_its_option():
    assert "zstd_compression_level=9" in refusal_of(zstd_compression=9)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "value",
    [-1, -0.5, math.nan, math.inf, [1], True, "", "big", "-5GB", "5 XB", "5GB5", "nan", b"5", {}],
    ids=repr,
)
def test_a_wrong_size_is_refused(name, value):
    assert '"5GB"' in refusal_of(**{name: value})


@pytest.mark.parametrize("name", SIZES[:2])
def test_a_size_may_not_be_none(name):
    assert "is not a size" in refusal_of(**{name: None})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, 5),
        (5e9, 5_000_000_000),
        (0, 0),
        (0.9, 0),
        ("5", 5),
        ("5b", 5),
        ("5GB", 5_000_000_000),
        ("5GiB", 5 * 2**30),
        ("5 gib", 5 * 2**30),
        (" 1.5 MB ", 1_500_000),
        (".5k", 500),
        ("2T", 2 * 10**12),
        ("1e9", 1_000_000_000),
        ("3PiB", 3 * 2**50),
    ],
)
def test_a_size_is_a_number_or_a_text_with_a_unit(value, expected):
    assert parse_size("size", value) == expected
    assert CacheOptions(max_memory_cache_size=value).max_memory_cache_size == expected


def test_a_large_integer_is_kept_exactly():
    assert parse_size("size", 2**60 + 1) == 2**60 + 1


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "5", True, [1]], ids=repr)
def test_a_wrong_time_is_refused(name, value):
    assert "seconds" in refusal_of(**{name: value})


@pytest.mark.parametrize("value", [1.5, -101, 23, 0, "3", True, None], ids=repr)
def test_a_level_outside_the_range_of_zstd_is_refused(value):
    message = refusal_of(zstd_compression_level=value)
    assert "-100" in message
    assert "22" in message


@pytest.mark.parametrize("value", [-100, -1, 1, 22])
def test_every_level_in_the_range_is_taken(value):
    assert CacheOptions(zstd_compression_level=value).zstd_compression_level == value


@pytest.mark.parametrize("value", [torch.int8, torch.bool, torch.complex64, "half", float, 16], ids=repr)
def test_a_cache_dtype_that_is_not_floating_is_refused(value):
    assert "torch.half" in refusal_of(cache_dtype=value)


@pytest.mark.parametrize("value", [torch.half, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_floating_cache_dtype_is_taken(value):
    assert CacheOptions(cache_dtype=value).cache_dtype is value


@pytest.mark.parametrize(
    "value",
    ["", ".", "..", ".hidden", "a/b", "../a", "/a", "a b", "a\n", "a\0", "é", "-a", "+a", "x" * 129, 3, b"a"],
    ids=repr,
)
def test_a_module_hash_that_is_not_a_plain_file_name_is_refused(value):
    refusal_of(persistent_module_hash=value)


@pytest.mark.parametrize(
    "value",
    [f"mine.{environment._SET_ASIDE}", f"a.b.{environment._SET_ASIDE}", f"{temporary._PREFIX}0123abcd"],
)
def test_a_module_hash_under_which_torchcache_puts_something_else_is_refused(value):
    message = refusal_of(persistent_module_hash=value)
    assert "choose one that does not start with" in message
    assert f".{environment._SET_ASIDE}" in message


@pytest.mark.parametrize("value", ["a", "minilm-v1", "A_b.c+d=e@f", "0", "x" * 128, "_x", "damaged", "a.damaged.b"])
def test_a_plain_file_name_is_taken_as_module_hash(value):
    assert CacheOptions(persistent_module_hash=value).persistent_module_hash == value


@pytest.mark.parametrize("value", [3, b"", "", True, ["a"]], ids=repr)
def test_a_directory_that_is_no_path_is_refused(value):
    assert "path" in refusal_of(persistent_cache_dir=value)


def test_a_tilde_in_a_directory_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert CacheOptions(persistent_cache_dir="~/cache").persistent_cache_dir == Path("/home/somebody/cache")


def test_a_home_that_is_not_known_is_refused(monkeypatch):
    assert "HOME" in refusal_of(persistent_cache_dir="~nobody-of-this-name/cache")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert "HOME" in refusal_of(persistent_cache_dir="~/cache")


def test_a_relative_directory_is_refused_when_the_current_one_is_gone(monkeypatch, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "absolute" in refusal_of(persistent_cache_dir="cache")
    assert CacheOptions(persistent_cache_dir="/cache").persistent_cache_dir == Path("/cache")


def test_a_directory_with_a_null_character_is_refused():
    assert "null" in refusal_of(persistent_cache_dir="a\0b")


@pytest.mark.parametrize("value", ["gpu", "cuda:x", 3, "meta", torch.float32], ids=repr)
def test_a_memory_device_that_is_none_is_refused(value):
    assert "'cuda:0'" in refusal_of(memory_cache_device=value)


@pytest.mark.parametrize("value", [1, True, b"1"], ids=repr)
def test_a_version_that_is_no_text_is_refused(value):
    assert "string" in refusal_of(version=value)


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("eviction", "stail", "'stale'"),
        ("when_grad", "detatch", "'detach'"),
        ("shared", "grup", "'group'"),
        ("mode", "required", "'require'"),
    ],
)
def test_a_wrong_choice_gets_the_choices_and_the_nearest(name, value, right):
    message = refusal_of(**{name: value})
    assert f"did you mean {right}" in message
    assert "must be one of" in message


@pytest.mark.parametrize("name", ["eviction", "mode", "when_grad"])
@pytest.mark.parametrize("value", [None, 1, True, ["stale"]], ids=repr)
def test_a_choice_that_is_no_text_is_refused(name, value):
    assert "must be one of" in refusal_of(**{name: value})


# -- attributes and combinations ----------


@pytest.mark.parametrize("name", [name for name in OTHER if name != "enabled"])
def test_every_option_may_be_an_attribute_and_is_checked_like_an_argument(name):
    @torchcache(persistent=True, persistent_cache_dir="/nowhere", batch_size=3)
    class Module(nn.Module):
        def __init__(self, value):
            super().__init__()
            setattr(self, f"torchcache_{name}", value)

        def forward(self, x):
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert getattr(cache_of(Module(OTHER[name])).options, name) == getattr(
            CacheOptions(**{name: OTHER[name]}), name
        )
        with pytest.raises(ConfigError, match=name):
            Module(object())


def test_the_attribute_of_a_class_counts_and_that_of_the_instance_wins():
    @torchcache()
    class Module(nn.Module):
        torchcache_version = "class"

        def __init__(self, version=None):
            super().__init__()
            if version:
                self.torchcache_version = version

    assert cache_of(Module()).options.version == "class"
    assert cache_of(Module("instance")).options.version == "instance"


def test_attributes_of_a_decorated_instance_count():
    module = nn.Linear(2, 2)
    module.torchcache_version = "mine"
    assert cache_of(torchcache(version="theirs")(module)).options.version == "mine"


def test_a_wrong_attribute_of_an_instance_is_refused_when_it_is_decorated():
    module = nn.Linear(2, 2)
    module.torchcache_versoin = "mine"
    with pytest.raises(ConfigError, match="torchcache_version"):
        torchcache()(module)
    assert "forward" not in vars(module)


def test_compression_without_persistence_is_refused_at_every_door():
    @torchcache(zstd_compression=True)
    class Module(nn.Module):
        pass

    for make in (
        Module,
        lambda: torchcache(zstd_compression=True)(lambda x: x),
        lambda: torchcache(zstd_compression=True)(nn.Linear(2, 2)),
    ):
        with pytest.raises(ConfigError, match="persistent=True") as caught:
            make()
        assert caught.value.argument == "zstd_compression"


def test_a_temporary_cache_cannot_be_shared_with_a_group():
    with pytest.raises(ConfigError, match="persistent_cache_dir") as caught:
        torchcache(persistent=True, shared="group")(lambda x: x)
    assert caught.value.argument == "shared"
    torchcache(shared="group")(lambda x: x)  # who switches persistent off may leave the rest


def test_a_combination_is_judged_after_the_attributes_are_merged():
    @torchcache(zstd_compression=True)
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.torchcache_persistent = True

    assert cache_of(Module()).options.zstd_compression


def test_an_undecorated_subclass_with_a_constructor_of_its_own_is_checked_at_the_first_call():
    @torchcache()
    class Base(nn.Module):
        def forward(self, x):
            return x

    class Below(Base):
        def __init__(self):
            super().__init__()
            self.torchcache_zstd_compression = True

    module = Below()
    with pytest.raises(ConfigError, match="persistent=True"):
        module(torch.rand(2, 2))


def test_a_directory_without_persistence_is_ignored_with_one_line(cache_dir, caplog):
    @torchcache(persistent_cache_dir=cache_dir)
    class Module(nn.Module):
        def forward(self, x):
            return x + 1

    for _ in range(3):
        module = Module()
        module(torch.rand(2, 2))
    lines = [r for r in caplog.records if "persistent_cache_dir" in r.getMessage()]
    assert [r.levelno for r in lines] == [logging.WARNING]
    assert not cache_dir.exists()


def test_a_wrong_value_is_refused_before_anything_is_decorated():
    class Module(nn.Module):
        pass

    before = dict(vars(Module))
    with pytest.raises(ConfigError):
        torchcache(max_memory_cache_size=-1)(Module)
    assert dict(vars(Module)) == before


# -- faults of the machine are no wrong options ----------


def test_a_directory_that_is_a_file_costs_one_line_and_the_run_goes_on(tmp_path, caplog):
    path = tmp_path / "file"
    path.write_text("mine")

    @torchcache(persistent=True, persistent_cache_dir=path)
    def add_one(x):
        return x + 1

    x = torch.rand(4, 10)
    for _ in range(3):
        assert torch.equal(add_one(x), x + 1)
    assert add_one.cache_instance.stats().memory_hits == 8
    assert sum(add_one.cache_instance.stats().faults.values()) >= 1
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert path.read_text() == "mine"


def test_a_directory_that_cannot_be_created_costs_one_line_and_the_run_goes_on(caplog):
    @torchcache(persistent=True, persistent_cache_dir="/proc/nowhere/cache")
    def add_one(x):
        return x + 1

    x = torch.rand(4, 10)
    for _ in range(3):
        assert torch.equal(add_one(x), x + 1)
    assert add_one.cache_instance.stats().memory_hits == 8
    assert add_one.cache_instance.cache_dir is None
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


@pytest.mark.parametrize("value", ["mask", None, 3, [1], {"mask"}], ids=repr)
def test_names_are_a_tuple_or_list_of_texts(value):
    assert "('mask',)" in refusal_of(unbatched=value)
