"""Methods: written in a class, or of somebody else's object; each caches for its instance."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import multiprocessing
import pickle
import pydoc
import warnings
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from tests.processes.cached import Towers, encode_in_a_process
from torchcache import CachedFunction, ConfigError, UncacheableError, cache_of, disabled, torchcache


class Embedder:
    """Stands for a plain class that holds a model and numbers."""

    def __init__(self, scale=2.0, **attributes):
        self.model = nn.Linear(10, 4)
        for parameter in self.model.parameters():
            parameter.data = torch.arange(parameter.numel()).reshape(parameter.shape).float()
        self.scale = scale
        self.calls = 0
        vars(self).update(attributes)

    @torchcache()
    def embed(self, x):
        self.calls += 1
        return self.model(x) * self.scale

    def embed_twice(self, x):
        return self.model(x) * self.scale * 2


class Slotted:
    __slots__ = ("__weakref__", "bias", "scale")

    def __init__(self, scale):
        self.scale = scale

    @torchcache()
    def embed(self, x):
        return x * self.scale + getattr(self, "bias", 0)


def batch():
    return torch.arange(40.0).reshape(4, 10)


def counts(method):
    stats = cache_of(method).stats()
    assert stats.bypasses == {}
    return stats.misses, stats.memory_hits


def key_of(method):
    explanation = cache_of(method).explain(batch())
    return explanation.module_hash, explanation.namespace


def is_cached(method):
    """Tell whether the second of two equal calls computes nothing, and gives the same."""
    x = torch.rand(3, 10)
    first, before = method(x), cache_of(method).stats()
    second, after = method(x), cache_of(method).stats()
    assert torch.equal(first, second)
    return after.misses == before.misses and after.memory_hits == before.memory_hits + 3


@pytest.fixture(params=["in a class", "of an object", "assigned back"])
def method(request):
    """A cached method of a module, which is its ``__self__``."""
    if request.param == "in a class":
        return Towers().encode_image
    towers = Towers()
    if request.param == "of an object":
        return torchcache()(towers.get_text_features)
    towers.get_text_features = torchcache()(towers.get_text_features)
    return towers.get_text_features


# -- a cached method is a method ----------


def test_a_method_is_cached_and_returns_what_it_returned_before(method):
    x = batch()
    expected = method.__wrapped__(x)
    assert torch.equal(method(x), expected)
    assert torch.equal(method(x[[2, 0]]), expected[[2, 0]])
    assert counts(method) == (4, 2)


def test_each_method_of_an_instance_has_a_cache_of_its_own():
    towers = Towers()
    x = batch()
    assert not torch.equal(towers.encode_image(x), towers.encode_text(x))
    assert counts(towers.encode_image) == counts(towers.encode_text) == (4, 0)
    assert cache_of(towers.encode_image) is not cache_of(towers.encode_text)
    assert cache_of(towers.encode_image).module_hash != cache_of(towers.encode_text).module_hash


def test_each_instance_has_a_cache_of_its_own():
    one, two = Towers(), Towers(factor=2.0)
    x = batch()
    assert torch.equal(one.encode_image(x) * 2, two.encode_image(x))
    assert counts(one.encode_image) == counts(two.encode_image) == (4, 0)


def test_the_cache_is_found_at_the_method_of_an_instance():
    towers = Towers()
    assert towers.encode_image.cache_instance is cache_of(towers.encode_image)
    assert towers.encode_image.cache_instance is Towers.encode_image.__get__(towers).cache_instance
    assert repr(cache_of(towers.encode_image)) == "<torchcache.Cache of Towers.encode_image>"


def test_a_method_without_an_instance_has_no_cache():
    with pytest.raises(ConfigError, match=r"Towers\.encode_image has no cache.*ask an instance"):
        cache_of(Towers.encode_image)
    with pytest.raises(AttributeError, match="ask an instance"):
        _ = Towers.encode_image.cache_instance


def test_a_method_keeps_name_docstring_and_signature():
    towers = Towers()
    for found in (Towers.encode_image, towers.encode_image):
        assert found.__name__ == "encode_image"
        assert found.__doc__ == "Encode images."
    assert Towers.encode_image.__qualname__ == "Towers.encode_image"
    assert Towers.encode_image.__module__ == Towers.__module__
    assert list(inspect.signature(Towers.encode_image).parameters) == ["self", "x", "shift"]
    assert list(inspect.signature(towers.encode_image).parameters) == ["x", "shift"]
    assert "encode_image(self, x: 'torch.Tensor', shift: 'float' = 0.0)" in pydoc.plain(pydoc.render_doc(Towers))


def test_a_method_equals_itself_and_no_other():
    towers = Towers()
    assert towers.encode_image == towers.encode_image
    assert len({towers.encode_image, towers.encode_image, towers.encode_text, Towers().encode_image}) == 3
    assert towers.encode_image != towers.get_text_features
    assert towers.encode_image.__self__ is towers


def test_a_method_may_be_called_through_its_class():
    towers = Towers()
    towers.encode_image(batch())
    assert torch.equal(Towers.encode_image(towers, batch()), towers.encode_image(batch()))
    assert counts(towers.encode_image) == (4, 8)


def test_a_cached_method_of_an_object_keeps_the_object_alive():
    method = torchcache()(Towers().get_text_features)
    gc.collect()
    assert is_cached(method)


@pytest.mark.parametrize("make", [Towers, Embedder])
def test_an_object_is_freed_when_its_user_lets_it_go(make):
    instance = make()
    decorated = instance.encode_image if make is Towers else instance.embed
    decorated(batch())
    gone = weakref.ref(instance)
    del instance, decorated
    gc.collect()
    assert gone() is None


def test_a_new_object_has_a_new_cache_wherever_it_lies_in_memory():
    for scale in range(50):
        slotted = Slotted(scale)
        assert torch.equal(slotted.embed(batch()), batch() * scale)
        assert counts(slotted.embed) == (4, 0)


def test_an_object_is_freed_although_a_cached_method_was_assigned_back():
    class Plain(nn.Module):
        def encode(self, x):
            return x + 1

    module = Plain()
    module.encode = torchcache()(module.encode)
    module.encode(batch())
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


# -- what counts ----------


def test_arguments_count_beside_the_samples(method):
    towers = Towers()
    x = batch()
    assert torch.equal(towers.encode_image(x, 1.0), towers.encode_image(x) + 1)
    assert torch.equal(towers.encode_image(x, shift=1.0), towers.encode_image(x) + 1)
    assert counts(towers.encode_image) == (8, 8)


def test_changed_weights_are_noticed(method):
    x = batch()
    before = method(x)
    with torch.no_grad():
        for parameter in method.__self__.parameters():
            parameter.add_(1)
    assert not torch.equal(method(x), before)
    assert torch.equal(method(x), method.__wrapped__(x))


def test_instances_with_equal_state_have_equal_keys_and_others_do_not():
    assert key_of(Towers().encode_image) == key_of(Towers().encode_image)
    assert key_of(Towers().encode_image) != key_of(Towers(factor=2.0).encode_image)
    assert key_of(Embedder(3.0).embed) == key_of(Embedder(3.0).embed)
    assert key_of(Embedder(3.0).embed) != key_of(Embedder(2.0).embed)


def test_the_mode_of_the_module_counts():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        @torchcache()
        def encode(self, x):
            return self.dropout(x)

    module = Noisy()
    module.encode(batch())
    assert cache_of(module.encode).stats().bypasses == {"dropout_in_training_mode": 1}
    assert is_cached(module.eval().encode)


def test_hooks_on_the_module_count_where_the_method_calls_it():
    class Model(nn.Module):
        def forward(self, x):
            return x + 1

        @torchcache()
        def encode(self, x):
            return self(x) * 2

    module = Model()
    x = batch()
    assert torch.equal(module.encode(x), (x + 1) * 2)
    module.register_forward_hook(lambda _module, _args, output: output + 100)
    assert torch.equal(module.encode(x), (x + 101) * 2)


def test_the_code_of_what_a_method_calls_counts():
    def make(amount):
        class Model(nn.Module):
            @torchcache()
            def encode(self, x):
                return self.helper(x)

            def helper(self, x):
                return x + amount

        return Model().encode

    assert key_of(make(1)) == key_of(make(1))
    assert key_of(make(1)) != key_of(make(2))


def test_what_a_method_writes_itself_does_not_count():
    towers = Towers()
    for i in range(6):
        towers.encode_image(batch() + i)
    assert towers.calls == 6 + 1, "a few rows of the first batch are computed once more"
    assert counts(towers.encode_image) == (24, 0)
    towers.encode_image(batch())
    assert towers.calls == 6 + 1


def test_what_a_method_under_another_name_writes_itself_does_not_count():
    def encode(self, x):
        self.calls += 1
        return x + self.offset

    class Model(nn.Module):
        calls, offset = 0, 1
        run = torch.no_grad()(encode)

    module = Model()
    method = torchcache()(module.run)
    for i in range(6):
        method(batch() + i)
    assert counts(method) == (24, 0)
    module.offset = 2
    assert torch.equal(method(batch()), batch() + 2)


def test_a_method_has_the_same_key_however_it_is_decorated():
    def make(decorator):
        class Model(nn.Module):
            @decorator
            def encode(self, x):
                return x + 1

        return Model()

    assigned = make(lambda method: method)
    assigned.encode = torchcache()(assigned.encode)
    assert key_of(assigned.encode) == key_of(torchcache()(make(lambda method: method).encode))
    assert key_of(assigned.encode) == key_of(make(torchcache()).encode)


def test_assigning_a_cached_method_back_does_not_change_the_modules_own_key():
    class Plain(nn.Module):
        def forward(self, x):
            return self.encode(x)

        def encode(self, x):
            return x + 1

    plain, assigned = torchcache()(Plain()), torchcache()(Plain())
    before = key_of(assigned)
    assigned.encode = torchcache()(assigned.encode)
    assert key_of(assigned) == before == key_of(plain)
    assert torch.equal(assigned(batch()), batch() + 1)
    assert is_cached(assigned)


def test_another_method_of_the_module_in_an_attribute_counts():
    class Plain(nn.Module):
        def first(self, x):
            return x + 1

        def second(self, x):
            return x + 2

        @torchcache()
        def encode(self, x):
            return self.chosen(x)

    module = Plain()
    x = batch()
    for chosen, expected in ((module.first, x + 1), (module.second, x + 2)):
        module.chosen = torchcache()(chosen)
        assert torch.equal(module.encode(x), expected)


def test_gradients_and_disabled_are_as_for_modules(method):
    method.__self__.requires_grad_(True)
    assert not method(batch()).requires_grad
    with disabled():
        assert method(batch()).requires_grad
    x = batch().requires_grad_()
    assert method(x).requires_grad
    assert cache_of(method).stats().bypasses == {"input_requires_grad": 1}


def test_explain_names_what_the_key_is_made_of(method):
    method(batch())
    explanation = cache_of(method).explain(batch())
    assert explanation.target == f"Towers.{method.__name__}"
    assert {sample.found_in for sample in explanation.samples} == {"memory"}
    assert "weights vision.weight" in explanation.parts


# -- objects that are no modules ----------


def test_a_method_of_a_plain_object_is_cached():
    embedder = Embedder()
    assert is_cached(embedder.embed)
    assert embedder.calls == 1 + 1, "a few rows are computed once more"
    assert is_cached(torchcache()(embedder.embed_twice))


@pytest.mark.parametrize(
    "change",
    [
        lambda embedder: setattr(embedder, "scale", 3.0),
        lambda embedder: embedder.model.weight.data.mul_(2),
        lambda embedder: setattr(embedder, "model", nn.Linear(10, 4)),
        lambda embedder: embedder.table.append(5),
        lambda embedder: embedder.table[0].update(b=2),
        lambda embedder: setattr(embedder, "new", 1),
    ],
    ids=["number", "weight", "model", "list", "list inside", "new attribute"],
)
def test_a_change_of_a_plain_object_is_noticed(change):
    embedder = Embedder(table=[{"a": 1}])
    embedder.embed(batch())
    before = key_of(embedder.embed)
    change(embedder)
    assert torch.equal(embedder.embed(batch()), embedder.embed.__wrapped__(batch()))
    assert key_of(embedder.embed) != before


def test_an_attribute_that_leads_back_to_a_plain_object_changes_nothing():
    embedder, other = Embedder(), Embedder()
    for each in (embedder, other):
        each.myself, each.hook = each, each.embed_twice
    for i in range(6):
        embedder.embed(batch() + i)
    assert counts(embedder.embed) == (24, 0)
    assert key_of(embedder.embed) == key_of(other.embed), "the number of calls does not count"


def test_parameters_in_a_plain_object_are_asked_whether_they_require_grad(caplog):
    Embedder().embed(batch())
    assert "parameters require grad" in caplog.text


def test_slots_of_a_plain_object_count():
    one, x = Slotted(2), batch()
    assert torch.equal(one.embed(x), x * 2)
    one.scale = 3
    assert torch.equal(one.embed(x), x * 3)
    one.bias = 1
    assert torch.equal(one.embed(x), x * 3 + 1)
    assert is_cached(one.embed)
    assert key_of(one.embed) != key_of(Slotted(3).embed)
    gone = weakref.ref(one)
    del one
    assert gone() is None


def test_a_dataclass_that_cannot_be_hashed_is_cached():
    @dataclass
    class Scaler:
        scale: float
        offsets: list = field(default_factory=list)

        @torchcache()
        def run(self, x):
            return x * self.scale + sum(self.offsets)

    scaler = Scaler(2.0)
    assert is_cached(scaler.run)
    scaler.offsets.append(1)
    assert torch.equal(scaler.run(batch()), batch() * 2 + 1)


def test_the_object_may_be_callable():
    class Transform:
        @torchcache()
        def __call__(self, x):
            return x + 1

    transform = Transform()
    assert torch.equal(transform(batch()), batch() + 1)
    assert is_cached(transform.__call__)


def test_an_object_that_cannot_be_referenced_weakly_is_refused():
    class Closed:
        __slots__ = ("scale",)

        @torchcache()
        def run(self, x):
            return x

        def plain(self, x):
            return x

    with pytest.raises(ConfigError, match=r"Closed\.run.*referenced weakly; add '__weakref__'"):
        Closed().run(batch())
    with pytest.raises(ConfigError, match="__weakref__"):
        torchcache()(Closed().plain)


@pytest.mark.parametrize("base", [dict, list, set, bytearray, Exception], ids=lambda base: base.__name__)
def test_an_object_whose_contents_are_no_attributes_is_refused(base):
    class Table(base):
        @torchcache()
        def run(self, x):
            return x

    with pytest.raises(ConfigError, match=r"Table derives from a built-in class.*in an attribute"):
        Table().run(batch())


# -- inheritance, and other doors beside it ----------


def test_an_inherited_method_is_cached_with_the_subclass():
    class Below(Towers):
        def get_text_features(self, x):
            return x

    assert is_cached(Below().encode_image)
    assert cache_of(Below().encode_image).module_hash != cache_of(Towers().encode_image).module_hash


def test_an_undecorated_override_caches_what_super_returns():
    class Below(Towers):
        def encode_image(self, x):
            return super().encode_image(x) * 100

    module = Below()
    x = batch()
    for _ in range(2):
        assert torch.equal(module.encode_image(x), module.vision(x) * 100)
    assert module.calls == 1 + 1, "a few rows are computed once more"
    assert cache_of(super(Below, module).encode_image).stats().memory_hits == 4


@pytest.fixture
def one_place(cache_dir):
    """Make a module whose results all lie on disk, under one name of the user's own."""
    made = []

    def make(cls):
        made.append(module := cls(cache_dir))
        module.torchcache_max_memory_cache_size = 0
        module.torchcache_persistent_module_hash = "mine"
        return module

    yield make
    for module in made:
        cache_of(module.encode_text).close()


def test_a_decorated_override_and_what_super_returns_are_kept_apart(one_place):
    class Below(Towers):
        @torchcache(cache_dtype=torch.half)
        def encode_text(self, x):
            return super().encode_text(x) * 100

    Below.encode_text.stands_for().__qualname__ = "Towers.encode_text"  # as of a subclass with its base's name
    for module in (Below(), one_place(Below)):
        expected = (module.text(batch()) * 100).half().float()
        for _ in range(2):
            assert torch.equal(module.encode_text(batch()), expected)
            assert torch.equal(super(Below, module).encode_text(batch()), module.text(batch()))
        assert cache_of(module.encode_text) is not cache_of(super(Below, module).encode_text)
        assert cache_of(module.encode_text).stats().misses == 4


def test_a_cached_forward_that_calls_cached_methods_caches_each():
    towers = torchcache()(Towers())
    x = batch()
    expected = towers.vision(x) * towers.text(x)
    for _ in range(2):
        assert torch.equal(towers(x), expected)
    assert counts(towers) == (4, 4)
    few = 3  # rows of the first batch, which the forward computes once more
    assert counts(towers.encode_image) == counts(towers.encode_text) == (4, few)
    assert torch.equal(towers.encode_text(x), towers.text(x))
    assert counts(towers.encode_text) == (4, few + 4)


def test_a_cached_method_that_calls_others_and_the_forward_caches_each():
    @torchcache()
    class Model(nn.Module):
        def forward(self, x):
            return self.inner(x) + 1

        @torchcache()
        def inner(self, x):
            return x * 2

        @torchcache()
        def outer(self, x):
            return self(x) + self.inner(x)

    module = Model()
    x = batch()
    for _ in range(2):
        assert torch.equal(module.outer(x), x * 4 + 1)
        assert torch.equal(module(x), x * 2 + 1)
        assert torch.equal(module.inner(x), x * 2)
    assert counts(module) == (4, 8 + 3), "three rows of the first batch are computed once more by what calls it"
    assert len({cache_of(target).module_hash for target in (module, module.inner, module.outer)}) == 3


def test_methods_and_forward_under_one_name_of_ones_own_are_kept_apart(one_place):
    towers = torchcache()(one_place(Towers))
    towers.get_text_features = torchcache()(towers.get_text_features)
    x = batch()
    for _ in range(2):
        assert torch.equal(towers.encode_image(x), towers.vision(x))
        assert torch.equal(towers.encode_text(x), towers.text(x))
        assert torch.equal(towers.get_text_features(x), towers.text(x) * 2)
        assert torch.equal(towers(x), towers.vision(x) * towers.text(x))
    assert cache_of(towers.encode_image).module_hash == cache_of(towers).module_hash == "mine"


def test_the_mode_counts_under_a_name_of_ones_own():
    embedder = Embedder(torchcache_persistent_module_hash="mine", layer=nn.Dropout(0.5))
    embedder.embed(batch())
    assert cache_of(embedder.embed).stats().bypasses == {"dropout_in_training_mode": 1}
    embedder.layer.eval()
    assert is_cached(embedder.embed)


def test_the_forward_may_be_decorated_as_a_method():
    class Model(nn.Module):
        @torchcache()
        def forward(self, x):
            return x + 1

    module = Model()
    assert torch.equal(module(batch()), module(batch()))
    assert counts(module.forward) == (4, 4)


def test_other_decorators_may_lie_above_and_below():
    class Model(nn.Module):
        @torch.no_grad()
        @torchcache()
        def above(self, x):
            return x + 1

        @torchcache()
        @torch.no_grad()
        def below(self, x):
            return x + 2

    module = Model()
    for method, expected in ((module.above, batch() + 1), (module.below, batch() + 2)):
        assert torch.equal(method(batch()), expected)
        assert torch.equal(method(batch()), expected)
        assert counts(method) == (4, 4)


def test_an_abstract_method_stays_abstract():
    class Base(ABC):
        @torchcache()
        @abstractmethod
        def encode(self, x): ...

    class Below(Base):
        def encode(self, x):
            return x

    with pytest.raises(TypeError, match="abstract"):
        Base()
    assert torch.equal(Below().encode(batch()), batch())


def test_a_static_method_is_cached_as_a_function():
    class Model(nn.Module):
        @staticmethod
        @torchcache(unbatched=("mask",))
        def mix(x, mask):
            return x * mask

    mask = torch.ones(10)
    Model.mix(batch(), mask)
    assert torch.equal(Model().mix(batch(), mask), batch())
    assert counts(Model.mix) == (4, 4)
    assert Model().mix.cache_instance is cache_of(Model.mix)


# -- options ----------


def test_attributes_of_the_instance_win_over_the_decorator(cache_dir):
    towers = Towers(cache_dir)
    towers.encode_image(batch())
    assert cache_of(towers.encode_image).cache_dir.parent == cache_dir
    towers.torchcache_version = "2"
    assert cache_of(towers.encode_text).options.version == "2"
    assert cache_of(torchcache(version="1")(towers.get_text_features)).options.version == "2"
    cache_of(towers.encode_image).close()


def test_a_disabled_instance_computes_as_if_undecorated(method):
    method.__self__.torchcache_enabled = False
    assert method(torch.ones(10)).shape == (4,), "a single vector is nothing the cache would take"
    with pytest.raises(ConfigError, match=rf"Towers\.{method.__name__} has no cache.*not enabled"):
        cache_of(method)
    assert not hasattr(method, "cache_instance")
    method.__self__.torchcache_enabled = True
    assert is_cached(method)


def test_a_decorator_that_is_not_enabled_may_be_for_one_instance():
    class Model(nn.Module):
        @torchcache(enabled=False)
        def encode(self, x):
            return x + 1

    module = Model()
    assert torch.equal(module.encode(torch.ones(2)), torch.ones(2) + 1)
    module.torchcache_enabled = True
    assert is_cached(module.encode)


def test_unbatched_is_checked_against_the_parameters_where_the_method_is_decorated():
    with pytest.raises(ConfigError, match=r"unbatched names 'masc'.*'mask'") as caught:

        class Model:
            @torchcache(unbatched=("masc",))
            def encode(self, x, mask):
                return x * mask

    assert caught.value.argument == "unbatched"
    with pytest.raises(ConfigError, match="no parameter"):
        torchcache(unbatched=("masc",))(Towers().get_text_features)


def test_options_that_do_not_go_together_are_refused_with_the_instance():
    class Model(nn.Module):
        @torchcache(zstd_compression=True)
        def encode(self, x):
            return x

    module = Model()
    with pytest.raises(ConfigError, match="zstd_compression"):
        module.encode(batch())
    module.torchcache_persistent = True
    assert is_cached(module.encode)
    cache_of(module.encode).close()
    with pytest.raises(ConfigError, match="zstd_compression"):
        torchcache(zstd_compression=True)(Towers().get_text_features)


# -- refusals ----------


def test_a_class_method_is_refused_in_either_order():
    with pytest.raises(ConfigError, match="decorate a method of its instances"):

        class Above:
            @torchcache()
            @classmethod
            def encode(cls, x):
                return x

    class Below:
        @classmethod
        @torchcache()
        def encode(cls, x):
            return x

        @classmethod
        def plain(cls, x):
            return x

    calls = Below.encode, Below().encode, lambda _: torchcache()(Below.plain)
    as_python_3_13_does = functools.partial(vars(Below)["encode"].__func__, Below)
    for call in (*calls, as_python_3_13_does):
        with pytest.raises(ConfigError, match="decorate a method of its instances"):
            call(batch())


@pytest.mark.parametrize(
    ("wrapper", "remedy"), [(property, "a property takes no batch"), (staticmethod, "write @staticmethod above")]
)
def test_what_is_no_function_in_a_class_is_refused_with_the_remedy(wrapper, remedy):
    with pytest.raises(ConfigError, match=remedy):

        class Model:
            @torchcache()
            @wrapper
            def encode(self):
                return None


def test_a_function_that_takes_a_module_is_sent_to_its_methods():
    @torchcache()
    def encode(model, x):
        return model(x)

    with pytest.raises(UncacheableError, match=r"decorate .* a method of it instead") as caught:
        encode(Towers(), batch())
    assert caught.value.argument == "model"


def test_decorating_twice_is_refused(method):
    for target in (method, Towers.encode_image, torchcache()(Towers().forward)):
        with pytest.raises(ConfigError, match="already"):
            torchcache()(target)


def test_a_method_that_returns_before_it_has_computed_is_refused():
    class Model:
        async def encode(self, x):
            return x

    with pytest.raises(ConfigError, match="async or generator"):
        torchcache()(Model().encode)
    with pytest.raises(ConfigError, match="async or generator"):
        torchcache()(Model.encode)


def test_a_method_without_python_code_is_refused():
    with pytest.raises(ConfigError, match="cannot decorate"):
        torchcache()([].append)


# -- copies, and other processes ----------


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_torch_save(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.fixture(params=[copy.deepcopy, through_pickle, through_torch_save], ids=["deepcopy", "pickle", "torch.save"])
def make_copy(request):
    return request.param


def test_a_copy_of_a_module_caches_its_method_by_itself(method, make_copy):
    towers, name = method.__self__, method.__name__
    if getattr(towers, name) != method:
        setattr(towers, name, method)
    before = method(batch())
    twin = make_copy(towers)
    copied = getattr(twin, name)
    assert copied.__self__ is twin
    assert cache_of(copied) is not cache_of(method)
    assert cache_of(copied).module_hash == cache_of(method).module_hash
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(copied(batch()), copied.__wrapped__(batch()))
    assert torch.equal(method(batch()), before)
    assert is_cached(copied)


def test_a_copy_of_a_method_has_a_copy_of_the_module(method, make_copy):
    copied = make_copy(method)
    assert copied.__self__ is not method.__self__
    assert torch.equal(copied(batch()), method(batch()))
    assert cache_of(copied) is not cache_of(method)


def test_a_method_in_a_class_is_pickled_by_its_name():
    assert through_pickle(Towers.encode_image) is Towers.encode_image
    assert copy.deepcopy(Towers.encode_image) is Towers.encode_image


def test_a_shallow_copy_computes_what_the_original_computes(method):
    twin = copy.copy(method.__self__)
    assert torch.equal(getattr(twin, method.__name__)(batch()), method(batch()))


def test_the_state_dict_is_untouched(method):
    method(batch())
    assert set(method.__self__.state_dict()) == {f"{n}.{p}" for n in ("vision", "text") for p in ("weight", "bias")}


@pytest.mark.parametrize("name", ["encode_image", "get_text_features"])
def test_a_spawned_process_finds_what_this_one_computed(cache_dir, tmp_path, name):
    towers = Towers(cache_dir)
    if name == "get_text_features":
        towers.get_text_features = torchcache()(towers.get_text_features)
    method = getattr(towers, name)
    y = method(batch())
    assert cache_of(method).flush()
    arguments = towers, name, batch(), tmp_path / "answer.pt"
    process = multiprocessing.get_context("spawn").Process(target=encode_in_a_process, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    answer, module_hash, store_hits = torch.load(tmp_path / "answer.pt")
    assert torch.equal(answer, y)
    assert (module_hash, store_hits) == (cache_of(method).module_hash, 4)
    cache_of(method).close()


def test_another_instance_finds_on_disk_what_the_first_one_computed(cache_dir):
    first, second = (Embedder(torchcache_persistent=True, torchcache_persistent_cache_dir=cache_dir) for _ in range(2))
    first.embed(batch())
    assert cache_of(first.embed).flush()
    second.embed(batch())
    assert cache_of(second.embed).stats().store_hits == 4
    assert second.calls == 0


# -- other ways to run it ----------


def test_compiled_code_around_a_cached_method_caches(method):
    expected = method.__wrapped__(batch()) * 2
    compiled = torch.compile(lambda x: method(x) * 2, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(batch()), expected)
    assert counts(method) == (4, 4)


def test_a_compiled_module_that_calls_its_cached_methods_caches():
    towers = Towers()
    compiled = torch.compile(towers, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(batch()), towers.vision(batch()) * towers.text(batch()))
    assert counts(towers.encode_image) == (4, 4)


def test_export_and_tracing_see_the_undecorated_methods():
    towers = Towers()
    expected = towers.vision(batch()) * towers.text(batch())
    assert torch.equal(torch.export.export(towers, (batch(),)).module()(batch()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(towers, batch())
    assert torch.equal(traced(batch()), expected)


def test_a_cached_function_may_use_a_cached_method(method):
    @torchcache()
    def doubled(x):
        return method(x) * 2

    assert torch.equal(doubled(batch()), method.__wrapped__(batch()) * 2)
    with torch.no_grad():
        for parameter in method.__self__.parameters():
            parameter.add_(1)
    assert torch.equal(doubled(batch()), method.__wrapped__(batch()) * 2)
    assert is_cached(doubled)


def test_a_cached_function_may_use_a_cached_method_of_a_plain_object():
    embedder = Embedder()
    method = torchcache()(embedder.embed_twice)

    @torchcache()
    def doubled(x):
        return method(x) * 2

    for scale in (2.0, 3.0):
        embedder.scale = scale
        assert torch.equal(doubled(batch()), embedder.model(batch()) * scale * 4)
    assert is_cached(doubled)


def test_copies_that_data_parallel_makes_for_one_call_are_not_cached():
    replica = Towers()._replicate_for_data_parallel()
    assert torch.equal(replica.encode_image(batch()), replica.vision(batch()))
    with pytest.raises(ConfigError, match="no cache"):
        cache_of(replica.encode_image)


def test_a_method_may_be_partly_applied():
    towers = Towers()
    shifted = functools.partial(towers.encode_image, shift=1.0)
    assert torch.equal(shifted(batch()), towers.vision(batch()) + 1)
    assert counts(towers.encode_image) == (4, 0)


def test_the_protocol_is_there_to_annotate_with():
    def run(encode: CachedFunction) -> None: ...

    assert inspect.signature(run, eval_str=True).parameters["encode"].annotation is CachedFunction
