"""Which code draws random numbers that no seed decides, as the walk sees it. Runs without torch."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from torchcache.keys.code import walk_code

PRELUDE = """
import functools, os, random, secrets, uuid
import numpy as np
"""


def run(text):
    """Execute a program and return its names."""
    names = {"__name__": "mine"}
    exec(compile(PRELUDE + textwrap.dedent(text), "mine.py", "exec", dont_inherit=True), names)
    return names


def sources(text):
    return walk_code(run(text)["target"]).draws.sources


# -- what is a source ----------

SOURCES = {
    "os.urandom(4)": "os.urandom",
    "os.getrandom(4)": "os.getrandom",
    "secrets.token_bytes(4)": "secrets.token_bytes",
    "secrets.randbelow(9)": "secrets.randbelow",
    "secrets.choice(x)": "random.SystemRandom",
    "secrets.randbits(4)": "random.SystemRandom",
    "uuid.uuid1()": "uuid.uuid1",
    "uuid.uuid4()": "uuid.uuid4",
    "random.SystemRandom().random()": "random.SystemRandom",
    "random.SystemRandom(3).random()": "random.SystemRandom",
    "random.Random().random()": "random.Random",
    "random.Random(None).random()": "random.Random",
    "random.seed()": "random.Random.seed",
    "np.random.default_rng().random()": "numpy.random.default_rng",
    "np.random.default_rng(seed=None).random()": "numpy.random.default_rng",
    "np.random.RandomState().rand()": "numpy.random.RandomState",
    "np.random.SeedSequence().entropy": "numpy.random.SeedSequence",
    "np.random.SeedSequence(spawn_key=(1,)).entropy": "numpy.random.SeedSequence",
    "np.random.seed()": "numpy.random.seed",
    "np.random.seed(None)": "numpy.random.seed",
    "np.random.MT19937()": "numpy.random.MT19937",
    "np.random.PCG64()": "numpy.random.PCG64",
    "np.random.PCG64DXSM()": "numpy.random.PCG64DXSM",
    "np.random.Philox(None)": "numpy.random.Philox",
    "np.random.Generator(np.random.SFC64())": "numpy.random.SFC64",
}


@pytest.mark.parametrize("text", SOURCES)
def test_what_no_seed_decides_is_found_under_its_public_name(text):
    assert sources(f"def target(x):\n    return {text}") == (SOURCES[text],)


SEEDED = [
    "random.Random(3)", "random.Random(x)", "random.seed(0)", "random.random()", "np.random.default_rng(0)",
    "np.random.default_rng(x)", "np.random.default_rng(seed=x + 1)", "np.random.default_rng(*x)",
    "np.random.RandomState(seed=0)", "np.random.RandomState(np.random.MT19937(5))", "np.random.SeedSequence(entropy=7)",
    "np.random.Philox(key=3)", "np.random.Generator(np.random.PCG64(1))", "np.random.rand()", "np.random.seed(3)",
    "uuid.uuid5(uuid.NAMESPACE_URL, x)", "uuid.UUID(int=x)", "secrets.compare_digest(x, x)", "os.getpid()",
    "np.random.default_rng(x.seed)", "np.random.default_rng(x if x is not None else 3)",
    "np.random.default_rng(x or 3)", "isinstance(x, random.Random)", "isinstance(x, np.random.RandomState)",
    "functools.partial(np.random.default_rng, x)", "functools.partial(np.random.default_rng, 3)()",
    "type(x) is np.random.RandomState", "x.seed(3)", "x.seed",
]  # fmt: skip


@pytest.mark.parametrize("text", SEEDED)
def test_what_a_seed_decides_or_leaves_a_trace_is_no_source(text):
    assert sources(f"def target(x):\n    return {text}") == ()


def test_a_module_of_the_users_own_that_has_the_name_of_one_of_the_standard_library_is_no_source():
    assert sources("""
        class secrets:
            @staticmethod
            def token_bytes(n):
                return bytes(n)
        def uuid4():
            return 4
        def target(x):
            return secrets.token_bytes(x), uuid4()
    """) == ()  # fmt: skip


# -- how it is named ----------

NAMED = {
    "by a global": "from os import urandom\ndef target(x):\n    return urandom(4)",
    "by another name": "from os import urandom as draw\ndef target(x):\n    return draw(4)",
    "by a local import of the module": "def target(x):\n    import os as o\n    return o.urandom(4)",
    "by a local import of the name": "def target(x):\n    from os import urandom as draw\n    return draw(4)",
    "by a local name": "def target(x):\n    draw = os.urandom\n    return draw(4)",
    "by a local name for the module": "def target(x):\n    o = os\n    return o.urandom(4)",
    "by a default": "def target(x, draw=os.urandom):\n    return draw(4)",
    "by a keyword default": "def target(x, *, draw=os.urandom):\n    return draw(4)",
    "by a table": "TABLE = {'draw': [os.urandom]}\ndef target(x):\n    return TABLE['draw'][0](4)",
    "by a dict": "TABLE = {'draw': os.urandom}\ndef target(x):\n    return TABLE['draw'](4)",
    "by a partial": "draw = functools.partial(os.urandom, 4)\ndef target(x):\n    return draw()",
    "as an argument": "def target(x):\n    return [*map(os.urandom, x)]",
    "by a closure": """
        def make(draw):
            def target(x):
                return draw(4)
            return target
        target = make(os.urandom)
    """,
    "in an inner function": "def target(x):\n    return [y for y in (lambda n: os.urandom(n))(4)]",
    "by a helper": "def helper(x):\n    return os.urandom(x)\ndef target(x):\n    return helper(x)",
    "by a class attribute": """
        class target:
            draw = staticmethod(os.urandom)
            def forward(self, x):
                return self.draw(4)
    """,
    "by an attribute of an object": """
        class Holder:
            def __init__(self):
                self.draw = os.urandom
            def get(self):
                return self.draw(4)
        HOLDER = Holder()
        def target(x):
            return HOLDER.get()
    """,
}  # fmt: skip


@pytest.mark.parametrize("text", NAMED.values(), ids=NAMED)
def test_a_source_is_found_by_whatever_name(text):
    assert sources(text) == ("os.urandom",)


MADE = {
    "by another name": "from numpy.random import default_rng as rng\ndef target(x):\n    return rng().random()",
    "by a local name": "def target(x):\n    make = np.random.default_rng\n    return make().random()",
    "by a local import": "def target(x):\n    import numpy.random as r\n    return r.default_rng().random()",
    "by one of two local names": """
        def target(x):
            if x:
                make = np.random.default_rng
            else:
                make = fixed
            return make().random()
    """,
    "by a conditional expression": "def target(x):\n    return (np.random.default_rng if x else min)().random()",
    "by a default": "def target(x, make=np.random.default_rng):\n    return make().random()",
    "by a partial": "make = functools.partial(np.random.default_rng)\ndef target(x):\n    return make().random()",
    "by a partial with None": """
        make = functools.partial(np.random.default_rng, None)
        def target(x):
            return make().random()
    """,
    "handed to another function": """
        def helper(make):
            return make().random()
        def target(x):
            return helper(np.random.default_rng)
    """,
    "by a class attribute": """
        class target:
            make = staticmethod(np.random.default_rng)
            def forward(self, x):
                return self.make().random()
    """,
    "in an argument": "def target(x):\n    return min(x, np.random.default_rng().random() if x else 0, key=None)",
    "after what is handed in": "def target(x, rng=None):\n    return (rng or np.random.default_rng()).random()",
    "with None in some case": "def target(x):\n    return np.random.default_rng(None if x else 3)",
    "in a comprehension": "def target(x):\n    return [np.random.default_rng().random() for _ in range(x)]",
    "in a handler": """
        def target(x):
            try:
                return x.value
            except AttributeError:
                return np.random.default_rng().random()
    """,
}


@pytest.mark.parametrize("text", MADE.values(), ids=MADE)
def test_a_generator_without_a_seed_is_found_by_whatever_name(text):
    assert sources(text) == ("numpy.random.default_rng",)


def test_a_subclass_of_a_generator_counts_as_it_does():
    text = "class Own(random.Random):\n    pass\ndef target(x):\n    return Own({}).random()"
    assert sources(text.format("")) == ("random.Random",)
    assert sources(text.format("3")) == ()


SYSTEM = {
    "in a global": "DRAW = random.SystemRandom()\ndef target(x):\n    return DRAW.random()",
    "by its method": "draw = random.SystemRandom().random\ndef target(x):\n    return draw()",
    "in a class attribute": """
        class target:
            rng = random.SystemRandom()
            def forward(self, x):
                return self.rng.random()
    """,
    "in an attribute of an object": """
        class Holder:
            def __init__(self):
                self.rng = random.SystemRandom()
            def get(self):
                return self.rng.random()
        HOLDER = Holder()
        def target(x):
            return HOLDER.get()
    """,
    "in an attribute of a global": """
        import types
        HOLDER = types.SimpleNamespace(rng=random.SystemRandom())
        def target(x):
            return HOLDER.rng.random()
    """,
}


@pytest.mark.parametrize("text", SYSTEM.values(), ids=SYSTEM)
def test_a_system_random_that_is_kept_counts_too(text):
    assert sources(text) == ("random.SystemRandom",)


@pytest.mark.parametrize(
    "held", [random.SystemRandom, random.SystemRandom().random, functools.partial(random.SystemRandom)]
)
def test_what_the_state_holds_of_it_counts(held):
    def target(x):
        return x

    assert walk_code(target, [held]).draws.sources == ("random.SystemRandom",)
    assert walk_code(target, [random.Random, random.Random(3).random]).draws.sources == ()


LATE = """
import sys
from torchcache.keys.code import walk_code

def target(x):
    import numpy as np
    import uuid as names
    return names.uuid4(), np.random.default_rng()

assert not {"uuid", "numpy.random"} & set(sys.modules)
print(*walk_code(target).draws.sources)
"""


def test_what_the_code_imports_only_when_it_runs_is_found():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    seen = subprocess.check_output([sys.executable, "-c", LATE], env=environment, text=True, timeout=250)
    assert seen.split() == ["numpy.random.default_rng", "uuid.uuid4"]


# -- seeds ----------

NONE = {
    "a global": "SEED = None\ndef target(x):\n    return np.random.default_rng(SEED)",
    "an attribute of a global": """
        import types
        CONFIG = types.SimpleNamespace(seed=None)
        def target(x):
            return np.random.default_rng(CONFIG.seed)
    """,
    "a class attribute": """
        class Config:
            seed = None
        def target(x):
            return np.random.default_rng(seed=Config.seed)
    """,
    "a default": "def target(x, seed=None):\n    return np.random.default_rng(seed)",
    "a keyword default": "def target(x, *, seed=None):\n    return np.random.default_rng(seed)",
    "a local name": "def target(x):\n    seed = None\n    return np.random.default_rng(seed)",
    "a local name for a global": "SEED = None\ndef target(x):\n    seed = SEED\n    return np.random.default_rng(seed)",
    "a default that the generator replaces": """
        def target(x, rng=None):
            rng = np.random.default_rng(rng)
            return rng.random()
    """,
    "a closure variable": """
        def make(seed):
            def target(x):
                return np.random.default_rng(seed)
            return target
        target = make(None)
    """,
}


@pytest.mark.parametrize("text", NONE.values(), ids=NONE)
def test_a_seed_that_is_none_wherever_it_comes_from_is_no_seed(text):
    assert sources(text) == ("numpy.random.default_rng",)


@pytest.mark.parametrize("text", NONE.values(), ids=NONE)
def test_the_same_with_another_value_is_a_seed(text):
    changed = text.replace("None", "3", 1)
    assert changed != text
    assert sources(changed) == ()


SEEDS = {
    "a default that the code replaces": """
        def target(x, seed=None):
            if seed is None:
                seed = 3
            return np.random.default_rng(seed)
    """,
    "a loop variable": "def target(x):\n    for seed in x:\n        np.random.default_rng(seed)",
    "one that is not known": "def target(x, seed=None):\n    return np.random.default_rng(seed if x else x)",
    "a parameter of an inner function": "def target(x):\n    return [*map(lambda s: np.random.default_rng(s), x)]",
    "another one if it is None": """
        def target(x, seed=None):
            return np.random.default_rng(seed if seed is not None else 3)
    """,
    "given afterwards": "def target(x):\n    rng = random.Random()\n    rng.seed(x)\n    return rng.random()",
    "a state given afterwards": """
        def target(x):
            rng = np.random.RandomState()
            rng.set_state(x)
            return rng.rand()
    """,
}


@pytest.mark.parametrize("text", SEEDS.values(), ids=SEEDS)
def test_a_seed_that_may_be_one_counts(text):
    assert sources(text) == ()


def test_variables_that_are_assigned_each_other_come_to_an_end():
    names = [f"v{i}" for i in range(12)]
    turns = "\n        ".join(f"{a} = {b} if x else {c}.next" for a in names for b in names for c in names[:2])
    text = f"""
    def target(x):
        for _ in x:
            {turns}
        x = x.next
        return np.random.default_rng(v0), np.random.default_rng(x)
    """
    assert sources(text.replace("\n        v", "\n            v")) == ()


def test_a_seed_is_looked_at_anew_each_time():
    names = run(NONE["a global"])
    draws = walk_code(names["target"]).draws
    assert draws.sources == ("numpy.random.default_rng",)
    names["SEED"] = 3
    assert draws.sources == ()
    names["SEED"] = None
    assert draws.sources == ("numpy.random.default_rng",)


@pytest.mark.parametrize("call", ["x.seed()", "x.seed(None)", "(lambda g: g.seed())(x)", "x.rng.seed()"])
def test_a_seed_that_an_unknown_generator_chooses_itself_counts(call):
    assert sources(f"def target(x):\n    return {call}") == ("seed()",)


def test_a_method_seed_of_the_users_own_counts_by_what_it_does():
    text = "class Own:\n    def seed(self):\n        return {}\ndef target(x):\n    return Own().seed()"
    assert sources(text.format("3")) == ()
    assert sources(text.format("uuid.uuid4()")) == ("uuid.uuid4",)


# -- what runs ----------

RUNS = {
    "forward": "class target:\n    def forward(self, x):\n        return uuid.uuid4()",
    "call": "class target:\n    def __call__(self, x):\n        return uuid.uuid4()",
    "getitem": "class target:\n    def __getitem__(self, i):\n        return uuid.uuid4()",
    "a method that forward calls": """
        class target:
            def forward(self, x):
                return self.helper(x)
            def helper(self, x):
                return uuid.uuid4()
    """,
    "a property": """
        class target:
            @property
            def noise(self):
                return uuid.uuid4()
            def forward(self, x):
                return self.noise
    """,
    "a base": """
        class Base:
            def forward(self, x):
                return uuid.uuid4()
        class target(Base):
            def forward(self, x):
                return super().forward(x)
    """,
    "a method by its text": """
        class target:
            def forward(self, x):
                return getattr(self, "noise")()
            def noise(self):
                return uuid.uuid4()
    """,
    "what a class makes of itself": """
        class Noise:
            def __init__(self):
                self.value = uuid.uuid4()
        def target(x):
            return Noise().value
    """,
    "what a class makes under another name": """
        class Noise:
            def __init__(self):
                self.value = uuid.uuid4()
        def target(x):
            make = Noise
            return make().value
    """,
    "what a class makes under another global name": """
        class Noise:
            def __init__(self):
                self.value = uuid.uuid4()
        Other = Noise
        def target(x):
            return Other().value
    """,
    "what a class method makes": """
        class Noise:
            def __init__(self):
                self.value = uuid.uuid4()
            @classmethod
            def of(cls):
                return cls()
        def target(x):
            return Noise.of().value
    """,
    "what a class method makes under another name": """
        class Noise:
            def __init__(self):
                self.value = uuid.uuid4()
            @classmethod
            def of(cls):
                return cls()
        make = Noise.of
        def target(x):
            return make().value
    """,
    "what an object makes of its own class": """
        class Noise:
            def __init__(self, value=None):
                self.value = value or uuid.uuid4()
            def again(self):
                return self.__class__()
        NOISE = Noise(3)
        def target(x):
            return NOISE.again().value
    """,
    "a default factory of a dataclass": """
        import dataclasses
        @dataclasses.dataclass
        class Noise:
            value: object = dataclasses.field(default_factory=uuid.uuid4)
        def target(x):
            return Noise().value
    """,
    "a context manager": """
        class Noise:
            def __enter__(self):
                return uuid.uuid4()
            def __exit__(self, *_):
                pass
        def target(x):
            with Noise() as noise:
                return noise
    """,
    "an object in an attribute of an object": """
        class Noise:
            def __call__(self):
                return uuid.uuid4()
        class Pipe:
            def __init__(self, step):
                self.step = step
            def run(self):
                return self.step()
        PIPE = Pipe(Noise())
        def target(x):
            return PIPE.run()
    """,
    "a default": "def target(x, helper=lambda: uuid.uuid4()):\n    return helper()",
    "a function in a list in a class attribute": """
        def noise(x):
            return uuid.uuid4()
        class target:
            steps = [noise]
            def forward(self, x):
                return [step(x) for step in self.steps]
    """,
    "a function in a table": """
        TABLE = {"noise": lambda x: uuid.uuid4()}
        class target:
            def forward(self, x):
                return TABLE["noise"](x)
    """,
    "a decorator": """
        def noisy(function):
            @functools.wraps(function)
            def wrapper(x):
                return function(x), uuid.uuid4()
            return wrapper
        @noisy
        def target(x):
            return x
    """,
    "what a decorator is around": """
        def plain(function):
            @functools.wraps(function)
            def wrapper(x):
                return function(x)
            return wrapper
        @plain
        def target(x):
            return uuid.uuid4()
    """,
    "behind a cache of the standard library": """
        @functools.lru_cache
        def helper(x):
            return uuid.uuid4()
        def target(x):
            return helper(x)
    """,
    "what a metaclass makes": """
        class Meta(type):
            def __call__(cls):
                return uuid.uuid4()
        class Noise(metaclass=Meta):
            pass
        def target(x):
            return Noise()
    """,
    "a bound method": """
        class Noise:
            def draw(self):
                return uuid.uuid4()
        draw = Noise().draw
        def target(x):
            return draw()
    """,
}


@pytest.mark.parametrize("text", RUNS.values(), ids=RUNS)
def test_code_that_runs_counts(text):
    assert sources(text) == ("uuid.uuid4",)


IN_A_MODULE = {
    "an import of its name": "from helpers import noise as draw\n        return draw()",
    "an import of the module": "import helpers as h\n        return h.noise()",
    "a table in it": "import helpers as h\n        return h.TABLE['noise']()",
}


@pytest.mark.parametrize("statements", IN_A_MODULE.values(), ids=IN_A_MODULE)
def test_code_of_another_module_that_runs_counts(monkeypatch, statements):
    helpers = types.ModuleType("helpers")
    exec("import uuid\ndef noise():\n    return uuid.uuid4()\nTABLE = {'noise': lambda: uuid.uuid4()}", vars(helpers))
    monkeypatch.setitem(sys.modules, "helpers", helpers)
    assert sources(f"class target:\n    def forward(self, x):\n        {statements}") == ("uuid.uuid4",)


IDLE = {
    "a method that nothing names": """
        class target:
            def forward(self, x):
                return x
            def push(self):
                return uuid.uuid4()
    """,
    "what makes the target": """
        class target:
            def __init__(self):
                self.name = uuid.uuid4().hex
            def forward(self, x):
                return super(target, self).__class__, isinstance(x, target)
    """.replace("super(target, self).__class__, ", ""),
    "what makes the target, which super() names": """
        class Base:
            def forward(self, x):
                return x
        class target(Base):
            def __init__(self):
                self.name = uuid.uuid4().hex
            def forward(self, x):
                return super(target, self).forward(x)
    """,
    "what was drawn when the program started": "SESSION = uuid.uuid4().hex\ndef target(x):\n    return SESSION",
    "another method of a class whose method runs": """
        class Helper:
            def twice(self, x):
                return x * 2
            def save(self):
                return uuid.uuid4()
        HELPER = Helper()
        def target(x):
            return HELPER.twice(x)
    """,
    "what is named by a method that does not run": """
        class Folder:
            def __enter__(self):
                return uuid.uuid4()
        class target:
            def forward(self, x):
                return x
            def save(self):
                with Folder() as folder:
                    return folder
    """,
    "copies and prints": """
        class target:
            def forward(self, x):
                return x
            def __deepcopy__(self, memo):
                return uuid.uuid4()
            def __repr__(self):
                return uuid.uuid4().hex
    """,
    "an order of samples that are asked for by index": """
        class target:
            def __getitem__(self, i):
                return i
            def __iter__(self):
                return iter(np.random.default_rng().permutation(4))
    """,
}


@pytest.mark.parametrize("text", IDLE.values(), ids=IDLE)
def test_code_that_does_not_run_does_not_count(text):
    assert sources(text) == ()


def test_an_order_of_an_object_that_the_code_iterates_over_counts():
    assert sources("""
        class Order:
            def __iter__(self):
                return iter(np.random.default_rng().permutation(4))
        ORDER = Order()
        class target:
            def forward(self, x):
                return [*ORDER]
    """) == ("numpy.random.default_rng",)  # fmt: skip


def test_the_walk_keeps_no_function_of_a_state_alive_for_its_seeds():
    import gc
    import weakref

    def make(seed):
        def target(x):
            return random.Random(seed)

        return target

    held = make(None)
    draws = walk_code(len, [held]).draws
    assert draws.sources == ("random.Random",)
    gone = weakref.ref(held)
    del held
    gc.collect()
    assert gone() is None
    assert draws.sources == ()
