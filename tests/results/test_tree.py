"""Trees as bytes: what can be kept, what comes back, what is refused, and bytes nobody wrote."""

from __future__ import annotations

import dataclasses
import enum
import logging
import math
import struct
import threading
from collections import OrderedDict, defaultdict, deque
from typing import NamedTuple

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from torchcache import UncacheableError
from torchcache.results.classes import KnownClasses
from torchcache.results.nodes import MAX_DEPTH, MAX_NODES, class_name
from torchcache.results.plain_nodes import BareNode
from torchcache.results.tree import KINDS, MAX_STRUCTURE_BYTES, flatten
from torchcache.storage import record


class Leaf:
    """Stands for a tensor."""


class Pair(NamedTuple):
    first: object
    second: object


class Color(enum.Enum):
    RED = 1
    BLUE = "blue"
    AGAIN = RED


class Level(enum.IntEnum):
    LOW = 3


class Access(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Box:
    content: object
    label: str = "box"


@dataclasses.dataclass(frozen=True, slots=True)
class Sealed:
    content: object
    count: int = 0

    def __post_init__(self):
        raise AssertionError("ran again")


class Bag:
    """Known to torch alone."""

    def __init__(self, items, name):
        self.items = items
        self.name = name


class Lossy(Bag):
    pass


class Keyed(OrderedDict):
    """Its context is a list, but not of its keys."""


class Opaque(Bag):
    pass


class Broken(Bag):
    pass


class Stubborn(Bag):
    pass


def refuse(*_):
    raise ZeroDivisionError("mine")


pytree.register_pytree_node(Bag, lambda bag: (bag.items, bag.name), lambda items, name: Bag(list(items), name))
pytree.register_pytree_node(Lossy, lambda bag: (bag.items, bag.name), lambda items, _: Lossy(list(items), "other"))
pytree.register_pytree_node(Opaque, lambda bag: (bag.items, object()), lambda items, _: Opaque(list(items), "name"))
pytree.register_pytree_node(
    Keyed, lambda keyed: (list(keyed.values()), [len(keyed)]), lambda values, _: Keyed(zip("abc", values, strict=False))
)
pytree.register_pytree_node(Broken, refuse, refuse)
pytree.register_pytree_node(Stubborn, lambda bag: (bag.items, bag.name), refuse)


def sealed(content, count=0):
    made = object.__new__(Sealed)
    object.__setattr__(made, "content", content)
    object.__setattr__(made, "count", count)
    return made


def tree_of(value):
    return flatten(value, lambda x: isinstance(x, Leaf))


def known_from(value):
    known = KnownClasses()
    known.learn_from(tree_of(value))
    return known


def round_trip(value, known=None):
    """Take a value apart and make it anew from the bytes, with the very same leaves."""
    tree = tree_of(value)
    structure = tree.encode()
    if known is None:
        known = known_from(value)
    node = known.decode(structure, lambda _: [Leaf() for _ in tree.leaves])
    assert node is not None
    return node.build(iter(tree.leaves))


def assert_alike(a, b):
    """Assert that two trees are of the same types and values, bit for bit, with the same leaves."""
    assert type(a) is type(b)
    if isinstance(a, Leaf) or a is None or isinstance(a, (enum.Enum, bool)):
        assert a is b
    elif isinstance(a, float):
        assert struct.pack("<d", a) == struct.pack("<d", b)
    elif isinstance(a, complex):
        assert struct.pack("<dd", a.real, a.imag) == struct.pack("<dd", b.real, b.imag)
    elif isinstance(a, dict):
        assert len(a) == len(b)
        for (key_a, value_a), (key_b, value_b) in zip(a.items(), b.items(), strict=True):
            assert_alike(key_a, key_b)
            assert_alike(value_a, value_b)
    elif isinstance(a, (tuple, list, deque)):
        assert len(a) == len(b)
        for item_a, item_b in zip(a, b, strict=True):
            assert_alike(item_a, item_b)
    elif isinstance(a, Sealed):
        assert_alike((a.content, a.count), (b.content, b.count))
    elif hasattr(a, "__dict__"):
        assert_alike(vars(a), vars(b))
    else:
        assert a == b


# -- what comes back ----------

FLOATS = st.floats() | st.sampled_from([-0.0, 5e-324, struct.unpack("<d", b"\x01\0\0\0\0\0\xf8\xff")[0]])
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**63) - 2, -(2**63) + 2),
    st.integers(2**64 - 2, 2**64 + 2),
    FLOATS,
    st.builds(complex, FLOATS, FLOATS),
    st.text(st.characters()),
    st.binary(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.device("cpu"), torch.device("cuda", 1)]),
    st.lists(st.integers(0, 2**40), max_size=3).map(torch.Size),
    st.sampled_from([Color.RED, Color.BLUE, Level.LOW, Access.WRITE, "\udc80"]),
)
KEYS = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=3)


def trees_of(leaves):
    """Return a strategy of trees over a strategy of leaves, with plain values beside them."""

    def containers(inner):
        few = st.lists(inner, max_size=3)
        pairs = st.lists(st.tuples(KEYS, inner), max_size=3)
        return st.one_of(
            few,
            few.map(tuple),
            pairs.map(dict),
            pairs.map(OrderedDict),
            st.tuples(inner, inner).map(lambda items: Pair(*items)),
            st.builds(Box, inner, st.text()),
            st.builds(sealed, inner, st.integers()),
            st.builds(Bag, few, PLAIN),
            st.builds(deque, few, st.sampled_from([None, 3])),
        )

    return st.recursive(leaves | PLAIN, containers, max_leaves=12)


TREES = trees_of(st.builds(Leaf)).filter(lambda value: not isinstance(value, Leaf) and tree_of(value).leaves)


@given(TREES)
def test_a_tree_comes_back_as_it_was(value):
    assert_alike(round_trip(value), value)


@pytest.mark.slow
@given(TREES)
def test_equal_trees_have_equal_bytes(value):
    assert tree_of(round_trip(value)).encode() == tree_of(value).encode()


def test_each_kind_of_node_has_a_tag_of_its_own():
    kinds = {*KINDS.by_type.values(), *KINDS.others} - {BareNode}
    assert sorted(kind.tag for kind in kinds) == list(range(13))


def test_a_lone_leaf_has_no_bytes():
    assert tree_of(Leaf()).encode() == b""


def test_containers_are_made_anew_each_time():
    leaf = Leaf()
    value = [{"a": [leaf, 1]}, Bag([leaf], ["context"])]
    tree = tree_of(value)
    node = KnownClasses().decode(tree.encode(), lambda _: [Leaf(), Leaf()])
    a, b = (node.build(iter(tree.leaves)) for _ in range(2))
    assert a is not b
    assert a[0] is not b[0]
    assert a[0]["a"] is not b[0]["a"]
    assert a[1].name is not b[1].name


def test_a_leaf_may_hang_in_several_places():
    leaf = Leaf()
    value = (leaf, [leaf], leaf)
    assert_alike(round_trip(value), value)


def test_the_form_in_bytes_is_the_documented_one():
    value = {"a": (Leaf(), [None, 1.5, 2**70]), "b": Pair(torch.float16, 1j)}
    assert msgpack.unpackb(tree_of(value).encode()) == [
        2, "a", [0, [], [1, None, 1.5, [8, (2**70).to_bytes(9, "big")]]],
        "b", [4, class_name(Pair), ["first", "second"], [10, "torch.float16"], [9, 0.0, 1.0]],
    ]  # fmt: skip


def test_a_dataclass_comes_back_without_its_init_and_with_all_its_attributes():
    box = Box(Leaf())
    box.extra = "beside the fields"
    made = round_trip(box)
    assert_alike(made, box)
    assert made.extra == "beside the fields"
    original = sealed(Leaf(), 3)
    assert_alike(round_trip(original), original)


def test_a_property_of_a_dataclass_does_not_run():
    @dataclasses.dataclass
    class Guarded:
        content: object

        @property
        def note(self):
            raise AssertionError("ran")

        @note.setter
        def note(self, value):
            raise AssertionError("ran")

    value = Guarded(Leaf())
    vars(value)["note"] = 1  # hidden behind the property
    assert vars(round_trip(value))["note"] == 1


def test_a_field_that_is_not_set_stays_so():
    @dataclasses.dataclass(slots=True)
    class Partial:
        content: object
        later: object = dataclasses.field(init=False)

    made = round_trip(Partial(Leaf()))
    assert not hasattr(made, "later")


def test_a_named_tuple_of_a_subclass_does_not_run_its_new():
    class Checked(Pair):
        __slots__ = ()

        def __new__(cls, a):
            return super().__new__(cls, a, a)

    value = Checked(Leaf())
    assert_alike(round_trip(value), value)


def test_what_torch_itself_registers_comes_back():
    for value in (
        Keyed(a=Leaf()),
        deque([Leaf(), 1], maxlen=2),
        defaultdict(None, {"a": Leaf()}),
        torch.return_types.max((Leaf(), 1)),
    ):
        made = round_trip(value, KnownClasses())
        assert type(made) is type(value)
        assert list(made) == list(value)


def test_numbers_are_those_of_plain_values():
    value = {7: [Leaf(), 1, True, 2.0, Level.LOW, (2,)], "b": torch.Size([3, 4]), "c": Bag([5], (6, "8"))}
    node = known_from(value).decode(tree_of(value).encode(), lambda _: [Leaf()])
    assert sorted(node.numbers()) == [1, 2, 3, 4, 5, 6]


# -- what is refused ----------


class Slotless(Pair):
    pass


class Listing(list):
    pass


class Number(float):
    pass


def with_attribute(value):
    value.extra = 1
    return value


@pytest.mark.parametrize(
    ("value", "path", "reason"),
    [
        ({"hidden": [Leaf(), 1, object()]}, "output['hidden'][2]", "builtins.object"),
        (Pair(Leaf(), {1, 2}), "output.second", "builtins.set"),
        ([Box(Number(1.0))], "output[0].content", "Number"),
        ([Listing()], "output[0]", "Listing"),
        ((Leaf(), Access.READ | Access.WRITE), "output[1]", "Access"),
        ([{Pair(1, 2): 3}], "output[0]", "key"),
        ([{(1, object()): 3}], "output[0]", "key"),
        ([{b"a": Leaf}], "output[0][b'a']", "builtins.type"),
        ([Lossy([1, 2], "name")], "output[0]", "does not make it again"),
        ([Opaque([1, 2], "name")], "output[0]", "context"),
        ([Broken([], "")], "output[0]", "flatten it (ZeroDivisionError"),
        ([Stubborn([], "")], "output[0]", "again (ZeroDivisionError"),
        ([with_attribute(Bag([], ""))], "output[0]", "attributes ['extra']"),
        ([with_attribute(OrderedDict())], "output[0]", "attributes of its own"),
        ([defaultdict(list)], "output[0]", "context"),
        (with_attribute(Slotless(Leaf(), 1)), "output", "attributes of its own"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_kept_is_named_with_its_place(value, path, reason):
    with pytest.raises(UncacheableError) as caught:
        tree_of([Leaf(), value]).encode()
    message = str(caught.value)
    assert f" at {path.replace('output', 'output[1]')}" in message
    assert reason in message
    assert "return " in message or "use " in message


def test_an_object_of_a_strange_class_is_refused():
    with pytest.raises(UncacheableError, match="returned object, not a tensor"):
        tree_of(object()).encode()


def test_what_is_refused_is_built_as_the_object_itself():
    strange, lossy, key = object(), Lossy([Leaf(), Leaf()], "name"), Pair(1, 2)
    leaf, new = Leaf(), Leaf()
    made = tree_of([strange, lossy, leaf, {key: strange}]).build([new])
    assert made[0] is strange
    assert made[1] is lossy
    assert made[2] is new
    assert made[3] == {key: strange}


def test_a_tree_that_contains_itself_ends():
    endless: list[object] = [Leaf()]
    endless += [endless, endless]
    with pytest.raises(UncacheableError, match="deep"):
        tree_of(endless).encode()


def test_trees_are_bounded():
    deep: object = Leaf()
    for _ in range(MAX_DEPTH + 2):
        deep = [deep]
    for value in (deep, [Leaf(), [None] * MAX_NODES], [Leaf(), "x" * MAX_STRUCTURE_BYTES]):
        with pytest.raises(UncacheableError, match="as tensors, one row a sample"):
            tree_of(value).encode()
    assert_alike(round_trip(deep[0][0]), deep[0][0])


def test_a_structure_leaves_room_for_the_rest_of_a_records_header():
    assert MAX_STRUCTURE_BYTES < record.MAX_HEADER_BYTES


# -- classes ----------


@pytest.mark.parametrize("value", [Pair(Leaf(), 1), Box(Leaf()), sealed(Leaf())])
def test_a_class_is_unknown_until_a_result_teaches_it(value):
    structure = tree_of(value).encode()
    known = KnownClasses()
    assert known.decode(structure, lambda _: [Leaf()]) is None
    known.learn_from(tree_of(value))
    assert known.decode(structure, lambda _: [Leaf()]) is not None


def test_classes_may_be_known_from_the_start():
    known = KnownClasses([Pair, Color, int])
    value = Pair(Leaf(), Color.BLUE)
    assert_alike(round_trip(value, known), value)


def test_classes_registered_with_torch_are_known():
    value = Bag([Leaf()], "name")
    assert_alike(round_trip(value, KnownClasses()), value)


def test_a_script_and_its_spawned_workers_name_a_class_alike():
    class Here:
        pass

    names = []
    for module in ("__main__", "__mp_main__"):
        Here.__module__ = module
        names.append(class_name(Here))
    assert names[0] == names[1]


def renamed(cls, like):
    cls.__module__, cls.__qualname__ = like.__module__, like.__qualname__
    return cls


def changed_pair():
    return renamed(NamedTuple("Pair", [("first", object), ("third", object)]), Pair)


def changed_box():
    return renamed(dataclasses.make_dataclass("Box", ["content", "name"]), Box)


def pair_as_dataclass():
    return renamed(dataclasses.make_dataclass("Pair", ["first", "second"]), Pair)


def changed_color():
    return renamed(enum.Enum("Color", {"RED": 2, "BLUE": "blue"}), Color)


def bool_color():
    return renamed(enum.Enum("Color", {"RED": True}), Color)


def color_without_red():
    return renamed(enum.Enum("Color", {"BLUE": "blue"}), Color)


@pytest.mark.parametrize(
    ("value", "changed"),
    [
        (Pair(Leaf(), 1), changed_pair),
        (Pair(Leaf(), 1), pair_as_dataclass),
        (Box(Leaf()), changed_box),
        ([Leaf(), Color.RED], changed_color),
        ([Leaf(), Color.RED], bool_color),
        ([Leaf(), Color.RED], color_without_red),
        ([Leaf(), Color.RED], lambda: renamed(type("Color", (), {}), Color)),
    ],
)
def test_a_class_that_has_changed_is_unknown(value, changed):
    structure = tree_of(value).encode()
    assert KnownClasses([changed()]).decode(structure, lambda _: [Leaf()]) is None


def test_two_classes_of_one_name_are_doubtful(caplog):
    def make():
        class Local(NamedTuple):
            content: object

        return Local

    value, other = make()(Leaf()), make()(Leaf())
    known = known_from(value)
    structure = tree_of(value).encode()
    assert known.is_certain(known.decode(structure, lambda _: [Leaf()]))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            known.learn_from(tree_of(other))
    node = known.decode(structure, lambda _: [Leaf()])
    assert type(node.build(iter([Leaf()]))) is type(other)
    assert not known.is_certain(node)
    assert len(caplog.records) == 1
    assert "define the class once" in caplog.text
    plain = known.decode(tree_of([Leaf()]).encode(), lambda _: [Leaf()])
    assert known.is_certain(plain)


def test_a_structure_is_tried_once_and_remembered():
    value = [Leaf(), 1]
    structure, tries = tree_of(value).encode(), []

    def stand_ins(_):
        tries.append(1)
        return [Leaf()]

    known = KnownClasses()
    nodes = {id(known.decode(structure, stand_ins)) for _ in range(3)}
    assert len(nodes) == len(tries) == 1


def test_remembered_structures_are_bounded():
    known = KnownClasses()
    for i in range(1000):
        assert known.decode(tree_of([Leaf(), i]).encode(), lambda _: [Leaf()]) is not None
    assert len(known._decoded) < 300


def test_threads_may_learn_and_decode_at_once():
    value = [Leaf(), Pair(1, Color.RED)]
    structure, known, failures = tree_of(value).encode(), KnownClasses([Pair, Color]), []

    def work(number):
        for i in range(200):
            known.learn(type(f"New{number}_{i}", (), {}))
            if known.decode(structure, lambda _: [Leaf()]) is None:
                failures.append(i)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -- bytes nobody wrote ----------

KNOWN = KnownClasses([Pair, Box, Sealed, Color, Level, Access])


def decode_hostile(structure):
    """Decode with one leaf; whatever the bytes are, nothing is raised and what comes back can be built."""
    node = KNOWN.decode(structure, lambda _: [Leaf()])
    if node is not None:
        node.build(iter([Leaf()]))
        list(node.numbers())
        assert KNOWN.is_certain(node)
    return node


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing(structure):
    decode_hostile(structure)


CLASSES = [
    "nowhere.Missing", "os.system", "builtins.dict", "torch.return_types.max", "collections.deque",
    "collections.defaultdict", "torch.Size", "torch._higher_order_ops.auto_functionalize.SchemaHolder",
    *map(class_name, (Pair, Box, Sealed, Color, Bag, Stubborn)),
]  # fmt: skip
HOSTILE = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=5), st.binary(),
        st.just([]), st.sampled_from(CLASSES), st.sampled_from([["content", "label"], ["first", "second"]]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(st.integers(-1, 13), st.lists(inner, max_size=4)).map(lambda node: [node[0], *node[1]]),
        st.tuples(st.integers(4, 7), st.sampled_from(CLASSES), st.lists(inner, max_size=5)).map(
            lambda node: [node[0], node[1], *node[2]]
        ),
        st.dictionaries(st.text(max_size=2), inner, max_size=2),
    ),
    max_leaves=20,
)  # fmt: skip


@given(HOSTILE)
def test_random_nodes_raise_nothing(packed):
    decode_hostile(msgpack.packb(packed))


@pytest.mark.slow
@given(TREES, st.data())
def test_damaged_bytes_raise_nothing(value, data):
    structure = bytearray(tree_of(value).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        structure[data.draw(st.integers(0, len(structure) - 1))] = data.draw(st.integers(0, 255))
    decode_hostile(bytes(structure))
    decode_hostile(bytes(structure[: data.draw(st.integers(0, len(structure)))]))


def nested(depth):
    packed: object = []
    for _ in range(depth):
        packed = [1, packed]
    return msgpack.packb(packed)


@pytest.mark.parametrize(
    "structure",
    [
        b"",
        b"\x90",
        msgpack.packb(None),
        msgpack.packb([0]),
        msgpack.packb([0, [], []]),
        msgpack.packb([0, []]) + b"\0",
        msgpack.packb([13, []]),
        msgpack.packb([True, []]),
        msgpack.packb([2, "a"]),
        msgpack.packb([2, "a", [], "a", 1]),
        msgpack.packb([2, [1, []], 1]),
        msgpack.packb([2, [], 1]),
        msgpack.packb([0, [], [8, b"\0\x01"]]),
        msgpack.packb([0, [], [10, "torch.nothing"]]),
        msgpack.packb([0, [], [11, "nothing"]]),
        msgpack.packb([0, [], [12, -1.5]]),
        msgpack.packb([0, [], msgpack.ExtType(1, b"x")]),
        msgpack.packb([0, [], {}]),
        msgpack.packb([6, "os.system", None, None, []]),
        msgpack.packb([6, class_name(Pair), None, None, []]),
        msgpack.packb([6, class_name(Bag), None, [], 1]),
        msgpack.packb([6, class_name(Stubborn), None, "", []]),
        msgpack.packb([6, "collections.deque", None, -1, []]),
        msgpack.packb([6, "collections.deque", None, 0, []]),
        msgpack.packb([4, class_name(Pair), ["first", "second"], []]),
        msgpack.packb([5, class_name(Box), ["content", "label"], ["content", "content"], [], 1]),
        msgpack.packb([5, class_name(Sealed), ["content", "count"], ["content", "other"], [], 1]),
        msgpack.packb([5, class_name(Pair), ["first", "second"], ["first"], []]),
        nested(MAX_DEPTH + 2),
        nested(500),
        b"\x92\x01" * 5000 + b"\x90",
        b"\x92\x01" * 60000 + b"\x90",
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        msgpack.packb([0, [], "x" * MAX_STRUCTURE_BYTES]),
    ],
    ids=range(35),
)
def test_bytes_that_are_no_tree_are_unknown(structure):
    assert decode_hostile(structure) is None


def test_a_number_that_is_not_one_is_kept_by_its_bits():
    value = [Leaf(), math.nan, -math.nan, struct.unpack("<d", b"\x01\0\0\0\0\0\xf0\x7f")[0]]
    assert_alike(round_trip(value), value)
