"""The pages for developers name what is there: files, functions, rooms, words. And make quick tries every room."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmarks import rooms
from stress.suites import SUITES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "torchcache"
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "CONTRIBUTING.md", ROOT / "docs/development/architecture.md", ROOT / "docs/glossary.md")
}
ARCHITECTURE = PAGES["architecture.md"]
IMPORTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
LAYERS = IMPORTS[0]["layers"]


def words_in_code(page: str) -> list[str]:
    """Return the words of a page that are written as code inside of its sentences and tables."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    return [word for code in re.findall(r"`([^`]+)`", text) for word in code.split()]


def table(heading: str) -> list[list[str]]:
    """Return the rows of the first table under a heading of the architecture, as lists of cells."""
    _, _, rest = ARCHITECTURE.partition(f"\n{heading}\n")
    lines = [line for line in rest.partition("\n#")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# -- paths and functions ------------------------------------------------------------------------------------------

PATH = re.compile(r"[\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|toml|ini)")


@pytest.mark.parametrize("page", PAGES)
def test_each_path_that_a_page_names_is_there(page):
    named = [word for word in words_in_code(page) if PATH.fullmatch(word)]
    assert named
    assert [path for path in named if not (ROOT / path).exists() and not (LIBRARY / path).exists()] == []


def test_each_suite_that_tries_a_promise_is_there():
    cells = [row[2] for row in table("## Each promise, and where it is kept")]
    suites = [name for cell in cells for name in re.findall(r"`(\w+)`", cell.partition("the suite")[2])]
    assert suites
    assert set(suites) <= set(SUITES)


LEGS = ("### The caller looks it up", "### The computer makes it", "### The writer commits it")
STEPS = [[cell.strip("*`") for cell in row[1:]] for leg in LEGS for row in table(leg)]
STEPS_OF_A_HIT = [[cell.strip("`") for cell in row[1:]] for row in table("## One hit")]

#: Prints which functions of the library are called, as pairs of a file and its line: in the first batch of a namespace,
#: on the writer's thread, and by batches after it, one of which is found on disk.
PROGRAM = """
import json, sys, threading

import torch

from torchcache import cache_of, torchcache

called = {}

def note(frame, event, _):
    if event == "call" and "torchcache" in frame.f_code.co_filename:
        of_thread = called.setdefault(threading.current_thread() is threading.main_thread(), [])
        of_thread.append((frame.f_code.co_filename, frame.f_code.co_firstlineno))

@torchcache(persistent=True, persistent_cache_dir=sys.argv[1], max_memory_cache_size=int(sys.argv[2]))
class Model(torch.nn.Module):
    def forward(self, x):
        return x * 2

threading.setprofile(note)
model, x = Model().eval(), torch.randn(9, 3)
sys.setprofile(note)
model(x)
sys.setprofile(None)
assert cache_of(model).flush()
first = called.pop(True)
sys.setprofile(note)
model(x + 1)
model(x)
sys.setprofile(None)
print(json.dumps([first, called[False], called[True]]))
"""


def test_the_way_of_a_row_begins_at_a_door_and_ends_with_the_commit():
    files = [file for file, _ in STEPS]
    assert files[0].startswith("doors/")
    assert "storage/commit.py" in files
    assert {file.partition("/")[0] for file in files} >= {room for room in ROOMS if (LIBRARY / room).is_dir()} - {
        "report"
    }


@cache
def definitions(file: str) -> dict[int, str]:
    """Return the names of a file's functions, those of methods with their class, by the first line of each."""
    names: dict[int, str] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for item in body:
            if isinstance(item, ast.ClassDef):
                visit(item.body, f"{prefix}{item.name}.")
            elif isinstance(item, ast.FunctionDef):
                names[min([item.lineno, *(decorator.lineno for decorator in item.decorator_list)])] = prefix + item.name

    visit(ast.parse((LIBRARY / file).read_text(encoding="utf-8")).body, "")
    return names


@pytest.mark.parametrize(("file", "function"), STEPS + STEPS_OF_A_HIT)
def test_each_step_of_the_way_of_a_row_is_in_its_file(file, function):
    assert function in definitions(file).values()


def steps_of(calls: list[list]) -> list[tuple[str, str]]:
    """Return what was called, each function once, in the order of the first calls."""
    named = {}
    for path, line in calls:
        if Path(path).is_relative_to(LIBRARY):
            file = Path(path).relative_to(LIBRARY).as_posix()
            named.setdefault((file, definitions(file).get(line, "")))
    return list(named)


def first_of(calls: list[list], file: str, function: str) -> int:
    """Return the number of the first call of a function."""
    return next(i for i, (path, line) in enumerate(calls) if steps_of([[path, line]]) == [(file, function)])


def test_a_row_goes_the_way_that_the_page_says(tmp_path):
    steps, of_a_hit = ([(file, function) for file, function in rows] for rows in (STEPS, STEPS_OF_A_HIT))
    ways: list[list] = []
    for memory_bytes in ("1000000", "0"):
        directory = str(tmp_path / memory_bytes)
        command = [sys.executable, "-c", PROGRAM, directory, memory_bytes]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout
        ways += json.loads(printed)
    _, on_thread, *_ = ways
    first, written, later, _, _, from_disk = map(steps_of, ways)

    called = {*first, *written, *later, *from_disk}
    assert {*steps, *of_a_hit} - called == {("doors/classes.py", "_make_forward")}, "called when the class is decorated"
    # Each half of the table in its order, but for what only a later batch comes to.
    in_call = [step for step in steps if step in first]
    assert in_call == sorted(in_call, key=first.index)
    of_rows = steps_of(on_thread[first_of(on_thread, "storage/lmdb.py", "LmdbStore.pack") :])  # a verdict went before
    in_thread = steps[steps.index(("storage/lmdb.py", "LmdbStore.pack")) :]
    assert in_thread == sorted(in_thread, key=of_rows.index)


# -- rooms --------------------------------------------------------------------------------------------------------

ROOMS = [name for layer in LAYERS for name in re.findall(r"\w+", layer)]


def test_the_rooms_of_the_map_are_the_layers_of_the_imports():
    named = [name for row in table("## The map") for name in re.findall(r"`(\w+)(?:/|\.py)`", row[0])]
    assert sorted(named) == sorted(ROOMS)


def test_the_order_of_the_rooms_is_that_of_the_imports():
    (order,) = re.findall(r"^```text\n(doors .*)\n```$", ARCHITECTURE, flags=re.MULTILINE)
    assert order.split(" > ")[:-1] == LAYERS[:-1]


def test_what_the_page_says_to_be_without_torch_is_checked():
    (contract,) = [contract for contract in IMPORTS if contract.get("forbidden_modules") == ["torch"]]
    checked = {module.removeprefix("torchcache.") for module in contract["source_modules"]}
    (line,) = re.findall(r"^- (`storage/`.*);$", ARCHITECTURE, flags=re.MULTILINE)
    named = {path.replace("/", ".") for path in re.findall(r"`(\w+(?:/\w+)*)(?:/|\.py)`", line)}
    assert named == {module for module in checked if not module.startswith("keys.")}
    assert IMPORTS.index(contract) == 2, "the page calls it the third"


def test_the_table_of_a_hit_has_rooms_of_the_map_and_keeps_its_bounds():
    written = (ROOT / "docs/tables" / rooms.TABLE).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| \d+ \| (\d+) \|$", written, flags=re.MULTILINE)
    calls, returns = map(int, re.search(r"calls (\d+) functions.* returns to a room (\d+) times", written).groups())
    assert {room for room, _, _ in rows} <= set(ROOMS), "run: python -m benchmarks rooms --write"
    assert sum(int(n) for _, n, _ in rows) == calls <= rooms.MOST_CALLS
    assert sum(int(times) - 1 for _, _, times in rows) == returns <= rooms.MOST_RETURNS


def test_a_hit_walks_no_further_than_it_may():
    own = [call for call in rooms.profiled_hit(rooms.ROWS) if call.room]
    entered = rooms.rooms_in_order(own)
    assert len(own) <= rooms.MOST_CALLS
    assert len(entered) - len(set(entered)) <= rooms.MOST_RETURNS


# -- words --------------------------------------------------------------------------------------------------------

CODE = "".join(path.read_text(encoding="utf-8") for path in LIBRARY.rglob("*.py")).lower()
TERMS = re.findall(r"^(.+)\n: ", PAGES["glossary.md"], flags=re.MULTILINE)


def test_the_glossary_has_each_word_once():
    words = [word for term in TERMS for word in term.split(", ")]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("word", [word.lower() for term in TERMS for word in term.split(", ")])
def test_each_word_of_the_glossary_is_one_of_the_code(word):
    spelled = re.escape(word).replace(r"\ ", "[ _]?").replace(r"\-", "[ _-]?")
    assert re.search(rf"(?<![a-z]){spelled}", CODE)


# -- make quick ---------------------------------------------------------------------------------------------------


def core() -> list[str]:
    """Return the test files that make quick runs."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    (files,) = re.findall(r"^CORE := \$\(addprefix tests/,(.*)\)$", text, flags=re.MULTILINE)
    return files.split()


def test_make_quick_runs_tests_of_every_room():
    files = core()
    assert [file for file in files if not (ROOT / "tests" / file).is_file()] == []
    tried = {file.partition("/")[0] for file in files}
    assert {room for room in ROOMS if (ROOT / "tests" / room).is_dir()} <= tried
