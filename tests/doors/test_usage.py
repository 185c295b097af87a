"""The promises of the usage page, one by one and in its order."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from torchcache import cache_of, torchcache

#: What stands in for a user's program.
PROGRAM = """
import sys
import torch
from torch import nn
from torchcache import torchcache

torch.manual_seed(0)

@torchcache(persistent=True, persistent_cache_dir=sys.argv[1])
class Extractor(nn.Module):
    def __init__(self, features=4, *, scale=2):
        super().__init__()
        self.linear = nn.Linear(10, features)
        self.scale = scale

    def forward(self, x):
        return self.linear(x) * self.scale

module = Extractor({arguments})
{then}
module(torch.arange(80.0).reshape(8, 10))
result = module.cache_instance.module_hash, module.cache_instance.stats().misses
module.cache_instance.close()
"""


def run_program(cache_dir: Path, *, arguments: str = "", then: str = "", edit: tuple[str, str] = ("", "")):
    """Run the program afresh; return its module hash and the number of rows it computed."""
    text = PROGRAM.format(arguments=arguments, then=then).replace(*edit).replace("sys.argv[1]", repr(str(cache_dir)))
    names = {"__name__": "program"}
    exec(compile(text, "program.py", "exec"), names)
    return names["result"]


def run_script(text: str, folder: Path, *arguments: object, **environment: str) -> str:
    """Run a program in a process of its own and return what it printed."""
    script = folder / "program.py"
    script.write_text(textwrap.dedent(text))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_counted(options=None):
    """Return a decorated module, and a list that gets the number of rows of each forward.

    The row that ``check_rows`` adds once is another file's matter.
    """
    computed = []

    @torchcache(check_rows=False, **(options or {}))
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(10, 4)

        def forward(self, x):
            computed.append(len(x))
            return self.linear(x)

    return Counted(), computed


# -- a module, a function ----------


def test_a_plain_linear_that_was_never_put_into_eval_mode_is_cached():
    @torchcache()
    class CachedModule(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(10, 10)

        def forward(self, x):
            return self.linear(x)

    module = CachedModule()
    x = torch.rand(4, 10)
    first = module(x)
    second = module(x)
    assert module.training
    assert torch.equal(first, second)
    assert torch.equal(first, module.linear(x))
    assert module.cache_instance.stats().misses == 4
    assert module.cache_instance.stats().memory_hits == 4


def test_the_second_call_does_not_run_the_forward():
    module, computed = make_counted()
    x = torch.rand(4, 10)
    module(x)
    module(x)
    assert sum(computed) == 4


def test_a_function_is_cached():
    @torchcache()
    def add_one(x):
        return x + 1

    x = torch.rand(4, 10)
    assert torch.equal(add_one(x), x + 1)
    assert torch.equal(add_one(x), x + 1)
    assert add_one.cache_instance.stats().memory_hits == 4
    assert add_one.cache_instance.stats().misses == 4


def test_a_module_of_somebody_else_is_cached():
    module = torchcache()(nn.Linear(10, 10))
    x = torch.rand(4, 10)
    first = module(x)
    assert torch.equal(module(x), first)
    assert cache_of(module).stats().memory_hits == 4


def test_samples_are_found_whatever_batch_they_come_in():
    module, computed = make_counted()
    x = torch.rand(6, 10)
    module(x[:3])
    module(x[torch.tensor([5, 2, 0, 1])])
    module(x.flip(0))
    assert sum(computed) == 6


# -- where it is kept ----------


@pytest.mark.slow
def test_a_persistent_cache_answers_the_second_run_of_a_program(cache_dir):
    program = PROGRAM.format(arguments="", then="") + "print(*result)"
    first_hash, first = run_script(program, cache_dir.parent, cache_dir).split()
    second_hash, second = run_script(program, cache_dir.parent, cache_dir).split()
    assert (first, second) == ("8", "0")
    assert first_hash == second_hash


def test_another_instance_with_the_same_weights_finds_the_results_at_once(cache_dir):
    module, computed = make_counted({"persistent": True, "persistent_cache_dir": cache_dir})
    twin = type(module)()
    twin.load_state_dict(module.state_dict())
    x = torch.rand(4, 10)
    assert torch.equal(module(x), twin(x))
    assert computed == [4], "what waits to be written is a hit too"


@pytest.mark.slow
def test_a_persistent_cache_without_a_directory_is_private_and_gone_at_the_end(tmp_path):
    program = """
        import torch
        from torchcache import torchcache

        @torchcache(persistent=True)
        def add_one(x):
            return x + 1

        add_one(torch.rand(4, 10))
        cache = add_one.cache_instance
        assert cache.flush()
        assert cache.stats().written_rows == 4
        print(cache.cache_dir.parent)
        """
    directory = Path(run_script(program, tmp_path, TMPDIR=str(tmp_path)).strip())
    assert directory.parent == tmp_path
    assert not directory.exists()


def test_a_temporary_directory_is_for_its_owner_only():
    @torchcache(persistent=True)
    def add_one(x):
        return x + 1

    add_one(torch.rand(4, 10))
    assert stat.S_IMODE(add_one.cache_instance.cache_dir.parent.stat().st_mode) == 0o700


def test_without_persistent_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @torchcache()
    def add_one(x):
        return x + 1

    add_one(torch.rand(4, 10))
    assert add_one.cache_instance.cache_dir is None
    assert list(tmp_path.iterdir()) == []


def test_a_path_object_and_a_string_name_the_same_directory(cache_dir):
    def make(directory):
        @torchcache(persistent=True, persistent_cache_dir=directory)
        def add_one(x):
            return x + 1

        return add_one

    assert cache_of(make(cache_dir)).cache_dir == cache_of(make(str(cache_dir))).cache_dir


# -- sizes and dtypes ----------


def test_sizes_may_be_floats(cache_dir):
    @torchcache(
        persistent=True, persistent_cache_dir=cache_dir, max_persistent_cache_size=2e9, max_memory_cache_size=1.5e6
    )
    def add_one(x):
        return x + 1

    x = torch.rand(4, 10)
    add_one(x)
    assert torch.equal(add_one(x), x + 1)
    assert cache_of(add_one).options.max_memory_cache_size == 1_500_000
    assert cache_of(add_one).options.max_persistent_cache_size == 2_000_000_000


def test_the_memory_tier_never_exceeds_its_size():
    @torchcache(max_memory_cache_size=10_000.0)
    def add_one(x):
        return x + 1

    for i in range(20):
        add_one(torch.full((50, 10), float(i)) + torch.arange(50.0).unsqueeze(1) / 100)
        assert add_one.cache_instance.stats().memory_bytes <= 10_000


def test_half_precision_and_compression_work_together(cache_dir):
    @torchcache(
        persistent=True,
        persistent_cache_dir=cache_dir,
        cache_dtype=torch.half,
        zstd_compression=True,
        max_memory_cache_size=0,
    )
    def third(x):
        return x / 3

    x = torch.rand(16, 100)
    first = third(x)
    assert cache_of(third).flush()
    second = third(x)
    assert cache_of(third).stats().store_hits == 16
    assert first.dtype == second.dtype == torch.float32
    assert torch.equal(first, second)
    assert torch.equal(first, (x / 3).half().float())


def test_half_precision_takes_half_the_memory():
    def bytes_held(**options):
        @torchcache(**options)
        def double(x):
            return x * 2

        double(torch.rand(64, 5000))
        return double.cache_instance.stats().memory_bytes

    assert bytes_held(cache_dtype=torch.half) * 2 == bytes_held()


def test_compression_takes_fewer_bytes_on_disk(cache_dir):
    def bytes_written(*, zstd_compression):
        @torchcache(persistent=True, persistent_cache_dir=cache_dir, zstd_compression=zstd_compression)
        def ones(x):
            return torch.ones(len(x), 10_000)

        ones(torch.rand(8, 10))
        cache_of(ones).flush()
        return cache_of(ones).stats().written_bytes

    assert bytes_written(zstd_compression=True) * 10 < bytes_written(zstd_compression=False)


def test_both_may_be_attributes_set_in_the_module(cache_dir):
    @torchcache(persistent=True, persistent_cache_dir=cache_dir)
    class CachedModule(nn.Module):
        def __init__(self):
            super().__init__()
            self.torchcache_cache_dtype = torch.half
            self.torchcache_zstd_compression = True
            self.linear = nn.Linear(10, 10)

        def forward(self, x):
            return self.linear(x)

    module = CachedModule()
    x = torch.rand(4, 10)
    first = module(x)
    assert module.cache_instance.options.cache_dtype is torch.half
    assert module.cache_instance.options.zstd_compression is True
    assert torch.equal(first, module.linear(x).half().float())
    assert torch.equal(module(x), first)


def test_attributes_win_over_the_decorator_for_their_instance_alone():
    @torchcache(max_memory_cache_size=1e6)
    class CachedModule(nn.Module):
        def __init__(self, size=None):
            super().__init__()
            if size is not None:
                self.torchcache_max_memory_cache_size = size

        def forward(self, x):
            return x + 1

    assert CachedModule(5e6).cache_instance.options.max_memory_cache_size == 5_000_000
    assert CachedModule().cache_instance.options.max_memory_cache_size == 1_000_000


# -- which instances ----------


@torchcache()
class Selective(nn.Module):
    def __init__(self, enabled):
        super().__init__()
        self.torchcache_enabled = enabled
        self.linear = nn.Linear(10, 10)

    def forward(self, x):
        return self.linear(x)


def test_instances_are_enabled_one_by_one():
    on, off = Selective(True), Selective(False)
    assert hasattr(on, "cache_instance")
    assert not hasattr(off, "cache_instance")
    x = torch.rand(4, 10)
    assert not on(x).requires_grad
    assert off(x).requires_grad
    assert torch.equal(off(x), off.linear(x))


def test_the_decorator_may_leave_it_to_the_instances():
    @torchcache(enabled=False)
    class CachedModule(nn.Module):
        def __init__(self, enabled=None):
            super().__init__()
            if enabled is not None:
                self.torchcache_enabled = enabled

        def forward(self, x):
            return x + 1

    assert not hasattr(CachedModule(), "cache_instance")
    assert hasattr(CachedModule(enabled=True), "cache_instance")


def test_an_instance_is_switched_at_run_time():
    module, computed = make_counted()
    x = torch.rand(4, 10)
    module(x)
    module.torchcache_enabled = False
    module(x)
    assert sum(computed) == 8
    assert not hasattr(module, "cache_instance")
    module.torchcache_enabled = True
    module(x)
    assert sum(computed) == 8
    assert module.cache_instance.stats().memory_hits == 4


def test_an_instance_that_started_switched_off_is_switched_on_at_run_time():
    module = Selective(False)
    x = torch.rand(4, 10)
    module(x)
    module.torchcache_enabled = True
    first = module(x)
    assert torch.equal(module(x), first)
    assert module.cache_instance.stats().memory_hits == 4


# -- what starts afresh ----------


def test_another_code_starts_afresh_and_the_old_code_finds_its_cache_again(cache_dir):
    old, _ = run_program(cache_dir)
    edited, computed = run_program(cache_dir, edit=("* self.scale", "+ self.scale"))
    assert computed == 8
    assert edited != old
    assert run_program(cache_dir) == (old, 0)
    assert run_program(cache_dir, edit=("* self.scale", "+ self.scale")) == (edited, 0)


def test_a_comment_does_not_start_afresh(cache_dir):
    old, _ = run_program(cache_dir)
    edit = ("    def forward", "\n    # A comment moves the lines.\n    def forward")
    assert run_program(cache_dir, edit=edit) == (old, 0)


@pytest.mark.parametrize(
    ("before", "after"),
    [("4", "5"), ("4", "features=5"), ("scale=2", "scale=3"), ("4, scale=2", "5, scale=2")],
    ids=["a position", "a keyword", "a keyword only", "one of two"],
)
def test_other_construction_arguments_start_afresh_and_the_old_ones_find_their_cache_again(cache_dir, before, after):
    old, _ = run_program(cache_dir, arguments=before)
    new, computed = run_program(cache_dir, arguments=after)
    assert computed == 8
    assert new != old
    assert run_program(cache_dir, arguments=before) == (old, 0)


def test_an_argument_is_the_same_by_position_and_by_keyword(cache_dir):
    old, _ = run_program(cache_dir, arguments="5")
    assert run_program(cache_dir, arguments="features=5") == (old, 0)


def test_other_parameters_are_computed_again_and_the_old_ones_find_their_cache_again(cache_dir):
    changed = "with torch.no_grad(): module.linear.weight.add_(1)"
    old, _ = run_program(cache_dir)
    same_hash, computed = run_program(cache_dir, then=changed)
    assert computed == 8
    assert same_hash == old, "weights are not part of the module hash"
    assert run_program(cache_dir) == (old, 0)
    assert run_program(cache_dir, then=changed) == (old, 0)


def test_parameters_that_change_while_the_program_runs_are_seen_at_once_and_found_again():
    module, computed = make_counted()
    x = torch.rand(4, 10)
    saved = {k: v.clone() for k, v in module.state_dict().items()}
    first = module(x)
    with torch.no_grad():
        module.linear.weight.mul_(2)
    second = module(x)
    assert not torch.equal(first, second)
    assert torch.equal(second, module.linear(x))
    rows = sum(computed)
    module.load_state_dict(saved)
    assert torch.equal(module(x), first)
    assert sum(computed) == rows


def test_a_version_starts_afresh():
    def hash_of(version):
        @torchcache(version=version)
        def add_one(x):
            return x + 1

        return add_one.cache_instance.module_hash

    assert len({hash_of(None), hash_of("1"), hash_of("2")}) == 3
    assert hash_of("1") == hash_of("1")


# -- a name of one's own ----------


def test_a_fixed_module_hash_names_the_directory(cache_dir):
    @torchcache(persistent=True, persistent_cache_dir=cache_dir, persistent_module_hash="minilm-v1")
    def add_one(x):
        return x + 1

    add_one(torch.rand(4, 10))
    assert add_one.cache_instance.module_hash == "minilm-v1"
    assert add_one.cache_instance.cache_dir == cache_dir / "minilm-v1"


def test_a_fixed_module_hash_survives_changes_of_code_arguments_and_parameters(cache_dir):
    def make(features, factor):
        @torchcache(persistent=True, persistent_cache_dir=cache_dir, persistent_module_hash="mine")
        class CachedModule(nn.Module):
            def __init__(self, features):
                super().__init__()
                self.linear = nn.Linear(10, features)

            def forward(self, x):
                return self.linear(x) * factor

        return CachedModule(features)

    x = torch.rand(4, 10)
    first_module = make(4, 1)
    first = first_module(x)
    first_module.cache_instance.close()
    second_module = make(4, 2)
    assert torch.equal(second_module(x), first)
    assert second_module.cache_instance.stats().misses == 0


def test_training_mode_and_autocast_count_under_a_fixed_module_hash():
    @torchcache(persistent_module_hash="mine")
    class CachedModule(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(10, 10)

        def forward(self, x):
            return self.linear(x) if self.training else -self.linear(x)

    module = CachedModule()
    x = torch.rand(4, 10)
    training = module(x)
    assert torch.equal(module.eval()(x), -training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_the_three_places_of_the_module_hash_agree(cache_dir, caplog):
    caplog.set_level(logging.INFO, logger="torchcache")

    @torchcache(persistent=True, persistent_cache_dir=cache_dir)
    class CachedModule(nn.Module):
        def forward(self, x):
            return x + 1

    module = CachedModule()
    module(torch.rand(4, 10))
    module.cache_instance.flush()
    module_hash = module.cache_instance.module_hash
    assert module.cache_instance.cache_dir == cache_dir / module_hash
    assert (cache_dir / module_hash).is_dir()
    lines = [r for r in caplog.records if module_hash in r.getMessage() and "CachedModule" in r.getMessage()]
    assert [r.levelname for r in lines] == ["INFO"]
