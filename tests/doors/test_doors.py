"""The doors: a class, a function, somebody else's module; and what stays as it was."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys
import threading
import typing
import warnings
from multiprocessing.reduction import ForkingPickler  # torch.multiprocessing adds what it does with tensors
from pathlib import Path

import pytest
import torch
from torch import nn

import torchcache as package
from torchcache import Cache, ConfigError, cache_of, disabled, torchcache


@torchcache()
class Documented(nn.Module):
    """A docstring."""

    def __init__(self, features: int = 4, *, scale: float = 1.0) -> None:
        """Make it."""
        super().__init__()
        self.linear = nn.Linear(10, features)
        self.scale = scale
        self.register_buffer("offset", torch.zeros(features))

    def forward(self, x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        """Compute it."""
        return self.linear(x) * self.scale + self.offset + shift


@torchcache()
def documented(x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    """Add it."""
    return x + shift


@torchcache()
class OldStyle(nn.Module):
    def __init__(self):
        super(OldStyle, self).__init__()  # noqa: UP008 - this is what must work
        self.linear = nn.Linear(10, 4)

    def forward(self, x):
        return self.linear(x)


class Foreign(nn.Module):
    """Stands for a module that somebody else wrote."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 4)

    def forward(self, x):
        return self.linear(x)


def batch():
    return torch.arange(40.0).reshape(4, 10)


def hits(target):
    stats = cache_of(target).stats()
    assert stats.bypasses == {}
    return stats.memory_hits


def is_cached(target):
    """Tell whether the second of two equal calls computes nothing."""
    x = torch.rand(3, 10)
    first = target(x)
    before = cache_of(target).stats()
    second = target(x)
    after = cache_of(target).stats()
    assert torch.equal(first, second)
    return after.misses == before.misses and after.memory_hits == before.memory_hits + 3


# -- a class keeps its face ----------


def test_a_class_is_returned_itself():
    class Module(nn.Module):
        def forward(self, x):
            return x + 1

    assert torchcache()(Module) is Module


def test_a_class_keeps_name_module_docstring_and_type():
    assert Documented.__name__ == Documented.__qualname__ == "Documented"
    assert Documented.__module__ == __name__
    assert Documented.__doc__ == "A docstring."
    assert type(Documented) is type
    assert Documented.__mro__[1] is nn.Module
    assert type(Documented()) is Documented


def test_methods_of_a_class_keep_name_docstring_and_signature():
    assert Documented.forward.__doc__ == "Compute it."
    assert Documented.forward.__qualname__ == "Documented.forward"
    assert Documented.__init__.__doc__ == "Make it."
    assert str(inspect.signature(Documented.forward)) == (
        "(self, x: 'torch.Tensor', shift: 'float' = 0.0) -> 'torch.Tensor'"
    )
    assert typing.get_type_hints(Documented.forward)["x"] is torch.Tensor


def test_the_signature_of_a_class_is_that_of_its_constructor():
    assert list(inspect.signature(Documented).parameters) == ["features", "scale"]
    assert inspect.signature(Documented).parameters["scale"].kind is inspect.Parameter.KEYWORD_ONLY


def test_wrong_construction_arguments_get_the_usual_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        Documented(wrong=1)


def test_a_function_keeps_name_module_docstring_and_signature():
    assert documented.__name__ == documented.__qualname__ == "documented"
    assert documented.__module__ == __name__
    assert documented.__doc__ == "Add it."
    assert list(inspect.signature(documented).parameters) == ["x", "shift"]
    assert pickle.loads(pickle.dumps(documented)) is documented


def test_an_instance_is_returned_itself_and_keeps_its_type():
    module = Foreign()
    assert torchcache()(module) is module
    assert type(module) is Foreign


def test_modules_of_the_class_of_a_decorated_instance_stay_uncached():
    torchcache()(Foreign())
    plain = Foreign()
    assert "forward" not in vars(plain)
    with pytest.raises(ConfigError):
        cache_of(plain)


def test_repr_and_named_modules_are_those_of_an_undecorated_module():
    decorated, plain = torchcache()(Foreign()), Foreign()
    assert repr(decorated) == repr(plain)
    assert [name for name, _ in decorated.named_modules()] == [name for name, _ in plain.named_modules()]


# -- torch's own doings stay untouched ----------


@pytest.fixture(params=["class", "instance"])
def module(request):
    torch.manual_seed(0)
    return Documented() if request.param == "class" else torchcache()(Foreign())


def test_the_state_dict_and_the_parameters_are_untouched(module):
    module(batch())
    names = [name for name, _ in module.named_parameters()]
    assert names == ["linear.weight", "linear.bias"]
    assert set(module.state_dict()) <= {*names, "offset"}
    assert module.load_state_dict(module.state_dict()) == ([], [])


def test_to_converts_and_the_converted_module_is_cached_anew(module):
    x = batch()
    single = module(x)
    assert module.to(torch.float64) is module
    double = module(x.double())
    assert double.dtype == torch.float64
    assert torch.allclose(double, single.double())
    assert torch.equal(module(x.double()), double)
    assert cache_of(module).stats().misses == 8


def test_train_and_eval_are_untouched(module):
    assert module.training
    assert module.eval() is module
    assert not module.training
    assert not module.linear.training
    assert module.train() is module
    assert module.linear.training


def test_hooks_on_the_module_run_on_hits_and_misses_alike(module):
    seen = []
    module.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    module.register_forward_hook(lambda _, args, output: seen.append((args[0].clone(), len(output))))
    module.register_forward_hook(lambda _module, _args, output: output * 10)
    x = batch()
    first, second = module(x), module(x)
    assert torch.equal(first, second)
    assert torch.equal(first, module.forward(x + 1) * 10)
    assert [n for _, n in seen] == [4, 4]
    assert all(torch.equal(seen_input, x + 1) for seen_input, _ in seen)
    assert hits(module) == 8


def test_a_backward_through_a_head_behind_a_cached_module_trains_the_head(module):
    head = nn.Linear(4, 2)
    for _ in range(2):
        head.zero_grad()
        head(module(batch())).sum().backward()
        assert head.weight.grad.abs().sum() > 0
    assert module.linear.weight.grad is None
    assert hits(module) == 4


# -- copies ----------


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.fixture(params=[copy.deepcopy, through_pickle, through_torch_save], ids=["deepcopy", "pickle", "torch.save"])
def make_copy(request):
    return request.param


def test_a_copy_computes_with_its_own_weights(module, make_copy):
    x = batch()
    before = module(x)
    twin = make_copy(module)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.linear.weight.add_(1)
    assert torch.equal(module(x), before)
    assert not torch.equal(twin(x), before)
    assert torch.equal(twin(x), twin.linear(x))


def test_a_copy_has_a_cache_of_its_own_with_the_same_name(module, make_copy):
    module(batch())
    twin = make_copy(module)
    assert cache_of(twin) is not cache_of(module)
    assert cache_of(twin).module_hash == cache_of(module).module_hash
    assert twin.cache_instance is cache_of(twin)
    assert is_cached(twin)


def test_a_copy_made_before_the_first_call_is_cached_too(module, make_copy):
    twin = make_copy(module)
    assert twin.cache_instance is cache_of(twin)
    assert is_cached(twin)


def test_a_copy_remembers_its_construction_arguments(make_copy):
    module = Documented(5, scale=2.0)
    twin = make_copy(module)
    assert cache_of(twin).module_hash == cache_of(module).module_hash
    assert cache_of(twin).module_hash != cache_of(Documented()).module_hash


def test_a_copy_finds_what_the_original_stored_on_disk(cache_dir, make_copy):
    module = torchcache(persistent=True, persistent_cache_dir=cache_dir)(Foreign())
    x = batch()
    result = module(x)
    assert cache_of(module).flush()
    twin = make_copy(module)
    assert torch.equal(twin(x), result)
    assert cache_of(twin).stats().store_hits == 4


def test_a_model_that_contains_a_cached_module_is_copied(make_copy):
    model = nn.Sequential(Documented(10), torchcache()(Foreign()))
    model(batch())
    twin = make_copy(model)
    with torch.no_grad():
        twin[0].linear.weight.add_(1)
        twin[1].linear.weight.add_(1)
    x = batch()
    assert torch.equal(twin(x), twin[1].linear(twin[0].linear(x)))
    assert is_cached(twin[0])


def test_a_shallow_copy_computes_what_the_original_computes(module):
    twin = copy.copy(module)
    assert torch.equal(twin(batch()), module(batch()))


def test_a_decorated_module_is_freed_when_its_user_lets_it_go():
    import gc
    import weakref

    for make in (Documented, lambda: torchcache()(Foreign())):
        module = make()
        module(batch())
        gone = weakref.ref(module)
        del module
        gc.collect()
        assert gone() is None


# -- every door: what turns it off and on, and what copies of a module compute ----------


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 4).requires_grad_(False)

    def forward(self, x):
        return self.linear(x)

    def encode(self, x):
        return self.linear(x)


@torchcache()
class ByClass(Body):
    pass


class ByMethod(Body):
    @torchcache()
    def encode(self, x):
        return self.linear(x)


class OfInstance(Body):
    """Is decorated, or has a method that is, when it is made."""


def by_assigned_method():
    module = OfInstance()
    module.encode = torchcache()(module.encode)
    return module


#: How to make a module, and what of it is called.
DOORS = {
    "class": (ByClass, lambda module: module),
    "instance": (lambda: torchcache()(OfInstance()), lambda module: module),
    "method": (ByMethod, lambda module: module.encode),
    "assigned method": (by_assigned_method, lambda module: module.encode),
}


@pytest.fixture(params=DOORS)
def door(request):
    make, entry = DOORS[request.param]
    torch.manual_seed(0)
    return request.param, make(), entry


def is_off(target):
    """Tell whether a target computes at each call, as if it were not decorated."""
    first, second = target(torch.ones(10)), target(torch.ones(10))  # a batch of none, which a cache would refuse
    assert torch.equal(first, second)
    with pytest.raises(ConfigError, match="has no cache"):
        cache_of(target)
    return not hasattr(target, "cache_instance")


def test_an_attribute_of_the_class_turns_every_door_off_and_on(door, monkeypatch):
    _, module, entry = door
    monkeypatch.setattr(type(module), "torchcache_enabled", False, raising=False)
    assert is_off(entry(module))
    monkeypatch.setattr(type(module), "torchcache_enabled", True)
    assert is_cached(entry(module))


def test_an_attribute_of_the_instance_wins_at_every_door(door, monkeypatch):
    _, module, entry = door
    monkeypatch.setattr(type(module), "torchcache_enabled", False, raising=False)
    module.torchcache_enabled = True
    assert is_cached(entry(module))
    monkeypatch.setattr(type(module), "torchcache_enabled", True)
    module.torchcache_enabled = False
    assert is_off(entry(module))


def test_what_a_door_knew_is_there_when_it_is_turned_on_again(door):
    _, module, entry = door
    x = batch()
    before = entry(module)(x)
    module.torchcache_enabled = False
    assert is_off(entry(module))
    module.torchcache_enabled = True
    assert torch.equal(entry(module)(x), before)
    assert hits(entry(module)) == 4


@pytest.mark.parametrize("make", [property, functools.cached_property], ids=["property", "cached"])
def test_an_attribute_may_be_a_property_at_every_door(door, make, monkeypatch):
    _, module, entry = door
    answers = [True]

    def torchcache_enabled(self):
        assert self is module
        return answers[-1]

    attribute = make(torchcache_enabled)
    if make is functools.cached_property:
        attribute.__set_name__(type(module), "torchcache_enabled")
    monkeypatch.setattr(type(module), "torchcache_enabled", attribute, raising=False)
    assert is_cached(entry(module))
    answers.append(False)
    if make is property:
        assert is_off(entry(module))
        answers.append("no")
        with pytest.raises(ConfigError, match="enabled='no' must be True or False"):
            entry(module)(batch())


def test_an_attribute_that_is_neither_true_nor_false_is_refused_at_every_door(door):
    _, module, entry = door
    entry(module)(batch())
    module.torchcache_enabled = "no"
    with pytest.raises(ConfigError, match="enabled='no' must be True or False"):
        entry(module)(batch())


def test_options_that_attributes_set_later_are_checked_together_at_every_door(door):
    _, module, entry = door
    module.torchcache_zstd_compression = True
    with pytest.raises(ConfigError, match="zstd_compression=True has no effect without persistent=True"):
        entry(module)(batch())


def replicated(module):
    """Return what ``nn.DataParallel`` makes on each device."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, copy.deepcopy(child))
    return replica


def copied(module):
    twin = copy.copy(module)
    vars(twin)["_modules"] = copy.deepcopy(module._modules)  # or both had the same linear
    return twin


def sent(module):
    """Return what a process gets that torch.multiprocessing sends a module with weights in shared memory."""
    return pickle.loads(bytes(ForkingPickler.dumps(module.share_memory())))


COPIES = {"replica": replicated, "copy": copied, "deepcopy": copy.deepcopy, "pickle": through_pickle, "sent": sent}

#: What of an instance alone is cached does not go with a shallow copy.
NOT_CACHED = {(door, "replica") for door in DOORS} | {("instance", "copy"), ("assigned method", "copy")}


@pytest.mark.parametrize("copying", COPIES)
@pytest.mark.parametrize("is_called_before", [True, False], ids=["called before", "new"])
def test_every_copy_of_a_module_computes_with_its_own_weights(door, copying, is_called_before):
    name, module, entry = door
    x = batch()
    torch.manual_seed(0)
    plain = Body()
    before = entry(plain)(x)
    if is_called_before:
        assert torch.equal(entry(module)(x), before)
    twin, plain_twin = COPIES[copying](module), COPIES[copying](plain)
    for changed in (twin, plain_twin):
        changed.linear.weight.data += 1
    assert not torch.equal(entry(plain_twin)(x), before) or copying == "sent"
    for _ in range(2):
        assert torch.equal(entry(twin)(x), entry(plain_twin)(x))
        assert torch.equal(entry(module)(x), entry(plain)(x))
    if (name, copying) in NOT_CACHED:
        assert is_off(entry(twin))
    else:
        assert is_cached(entry(twin))
        assert cache_of(entry(twin)) is not cache_of(entry(module))
    assert is_cached(entry(module))
    assert not {"forward", "encode", "cache_instance"} & vars(plain).keys()


def test_a_shallow_copy_may_be_decorated_and_copied_in_turn():
    module = torchcache()(OfInstance())
    twin = torchcache()(copy.copy(module))
    assert is_cached(twin)
    again = copy.deepcopy(twin)
    assert is_cached(again)
    assert vars(again)["forward"] is not vars(twin)["forward"] is not vars(module)["forward"]


def test_a_shallow_copy_keeps_the_forward_that_its_instance_had():
    module = OfInstance()
    module.forward = lambda x: x * 2
    assert torch.equal(copy.copy(torchcache()(module))(batch()), batch() * 2)


def test_a_state_of_its_own_is_copied_as_the_class_says():
    class Own(Body):
        def __getstate__(self):
            return {**vars(self), "seen": True}

    module = torchcache()(Own())
    for twin in (copy.copy(module), copy.deepcopy(module)):
        assert twin.seen
        assert torch.equal(twin(batch()), module(batch()))


def test_copies_that_data_parallel_makes_are_said_once(door, caplog):
    _, module, entry = door
    for _ in range(2):
        replica = replicated(module)
        assert torch.equal(entry(replica)(batch()), replica.linear(batch()))
    assert caplog.text.count("nn.DataParallel makes copies of the module for each call") == 1


def test_the_hooks_for_copies_count_in_no_key():
    module = torchcache()(OfInstance())
    module(batch())
    described = [name for name, _ in cache_of(module)._core.identity.describe()]
    assert "state linear.in_features" in described, described
    assert not [name for name in described if "__getstate__" in name or "_replicate" in name]


# -- inheritance ----------


def test_super_with_the_class_itself_does_not_recurse():
    assert is_cached(OldStyle())


def test_an_undecorated_subclass_is_cached_and_its_arguments_count():
    class Below(Documented):
        def __init__(self, times):
            super().__init__()
            self.times = times

    assert is_cached(Below(2))
    assert cache_of(Below(2)).module_hash != cache_of(Below(3)).module_hash
    assert cache_of(Below(2)).module_hash == cache_of(Below(times=2)).module_hash
    assert cache_of(Below(2)).module_hash != cache_of(Documented()).module_hash


def test_an_undecorated_subclass_with_a_forward_of_its_own_caches_what_super_returns():
    class Below(Documented):
        def forward(self, x, shift=0.0):
            return super().forward(x, shift) * 100

    module = Below()
    x = batch()
    expected = module.linear(x) * 100
    assert torch.equal(module(x), expected)
    assert torch.equal(module(x), expected)
    assert hits(module) == 4


def test_a_decorated_subclass_of_a_plain_base_is_cached():
    class Base(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor

    @torchcache()
    class Below(Base):
        def forward(self, x):
            return super().forward(x) + 1

    module = Below(3)
    x = batch()
    assert torch.equal(module(x), x * 3 + 1)
    assert is_cached(module)


def test_base_and_subclass_both_decorated_share_one_cache_an_instance():
    calls = []

    @torchcache(cache_dtype=torch.half)
    class Base(nn.Module):
        def __init__(self, factor=1.0):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            calls.append("base")
            return x / 3 * self.factor

    @torchcache(check_rows=False)
    class Below(Base):
        def forward(self, x):
            calls.append("below")
            return super().forward(x) + 1

    module = Below()
    x = batch()
    expected = x / 3 + 1
    assert torch.equal(module(x), expected), "the outer options count, the inner call passes through"
    assert torch.equal(module(x), expected)
    assert calls == ["below", "base"]
    assert cache_of(module).stats().misses == 4
    assert torch.equal(Base()(x), (x / 3).half().float())
    assert cache_of(Below(2.0)).module_hash != cache_of(module).module_hash


def test_the_forward_of_a_decorated_base_called_by_name_gives_its_own_results():
    @torchcache()
    class Base(nn.Module):
        def forward(self, x):
            return x + 1

    @torchcache()
    class Below(Base):
        def forward(self, x):
            return x + 2

    module = Below()
    x = batch()
    for _ in range(2):
        assert torch.equal(module(x), x + 2)
        assert torch.equal(Base.forward(module, x), x + 1)


def test_a_diamond_runs_every_constructor_and_forward_once():
    order = []

    @torchcache()
    class Top(nn.Module):
        def __init__(self):
            super().__init__()
            order.append("top")

        def forward(self, x):
            return x + 1

    @torchcache()
    class Left(Top):
        def __init__(self):
            super().__init__()
            order.append("left")

        def forward(self, x):
            return super().forward(x) * 2

    class Right(Top):
        def __init__(self):
            super().__init__()
            order.append("right")

        def forward(self, x):
            return super().forward(x) + 10

    @torchcache()
    class Bottom(Left, Right):
        def __init__(self):
            super().__init__()
            order.append("bottom")

    module = Bottom()
    assert order == ["top", "right", "left", "bottom"]
    x = batch()
    assert torch.equal(module(x), (x + 1 + 10) * 2)
    assert is_cached(module)


def test_a_class_without_its_own_forward_and_constructor_follows_the_order_of_its_bases():
    class Base(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor

    class Mixin(nn.Module):
        def forward(self, x):
            return super().forward(x) + 1

    @torchcache()
    class Empty(Base):
        pass

    class Mixed(Empty, Mixin, Base):
        pass

    class MixedFirst(Mixin, Empty):
        pass

    x = batch()
    for module, expected in ((Empty(2), x * 2), (Mixed(2), x * 2 + 1), (MixedFirst(2), x * 2 + 1)):
        assert torch.equal(module(x), expected)
        assert torch.equal(module(x), expected)
        assert hits(module) == 4


def test_a_forward_that_the_base_gets_later_is_used():
    class Base(nn.Module):
        def forward(self, x):
            return x + 1

    @torchcache()
    class Empty(Base):
        pass

    Base.forward = lambda _self, x: x + 5
    x = batch()
    assert torch.equal(Empty()(x), x + 5)


def test_a_class_with_a_new_of_its_own_is_cached():
    @torchcache()
    class Module(nn.Module):
        def __new__(cls, factor):
            instance = super().__new__(cls)
            vars(instance)["made_with"] = factor
            return instance

        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor

    module = Module(3)
    assert module.made_with == 3
    assert is_cached(module)
    assert cache_of(module).module_hash != cache_of(Module(4)).module_hash


def test_attributes_may_be_set_before_the_constructor_of_torch_ran():
    @torchcache()
    class Early(nn.Module):
        def __init__(self, factor):
            self.factor = factor
            super().__init__()

        def forward(self, x):
            return x * self.factor

    assert is_cached(Early(2))


def test_an_instance_with_a_forward_of_its_own_is_cached_with_that_forward():
    module = Foreign()
    module.forward = lambda x: module.linear(x) + 7
    torchcache()(module)
    x = batch()
    assert torch.equal(module(x), module.linear(x) + 7)
    assert is_cached(module)


# -- finding the cache ----------


def test_cache_of_returns_the_cache_of_every_door(module):
    assert isinstance(cache_of(module), Cache)
    assert cache_of(module) is module.cache_instance
    assert cache_of(documented) is documented.cache_instance


@pytest.mark.parametrize("target", [Documented, nn.Linear(2, 2), lambda x: x, 3, None])
def test_cache_of_something_without_a_cache_says_so(target):
    with pytest.raises(ConfigError, match="has no cache"):
        cache_of(target)


def test_cache_of_a_class_asks_for_an_instance():
    with pytest.raises(ConfigError, match="ask an instance"):
        cache_of(Documented)


def test_a_disabled_instance_has_no_cache_instance(module):
    module.torchcache_enabled = False
    with pytest.raises(ConfigError, match="not enabled"):
        cache_of(module)
    module(batch())
    assert not hasattr(module, "cache_instance")
    module.torchcache_enabled = True
    module(batch())
    assert module.cache_instance is cache_of(module)


def test_an_instance_that_was_disabled_before_it_was_decorated_has_no_cache_instance():
    module = Foreign()
    module.torchcache_enabled = False
    assert not hasattr(torchcache()(module), "cache_instance")
    assert not hasattr(torchcache(enabled=False)(Foreign()), "cache_instance")


def test_a_disabled_instance_computes_as_if_undecorated(module):
    module.torchcache_enabled = False
    assert module(batch()).requires_grad
    assert module(torch.ones(10)).shape == (4,), "a single vector is nothing the cache would take"


def test_a_disabled_function_is_left_alone():
    def function(x):
        return x

    assert torchcache(enabled=False)(function) is function


def test_a_member_named_cache_instance_stays_the_users():
    @torchcache()
    class Module(nn.Module):
        def cache_instance(self):
            return "mine"

        def forward(self, x):
            return x + 1

    assert Module().cache_instance() == "mine"
    assert is_cached(Module())


# -- turning it off ----------


def test_inside_disabled_nothing_is_looked_up_stored_or_detached(module):
    with disabled():
        assert module(batch()).requires_grad
        assert module(torch.ones(10)).shape == (4,)
    assert cache_of(module).stats().misses == 0
    assert is_cached(module)


def test_disabled_ends_with_its_block_even_after_an_error(module):
    with pytest.raises(ZeroDivisionError), disabled():
        _ = 1 / 0
    assert is_cached(module)


def test_disabled_may_be_nested(module):
    with disabled(), disabled():
        pass
    assert is_cached(module)
    with disabled():
        with disabled():
            pass
        assert module(batch()).requires_grad


def test_disabled_concerns_its_own_thread_only(module):
    results = []
    with disabled():
        thread = threading.Thread(target=lambda: results.append(module(batch()).requires_grad))
        thread.start()
        thread.join()
    assert results == [False]


@pytest.mark.parametrize(("value", "is_off"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_environment_turns_everything_off(module, monkeypatch, value, is_off):
    monkeypatch.setenv("TORCHCACHE_DISABLED", value)
    assert module(batch()).requires_grad == is_off
    assert cache_of(module).stats().misses == (0 if is_off else 4)


# -- refusals ----------


@pytest.mark.parametrize("cls", [nn.Linear, nn.Module, nn.Sequential])
def test_torchs_own_class_is_refused(cls):
    before = vars(cls).copy()
    with pytest.raises(ConfigError, match=r"torch's own class .*subclass.*instance"):
        torchcache()(cls)
    assert dict(vars(cls)) == before


def test_a_class_that_is_no_module_is_refused():
    class Plain:
        pass

    with pytest.raises(ConfigError, match=r"Plain.*no nn\.Module; decorate its methods"):
        torchcache()(Plain)


@pytest.mark.parametrize("target", [3, "forward", None, len, torch.rand(2, 2)])
def test_what_is_neither_module_nor_function_is_refused(target):
    with pytest.raises(ConfigError, match="cannot decorate"):
        torchcache()(target)


def test_missing_parentheses_are_named_on_a_class():
    with pytest.raises(ConfigError, match=r"parentheses.*@torchcache\(\)"):

        @torchcache
        class Module(nn.Module):
            pass


def test_missing_parentheses_are_named_on_a_function_and_on_a_module():
    with pytest.raises(ConfigError, match="parentheses"):
        torchcache(lambda x: x)
    with pytest.raises(ConfigError, match="parentheses"):
        torchcache(nn.Linear(2, 2))


def test_a_function_that_returns_before_it_has_computed_is_refused():
    async def coroutine(x):
        return x

    def generator(x):
        yield x

    async def generator_of_both_kinds(x):
        yield x

    for function in (coroutine, generator, generator_of_both_kinds):
        with pytest.raises(ConfigError, match="async or generator"):
            torchcache()(function)


def test_decorating_twice_is_refused_at_every_door():
    for make in (lambda: Documented, lambda: documented, lambda: torchcache()(Foreign()), Documented):
        with pytest.raises(ConfigError, match="already"):
            torchcache()(make())


def test_a_scripted_module_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Foreign())
    with pytest.raises(ConfigError, match="Python"):
        torchcache()(scripted)


def test_a_refused_target_is_left_as_it_was():
    class Plain:
        pass

    before = dict(vars(Plain))
    with pytest.raises(ConfigError):
        torchcache()(Plain)
    assert dict(vars(Plain)) == before


def test_wrong_use_is_a_value_error_and_a_type_error():
    for kind in (ValueError, TypeError, package.TorchcacheError):
        with pytest.raises(kind):
            torchcache()(3)


# -- construction ----------


class Opaque:
    """An object that is known by its address only."""


def unseen():
    """Return something that has no value which can be seen."""
    return (i for i in ())


def test_an_argument_without_a_stable_name_is_warned_about_and_named():
    @torchcache()
    class Module(nn.Module):
        def __init__(self, tokenizer):
            super().__init__()
            self.tokenizer = tokenizer

        def forward(self, x):
            return x + 1

    with pytest.warns(UserWarning, match=r"'tokenizer'.*generator.*persistent_module_hash") as caught:
        module = Module(unseen())
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at the construction"
    module(batch())
    assert cache_of(module).stats().bypasses == {"opaque_state": 1}, "it may be consumed at any time"


def test_a_module_with_an_unnamed_argument_is_cached_for_this_process_only(cache_dir):
    @torchcache(persistent=True, persistent_cache_dir=cache_dir)
    class Module(nn.Module):
        def __init__(self, tokenizer):
            super().__init__()

        def forward(self, x):
            return x + 1

    with pytest.warns(UserWarning, match="stable name"):
        first, second = Module(unseen()), Module(unseen())
    assert cache_of(first).module_hash != cache_of(second).module_hash
    first(batch())
    assert not cache_of(first).cache_dir.is_relative_to(cache_dir)


def test_an_unnamed_argument_does_not_matter_under_a_name_of_ones_own(cache_dir):
    @torchcache(persistent=True, persistent_cache_dir=cache_dir, persistent_module_hash="mine")
    class Module(nn.Module):
        def __init__(self, tokenizer):
            super().__init__()

        def forward(self, x):
            return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = Module(unseen())
    assert cache_of(module).cache_dir == cache_dir / "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        (3, 3.0),
        (True, 1),
        ("a", b"a"),
        ((1, 2), [1, 2]),
        ({"a": 1}, {"a": 2}),
        (torch.zeros(3), torch.zeros(3, dtype=torch.half)),
        (torch.zeros(3), torch.ones(3)),
        (torch.float32, torch.float16),
        (nn.ReLU(), nn.GELU()),
        (nn.Linear(2, 3), nn.Linear(2, 4)),
        (nn.ReLU, nn.GELU),
        (torch.relu, torch.tanh),
        (lambda x: x + 1, lambda x: x + 2),
        (None, 0),
    ],
    ids=lambda pair: " or ".join(type(value).__name__ for value in pair),
)
def test_construction_arguments_count_by_type_and_value(arguments):
    @torchcache()
    class Module(nn.Module):
        def __init__(self, value, *rest, **named):
            super().__init__()

        def forward(self, x):
            return x

    a, b = arguments
    hashes = [
        cache_of(Module(*args, **kwargs)).module_hash
        for args, kwargs in [((a,), {}), ((b,), {}), ((0, a), {}), ((0, b), {}), ((0,), {"n": a}), ((0,), {"n": b})]
    ]
    assert len(set(hashes)) == 6
    assert cache_of(Module(a)).module_hash == hashes[0]


def test_construction_arguments_are_noted_as_they_were_given():
    @torchcache()
    class Module(nn.Module):
        def __init__(self, sizes):
            super().__init__()
            sizes.append(9)

        def forward(self, x):
            return x

    assert cache_of(Module([1])).module_hash == cache_of(Module([1])).module_hash
    assert cache_of(Module([1])).module_hash != cache_of(Module([1, 9])).module_hash


def test_the_cache_is_built_after_the_constructor_and_sees_what_it_set():
    @torchcache()
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.torchcache_version = "7"

        def forward(self, x):
            return x

    assert cache_of(Module()).options.version == "7"


def test_a_module_may_be_called_in_its_own_constructor():
    @torchcache()
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(10, 4)
            with torch.no_grad():
                self.features = self(torch.zeros(1, 10)).shape[1]

        def forward(self, x):
            return self.linear(x)

    module = Module()
    assert module.features == 4
    assert is_cached(module)


# -- other ways to run a module ----------


def test_tracing_sees_the_undecorated_module(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, batch())
    assert traced(batch()).requires_grad
    assert torch.equal(traced(batch() + 1), module(batch() + 1))


def test_export_sees_the_undecorated_module(module):
    exported = torch.export.export(module, (batch(),)).module()
    assert exported(batch()).requires_grad
    assert torch.equal(exported(batch()), module(batch()))


def test_a_spawned_process_gets_the_same_module(tmp_path):
    module = Documented(4, scale=2.0)
    torch.save(module, tmp_path / "module.pt")
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
import importlib.util
spec = importlib.util.spec_from_file_location({__name__!r}, {__file__!r})
sys.modules[{__name__!r}] = test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test)
module = test.torch.load({str(tmp_path / "module.pt")!r}, weights_only=False)
print(module.cache_instance.module_hash)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == [cache_of(module).module_hash]
