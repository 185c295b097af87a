"""What objects of classes written in C are made of, for the standard library and for libraries that people use.

Found by the names of classes: nothing is imported that the object's own class did not import.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import io
import sys
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from torchcache.keys.attributes import attributes_of
from torchcache.keys.pictures import parts_of_picture
from torchcache.keys.registry import Encode, Registration, ship, ship_part


def _reduction(value: Any) -> object:  # noqa: ANN401 - here and below: an object of the class that is registered
    """Return what pickle would keep of an object, beside its class."""
    made_by, *parts = value.__reduce_ex__(4)
    # What makes it anew may hold some of it: a methodcaller's arguments by keyword are in a partial.
    return (made_by, *parts) if isinstance(made_by, functools.partial) else tuple(parts)


# -- the standard library and NumPy ------------------------------------------------------------------------------


def _memory_map(value: Any) -> object:  # noqa: ANN401
    return value.tell(), value[:]


def _stream(value: Any) -> object:  # noqa: ANN401
    parts = value.getvalue(), value.tell()
    notes = vars(value)
    return (*parts, notes) if notes and type(value) in (io.BytesIO, io.StringIO) else parts


def _memory_view(value: memoryview) -> object:
    return value.format, value.shape, value.tobytes()


def _time_zone(value: Any) -> object:  # noqa: ANN401
    """Return the name of a time zone.

    Raises:
        pickle.PicklingError: If it was read from a file, whatever name it was given.
    """
    value.__reduce__()
    return value.key


def _variable_of_context(value: contextvars.ContextVar[Any]) -> object:
    try:
        return value.name, value.get()
    except LookupError:  # it was not set and has no default
        return (value.name,)


def _pattern(value: Any) -> object:  # noqa: ANN401
    return value.pattern, value.flags


def _dtype(value: np.dtype[Any]) -> object:
    metadata = dict(value.metadata) if value.metadata else None
    if value.subdtype is not None:
        return *value.subdtype, metadata
    fields = None if value.fields is None else dict(value.fields)
    return value.str, value.names, fields, value.itemsize, value.isalignedstruct, metadata, value.type.__name__


def _shared_memory(value: Any) -> object:  # noqa: ANN401
    """Return the bytes of an object of ctypes.

    Raises:
        TypeError: If it holds an address, since what lies there is not seen.
    """
    cls = type(value)
    if issubclass(cls, ctypes.c_char_p | ctypes.c_wchar_p):
        return value.value
    if not _is_plain_memory(cls):
        raise TypeError("it holds an address")
    return [str(field[:2]) for field in getattr(cls, "_fields_", ())], bytes(value)


def _is_plain_memory(cls: Any) -> bool:  # noqa: ANN401 - a class of ctypes
    if issubclass(cls, ctypes.Array):
        return _is_plain_memory(cls._type_)
    if issubclass(cls, ctypes.Structure | ctypes.Union):
        fields = [field for base in cls.__mro__ for field in vars(base).get("_fields_", ())]
        return all(_is_plain_memory(field[1]) for field in fields)
    return getattr(cls, "_type_", None) in set("cbBhHiIlLqQfdg?u")


_IMMUTABLE: dict[tuple[str, str], Encode] = {
    **{("datetime", name): _reduction for name in ("date", "datetime", "time", "timedelta", "timezone")},
    ("builtins", "range"): _reduction,
    ("decimal", "Decimal"): lambda value: value.as_tuple(),
    ("zoneinfo", "ZoneInfo"): _time_zone,
    ("re", "Pattern"): _pattern,
    ("_struct", "Struct"): lambda value: value.format,
    **{("operator", name): _reduction for name in ("attrgetter", "itemgetter", "methodcaller")},
    ("types", "GenericAlias"): _reduction,
    ("_ctypes", "CField"): repr,
    ("torch", "finfo"): repr,
    ("torch", "iinfo"): repr,
}

_CHANGING: dict[tuple[str, str], Encode] = {
    ("_io", "BytesIO"): _stream,
    ("_io", "StringIO"): _stream,
    ("mmap", "mmap"): _memory_map,
    ("builtins", "memoryview"): _memory_view,
    ("builtins", "mappingproxy"): lambda value: tuple(value.items()),
    **{("builtins", f"dict_{name}"): tuple for name in ("keys", "values", "items")},
    ("array", "array"): lambda value: (value.typecode, value.tobytes()),
    ("itertools", "count"): repr,
    ("weakref", "ReferenceType"): lambda value: value(),
    ("weakref", "finalize"): lambda value: (value.peek(), value.atexit),
    ("_contextvars", "ContextVar"): _variable_of_context,
    **{("_ctypes", name): _shared_memory for name in ("_SimpleCData", "Structure", "Union", "Array")},
}


def _storage(value: Any) -> object:  # noqa: ANN401
    """Return the bytes of a storage of torch as a tensor; what pickle keeps of one is another in each process."""
    torch = sys.modules["torch"]
    return torch.empty(0, dtype=torch.uint8, device=value.device).set_(value)


# -- libraries ---------------------------------------------------------------------------------------------------


def _notes_on_pandas(value: Any, counted: Collection[str] = ()) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return what somebody hung on an object of pandas in a list, or an empty one.

    Args:
        value: The object.
        counted: Attributes that are told elsewhere.
    """
    held = attributes_of(value) or {}
    notes = {name: note for name, note in held.items() if name not in _OF_PANDAS and name not in counted}
    return [notes] if notes else []


#: Attributes of objects of pandas that it has itself: what is in them, and what it has computed of that so far.
_OF_PANDAS = frozenset({
    "_mgr", "_attrs", "_flags", "_name", "_item_cache", "_cacher", "_is_copy", "_data", "_cache", "_id", "_references",
    "_range", "_freq", "_levels", "_codes", "_names", "sortorder", "_engine", "_typ", "_ndarray", "_dtype",
})  # fmt: skip


def _frame(value: Any) -> object:  # noqa: ANN401
    more = [(name, getattr(value, name, None)) for name in value._metadata]  # noqa: SLF001 - as pandas asks of subclasses
    more += [("flags", value.flags.allows_duplicate_labels)]
    more += [("notes", notes) for notes in _notes_on_pandas(value, value._metadata)]  # noqa: SLF001 - as above
    return value.columns, value.index, [column.array for _, column in value.items()], value.attrs, more


def _series(value: Any) -> object:  # noqa: ANN401
    more = [(name, getattr(value, name, None)) for name in value._metadata]  # noqa: SLF001 - as above
    more += [("flags", value.flags.allows_duplicate_labels)]
    more += [("notes", notes) for notes in _notes_on_pandas(value, value._metadata)]  # noqa: SLF001 - as above
    return value.name, value.index, value.array, value.attrs, more


def _backed_array(value: Any) -> object:  # noqa: ANN401
    """Return an array of dates, categories or strings without what it has noted about itself."""
    parts = value._ndarray, value.dtype, getattr(value, "_freq", None)  # noqa: SLF001 - the public ones copy
    return (*parts, *_notes_on_pandas(value))


def _without_cache(value: Any) -> object:  # noqa: ANN401
    """Return the attributes of an array or a dtype of pandas without what it has computed of itself so far."""
    return {name: part for name, part in vars(value).items() if name != "_cache"}


def _index(value: Any) -> object:  # noqa: ANN401
    return (*value.__reduce__()[1], *_notes_on_pandas(value))


def _arrow_table(value: Any) -> object:  # noqa: ANN401
    arrow = sys.modules["pyarrow"]
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, value.schema) as writer:
        writer.write(value)
    return sink.getvalue().to_pybytes()


def _arrow_array(value: Any) -> object:  # noqa: ANN401
    return _arrow_table(sys.modules["pyarrow"].table({"": value}))


def _variable(value: Any) -> object:  # noqa: ANN401
    return value.dims, value.data, dict(value.attrs), dict(value.encoding)


def _data_set(value: Any) -> object:  # noqa: ANN401
    return dict(value.variables), [*value.data_vars], dict(value.attrs)


def _data_array(value: Any) -> object:  # noqa: ANN401
    return value.name, value.variable, {name: coordinate.variable for name, coordinate in value.coords.items()}


def _sparse(value: Any) -> object:  # noqa: ANN401
    """Return the attributes of a sparse matrix without notes such as whether its indices are sorted."""
    return {name: part for name, part in vars(value).items() if not name.startswith("_has_")}


_OF_LIBRARIES: dict[tuple[str, str], Encode] = {
    ("ctypes", "CDLL"): lambda value: value._name,  # noqa: SLF001 - it has no public one
    ("_thread", "_local"): vars,  # what the present thread sees
    ("torch", "UntypedStorage"): _storage,
    ("torch", "TypedStorage"): lambda value: (value.dtype, value._untyped_storage),  # noqa: SLF001 - the public one warns
    ("pandas", "DataFrame"): _frame,
    ("pandas", "Series"): _series,
    ("pandas", "Index"): _index,
    ("pandas", "NDArrayBacked"): _backed_array,
    **{
        ("pandas", name): _without_cache
        for name in ("BaseMaskedArray", "BaseMaskedDtype", "CategoricalDtype", "DatetimeTZDtype")
    },
    ("pandas", "ArrowExtensionArray"): lambda value: (value.dtype, value.__arrow_array__()),
    ("pandas", "NAType"): repr,
    **{("pyarrow", name): _arrow_table for name in ("Table", "RecordBatch")},
    **{("pyarrow", name): _arrow_array for name in ("Array", "ChunkedArray")},
    ("polars", "DataFrame"): lambda value: value.serialize(),
    ("polars", "Series"): lambda value: value.to_frame().serialize(),
    ("xarray", "Variable"): _variable,
    ("xarray", "Dataset"): _data_set,
    ("xarray", "DataArray"): _data_array,
    ("scipy", "_spbase"): _sparse,
    ("PIL", "Image"): parts_of_picture,
    ("sentencepiece", "SentencePieceProcessor"): lambda value: (value.serialized_model_proto(), _public(value)),
}


def _hugging_face_data_set(value: Any) -> object:  # noqa: ANN401
    """Return what a dataset of Hugging Face is: its own fingerprint, which follows its data, and the form of items."""
    version = sys.modules["datasets"].__version__
    how = value.format  # with a transform, whose code is walked
    return version, value._fingerprint, how, str(value.features)  # noqa: SLF001 - it has no public one


def _graph(value: Any) -> object:  # noqa: ANN401
    """Return what a graph of torch.fx computes: its code, and the functions and constants that this names."""
    code = value.python_code("self")
    return code.src, code.globals


def _quick_graph(value: Any) -> object:  # noqa: ANN401
    """Return the nodes of a graph as they are in this process; to write its code takes ten times as long."""
    lines: list[str] = []
    for node in value.nodes:
        target = node.target if isinstance(node.target, str) else id(node.target)
        lines.append(f"{node.op} {target} {node.args} {node.kwargs}")
    return "\n".join(lines)


def _tokenizer(value: Any) -> object:  # noqa: ANN401
    return value.__getstate__()


def _tokenizer_in_transformers(value: Any) -> object:  # noqa: ANN401
    """Return what a tokenizer is, without how it truncates and pads: transformers sets that at each call."""
    state = value.__getstate__()
    return state[state.index(b'"added_tokens"') :]


def _quick_tokenizer_in_transformers(value: Any) -> object:  # noqa: ANN401
    """Return all of a tokenizer but for its vocabulary, of which some tokens and the size."""
    size = value.get_vocab_size(with_added_tokens=True)
    if size <= _SMALL_VOCABULARY:
        return _tokenizer_in_transformers(value)
    tokens = [value.id_to_token(i) for i in range(0, size, max(1, size // _TOKENS))]
    parts = value.normalizer, value.pre_tokenizer, value.post_processor, value.decoder
    states = [part and part.__getstate__() for part in parts]
    added = [(number, str(token)) for number, token in value.get_added_tokens_decoder().items()]
    return size, tokens, added, states, type(value.model), value.encode_special_tokens


def _quick_tokenizer(value: Any) -> object:  # noqa: ANN401
    return value.truncation, value.padding, _quick_tokenizer_in_transformers(value)


#: At most so many tokens of a larger vocabulary are compared at each call; a smaller one is compared as a whole.
_TOKENS = 64
_SMALL_VOCABULARY = 1024


def _public(value: Any) -> Mapping[str, object]:  # noqa: ANN401
    return {name: part for name, part in vars(value).items() if name != "this"}


def _ship_all() -> None:
    for (package, name), encode in _IMMUTABLE.items():
        ship(package, name, Registration(encode, is_immutable=True))
    for (package, name), encode in _CHANGING.items():
        ship(package, name, Registration(encode))
    for (package, name), encode in _OF_LIBRARIES.items():
        ship(package, name, Registration(encode, stands_for_subclasses=True))
    ship("datasets", "Dataset", Registration(_hugging_face_data_set, names_code=True))
    ship("torch", "Graph", Registration(_graph, stands_for_subclasses=True, quick=_quick_graph))
    ship("tokenizers", "Tokenizer", Registration(_tokenizer, quick=_quick_tokenizer))
    in_transformers = Registration(_tokenizer_in_transformers, quick=_quick_tokenizer_in_transformers)
    ship_part("transformers", "PreTrainedTokenizerBase", "_tokenizer", in_transformers)
    # Written down from a set, in an order that each process has for itself.
    ship_part("diffusers", "FrozenDict", "_use_default_values", Registration(frozenset, is_immutable=True))
    ship("numpy", "dtype", Registration(_dtype, is_immutable=True, stands_for_subclasses=True))


_ship_all()
