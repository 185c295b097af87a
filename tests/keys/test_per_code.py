"""What is kept for a code object is that code object's own, and no more than so much is kept."""

from __future__ import annotations

import types
from threading import Thread

import pytest

from torchcache.keys import per_code
from torchcache.keys.calls import uses_of
from torchcache.keys.canonical import fingerprint_code
from torchcache.keys.code import walk_code
from torchcache.keys.per_code import PerCode
from torchcache.keys.reads import reads_of
from torchcache.keys.writes import Writes


def compiled(text: str, filename: str = "one.py") -> types.FunctionType:
    """Return the function ``f`` of a program."""
    names: dict[str, object] = {"__name__": "program"}
    exec(compile(text, filename, "exec"), names)
    function = names["f"]
    assert isinstance(function, types.FunctionType)
    return function


TEXT = "def f(x): return helper(x)"


def test_an_answer_is_found_once_for_each_code_object() -> None:
    asked = []
    name_of = PerCode(lambda code: asked.append(code) or code.co_name)
    code = compiled(TEXT).__code__
    assert [name_of(code), name_of(code)] == ["f", "f"]
    assert asked == [code]


def test_what_is_given_with_a_code_object_has_an_answer_of_its_own() -> None:
    both = PerCode(lambda code, more: (code.co_name, more))
    code = compiled(TEXT).__code__
    assert both(code, 1) == ("f", 1)
    assert both(code, 2) == ("f", 2)


def test_equal_code_objects_of_two_files_are_told_apart() -> None:
    one, other = compiled(TEXT, "one.py").__code__, compiled(TEXT, "other.py").__code__
    assert one == other  # Python does not compare their files
    file_of = PerCode(lambda code: code.co_filename)
    assert [file_of(one), file_of(other), file_of(one)] == ["one.py", "other.py", "one.py"]


def test_code_on_other_lines_is_told_apart_and_says_the_same() -> None:
    one, other = compiled(TEXT).__code__, compiled(f"\n\n{TEXT}").__code__
    line_of = PerCode(lambda code: code.co_firstlineno)
    assert [line_of(one), line_of(other)] == [1, 3]
    assert fingerprint_code(one) == fingerprint_code(other)
    assert reads_of(one) == reads_of(other)


def test_a_function_whose_code_is_replaced_is_looked_at_anew() -> None:
    function, other = compiled(TEXT), compiled("def f(x):\n  global n\n  n = x\n  return another(x)")
    before = walk_code(function).fingerprint
    assert reads_of(function.__code__).names == ("helper",)

    function.__code__ = other.__code__
    assert walk_code(function).fingerprint == walk_code(other).fingerprint != before
    assert reads_of(function.__code__).names == ("another",)
    assert {operand.root for operand in uses_of(function.__code__).read} == {"another", "x"}
    writes = Writes()
    writes.note(function)
    assert writes.assigned_names == {"n"}


def test_one_code_object_writes_to_the_class_whose_method_it_is() -> None:
    function = compiled("def f(self): self.n = self.m")
    for owner in (int, str):
        writes = Writes()
        writes.note(function, owner)
        assert writes.leave_out_attribute(owner, "n", is_container=False)
        assert not writes.leave_out_attribute(owner, "m", is_container=False)
        assert not writes.leave_out_attribute(bytes, "n", is_container=False)


def test_one_code_object_has_the_defaults_of_each_function() -> None:
    function = compiled("def f(kept): kept.append(1)")
    for defaults, changed in (((), set()), (([],), {"kept="})):
        function.__defaults__ = defaults or None
        writes = Writes()
        writes.note(function)
        assert writes.changed_names == changed


def test_the_oldest_answer_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_code, "MOST_KEPT", 3)
    asked = []
    name_of = PerCode(lambda code: asked.append(code.co_name) or code.co_name)
    codes = [compiled(TEXT).__code__.replace(co_name=name) for name in "abcd"]
    assert list(map(name_of, codes)) == [*"abcd"]
    assert len(name_of) == 3
    name_of(codes[3])
    assert asked == [*"abcd"]
    name_of(codes[0])
    assert asked == [*"abcda"]


def test_threads_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_code, "MOST_KEPT", 4)
    name_of = PerCode(lambda code: code.co_name)
    codes = [compiled(TEXT).__code__.replace(co_name=f"f{i}") for i in range(32)]
    wrong = []

    def ask() -> None:
        for _ in range(50):
            wrong.extend(code for code in codes if name_of(code) != code.co_name)

    threads = [Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(name_of) <= 4
