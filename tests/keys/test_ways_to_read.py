"""An attribute counts if code that runs can read it, in whatever way.

``ways_to_read.txt`` has more programs: each makes ``m``, which is called, and behind ``---`` is a change of what shapes
its result.
"""

# ruff: noqa: E501, ISC004 - tables of programs
from __future__ import annotations

import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from torchcache import cache_of, disabled, torchcache

PRELUDE = """
import argparse, copy, dataclasses, functools, json, operator, pickle, types
import torch
from torch import nn

def helper(holder, x):
    return x * holder.scale

def named(holder, name):
    return getattr(holder, name)

class Config:
    def __init__(self, scale):
        self.scale = scale
        self.out = 0

@dataclasses.dataclass
class Data:
    scale: float
    out: int = 0

@dataclasses.dataclass
class Outer:
    inner: Data
    out: int = 0

class Described:
    def __set_name__(self, owner, name):
        self.place = "_" + name

    def __get__(self, obj, owner):
        return vars(obj)[self.place]

class Named:
    def __get__(self, obj, owner):
        return obj.private

class Block(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.out = 0

    def forward(self, x):
        return x * self.scale

class Weighted(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), scale), requires_grad=False)
        self.other = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return x * self.weight

class Wrapper:
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

SCALE = operator.attrgetter("scale")
DEEP = operator.attrgetter("holder.scale")
RUN = operator.methodcaller("times", 1)
"""

#: What stands in the class, in its constructor, in the method that is cached; and what changes the scale.
PLAIN = "self.scale = scale"
ASSIGN = "self.scale = scale"
WAYS = {
    # the twelve
    "plain": ("", PLAIN, "return x * self.scale", ASSIGN),
    "property": ("@property\ndef factor(self): return self.scale", PLAIN, "return x * self.factor", ASSIGN),
    "descriptor": ("factor = Described()", "self._factor = scale", "return x * self.factor", "self._factor = scale"),
    "named descriptor": ("factor = Named()", "self.private = scale", "return x * self.factor", "self.private = scale"),
    "__getattr__": (
        "def __getattr__(self, name):\n    if name == 'factor': return self.scale\n    raise AttributeError(name)",
        PLAIN, "return x * self.factor", ASSIGN,
    ),
    "getattr with a constant": ("", PLAIN, "return x * getattr(self, 'scale')", ASSIGN),
    "getattr with a computed name": ("", PLAIN, "return x * getattr(self, 'sc' + 'ale'[len(x) - 3:])", ASSIGN),
    "vars": ("", PLAIN, "return x * vars(self)['sc' + 'ale'[len(x) - 3:]]", ASSIGN),
    "__dict__": ("", PLAIN, "return x * sum(v for k, v in self.__dict__.items() if k[:2] == 'sc')", ASSIGN),
    "attrgetter": ("", PLAIN, "return x * SCALE(self)", ASSIGN),
    "attrgetter in the method": ("", PLAIN, "return x * operator.attrgetter('scale')(self)", ASSIGN),
    "attrgetter through an object": (
        "", "self.holder = Config(scale)", "return x * DEEP(self)", "self.holder.scale = scale",
    ),
    "closure": ("", PLAIN, "f = lambda: self.scale\nreturn x * f()", ASSIGN),
    "class attribute": ("scale = 0.0", "type(self).scale = scale", "return x * self.scale", "type(self).scale = scale"),
    "through another object": (
        "", "self.holder = Config(scale)", "return x * self.holder.scale", "self.holder.scale = scale",
    ),
    "inside a library's callback": (
        "", PLAIN, "return functools.reduce(lambda a, b: a * self.scale, [1], x)", ASSIGN,
    ),
    # others
    "a method that a library calls": (
        "def key(self, x): return x * self.scale", PLAIN, "return next(map(self.key, [x]))", ASSIGN,
    ),
    "helper": ("", PLAIN, "return helper(self, x)", ASSIGN),
    "helper of an object": ("", "self.cfg = Config(scale)", "return helper(self.cfg, x)", "self.cfg.scale = scale"),
    "helper with a name": ("", PLAIN, "return x * named(self, 'scale')", ASSIGN),
    "methodcaller": ("def times(self, n): return self.scale * n", PLAIN, "return x * RUN(self)", ASSIGN),
    "asdict": (
        "", "self.cfg = Data(scale)", "return x * dataclasses.asdict(self.cfg)['sc' + 'ale']", "self.cfg.scale = scale",
    ),
    "asdict of what holds it": (
        "", "self.cfg = Outer(Data(scale))",
        "return x * sum(sum(v.values()) for v in dataclasses.asdict(self.cfg).values() if isinstance(v, dict))",
        "self.cfg.inner.scale = scale",
    ),
    "repr": ("", "self.cfg = Data(scale)", "return x * len(f'{self.cfg}')", "self.cfg.scale = scale"),
    "equality": ("", "self.cfg = Data(scale)", "return x * (self.cfg == Data(2.0))", "self.cfg.scale = scale"),
    "membership": ("", "self.cfg = Data(scale)", "return x * (Data(2.0) in [self.cfg])", "self.cfg.scale = scale"),
    "deepcopy": ("", "self.cfg = Data(scale)", "c = copy.deepcopy(self.cfg)\nreturn x * c.scale", "self.cfg.scale = scale"),
    "returned": (
        "def get(self): return self.cfg", "self.cfg = Config(scale)", "return x * vars(self.get())['sc' + 'ale']",
        "self.cfg.scale = scale",
    ),
    "stored": (
        "", "self.cfg = Config(scale); self.other = None",
        "self.other = self.cfg\nreturn x * vars(self.other)['sc' + 'ale']", "self.cfg.scale = scale",
    ),
    "in a list": (
        "", "self.cfgs = [Config(scale)]", "return x * vars(self.cfgs[0])['sc' + 'ale']", "self.cfgs[0].scale = scale",
    ),
    "loop": (
        "", "self.cfgs = [Config(scale)]", "for cfg in self.cfgs: x = x * vars(cfg)['sc' + 'ale']\nreturn x",
        "self.cfgs[0].scale = scale",
    ),
    "loop over a dict": (
        "", "self.cfgs = {'a': Config(scale)}",
        "for k, cfg in self.cfgs.items(): x = x * vars(cfg)['sc' + 'ale']\nreturn x", "self.cfgs['a'].scale = scale",
    ),
    "comprehension": (
        "", "self.cfgs = [Config(scale)]", "return x * sum(vars(cfg)['sc' + 'ale'] for cfg in self.cfgs)",
        "self.cfgs[0].scale = scale",
    ),
    "enumerate": (
        "", "self.cfgs = [Config(scale)]",
        "for i, (cfg,) in enumerate(zip(self.cfgs)): x = x * vars(cfg)['sc' + 'ale']\nreturn x",
        "self.cfgs[0].scale = scale",
    ),
    "unpacked": (
        "", "self.cfgs = (Config(scale), 1)", "cfg, _ = self.cfgs\nreturn x * vars(cfg)['sc' + 'ale']",
        "self.cfgs[0].scale = scale",
    ),
    "either": (
        "", "self.cfg = Config(scale); self.no = None",
        "c = self.no or self.cfg\nreturn x * vars(c)['sc' + 'ale']", "self.cfg.scale = scale",
    ),
    "either in a call": (
        "", "self.cfg = Config(scale); self.no = None",
        "return x * vars(self.no or self.cfg)['sc' + 'ale']", "self.cfg.scale = scale",
    ),
    "one of two": (
        "", "self.cfg = Config(scale); self.no = None",
        "return x * vars(self.cfg if len(x) else self.no)['sc' + 'ale']", "self.cfg.scale = scale",
    ),
    "walrus": ("", "self.cfg = Config(scale)", "if (c := self.cfg): x = x * vars(c)['sc' + 'ale']\nreturn x", "self.cfg.scale = scale"),
    "matched": (
        "", "self.cfg = Data(scale)", "match self.cfg:\n    case Data(s, out): return x * s", "self.cfg.scale = scale",
    ),
    "a wrapper that forwards": (
        "", "self.wrapped = Wrapper(Config(scale))", "return x * self.wrapped.scale", "self.wrapped.inner.scale = scale",
    ),
    "a namespace": (
        "", "self.args = argparse.Namespace(scale=scale)", "return x * self.args.scale", "self.args.scale = scale",
    ),
    "a namespace by vars": (
        "", "self.args = argparse.Namespace(scale=scale)", "return x * vars(self.args)['sc' + 'ale']",
        "self.args.scale = scale",
    ),
    "a bound method": (
        "def times(self, x): return x * self.scale", PLAIN + "; self.run = self.times", "return self.run(x)", ASSIGN,
    ),
    "a bound method of another": (
        "", "self.block = Block(scale); self.run = self.block.forward", "return self.run(x)", "self.block.scale = scale",
    ),
    "partial": (
        "", "self.cfg = Config(scale); self.run = functools.partial(helper, self.cfg)", "return self.run(x)",
        "self.cfg.scale = scale",
    ),
    "a function over it": (
        "", "self.cfg = Config(scale); cfg = self.cfg; self.run = lambda x: x * vars(cfg)['sc' + 'ale']",
        "return self.run(x)", "self.cfg.scale = scale",
    ),
    "module": ("", "self.block = Block(scale)", "return self.block(x)", "self.block.scale = scale"),
    "weight": ("", "self.block = Weighted(scale)", "return self.block(x)", "self.block.weight.data.fill_(scale)"),
    "module list": (
        "", "self.blocks = nn.ModuleList([Block(scale)])", "for b in self.blocks: x = b(x)\nreturn x",
        "self.blocks[0].scale = scale",
    ),
    "sequential": ("", "self.blocks = nn.Sequential(Block(scale))", "return self.blocks(x)", "self.blocks[0].scale = scale"),
    "sequential of weights": (
        "", "self.blocks = nn.Sequential(Weighted(scale))", "return self.blocks(x)",
        "self.blocks[0].weight.data.fill_(scale)",
    ),
    "parameters": (
        "", "self.block = Weighted(scale)", "return x * sum(p.sum() for p in self.block.parameters())",
        "self.block.weight.data.fill_(scale)",
    ),
    "state_dict": (
        "", "self.block = Weighted(scale)", "return x * self.block.state_dict()['wei' + 'ght'].sum()",
        "self.block.weight.data.fill_(scale)",
    ),
    "get_submodule": (
        "", "self.block = nn.ModuleDict({'ab': Block(scale)})", "return self.block.get_submodule('a' + 'b')(x)",
        "self.block['ab'].scale = scale",
    ),
    "children": (
        "", "self.block = nn.ModuleDict({'ab': Block(scale)})", "for b in self.block.children(): x = b(x)\nreturn x",
        "self.block['ab'].scale = scale",
    ),
    "functional_call": (
        "", "self.block = Block(scale)", "return torch.func.functional_call(self.block, {}, (x,))",
        "self.block.scale = scale",
    ),
    "checkpoint": (
        "", "self.block = Block(scale)",
        "return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)", "self.block.scale = scale",
    ),
    "a patched forward": (
        "", "self.block = Block(1.0); self.block.scale = scale\n"
        "self.block.forward = types.MethodType(lambda self, x: x * vars(self)['sc' + 'ale'], self.block)",
        "return self.block(x)", "self.block.scale = scale",
    ),
    "a hook": (
        "", "self.block = Block(1.0); self.block.factor = scale\n"
        "self.block.register_forward_hook(lambda m, a, out: out * getattr(m, 'fac' + 'tor'))",
        "return self.block(x)", "self.block.factor = scale",
    ),
    "an inherited method": (
        "def twice(self, x): return x * self.scale", PLAIN, "return super(type(self), self).__init__ and self.twice(x)",
        ASSIGN,
    ),
    "iter": ("def __iter__(self): yield self.scale", PLAIN, "return x * next(iter(self))", ASSIGN),
    "call": ("def times(self): return self.scale\n__call__ = times", PLAIN, "return x * self()", ASSIGN)
    ,
    "getitem": ("def __getitem__(self, i): return self.scale", PLAIN, "return x * self[0]", ASSIGN),
    "operator": ("def __mul__(self, x): return x * self.scale", PLAIN, "return self * x", ASSIGN),
    "truth": ("def __bool__(self): return self.scale > 2", PLAIN, "return x * (3 if self else 4)", ASSIGN),
    "cached property": (
        "@functools.cached_property\ndef factor(self): return self.cfg.scale", "self.cfg = Config(scale)",
        "return x * self.factor", "self.cfg.scale = scale; vars(self).pop('factor', None)",
    ),
    "setattr": ("", PLAIN + "; self.last = 0", "setattr(self, 'last', self.scale)\nreturn x * self.last", ASSIGN),
    "hasattr": ("", "", "return x * (2.0 if hasattr(self, 'sc' + 'ale'[len(x) - 3:]) else 3.0)", ASSIGN),
    "eval": ("", PLAIN, "return x * eval('self.sc' + 'ale')", ASSIGN),
    "locals": ("", PLAIN, "return x * locals()['se' + 'lf'].scale", ASSIGN),
    "format": ("", PLAIN, "return x * len('{0.scale}'.format(self))", "self.scale = 10 * scale"),
    "json": ("", "self.cfg = Data(scale)", "return x * len(json.dumps(self.cfg, default=vars))", "self.cfg.scale = scale * 10"),
}  # fmt: skip


BASES = ("object", "nn.Module")


def build(way, base):
    inside, constructor, body, change = WAYS[way]
    text = f"""
class Holder({base}):
{textwrap.indent(inside, "    ")}
    def __init__(self, scale):
        super().__init__()
{textwrap.indent(constructor, "        ")}
    def compute(self, x):
{textwrap.indent(body, "        ")}

def change(self, scale):
{textwrap.indent(change, "    ")}
"""
    program = {"__name__": "__main__", "__file__": __file__}
    exec(compile(PRELUDE + text, "<user>", "exec"), program)
    return program


#: A module's call is its own.
DEALT = [(way, base) for way in WAYS for base in BASES if (way, base) != ("call", "nn.Module")]


@pytest.mark.parametrize(("way", "base"), DEALT)
def test_what_code_reads_in_any_way_counts(way, base):
    program = build(way, base)
    made = program["Holder"](2.0)
    plain = made.compute
    made.compute = torchcache(check_rows=False)(made.compute)
    x = torch.arange(1.0, 10).view(3, 3)
    for scale in (2.0, 3.0, 5.0, 2.0):
        program["change"](made, scale)
        assert torch.equal(made.compute(x), plain(x)), scale
        assert torch.equal(made.compute(x), plain(x)), scale


#: Where what is read could be missed: a program with ``m``, which is called, and a change of what shapes its result.
HEADER = """
import argparse, functools, pickle, types, zlib
import torch
from torch import nn
from types import SimpleNamespace

def P(value): return nn.Parameter(torch.tensor([value]), requires_grad=False)

def digest(value): return zlib.crc32(pickle.dumps(value)) % 999

class Same(nn.Module):
    def forward(self, x): return x

class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = P(2.0)
    def forward(self, x): return x

class Scaled:
    def __init__(self): self.scale = 2.0
    def get(self): return 1

class Ordered:
    def __init__(self, key, value): self.key, self.value = key, value
    def __lt__(self, other): return self.key < other.key
    def __eq__(self, other): return self.key == other

G = SimpleNamespace(scale=2.0)

class Made:
    def __init__(self): self.scale = G.scale
    @classmethod
    def make(cls): return cls()
    def __class_getitem__(cls, item): return G.scale

def digest_of(self): return digest(self)
"""


def module(body, constructor="pass", more=""):
    """Return the text of a program whose ``m`` is a module."""
    lines = ["class M(nn.Module):", "    def __init__(self):", "        super().__init__()", f"        {constructor}"]
    lines += [textwrap.indent(more, "    "), f"    def forward(self, x): return {body}", "m = M().eval()"]
    return "\n".join(lines)


def function(body, setting):
    return f"{setting}\ndef m(x): return {body}"


OWN_CALL = """
class Gain(nn.Module):
    def _call_impl(self, *given): return super()._call_impl(*given) * self.gain
    def forward(self, x): return x
"""
PREFIXED = """
def __getattr__(self, name):
    try: return super().__getattr__(name)
    except AttributeError: return super().__getattr__('_' + name)
"""

MISSED = {
    "a replaced forward": (module("self.k(x)", "self.k = Same()"), "m.k.forward = lambda x: x * 3"),
    "an object as forward": (
        module("self.k(x)", "self.k = Same(); self.k.forward = functools.partial(torch.mul, 2.0)"),
        "m.k.forward = functools.partial(torch.mul, 3.0)",
    ),
    "a replaced _call_impl": (module("self.k(x)", "self.k = Same()"), "m.k._call_impl = lambda x: x * 3"),
    "an own _call_impl": (OWN_CALL + module("self.k(x)", "self.k = Gain(); self.k.gain = 2"), "m.k.gain = 3"),
    "a child by its key": (
        module("x * sum(self.s.a.parameters())", "self.s = nn.ModuleDict({'a': Weight()})"), "m.s.a.w.fill_(3)",
    ),
    "eval() returns self": (module("x * sum(self.eval().parameters())", "self.w = P(2.0)"), "m.w.fill_(3)"),
    "to() of a child": (
        module("x * sum(self.k.to(x.device).state_dict().values())", "self.k = Weight()"), "m.k.w.fill_(3)",
    ),
    "float() by a text": (
        module("x * sum(getattr(self.k, 'float')().state_dict().values())", "self.k = Weight()"), "m.k.w.fill_(3)",
    ),
    "super().parameters()": (module("x * sum(super().parameters())", "self.w = P(2.0)"), "m.w.fill_(3)"),
    "super().children()": (
        module("[c(x) for c in super(M, self).children()][0]", "self.k = Same()"), "m.k.forward = lambda x: x * 3",
    ),
    "a prefix in __getattr__": (module("x * self.scale", "self._scale = P(2.0)", PREFIXED), "m._scale.fill_(3)"),
    "__getattr__ by hand": (
        module("x * sum(self.__getattr__(n) for n in ['w' + str(0)])", "self.w0 = P(2.0)"), "m.w0.fill_(3)",
    ),
    "map(dict.get)": (function("x * sum(map(digest, map(d.get, ['a'])))", "d = {'a': Scaled()}"), "d['a'].scale = 3.0"),
    "dict.__getitem__": (function("x * sum(d.__getitem__('a').parameters())", "d = {'a': Weight()}"), "d['a'].w.fill_(3)"),
    "__next__": (function("x * digest(iter(d).__next__())", "d = [Scaled()]"), "d[0].scale = 3.0"),
    "list.sort": (
        function("x * (lambda l: (l.sort(), l[0].value)[1])(list(d))", "d = [Ordered(1, 2.0), Ordered(2, 5.0)]"),
        "d[0].key = 9",
    ),
    "list.count": (function("x * (1 + d.count(1))", "d = [Ordered(1, 2.0)]"), "d[0].key = 9"),
    "a class in an attribute": (module("x * self.cls().scale", "self.cls = Made"), "G.scale = 3.0"),
    "cls()": (function("x * d.make().scale", "d = Made()"), "G.scale = 3.0"),
    "a table of classes": (function("x * d['k']().scale", "d = {'k': Made}"), "G.scale = 3.0"),
    "type(object)()": (function("x * type(d)().scale", "d = Made()"), "G.scale = 3.0"),
    "type(object)[]": (function("x * type(d)[0]", "d = Made()"), "G.scale = 3.0"),
    "a text for a library": (
        "def query(text): return eval(text.replace('@', ''), {'self': m})\n"
        + module("x * query('1 * @self.limit and @self.limit')", "self.limit = 2.0"),
        "m.limit = 3.0",
    ),
    "a function bound to an object": (
        function("x * callback()", "d = Scaled()\ncallback = types.MethodType(digest_of, d)"), "d.scale = 3.0",
    ),
    "a bound method": (function("x * digest(d.get)", "d = Scaled()"), "d.scale = 3.0"),
    "_get_kwargs": (
        function("x * dict(d._get_kwargs())['sc' + 'ale']", "d = argparse.Namespace(scale=2.0)"), "d.scale = 3.0",
    ),
    "__repr__ of a namespace": (
        function("x * zlib.crc32(d.__repr__().encode())", "d = SimpleNamespace(scale=2.0)"), "d.scale = 3.0",
    ),
    "__repr__ of a module": (
        module("x * len(self.__repr__())", "self.l = nn.Linear(1, 1).requires_grad_(False)"), "m.l.out_features = 10000",
    ),
    "_named_members": (
        module("x * next(self._named_members(lambda m: m._parameters.items()))[1]", "self.w = P(2.0)"), "m.w.fill_(3)",
    ),
}  # fmt: skip


def run_as_module(text, monkeypatch):
    """Run a program as a module, where pickle looks for its classes; return its globals."""
    module = types.ModuleType("torchcache_test_ways")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    program = vars(module)
    program["__file__"] = __file__
    exec(compile(text, "<user>", "exec"), program)
    return program


def check_that_a_change_shows(cached, plain, change, program, x):
    """Call before and after a change; the result is that of the plain call, and another one than before."""
    with torch.no_grad():
        for _ in range(3):
            before = cached(x)
        exec(change, program)
        with disabled():
            expected = plain(x)
        assert not torch.equal(before, expected)
        assert torch.equal(cached(x), expected)


@pytest.mark.parametrize("way", MISSED)
def test_what_code_reads_in_ways_that_could_be_missed_counts(way, monkeypatch):
    text, change = MISSED[way]
    program = run_as_module(HEADER + text, monkeypatch)
    target = program["m"]
    x = torch.arange(1.0, 10).view(3, 3)
    check_that_a_change_shows(torchcache(check_rows=False)(target), target, change, program, x)


MORE_HEADER = """
import abc, argparse, contextvars, copy, csv, ctypes, dataclasses, functools, inspect, json, operator, pickle
import threading, types, typing, weakref, zlib
import torch
from torch import nn
from types import SimpleNamespace
from torchcache import disabled, torchcache

P = lambda value: nn.Parameter(torch.tensor([value]), requires_grad=False)
crc = lambda value: zlib.crc32(pickle.dumps(value)) % 999

class I(nn.Module):
    def forward(self, x): return x

class O: pass
"""

TEXT = (Path(__file__).parent / "ways_to_read.txt").read_text(encoding="utf-8")
MORE = {name: rest for name, _, rest in (part.partition("\n") for part in TEXT.split("=== ")[1:])}


@pytest.mark.parametrize("way", MORE)
def test_what_code_reads_where_it_is_hard_to_see_counts(way, monkeypatch):
    text, _, change = MORE[way].partition("\n---\n")
    program = run_as_module(MORE_HEADER + text, monkeypatch)
    called = program["m"]
    x = program["x"] = torch.rand(4, 3)
    check_that_a_change_shows(called, called, change, program, x)
    assert cache_of(called).stats().misses
