"""torch.compile around a cached module and inside it; what is transformed, exported or traced goes around the cache."""

from __future__ import annotations

import logging
import sys
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from torchcache import cache_of, torchcache

#: Torch's own transforms and its tracer say so of themselves.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]+. is deprecated:DeprecationWarning")

MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randint(-3, 4, parameter.shape, generator=generator).float()
        self.requires_grad_(False)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Layer(nn.Module):
    """Torch does not compile its own layers in place."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.linear = linear.weight, linear

    def forward(self, x):
        return self.linear(x)


@torchcache()
class CachedNet(Net):
    pass


@torchcache()
class CachedIdentity(nn.Identity):
    pass


@pytest.fixture(autouse=True)
def compiles_anew():
    torch._dynamo.reset()


def batch(n=4, seed=0):
    return torch.randint(-9, 10, (n, 6), generator=torch.Generator().manual_seed(seed)).float()


def compiled_submodule(backend):
    net = Net()
    net.first = torch.compile(net.first, backend=backend)
    return torchcache()(net)


def submodule_compiled_in_place(backend):
    net = Net()
    net.first = Layer(net.first)
    net.first.compile(backend=backend)
    return torchcache()(net)


def compiled_module(backend):
    return torchcache()(torch.compile(Net(), backend=backend))


def compiled_forward(backend):
    net = Net()
    net.forward = torch.compile(net.forward, backend=backend)
    return torchcache()(net)


def function_that_calls_a_compiled_module(backend):
    inner = torch.compile(Net(), backend=backend)

    @torchcache()
    def function(x):
        return inner(x)

    return function


INSIDE = [
    compiled_submodule,
    submodule_compiled_in_place,
    compiled_module,
    compiled_forward,
    function_that_calls_a_compiled_module,
]


@pytest.mark.parametrize(
    ("make", "backend"), [*((make, "eager") for make in INSIDE), (compiled_submodule, "aot_eager")]
)
def test_a_changing_number_of_missing_rows_compiles_a_few_times_only(make, backend):
    """A fixed size, any size, and one row; then the same again where inference mode gives tensors other keys."""
    counter = CompileCounterWithBackend(backend)
    target, plain, cached = make(counter), Net(), batch(64)
    target(cached)
    seed = 1
    for mode, most in zip(MODES, (3, 3, 6), strict=True):
        for missing in range(1, 33):
            seed += 1
            x = torch.cat([cached, batch(missing, seed)])
            with mode():
                assert torch.equal(target(x), plain(x))
        assert counter.frame_count <= most, mode
    assert counter.frame_count > 1, "nothing was compiled"
    stats = cache_of(target).stats()
    assert (stats.bypasses, dict(stats.dropped_rows), dict(stats.faults)) == ({}, {}, {})
    assert stats.memory_hits >= 3 * 32 * 64


@pytest.mark.parametrize("make", INSIDE)
def test_compiling_changes_nothing_that_counts(make):
    """The first call compiles, in each process anew: what it computed is found again, by later ones too."""
    compiled = make("eager")
    name = cache_of(compiled).module_hash
    for _ in range(2):
        compiled(batch())
    stats = cache_of(compiled).stats()
    assert (stats.misses, stats.memory_hits) == (4, 4)
    twin = make("eager")
    assert cache_of(twin).module_hash == cache_of(compiled).module_hash == name
    anew = cache_of(compiled)._core.identity.apart().look()
    look_of_twin, look_of_compiled = (cache_of(target)._core.caller.state.look() for target in (twin, compiled))
    assert look_of_twin == look_of_compiled == anew, "compiling left notes that count"
    assert not look_of_twin.is_private


@pytest.mark.parametrize(
    "make", [compiled_submodule, submodule_compiled_in_place, function_that_calls_a_compiled_module]
)
def test_another_back_end_is_another_namespace(make):
    """It may add up in another order."""
    targets = [make(backend) for backend in ("eager", "aot_eager")]
    first, second = (cache_of(target)._core.caller.state.look() for target in targets)
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    "make", [compiled_submodule, submodule_compiled_in_place, function_that_calls_a_compiled_module]
)
def test_a_change_of_weights_inside_a_compiled_module_is_noticed(make):
    target = make("eager")
    module = target if isinstance(target, nn.Module) else target.__wrapped__.__closure__[0].cell_contents
    x = batch()
    before = target(x)
    with torch.no_grad():
        module.first.weight.mul_(2)
    after = target(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, target(x))


@pytest.mark.parametrize("make", [CachedNet, lambda: torchcache()(Net())], ids=["class", "instance"])
@pytest.mark.parametrize("way", ["function", "model", "in place"])
def test_a_compiled_model_with_a_cached_module_in_it_caches(make, way):
    module, head = make(), nn.Linear(3, 2)
    model = nn.Sequential(module, head)
    expected = head(Net()(batch()))
    if way == "function":
        call = torch.compile(lambda x: head(module(x)), backend="eager")
    elif way == "model":
        call = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        call = model
    for _ in range(3):
        head.zero_grad()
        y = call(batch())
        assert torch.equal(y, expected)
        y.sum().backward()
        assert head.weight.grad.abs().sum() > 0
    stats = cache_of(module).stats()
    assert (stats.misses, stats.memory_hits, stats.bypasses) == (4, 8, {})


@pytest.mark.parametrize("make", [CachedNet, lambda: torchcache()(Net())], ids=["class", "instance"])
def test_a_cached_module_that_is_compiled_itself_caches(make):
    for is_in_place in (False, True):
        module = make()
        call = module if is_in_place else torch.compile(module, backend="eager")
        if is_in_place:
            module.compile(backend="eager")
        for _ in range(3):
            assert torch.equal(call(batch()), Net()(batch()))
        assert cache_of(module).stats().memory_hits == 8


# -- transforms, export, tracing ----------


def doubled():
    return {name: parameter * 2 for name, parameter in Net().named_parameters()}


def with_weights(module, weights, x):
    return torch.func.functional_call(module, weights, (x,))


def tangent_of(call):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(lambda x: forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def vmap_over_something_else(module):
    x = batch()
    return torch.vmap(lambda factor: module(x) * factor)(torch.ones(3))


def vmap_over_weights(module):
    x = batch()
    return torch.vmap(lambda weights: with_weights(module, weights, x))(
        {name: torch.stack([weight, weight * 3]) for name, weight in doubled().items()}
    )


TRANSFORMS = {
    "vmap": lambda m: torch.vmap(m)(torch.stack([batch(), batch(4, 1)])),
    "vmap over weights": vmap_over_weights,
    "vmap over something else": vmap_over_something_else,
    "grad": lambda m: torch.func.grad(lambda x: m(x).sum())(batch()),
    "grad of weights": lambda m: torch.func.grad(lambda w: with_weights(m, w, batch()).sum())(doubled())[
        "first.weight"
    ],
    "grad of something else": lambda m: torch.func.grad(lambda y: (m(batch()) * y).sum())(torch.tensor(2.0)),
    "jvp": lambda m: torch.func.jvp(m, (batch(),), (torch.ones(4, 6),))[1],
    "jacfwd": lambda m: torch.func.jacfwd(m)(batch(2)),
    "hessian": lambda m: torch.func.hessian(lambda x: m(x).square().sum())(batch(2)),
    "functionalize": lambda m: torch.func.functionalize(m)(batch()),
}


@pytest.mark.parametrize("make", [CachedNet, lambda: torchcache()(Net())], ids=["class", "instance"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_torch_func_goes_around_the_cache(make, name):
    module = make()
    module(batch())
    module(batch(2))
    transform = TRANSFORMS[name]
    assert torch.equal(transform(module), transform(Net()))
    stats = cache_of(module).stats()
    assert set(stats.bypasses) == {"functorch_transform"}, stats
    assert (stats.misses, dict(stats.faults)) == (4, {})


def test_a_functional_call_has_the_weights_it_was_given():
    module = torchcache()(Net())
    own = module(batch())
    for _ in range(2):
        given = with_weights(module, doubled(), batch())
        assert torch.equal(given, with_weights(Net(), doubled(), batch()))
        assert not torch.equal(given, own)
    assert torch.equal(module(batch()), own)
    assert cache_of(module).stats().bypasses == {}


def test_forward_mode_gradients_go_around_the_cache():
    module = torchcache()(Net())
    module(batch())
    by_input = tangent_of(lambda dual: module(dual(batch())))
    assert torch.equal(by_input, tangent_of(lambda dual: Net()(dual(batch()))))

    def through_weights(net):
        return tangent_of(lambda dual: with_weights(net, {k: dual(w) for k, w in doubled().items()}, batch()))

    assert torch.equal(through_weights(module), through_weights(Net()))
    assert cache_of(module).stats().bypasses == {"forward_mode_gradients": 2}


@pytest.mark.parametrize("make", [CachedNet, lambda: torchcache()(Net())], ids=["class", "instance"])
@pytest.mark.parametrize("way", ["export", "strict export", "trace", "fx"])
def test_what_is_exported_or_traced_is_the_undecorated_module(make, way, caplog):
    module = make()
    module(batch())
    with caplog.at_level(logging.WARNING, "torchcache"):
        if way == "trace":
            result = torch.jit.trace(module, (batch(),))
        elif way == "fx":
            result = torch.fx.symbolic_trace(module)
        else:
            result = torch.export.export(module, (batch(),), strict=way == "strict export").module()
    other = batch(4, 9)
    assert torch.equal(result(other), Net()(other))
    # Strict export cannot count while it traces, and fx asks the class of an instance.
    is_counted = way in ("export", "trace") or (way == "fx" and make is CachedNet)
    bypasses = cache_of(module).stats().bypasses
    assert set(bypasses) == ({"export_or_trace"} if is_counted else set()), bypasses
    assert caplog.text.count("export_or_trace") == is_counted


def test_strict_export_while_other_cached_modules_go():
    module, stop = CachedNet(), threading.Event()
    module(batch())
    others = [CachedIdentity() for _ in range(1000)]
    for other in others:
        cache_of(other)

    def let_go():
        while others and not stop.wait(0.002):
            others.pop()

    thread = threading.Thread(target=let_go)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        torch.export.export(module, (batch(),), strict=True)
    finally:
        stop.set()
        thread.join(30)
        sys.setswitchinterval(interval)
    assert len(others) < 1000, "none went while the module was exported"
