"""Code of the user's own that stands in namespaces of libraries, such as a function set in ``torch.nn.functional``.

Code of a library is not walked: what it finds by a name counts by the version of the library, unless a user put
something else there, or registered something in a table of the library. So the namespaces of the code that is reached
are looked through: those of torch that all code uses, the classes of the state, and the modules that classes and
functions of libraries were defined in. This module does not import torch.
"""

from __future__ import annotations

import abc
import gc
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from torchcache.keys.changes import is_plain_type
from torchcache.keys.displaced import Displaced, changed, remember
from torchcache.keys.fast import dict_versions
from torchcache.keys.home import Home
from torchcache.keys.inside import BUILTIN, OPENED
from torchcache.keys.origins import (
    STANDARD,
    UNCOUNTED,
    functions_behind,
    is_of_cython,
    is_own_class,
    origin_of_class,
    origin_of_function,
    origin_of_module,
)
from torchcache.keys.ours import unwrap
from torchcache.keys.reads import all_codes

#: The modules of torch that code of all libraries uses.
_OF_ALL = ("builtins", "torch", "torch.nn.functional", "torch._C._nn")

#: Functions of C, by their modules, and the module of the table that they look into.
_TABLES_OF_C = {"_pickle": "copyreg"}

#: In a table with more entries than this, nothing is looked for.
_MOST_ENTRIES = 1024

#: So many namespaces are kept for the walks to come. Most are those of modules, which live as long as the program.
_MOST_KEPT = 512

#: A class of C: nobody sets attributes of it.
_IS_IMMUTABLE = 1 << 8

#: Methods that show an object to people.
_SHOWING = frozenset({"__repr__", "__str__", "__format__"})

#: Whoever reads these looks up names that he makes.
_LOOKS_UP = frozenset({"getattr", "attrgetter", "methodcaller", "__getattribute__"})

#: What a prompt calls the last result.
_LAST_RESULT = "_"

_LEAVES = (types.ModuleType, *BUILTIN)
_CODE = (types.FunctionType, type, *BUILTIN)

#: Tells what leads to code of the user's own, and not to that of an installed target.
_USERS = Home(len)


def _nothing() -> object:
    """Stand for what was not looked through yet."""
    return None


@dataclass(frozen=True, slots=True)
class PutIn:
    """Something of the user's own that stands in a namespace of a library.

    Attributes:
        label: The namespace.
        key: The name in it; of an entry in a table, that of its key.
        value: What stands there.
        is_in_table: Whether the namespace is a table, of which it is not known who asks for what.
    """

    label: str
    key: str
    value: object
    is_in_table: bool

    def is_meant(self, names: set[str]) -> bool:
        """Tell whether code may mean it that reads some names; methods with special names, Python calls by itself."""
        is_special = _is_special(self.key) and self.key not in _SHOWING
        is_looked_up = self.label != "builtins" and not names.isdisjoint(_LOOKS_UP)
        return self.is_in_table or is_special or self.key in names or is_looked_up


@dataclass(slots=True)
class _Namespace:
    """A namespace, as it was when it was looked through.

    Attributes:
        label: What to call it.
        entries: The dictionary itself, which is alive as long as this.
        origin: The distribution of it; None for a table.
        code: The code in it, by its keys.
        found: What of the user's own stands in it.
        displaced: Names in it under which code stands that libraries defined by another name, and that code.
        tables: The tables in it, and in objects in it, by what to call them.
    """

    label: str
    entries: dict[Any, Any]
    origin: str | None = None
    code: dict[Any, object] = field(default_factory=dict)
    found: dict[Any, object] = field(default_factory=dict)
    displaced: dict[str, Displaced] = field(default_factory=dict)
    tables: dict[str, dict[Any, Any]] = field(default_factory=dict)
    classes: list[type] = field(default_factory=list)
    is_table: bool = False
    _look: Callable[[], object] = _nothing
    _seen: object = None
    _names_read: set[str] | None = None

    def look_through(self) -> None:
        """Find what of the user's own stands in it, and the tables; once."""
        if self._look is not _nothing:
            return
        version = dict_versions.versions_of([self.entries])
        seen = version() if version else None  # before what it is the version of
        is_table = self.is_table = not any(
            isinstance(dict.get(self.entries, key), str) for key in ("__name__", "__module__")
        )
        for key, value in _items(self.entries):
            if issubclass(type(value), _CODE):  # isinstance asks the value, which may warn that it is deprecated
                self.code[key] = value
            if self._is_users(key, value):
                self.found[key] = value
            elif not is_table and key != _LAST_RESULT and not _is_special(key):
                self._add_tables(key, value)
        self.displaced = self._displaced_now()
        self._look = version or self._reading()
        self._seen = seen or self._look()

    def _is_users(self, key: object, value: object) -> bool:
        """Tell whether an entry is something of the user's own, or is of a class of theirs."""
        if key == _LAST_RESULT or (_is_special(key) and type(value) not in OPENED):
            return False
        return _leads_to_users(value) or (self.is_table and isinstance(key, type) and is_own_class(key))

    def _displaced_now(self) -> dict[str, Displaced]:
        """Return the names under which code of libraries stands that was defined by another one, or by another library.

        In place of what a module imports, and what it gives another name, that stands from the first on.
        """
        if self.is_table or self.origin in (None, STANDARD):  # programs that run code put what shows output there
            return {}
        return {
            key: code
            for key, value in _items(self.entries)
            if type(key) is str and (code := Displaced.of(value, self.label, self.origin, key)) is not None
        }

    def was_assigned(self) -> bool:
        """Tell whether something may have been assigned in it since it was looked through."""
        try:
            return self._look() != self._seen
        except KeyError:  # something is gone
            return True

    def _reading(self) -> Callable[[], object]:
        """Return a function that reads which code is there, and of which types all else is."""
        entries = self.entries
        read_code = _getter([key for key in entries if key in self.code])
        read_others = _getter([key for key in entries if key not in self.code])

        def look() -> object:
            plain = entries if type(entries) is dict else dict(_items(entries))
            return len(plain), read_code(plain), list(map(type, read_others(plain)))

        return look

    def _add_tables(self, key: str, value: object) -> None:
        """Note a value that is a table, or an object that has tables, as registries of libraries do."""
        kind = type(value)
        if issubclass(kind, dict):
            table: dict[Any, Any] = value  # type: ignore[assignment]
            if _may_hold_code(table):
                self.tables[key] = table
            return
        if issubclass(kind, (*_CODE, types.ModuleType)):
            return
        try:
            attributes = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return
        if type(attributes) is not dict:
            return
        origin = origin_of_module(kind.__module__)
        held = {name: inner for name, inner in _items(attributes) if type(inner) is dict and _may_hold_code(inner)}
        if origin is not None and origin not in UNCOUNTED and (held or issubclass(kind, Mapping)):
            self.classes.append(kind)
            self.tables.update((f"{key}.{name}", inner) for name, inner in held.items())

    def names_read(self) -> set[str]:
        """Return the names that code of the library in it reads; found out once, as ``found`` is."""
        if self._names_read is not None:
            return self._names_read
        names = set[str]()
        for value in self.code.values():
            if isinstance(value, types.FunctionType):
                names |= _names_read_by(value)
            elif isinstance(value, type) and value.__module__ == self.label:
                for attribute in vars(value).values():
                    for function in functions_behind(attribute):
                        names |= _names_read_by(function)
        self._names_read = names
        return names

    def has_changed(self) -> bool:
        """Tell whether something else of the user's own stands in it now."""
        if not self.was_assigned():
            return False
        entries = dict(_items(self.entries))
        if any(entries.get(key) is not value for key, value in self.found.items()):
            return True
        for key, value in entries.items():
            if key not in self.found and self.code.get(key) is not value and self._is_users(key, value):
                return True
        return self._displaced_now() != self.displaced


#: Those last made, by the ids of the dictionaries, which they keep.
_looked_through: dict[int, _Namespace] = {}


class Namespaces:
    """The namespaces of libraries that code of the user's own may stand in, each looked through once."""

    def __init__(self) -> None:
        self._known: dict[int, _Namespace] = {}  # by the ids of the dictionaries
        self._waiting: list[_Namespace] = []
        self._unmeant: list[PutIn] = []  # of which no code is known that may mean them
        self._registrations = Registrations()
        for name in _OF_ALL:
            if "torch" in sys.modules or name == "builtins":
                self.add_module(name)
        tensor = getattr(sys.modules.get("torch"), "Tensor", None)
        if isinstance(tensor, type):
            self.add_class(tensor)

    def add_class(self, cls: type) -> None:
        """Note that objects of a class are used, and with it the module it was defined in."""
        for base in cls.__mro__:
            if isinstance(base, abc.ABCMeta):
                self._registrations.add(base)
            if base.__flags__ & _IS_IMMUTABLE:
                continue
            if _is_of_library(base):
                self._add(f"{base.__module__}.{base.__qualname__}", _dict_of(base), origin_of_module(base.__module__))
                if origin_of_module(base.__module__) != STANDARD:
                    self.add_module(base.__module__)

    def add_code(self, value: object) -> None:
        """Note that code uses a function or class of a library."""
        if isinstance(value, type):
            self.add_class(value)
        elif isinstance(value, types.FunctionType):
            # Not one of the user's own, which stands in place of one: all that lies beside it would count as put in.
            if origin_of_function(value) is not None:
                name = str(value.__globals__.get("__name__"))
                self._add(name, value.__globals__, origin_of_module(name))
        elif isinstance(value, types.BuiltinFunctionType):
            self.add_module(_TABLES_OF_C.get(str(value.__module__), ""))

    def add_module(self, name: str) -> None:
        """Note that code of a module of a library is used."""
        module = sys.modules.get(name)
        if isinstance(module, types.ModuleType) and origin_of_module(name) is not None:
            self._add(name, vars(module), origin_of_module(name))

    def _add(self, label: str, entries: dict[Any, Any], origin: str | None = None) -> None:
        if id(entries) in self._known:
            return
        namespace = _looked_through.get(id(entries))
        # One in which something was assigned stays as it was for the walks that know it, to show them the change.
        if namespace is None or namespace.was_assigned():
            namespace = _Namespace(label, entries, origin)
            if len(_looked_through) < _MOST_KEPT or id(entries) in _looked_through:
                _looked_through[id(entries)] = namespace
        self._known[id(entries)] = namespace
        self._waiting.append(namespace)

    def found(self, names: set[str]) -> list[PutIn]:
        """Return what of the user's own stands in one of them that code may mean, each once.

        Args:
            names: What the user's own code reads.
        """
        while self._waiting:
            namespace = self._waiting.pop(0)
            namespace.look_through()
            for cls in namespace.classes:
                self.add_class(cls)
            for name, table in namespace.tables.items():
                self._add(f"{namespace.label}.{name}", table)
            for key, value in sorted(namespace.found.items(), key=lambda item: _name_of(item[0])):
                for part in _parts_of(value):
                    self._unmeant.append(PutIn(namespace.label, _name_of(key), part, namespace.is_table))

        if not self._unmeant:
            return []
        # Of builtins, libraries use those that are no user's concern, such as print.
        by_libraries = set[str]()
        for namespace in self._known.values():
            by_libraries |= namespace.names_read()
        found: list[PutIn] = []
        left: list[PutIn] = []
        for put_in in self._unmeant:
            read = names if put_in.label == "builtins" else names | by_libraries
            (found if put_in.is_meant(read) else left).append(put_in)
        self._unmeant = left
        return found

    def registered(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each abstract class that classes were registered with, and their names."""
        yield from self._registrations.named()

    def remember(self) -> None:
        """Remember which functions have other names by now than they were defined by: that is how torch comes."""
        for namespace in self._known.values():
            namespace.look_through()
            remember(namespace.label, namespace.displaced)

    def displaced(self) -> Iterator[str]:
        """Yield where in namespaces other functions of libraries stand than came with them, and which."""
        for namespace in self._known.values():
            for key, code in changed(namespace.label, namespace.displaced):
                if code is None or not code.is_added or key in self._names_read_by(namespace.origin):
                    yield f"{namespace.label}.{key} {code.name if code else ''}"

    def _names_read_by(self, library: str | None) -> set[str]:
        """Return the names that code of a library reads, of which a namespace is known."""
        return set[str]().union(*(known.names_read() for known in self._known.values() if known.origin == library))

    def watch(self) -> NamespaceWatch:
        """Return what notices that something else of the user's own stands in one of them."""
        return NamespaceWatch(self._known.values(), self._registrations)


class Registrations:
    """The classes that abstract classes take for their own, because they were registered."""

    def __init__(self) -> None:
        self.classes: dict[int, type] = {}

    def add(self, cls: type) -> None:
        """Note an abstract class that is used."""
        self.classes[id(cls)] = cls

    def named(self) -> Iterator[tuple[str, list[str]]]:
        """Yield those that count, with the names of what was registered."""
        for cls in self.classes.values():
            is_users = is_own_class(cls)
            names: list[str] = []
            for reference in abc._get_dump(cls)[0]:  # type: ignore[attr-defined]  # noqa: SLF001 - there is no other way
                registered = reference()
                if isinstance(registered, type) and (is_users or is_own_class(registered)):
                    names.append(f"{registered.__module__}.{registered.__qualname__}")
            if names:
                yield cls.__qualname__, sorted(names)


class NamespaceWatch:
    """Notices that something else of the user's own stands in a namespace; not thread-safe.

    Args:
        namespaces: Those that were looked through.
        registrations: What was registered with abstract classes.
    """

    def __init__(self, namespaces: Iterable[_Namespace] = (), registrations: Registrations | None = None) -> None:
        self._namespaces = list(namespaces)
        self._registrations = registrations or Registrations()
        self._names = list(self._registrations.named())
        self._token = abc.get_cache_token()
        self._versions = dict_versions.versions_of([namespace.entries for namespace in self._namespaces])
        self._seen = self._versions() if self._versions else b""

    def has_changed(self) -> bool:
        """Tell whether something else stands in one of them now."""
        if self._versions is None or self._versions() != self._seen:
            if any(namespace.has_changed() for namespace in self._namespaces):
                return True
            self._seen = self._versions() if self._versions else b""
        return abc.get_cache_token() != self._token and self._has_other_registrations()

    def _has_other_registrations(self) -> bool:
        token = abc.get_cache_token()
        if list(self._registrations.named()) != self._names:
            return True
        self._token = token
        return False


def _names_read_by(function: types.FunctionType) -> set[str]:
    """Return the names that a function of a library reads, short of those that it makes."""
    return {name for code in all_codes(function.__code__) for name in code.co_names} - _LOOKS_UP


def _getter(keys: list[Any]) -> Callable[[Mapping[Any, Any]], tuple[object, ...]]:
    """Return what reads the entries of some keys; it raises KeyError where one is gone."""
    if len(keys) > 1:
        return itemgetter(*keys)
    return lambda entries: tuple([entries[key] for key in keys])


def _dict_of(cls: type) -> dict[str, Any]:
    """Return the dictionary of a class itself, which changes as the class does."""
    return next(found for found in gc.get_referents(vars(cls)) if isinstance(found, dict))


def _items(entries: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Return what is in a namespace or table, without running code of its class."""
    if dict.__len__(entries) > _MOST_ENTRIES and not isinstance(dict.get(entries, "__name__"), str):
        return []
    return [(key, value) for key, value in dict.items(entries) if not _is_of_compiler(key)]


def _may_hold_code(table: dict[Any, Any]) -> bool:
    """Tell whether code may be registered in a table: it is empty, or there is something in it that is not plain."""
    values = [value for _, value in _items(table)]
    return not values or not all(is_plain_type(type(value)) for value in values)


def _is_of_compiler(key: object) -> bool:
    """Tell whether a key is a name that dynamo makes in the module of a function that it compiles."""
    return type(key) is str and key.startswith("__") and not key.endswith("__")


def _is_special(key: object) -> bool:
    """Tell whether a key is a name that Python gives a meaning."""
    return type(key) is str and key.startswith("__") and key.endswith("__")


def _name_of(key: object) -> str:
    """Name a key so that it has the same name in each process."""
    if isinstance(key, type):
        return f"{key.__module__}.{key.__qualname__}"
    return key if type(key) is str else type(key).__name__


def _parts_of(value: object) -> list[object]:
    """Return what lies in an entry of a table, which may be several functions; or the value itself."""
    if isinstance(value, (tuple, list)):
        return [part for part in value if _leads_to_users(part)]
    return [value]


def _leads_to_users(value: object) -> bool:
    """Tell whether a value is code of the user's own, or leads to it."""
    kind = type(value)
    if issubclass(kind, types.FunctionType):
        return any(map(_is_users_function, functions_behind(unwrap(value))))
    if issubclass(kind, type):
        return _is_users_class(value)  # type: ignore[arg-type]
    if issubclass(kind, _LEAVES) or is_plain_type(kind):
        return False
    if issubclass(kind, (tuple, list)):
        return len(value) <= _MOST_ENTRIES and any(map(_is_users_part, value))  # type: ignore[call-overload, arg-type]
    if kind in OPENED or is_of_cython(value) or hasattr(kind, "__wrapped__") or hasattr(kind, "cache_info"):
        return _USERS.leads_to_own(value)
    return _is_users_class(kind)


def _is_users_part(value: object) -> bool:
    return not issubclass(type(value), (tuple, list)) and _leads_to_users(value)


def _is_users_function(function: types.FunctionType) -> bool:
    """Tell a function of the user's own from what libraries write as a text and compile."""
    if origin_of_function(function) is not None:
        return False
    if not function.__code__.co_filename.startswith("<"):
        return True
    name = str(function.__module__)
    return not name.startswith("namedtuple_") and (name == "builtins" or origin_of_module(name) is None)


def _is_of_library(cls: type) -> bool:
    """Tell whether a class was defined in a library; with a function of the user's own in it, it counts as theirs."""
    if origin_of_class(cls) is not None:
        return True
    if origin_of_module(cls.__module__) is None:
        return False
    outermost, _, _ = cls.__qualname__.partition(".")
    return outermost in vars(sys.modules[cls.__module__])  # not of a program that took the name of its module


def _is_users_class(cls: type) -> bool:
    return cls.__module__ in sys.modules and origin_of_module(cls.__module__) is None
