"""Plain values as source text: families whose members look alike, and how to get another one."""

from __future__ import annotations

import random

#: Members of one family are easily taken for each other; each is another value, by type or by structure.
PLAIN = (
    ("1", "True", "1.0", "'1'", "b'1'", "(1,)", "(1+0j)", "'1.0'", "'True'"),
    ("0", "False", "0.0", "-0.0", "''", "b''", "()", "None", "'None'", "(0,)"),
    ("2", "2.0", "'2'", "(2,)", "((2,),)", "(2.0,)", "(2+0j)"),
    ("'a'", "b'a'", "('a',)", "('a', ())", "('a', '')"),
    ("float('nan')", "'nan'", "float('inf')", "-float('nan')"),
    ("(1, (2, 3))", "((1, 2), 3)", "(1, 2, 3)", "(1, 2, 3, None)", "((1, 2, 3),)", "(1, 2.0, 3)"),
    ("('ab', 'c')", "('a', 'bc')", "('abc',)", "'abc'", "('abc', '')"),
    ("torch.float32", "'torch.float32'", "torch.float16", "'float32'"),
    ("torch.device('cpu')", "'cpu'", "torch.device('cpu', 0)"),
    ("2**70", "float(2**70)", "2**70 + 1", "str(2**70)"),
    ("3", "3.0", "3.0000000000000004", "4"),
    ("1e-320", "0.0", "2e-320"),
    ("HTTPStatus.OK", "200", "HTTPStatus.ACCEPTED", "'OK'"),
    ("'\\ud800'", "'?'", "'\\udc80'"),
    ("slice(1, 2)", "(1, 2)", "slice(1, 2, 1)", "slice(None, 2)"),
)

#: Of a constructor's arguments, attributes and globals.
COMPOSITE = (
    *PLAIN,
    ("[1, 2]", "(1, 2)", "{1: 2}", "{1, 2}", "[1, 2.0]", "[1, [2]]", "[True, 2]", "Point(1, 2)"),
    ("{'a': 1, 'b': 2}", "{'a': 1.0, 'b': 2}", "[('a', 1), ('b', 2)]", "{'a': 2, 'b': 1}", "{'a': {'b': 2}}"),
    ("{'red', 'green', 'blue'}", "frozenset({'red', 'green', 'blue'})", "['red', 'green', 'blue']", "{'red', 'blue'}"),
    ("Config(1, 'a')", "Config(1.0, 'a')", "Config(1, 'b')", "Config(True, 'a')", "(1, 'a')"),
    ("Color.RED", "Color.BLUE", "'RED'", "Shade.RED"),
    ("Point(1, 2)", "Point(1, 2.0)", "Point(2, 1)"),
)

#: Of attributes and globals: what has no name of its own, but attributes or code.
STATEFUL = (
    *COMPOSITE,
    ("Holder(1)", "Holder(1.0)", "Holder([1])", "Holder(Holder(1))", "Other(1)"),
    ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}"),
    ("[Holder('x'), {'k': [1]}]", "[Holder('x'), {'k': [True]}]", "[Holder('x'), {'k': (1,)}]"),
    ("np.array([1.0, 2.0])", "np.array([1, 2])", "np.array([1.0, 2.5])", "np.array([[1.0, 2.0]])"),
)

NUMBERS = ("1.5", "0.5", "2", "2.0", "-1.25", "0.0", "-0.0", "3", "3.0", "1e-3")
OPERATORS = ("+", "-", "*")

Families = tuple[tuple[str, ...], ...]


def choose(rng: random.Random, families: Families) -> str:
    """Return any literal."""
    return rng.choice(rng.choice(families))


def of_another_type(rng: random.Random, literal: str, families: Families) -> str:
    """Return a literal that is easily taken for this one."""
    relatives = [other for family in families if literal in family for other in family if other != literal]
    return rng.choice(relatives or [other for other in families[0] if other != literal])


def of_another_value(rng: random.Random, literal: str, families: Families) -> str:
    """Return a literal of another family."""
    return choose(rng, tuple(family for family in families if literal not in family))
