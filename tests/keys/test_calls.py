"""What instructions say of calls, compared with the program's text, in every version of Python. Runs without torch."""

from __future__ import annotations

import ast
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache.keys.calls import uses_of
from torchcache.keys.operands import NONE, Operand

LOCALS = ("a", "b")


def code_of(text):
    names = {}
    exec(compile(textwrap.dedent(text), "mine.py", "exec", dont_inherit=True), names)
    return names["target"].__code__


def name_of(operands):
    """Name an operand as the text does; None for one that is no name."""
    if len(operands) != 1 or operands[0].kind not in ("global", "variable"):
        return None
    return ".".join((operands[0].root, *operands[0].keys))


def dotted(node):
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def possible(operands):
    """Return the names that a value may be read by, "None", and "other"."""
    return frozenset("None" if (operand,) == NONE else name_of((operand,)) or "other" for operand in operands)


def possible_of_text(node):
    if isinstance(node, ast.IfExp):
        return possible_of_text(node.body) | possible_of_text(node.orelse)
    if isinstance(node, ast.BoolOp):
        return frozenset().union(*map(possible_of_text, node.values))
    is_none = isinstance(node, ast.Constant) and node.value is None
    return frozenset(["None" if is_none else dotted(node) or "other"])


def seen(calls):
    """Return the calls whose callee has a name, with what each argument may be; None if more are given."""
    return {
        (
            name_of(call.callee),
            None if call.has_more else tuple(map(possible, call.positional)),
            None if call.has_more else tuple((key, possible(value)) for key, value in call.keywords),
        )
        for call in calls
        if name_of(call.callee) is not None
    }


def expected(text):
    calls = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and dotted(node.func) is not None:
            has_more = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
            calls.add(
                (
                    dotted(node.func),
                    None if has_more else tuple(map(possible_of_text, node.args)),
                    None if has_more else tuple((k.arg, possible_of_text(k.value)) for k in node.keywords),
                )
            )
    return calls


names = st.sampled_from(["f", "g.h", "g.h.i", *LOCALS, "a.h"])
atoms = st.one_of(names, st.sampled_from(["None", "3", "'text'", "(1, 2)"]))


def larger(inner):
    arguments = st.one_of(
        st.lists(inner, max_size=3).map(", ".join),
        st.tuples(inner, inner).map("{0[0]}, k={0[1]}".format),
        inner.map("k={}".format),
        st.tuples(inner, inner, inner).map("{0[0]}, k={0[1]}, m={0[2]}".format),
        names.map("*{}".format),
        names.map("3, **{}".format),
    )
    return st.one_of(
        st.tuples(names, arguments).map("{0[0]}({0[1]})".format),
        st.tuples(inner, arguments).map("f({0[0]}).h({0[1]})".format),
        st.tuples(inner, names, inner).map("({0[0]} if {0[1]} else {0[2]})".format),
        st.tuples(inner, names, inner).map("({0[0]} if {0[1]} is None else {0[2]})".format),
        st.tuples(names, inner).map("({0[0]} or {0[1]})".format),
        st.tuples(names, inner).map("({0[0]} and {0[1]})".format),
        st.tuples(inner, inner).map("({0[0]}, {0[1]})".format),
        st.tuples(inner, inner).map("{{{0[0]}: {0[1]}}}".format),
        st.tuples(inner, names).map("[{0[0]} for c in {0[1]}]".format),
        st.tuples(names, names, inner).map("({0[0]} < {0[1]} < {0[2]})".format),
        inner.map("(lambda: {})".format),
        inner.map("f'{{{}}}'".format),
        st.tuples(names, inner).map("{0[0]}[{0[1]}]".format),
    )


expressions = st.recursive(atoms, larger, max_leaves=12)

STATEMENTS = [
    "return {}",
    "d = {}",
    "if f: return {}\n    return 3",
    "for c in {}: f(c)",
    "while f: g.h({})",
    "with g.h as c: f({})",
    "try: f(3)\n    except g.E as e: return {}",
    "c, d = {}\n    return f(d)",
    "assert f, {}",
    "del a.x\n    a.x = {}",
]


@given(st.sampled_from(STATEMENTS), expressions.filter(lambda text: "f'" not in text or text.count("'") == 2))
def test_calls_are_those_of_the_text(statement, expression):
    text = "def target(a, b):\n    " + statement.format(expression)
    assert seen(uses_of(code_of(text)).calls) == expected(text)


def test_a_value_that_depends_on_a_branch_may_be_either():
    (call,) = uses_of(code_of("def target(x):\n    return f(None if x else x, k=x or 3)")).calls
    assert [set(operands) for operands in call.positional] == [{*NONE, Operand("variable", "x")}]
    ((name, value),) = call.keywords
    assert name == "k"
    assert {operand.kind for operand in value} == {"variable", "constant"}


def test_a_result_is_known_by_the_number_of_its_call():
    uses = uses_of(code_of("def target(x):\n    y = f()\n    y.seed(3)\n    return g(y)"))
    assert uses.assigned["y"] == (Operand("result", "0"),)
    assert [name_of(call.callee) for call in uses.calls] == ["f", "y.seed", "g"]


@pytest.mark.parametrize(
    ("statement", "operand"),
    [
        ("import os", Operand("module", "os")),
        ("import os.path", Operand("module", "os")),
        ("import os.path as os", Operand("module", "os", ("path",))),
        ("from os import path as os", Operand("module", "os", ("path",))),
        ("from os.path import join as os", Operand("module", "os.path", ("join",))),
        ("from ..pack import thing as os", Operand("module", "..pack", ("thing",))),
        ("from . import thing as os", Operand("module", ".", ("thing",))),
    ],
)
def test_an_import_says_which_module(statement, operand):
    assert uses_of(code_of(f"def target():\n    {statement}\n    return os")).assigned["os"] == (operand,)
