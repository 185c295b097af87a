"""Values that people's code holds, as text: how each is made, what code reads of it, how it is changed in place.

A value is a function of one whole number. Two of the same number are equal; of two numbers, code reads two results.
The text becomes part of a program, so what the cache looks at is what a user would have written.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Value:
    """One kind of value.

    Attributes:
        name: Its name.
        make: An expression that makes the value for the number ``v``, anew each time.
        read: An expression for what code gets out of ``value``, as a number. It leaves the value as it is, unless the
            kind is consumed.
        change: Statements that make ``value`` the one for ``v`` without another object in its place; none if that
            cannot be done.
        setup: Imports, classes and functions that these need.
        package: What must be installed.
        is_seen: Whether the cache has to see it whole. Otherwise a call may also go around the cache.
        is_consumed: Whether to read it changes it, so that each call gives another result.
        is_lazy: Whether to read it may change what it holds, and not what is read.
        has_code: Whether it is or holds functions or modules. Their code is not walked in an argument of a call, which
            then goes around the cache or is refused.
        is_returned: Whether programs return it. The cache learns of a class of a library when it is first returned,
            so another process does not find that result; an image from a file comes back as a plain one; and a tensor
            with an attribute is not kept, since the attribute would be lost.
        most_calls: After so many calls a change in place must be noticed.
        numbers: What ``v`` may be.
    """

    name: str
    make: str
    read: str
    change: str = ""
    setup: str = ""
    package: str = ""
    is_seen: bool = True
    is_consumed: bool = False
    is_lazy: bool = False
    has_code: bool = False
    is_returned: bool = True
    most_calls: int = 1
    numbers: tuple[int, ...] = tuple(range(2, 28))

    @property
    def can_be_consumed(self) -> bool:
        """Whether code can consume it; a dataset that holds it is not cached, as its state is not looked at again."""
        return self.name.startswith(("BytesIO", "StringIO", "itertools."))

    @property
    def text(self) -> str:
        """The functions of a program that make, read and change the value."""
        change = "\n    ".join(self.change.splitlines() or ["raise NotImplementedError"])
        return (
            f"{self.setup}\n\ndef make(v):\n    return {self.make}\n\n\n"
            f"def read(value):\n    return float({self.read})\n\n\ndef change(value, v):\n    {change}\n"
        )


def _group(setup: str, *values: Value, package: str = "") -> Iterator[Value]:
    for value in values:
        yield replace(value, setup=f"{setup}\n{_HELPERS}\n{value.setup}", package=package)


_HELPERS = """

def done(value, *_):
    return value


def with_unit(value, v):
    value.unit = v
    return value
"""


def _sub(base: str) -> str:
    return f"class Sub({base}):\n    pass"


_UNIT = "class Unit:\n    def __init__(self, a):\n        self.a = a"


#: A change in a large container is noticed within so many calls.
_MOST_CALLS = 64

#: Five flags that tell the numbers apart, and the number that they stand for.
_BITS = "[bool(v >> i & 1) for i in range(5)]"
_FROM_BITS = "sum(int(flag) << i for i, flag in enumerate({}))"
_PARITY = (2, 3)

_PANDAS = _group(
    "import numpy as np\nimport pandas as pd",
    Value("pandas DataFrame", "pd.DataFrame({'a': [v, 1]})", "value['a'].iloc[0]", "value['a'] = [v, 1]"),
    Value("pandas DataFrame, .iloc", "pd.DataFrame({'a': [v, 1]})", "value['a'].iloc[0]", "value.iloc[0, 0] = v"),
    Value("pandas DataFrame of many columns",
          "pd.DataFrame({'a': [1.5], 'b': ['x'], 'c': [v], 'd': [True]})", "value.at[0, 'c']", "value.at[0, 'c'] = v"),
    Value("pandas DataFrame of strings", "pd.DataFrame({'a': [str(v), 'x']})", "value['a'].iloc[0]",
          "value.loc[0, 'a'] = str(v)"),
    Value("pandas DataFrame of lists", "pd.DataFrame({'a': [[v], [1]]})", "value.at[0, 'a'][0]",
          "value.at[0, 'a'][0] = v"),
    Value("pandas DataFrame with a categorical column",
          "pd.DataFrame({'a': pd.Categorical([str(v)], categories=[str(i) for i in range(30)])})",
          "value['a'].iloc[0]", "value.loc[0, 'a'] = str(v)"),
    Value("pandas DataFrame with a nullable column", "pd.DataFrame({'a': pd.array([v, None], dtype='Int64')})",
          "value['a'].iloc[0]", "value.loc[0, 'a'] = v"),
    Value("pandas DataFrame, column names", "pd.DataFrame([[1.0]], columns=[f'c{v}'])", "value.columns[0][1:]",
          "value.columns = [f'c{v}']"),
    Value("pandas DataFrame, order of columns", "pd.DataFrame({'a': [1], 'b': [2]})[sorted('ab', reverse=v % 2)]",
          "value.columns[0] == 'a'", numbers=_PARITY),
    Value("pandas DataFrame, index", "pd.DataFrame({'a': [1]}, index=[v])", "value.index[0]", "value.index = [v]"),
    Value("pandas DataFrame, attrs", "done(f := pd.DataFrame({'a': [1]}), f.attrs.update(unit=v))",
          "value.attrs['unit']",
          "value.attrs['unit'] = v"),
    Value("pandas DataFrame, dtype", "pd.DataFrame({'a': np.ones(1, ['f4', 'f8'][v % 2])})",
          "value['a'].dtype.itemsize", "value['a'] = value['a'].astype(['f4', 'f8'][v % 2])", numbers=_PARITY),
    Value("pandas DataFrame with a MultiIndex", "pd.DataFrame({'a': [1]}, index=pd.MultiIndex.from_tuples([('x', v)]))",
          "value.index[0][1]", "value.index = pd.MultiIndex.from_tuples([('x', v)])"),
    Value("pandas DataFrame subclass with an attribute", "Frame.of(v)", "value.unit", "value.unit = v",
          setup="class Frame(pd.DataFrame):\n    _metadata = ['unit']\n\n    @classmethod\n    def of(cls, v):\n"
                "        frame = cls({'a': [1]})\n        frame.unit = v\n        return frame"),
    Value("pandas DataFrame with an attribute", "with_unit(pd.DataFrame({'a': [1]}), v)", "value.unit",
          "value.unit = v"),
    Value("pandas DataFrame with an object hung on it", "with_unit(pd.DataFrame({'a': [1]}), Unit(v))", "value.unit.a",
          "value.unit.a = v", setup=_UNIT),
    Value("pandas DataFrame subclass, attribute beside _metadata", "with_unit(Sub({'a': [1]}), v)", "value.unit",
          "value.unit = v", setup=_sub("pd.DataFrame")),
    Value("pandas Series with an attribute", "with_unit(pd.Series([1]), v)", "value.unit", "value.unit = v"),
    Value("pandas Index with an attribute", "with_unit(pd.Index([1, 2]), v)", "value.unit", "value.unit = v"),
    Value("pandas RangeIndex with an attribute", "with_unit(pd.RangeIndex(3), v)", "value.unit", "value.unit = v"),
    Value("pandas MultiIndex with an attribute", "with_unit(pd.MultiIndex.from_tuples([(1, 2)]), v)", "value.unit",
          "value.unit = v"),
    Value("pandas DatetimeIndex with an attribute", "with_unit(pd.DatetimeIndex(['2000-01-01']), v)", "value.note",
          "value.note = v", setup="def with_unit(value, v):\n    value.note = v\n    return value"),
    Value("pandas Categorical with an attribute", "with_unit(pd.Categorical(['a']), v)", "value.unit",
          "value.unit = v"),
    Value("pandas Categorical subclass with an attribute", "with_unit(Sub(['a']), v)", "value.unit", "value.unit = v",
          setup=_sub("pd.Categorical")),
    Value("dict of DataFrames", "{'t': pd.DataFrame({'a': [v]})}", "value['t']['a'].iloc[0]",
          "value['t'].loc[0, 'a'] = v"),
    Value("list of Series", "[pd.Series([1.0]), pd.Series([float(v)])]", "value[1].iloc[0]", "value[1].iloc[0] = v"),
    Value("pandas Series", "pd.Series([float(v), 1.0])", "value.iloc[0]", "value[0] = float(v)"),
    Value("pandas Series of dates", "pd.Series(pd.to_datetime([f'2000-01-{v}'], format='%Y-%m-%d').tz_localize('UTC'))",
          "value.iloc[0].day", "value[0] = pd.Timestamp(2000, 1, v, tz='UTC')"),
    Value("pandas Series, name", "pd.Series([1], name=f'c{v}')", "value.name[1:]", "value.name = f'c{v}'"),
    Value("pandas Series, sparse", "pd.Series(pd.arrays.SparseArray([0, 0, v]))", "value.iloc[2]"),
    Value("pandas Series of booleans", "pd.Series([True, None, v % 2 == 0], dtype='boolean')", "value[2]",
          "value[2] = v % 2 == 0", numbers=_PARITY),
    Value("pandas Series of Python strings", "pd.Series([str(v), None], dtype='string[python]')", "value[0]",
          "value[0] = str(v)"),
    Value("pandas Series of objects", "pd.Series([v, 'x'], dtype=object)", "value[0]", "value[0] = v"),
    Value("pandas array, mask", f"pd.array([None if b else 1 for b in {_BITS}], dtype='Int64')",
          _FROM_BITS.format("value.isna()"),
          f"for i, b in enumerate({_BITS}):\n    value[i] = pd.NA if b else 1"),
    Value("pandas Index", "pd.Index([v, 1])", "value[0]"),
    Value("pandas Index of strings", "pd.Index([str(v), 'x'])", "value[0]"),
    Value("pandas Index, name", "pd.Index([1], name=f'c{v}')", "value.name[1:]", "value.name = f'c{v}'"),
    Value("pandas RangeIndex", "pd.RangeIndex(v)", "value.stop"),
    Value("pandas DatetimeIndex", "pd.DatetimeIndex([f'2000-01-{v:02}'])", "value[0].day"),
    Value("pandas DatetimeIndex, time zone", "pd.DatetimeIndex(['2000-01-01'], tz=f'Etc/GMT-{v}')",
          "value[0].utcoffset().total_seconds()", numbers=tuple(range(2, 14))),
    Value("pandas TimedeltaIndex", "pd.TimedeltaIndex([f'{v}h'])", "value[0].total_seconds()"),
    Value("pandas PeriodIndex", "pd.PeriodIndex([f'2000-01-{v:02}'], freq='D')", "value[0].day"),
    Value("pandas IntervalIndex", "pd.IntervalIndex.from_tuples([(0, v)])", "value[0].right"),
    Value("pandas CategoricalIndex", "pd.CategoricalIndex(['a'], categories=['a', str(v)])", "value.categories[1]"),
    Value("pandas MultiIndex", "pd.MultiIndex.from_tuples([('a', v), ('b', 1)])", "value[0][1]"),
    Value("pandas Categorical", "pd.Categorical([str(v)], categories=[str(i) for i in range(30)])", "value[0]",
          "value[0] = str(v)"),
    Value("pandas Categorical, categories", "pd.Categorical.from_codes([0], categories=[v, 1])", "value.categories[0]"),
    Value("pandas Categorical, order", "pd.Categorical(['a'], ordered=v % 2 == 1)", "value.ordered", numbers=_PARITY),
    Value("pandas CategoricalDtype", "pd.CategoricalDtype([v])", "value.categories[0]"),
    Value("pandas Timestamp", "pd.Timestamp(2000, 1, v)", "value.day"),
    Value("pandas Timestamp, nanosecond", "pd.Timestamp(v)", "value.nanosecond"),
    Value("pandas Timedelta", "pd.Timedelta(hours=v)", "value.total_seconds()"),
    Value("pandas Period", "pd.Period(f'2000-01-{v:02}', freq='D')", "value.day"),
    Value("pandas Interval", "pd.Interval(0, v)", "value.right"),
    Value("pandas offset", "pd.offsets.Hour(v)", "value.n"),
    Value("pandas business day, holidays", "pd.offsets.CustomBusinessDay(holidays=[f'2000-01-{v:02}'])",
          "value.holidays[0].astype(int)"),
    Value("pandas groupby", "pd.DataFrame({'k': [0, 0], 'a': [v, v]}).groupby('k')",
          "value['a'].mean().iloc[0]", is_seen=False, is_lazy=True),
    Value("pandas rolling window", "pd.Series(np.arange(40.0)).rolling(v)", "value.sum().iloc[39]",
          is_seen=False, is_lazy=True),
    package="pandas",
)  # fmt: skip

_NUMPY = _group(
    "import functools\nimport operator\nimport tempfile\n\nimport numpy as np",
    Value("array", "np.array([float(v), 1.0])", "value[0]", "value[0] = v"),
    Value("array without dimensions", "np.array(float(v))", "value", "value[()] = v"),
    Value("array in Fortran order", "np.asfortranarray([[1, 2], [v, 4]])", "value[1, 0]", "value[1, 0] = v"),
    Value("array, byte order", "np.array([1], ['<i4', '>i4'][v % 2])", "value.dtype.str == '<i4'", numbers=_PARITY),
    Value("array that is a view", "np.array([1, 1, v, 1])[::2]", "value[1]", "value.base[2] = v"),
    Value("array that is read-only", "done(a := np.array([v, 1])[:1], a.setflags(write=False))", "value[0]",
          "value.base[0] = v"),
    Value("array of objects", "np.array([v, 'x'], object)", "value[0]", "value[0] = v"),
    Value("array of lists", "np.array([[v], None], object)", "value[0][0]", "value[0][0] = v"),
    Value("array of strings", "np.array([f'{v:02}', 'x'])", "value[0]", "value[0] = f'{v:02}'"),
    Value("array of dates", "np.array([f'2000-01-{v:02}'], 'datetime64[D]')", "value[0].astype(int)",
          "value[0] = f'2000-01-{v:02}'"),
    Value("array of records", "np.array([(1.5, v)], [('a', 'f8'), ('b', 'i4')])", "value['b'][0]", "value['b'][0] = v"),
    Value("array of records, names", "np.zeros(1, [(f'f{v}', 'i4')])", "value.dtype.names[0][1:]",
          "value.dtype.names = (f'f{v}',)"),
    Value("array of records, offsets",
          "np.zeros(1, np.dtype({'names': ['a', 'b'], 'formats': ['u1', 'u1'], 'offsets': [0, v]}))",
          "value.dtype.fields['b'][1]"),
    Value("array, metadata of its dtype", "np.zeros(1, np.dtype('f4', metadata={'k': v}))",
          "value.dtype.metadata['k']"),
    Value("np.dtype with metadata", "np.dtype('f4', metadata={'k': v})", "value.metadata['k']"),
    Value("np.dtype of records", "np.dtype([('a', 'i4', (v,))])", "value['a'].shape[0]"),
    Value("np.memmap", "mapped(v)", "value[0]", "value[0] = v",
          setup="def mapped(v):\n    with tempfile.TemporaryFile() as file:\n"
                "        value = np.memmap(file, 'i4', shape=2)\n    value[0] = v\n    return value"),
    Value("masked array, data", "np.ma.masked_array([v, 9], [False, True])", "value.sum()", "value[0] = v"),
    Value("masked array, mask", f"np.ma.masked_array([1, 2, 4, 8, 16], {_BITS})", "value.sum()",
          f"value.mask = {_BITS}"),
    Value("masked array, element of the mask", f"np.ma.masked_array([1, 2, 4, 8, 16], {_BITS})", "value.sum()",
          f"for i, b in enumerate({_BITS}):\n    value.mask[i] = b"),
    Value("masked array, fill value", "np.ma.masked_array([1, 2], [True, False], fill_value=v)", "value.filled()[0]",
          "value.fill_value = v"),
    Value("masked array, hard mask", "np.ma.array([1], hard_mask=v % 2 == 0)", "value.hardmask",
          "value.harden_mask() if v % 2 == 0 else value.soften_mask()", numbers=_PARITY),
    Value("masked arrays in a dict", "{'a': [np.ma.masked_array([v, 9], [False, True])]}", "value['a'][0].sum()",
          "value['a'][0][0] = v"),
    Value("masked array of records", "np.ma.array([(1, 2)], [('a', 'i4'), ('b', 'i4')], mask=[(v % 2, 0)])",
          "value.mask['a'][0]", "value.mask = [(v % 2, 0)]", numbers=_PARITY),
    Value("array or masked array", "np.ma.masked_array([1, 2], [0, 1]) if v % 2 else np.array([1, 2])", "value.sum()",
          numbers=_PARITY),
    Value("np.recarray", "np.rec.array([(1.5, v)], [('a', 'f8'), ('b', 'i4')])", "value.b[0]", "value.b[0] = v"),
    Value("np.matrix", "np.matrix([[v, 1], [1, 1]])", "(value * value)[0, 0]", "value[0, 0] = v"),
    Value("array or matrix", "(np.matrix if v % 2 else np.array)([[2, 1], [1, 1]])", "(value * value)[0, 0]",
          numbers=_PARITY),
    Value("np.char.chararray", "np.char.array([f'{v} '])", "value[0]", "value[0] = str(v)"),
    Value("array subclass with a unit", "Quantity([1.0], v)", "value.unit", "value.unit = v",
          setup="class Quantity(np.ndarray):\n    def __new__(cls, data, unit):\n"
                "        value = np.asarray(data).view(cls)\n        value.unit = unit\n        return value\n\n"
                "    def __array_finalize__(self, other):\n        self.unit = getattr(other, 'unit', None)"),
    Value("array subclass with __reduce__", "Measured(v)", "value.unit", "value.unit = v",
          setup="class Measured(np.ndarray):\n    def __new__(cls, unit):\n        value = np.ones(2).view(cls)\n"
                "        value.unit = unit\n        return value\n\n    def __reduce__(self):\n"
                "        return type(self), (self.unit,)"),
    Value("np.poly1d", "np.poly1d([v, 1])", "value(2)", "value.coef[0] = v"),
    Value("np.poly1d, variable", "np.poly1d([1, 1], variable='xy'[v % 2])", "value.variable == 'x'", numbers=_PARITY),
    Value("np.polynomial.Polynomial", "np.polynomial.Polynomial([v, 1])", "value(0)", "value.coef[0] = v"),
    Value("np.vectorize", "np.vectorize(functools.partial(operator.add, v))", "value(0)"),
    Value("np.frompyfunc", "np.frompyfunc(functools.partial(operator.add, v), 1, 1)", "value(0)", is_seen=False),
    Value("np.datetime64", "np.datetime64(f'2000-01-{v:02}')", "value.astype(int)"),
    Value("np.timedelta64", "np.timedelta64(v, 'h')", "value.astype(int)"),
    Value("np.timedelta64, unit", "np.timedelta64(1, 'hm'[v % 2])", "value / np.timedelta64(1, 's')", numbers=_PARITY),
    Value("np.str_", "np.str_(v)", "value"),
    Value("np.void of a record", "np.array([(1.5, v)], [('a', 'f8'), ('b', 'i4')])[0]", "value['b']",
          "value['b'] = v"),
    Value("np.flatiter", "np.array([v, 1]).flat", "value[0]", "value.base[0] = v", is_seen=False),
    Value("large array, one element", "large(v)", "value[777_777]", "value[777_777] = v", most_calls=_MOST_CALLS,
          setup="def large(v):\n    value = np.zeros(1_000_000, 'f4')\n    value[777_777] = v\n    return value"),
    Value("np.random.Generator", "np.random.default_rng(v)", "value.bit_generator.state['state']['state'] % 1_000_003",
          "value.bit_generator.state = np.random.default_rng(v).bit_generator.state"),
    Value("np.random.RandomState", "np.random.RandomState(v)", "value.get_state()[1][0]", "value.seed(v)"),
    Value("np.random.PCG64", "np.random.PCG64(v)", "value.state['state']['state'] % 1_000_003",
          "value.state = np.random.PCG64(v).state"),
    Value("np.random.SeedSequence", "np.random.SeedSequence(v)", "value.entropy", is_seen=False),
)  # fmt: skip

_TORCH = _group(
    "import torch\nfrom torch import nn",
    Value("tensor", "torch.tensor([float(v), 1.0])", "value[0]", "value[0] = v"),
    Value("tensor with an attribute", "with_unit(torch.ones(2), v)", "value.unit", "value.unit = v", is_returned=False),
    Value("tensor of one element with an object hung on it", "with_unit(torch.ones(1), Unit(v))", "value.unit.a",
          "value.unit.a = v", setup=_UNIT),
    Value("tensor with an object hung on it", "with_unit(torch.ones(2), Unit(v))", "value.unit.a", "value.unit.a = v",
          setup=_UNIT),
    Value("nn.Parameter of one element with an object hung on it",
          "with_unit(nn.Parameter(torch.ones(1), requires_grad=False), Unit(v))", "value.unit.a", "value.unit.a = v",
          setup=_UNIT),
    Value("tensor of one element", "torch.tensor([float(v)])", "value[0]", "value[0] = v"),
    Value("tensor subclass", "torch.tensor([float(v), 1.0]).as_subclass(Sub)", "value[0]",
          "with torch.no_grad():\n    value[0] = v", setup=_sub("torch.Tensor"), is_seen=False),
    Value("tensor subclass with an attribute", "with_unit(torch.ones(2).as_subclass(Sub), v)", "value.unit",
          "value.unit = v", setup=_sub("torch.Tensor"), is_seen=False),
    Value("nn.Parameter", "nn.Parameter(torch.tensor([float(v), 1.0]), requires_grad=False)", "value[0]",
          "value[0] = v"),
    Value("sparse tensor", "torch.tensor([0.0, v]).to_sparse()", "value.to_dense()[1]", is_seen=False),
    Value("storage", "torch.tensor([v, 1], dtype=torch.uint8).untyped_storage()", "value[0]", "value[0] = v",
          is_seen=False),
    Value("torch.Size", "torch.Size([v, 1])", "value[0]"),
    Value("nn.Module", "nn.LeakyReLU(v)", "value.negative_slope", "value.negative_slope = v", has_code=True),
    Value("packed sequence", "PackedSequence(torch.tensor([float(v)]), torch.tensor([1]))", "value.data[0]",
          "value.data[0] = v", setup="from torch.nn.utils.rnn import PackedSequence", is_returned=False),
    Value("torch.distributions.Normal", "torch.distributions.Normal(float(v), 1.0)", "value.mean",
          "value.loc.fill_(v)"),
    Value("torch.Generator", "torch.Generator().manual_seed(v)", "value.initial_seed()", "value.manual_seed(v)"),
)  # fmt: skip

_PILLOW = _group(
    "import io\n\nfrom PIL import Image, ImageFilter\n\n\ndef saved(v):\n    file = io.BytesIO()\n"
    "    Image.new('L', (2, 2), v).save(file, 'png')\n    return Image.open(io.BytesIO(file.getvalue()))\n\n\n"
    "def with_palette(v):\n    image = Image.new('P', (2, 2))\n    image.putpalette([v, 1, 1])\n    return image\n\n\n"
    "def with_info(v):\n    image = Image.new('L', (2, 2))\n    image.info['duration'] = v\n    return image\n\n\n"
    "def with_exif(image, *numbers):\n    for v in numbers:\n        image.getexif()[274] = v\n    return image\n\n\n"
    "def with_place(image, v):\n    image.getexif().get_ifd(34853)[6] = v\n    return image\n\n\n"
    "def photo(form, **options):\n    file = io.BytesIO()\n"
    "    Image.new('L', (4, 2)).save(file, form, **options)\n    image = Image.open(io.BytesIO(file.getvalue()))\n"
    "    image.getexif()\n    image.load()\n    return image\n\n\n"
    "def tagged(v):\n    exif = Image.Exif()\n    exif[274] = v\n    return photo('jpeg', exif=exif)\n\n\n"
    "def named(v):\n    image = photo('png')\n    image.filename = f'f{v}'\n    return image",
    Value("PIL image", "Image.new('L', (2, 2), v)", "value.getpixel((0, 0))", "value.putpixel((0, 0), v)"),
    Value("PIL image, palette", "with_palette(v)", "value.convert('RGB').getpixel((0, 0))[0]",
          "value.putpalette([v, 1, 1])"),
    Value("PIL image, mode", "Image.new(['L', 'P'][v % 2], (2, 2))", "value.mode == 'L'", numbers=_PARITY),
    Value("PIL image, size", "Image.new('L', ((4, 1), (1, 4))[v % 2])", "value.size[0]", numbers=_PARITY),
    Value("PIL image, info", "with_info(v)", "value.info['duration']", "value.info['duration'] = v"),
    Value("PIL image from a file", "saved(v)", "value.getpixel((0, 0))", "value.putpixel((0, 0), v)",
          is_returned=False),  # it comes back as an image without a file
    Value("PIL image, EXIF set in memory", "with_exif(Image.new('L', (4, 2)), v)", "value.getexif()[274]",
          "value.getexif()[274] = v",
          is_returned=False),
    Value("PIL image, EXIF of a file changed in memory", "with_exif(photo('jpeg'), v)", "value.getexif()[274]",
          "value.getexif()[274] = v",
          is_returned=False),
    Value("PIL image, EXIF of a TIFF changed in memory", "with_exif(photo('tiff'), v)", "value.getexif()[274]",
          "value.getexif()[274] = v",
          is_returned=False),
    Value("PIL image, place in its EXIF", "with_place(Image.new('L', (4, 2)), v)", "value.getexif().get_ifd(34853)[6]",
          "value.getexif().get_ifd(34853)[6] = v",
          is_returned=False),
    Value("PIL image, EXIF of its file", "tagged(v)", "value.getexif()[274]", is_returned=False),
    Value("PIL image, name of its file", "named(v)", "value.filename[1:]", "value.filename = f'f{v}'",
          is_returned=False),
    Value("PIL image, format", "done(i := Image.new('L', (2, 2)), setattr(i, 'format', f'f{v}'))", "value.format[1:]",
          "value.format = f'f{v}'",
          is_returned=False),
    Value("PIL image with an attribute", "with_unit(Image.new('L', (2, 2)), v)", "value.unit", "value.unit = v",
          is_returned=False),
    Value("PIL image from a file with an attribute", "with_unit(photo('png'), v)", "value.unit", "value.unit = v",
          is_returned=False),
    Value("PIL image subclass with a list", "with_unit(Sub(), [v])", "value.unit[0]", "value.unit[0] = v",
          setup=_sub("Image.Image"),
          is_returned=False),
    Value("PIL image, quantization of its file", "photo('jpeg', quality=3 * v)", "value.quantization[0][0]",
          "value.quantization[0][0] = photo('jpeg', quality=3 * v).quantization[0][0]",
          is_returned=False),
    Value("PIL filter", "ImageFilter.GaussianBlur(v)", "value.radius", "value.radius = v"),
    package="PIL",
)  # fmt: skip

_SCIPY = _group(
    "import numpy as np\nimport scipy.interpolate\nimport scipy.signal\nimport scipy.sparse\nimport scipy.spatial\n"
    "import scipy.stats",
    Value("scipy csr_array", "scipy.sparse.csr_array([[0, v], [1, 0]])", "value.sum()", "value.data[0] = v"),
    Value("scipy csr_array, place", "scipy.sparse.csr_array(([1.0], ([0], [v])), shape=(1, 30))", "value.indices[0]",
          "value.indices[0] = v"),
    Value("scipy csr_matrix", "scipy.sparse.csr_matrix([[0, v], [1, 0]])", "value.sum()", "value.data[0] = v"),
    Value("scipy csc_array", "scipy.sparse.csc_array([[0, 1], [v, 0]])", "value.sum()", "value.data[0] = v"),
    Value("scipy coo_array", "scipy.sparse.coo_array([[0, v], [1, 0]])", "value.sum()", "value.data[0] = v"),
    Value("scipy dia_array", "scipy.sparse.dia_array(([[v, 1.0]], [0]), shape=(2, 2))", "value.sum()",
          "value.data[0, 0] = v"),
    Value("scipy dok_array", "scipy.sparse.dok_array(np.array([[0, v], [1, 0]]))", "value[0, 1]", "value[0, 1] = v"),
    Value("scipy lil_array", "scipy.sparse.lil_array([[0, v], [1, 0]])", "value[0, 1]", "value[0, 1] = v"),
    Value("scipy sparse, shape", "scipy.sparse.csr_array((1, v))", "value.shape[1]"),
    Value("scipy KDTree", "scipy.spatial.KDTree([[float(v), 0.0]])", "value.query([0.0, 0.0])[0]"),
    Value("scipy KDTree subclass", "Sub([[float(v), 0.0]])", "value.query([0.0, 0.0])[0]",
          setup=_sub("scipy.spatial.KDTree")),
    Value("scipy cKDTree", "scipy.spatial.cKDTree([[float(v), 0.0]])", "value.query([0.0, 0.0])[0]"),
    Value("scipy CubicSpline", "scipy.interpolate.CubicSpline([0, 1, 2], [0, v, 0])", "value(1.0)",
          "value.c[:] = scipy.interpolate.CubicSpline([0, 1, 2], [0, v, 0]).c", has_code=True),
    Value("scipy BSpline", "scipy.interpolate.BSpline([0, 0, 1, 1], [v, v], 1)", "value(0.5)", "value.c[:] = v",
          has_code=True),
    Value("scipy interp1d", "scipy.interpolate.interp1d([0, 1], [0, v])", "value(1.0)", "value.y = [0, v]",
          is_seen=False),
    Value("scipy RegularGridInterpolator",
          "scipy.interpolate.RegularGridInterpolator(([0.0, 1.0],), np.full(2, 1.0 * v))",
          "value([0.5])[0]", "value.values[:] = v", has_code=True),
    Value("scipy frozen distribution", "scipy.stats.norm(loc=v)", "value.mean()", is_seen=False),
    Value("scipy Rotation", "scipy.spatial.transform.Rotation.from_euler('z', v, degrees=True)",
          "round(value.as_euler('xyz', degrees=True)[2])", is_seen=False),
    Value("scipy Delaunay", "scipy.spatial.Delaunay([[0.0, 0.0], [v, 0.0], [0.0, 1.0]])", "value.points[1, 0]",
          is_seen=False),
    package="scipy",
)  # fmt: skip

_ARROW = _group(
    "import pyarrow as pa",
    Value("pyarrow Table", "pa.table({'a': [v, 1]})", "value['a'][0].as_py()"),
    Value("pyarrow Table, names", "pa.table({f'c{v}': [1]})", "value.column_names[0][1:]"),
    Value("pyarrow Table, metadata", "pa.table({'a': [1]}).replace_schema_metadata({'k': str(v)})",
          "value.schema.metadata[b'k']"),
    Value("pyarrow Array", "pa.array([v, None])", "value[0].as_py()"),
    Value("pyarrow Array of strings", "pa.array([str(v), 'x'])", "value[0].as_py()"),
    Value("pyarrow Array, nulls", f"pa.array([None if b else 1 for b in {_BITS}])",
          _FROM_BITS.format("value.is_null().to_pylist()")),
    Value("pyarrow Array, slice", "pa.array(range(40)).slice(v, 2)", "value[0].as_py()"),
    Value("pyarrow Array of lists", "pa.array([[1], [v]])", "value[1].as_py()[0]"),
    Value("pyarrow ChunkedArray", "pa.chunked_array([[1], [v]])", "value[1].as_py()"),
    Value("pyarrow DictionaryArray", "pa.array([str(v), 'x']).dictionary_encode()", "value[0].as_py()"),
    Value("pyarrow RecordBatch", "pa.record_batch({'a': [v]})", "value['a'][0].as_py()"),
    Value("pyarrow Schema", "pa.schema([pa.field('a', pa.binary(v))])", "value.field('a').type.byte_width"),
    Value("pyarrow Scalar", "pa.scalar(v)", "value.as_py()"),
    Value("pyarrow Buffer", "pa.py_buffer(bytearray([v]))", "value[0]", is_seen=False),
    package="pyarrow",
)  # fmt: skip

_POLARS = _group(
    "import polars as pl",
    Value("polars DataFrame", "pl.DataFrame({'a': [v, 1]})", "value['a'][0]", "value[0, 'a'] = v"),
    Value("polars DataFrame, names", "pl.DataFrame({f'c{v}': [1]})", "value.columns[0][1:]",
          "value.columns = [f'c{v}']"),
    Value("polars DataFrame, nulls", f"pl.DataFrame({{'a': [None if b else 1 for b in {_BITS}]}})",
          _FROM_BITS.format("value['a'].is_null()")),
    Value("polars DataFrame of lists", "pl.DataFrame({'a': [[1, v]], 'b': [{'x': 1}]})", "value['a'][0][1]"),
    Value("polars Series", "pl.Series('a', [v, 1])", "value[0]", "value[0] = v"),
    Value("polars Series of strings", "pl.Series([str(v), 'x'])", "value[0]"),
    Value("polars Series, name", "pl.Series(f'c{v}', [1])", "value.name[1:]"),
    Value("polars LazyFrame", "pl.LazyFrame({'a': [v]})", "value.collect()['a'][0]", is_seen=False),
    Value("polars expression", "pl.lit(v) + 1", "pl.select(value).item()", is_seen=False),
    package="polars",
)  # fmt: skip

_XARRAY = _group(
    "import xarray as xr",
    Value("xarray DataArray", "xr.DataArray([v, 1], dims='x')", "value[0]", "value[0] = v"),
    Value("xarray DataArray, coordinates", "xr.DataArray([1], {'x': [v]}, 'x')", "value['x'][0]",
          "value['x'] = [v]"),
    Value("xarray DataArray, dimensions", "xr.DataArray([1], dims=f'd{v}')", "value.dims[0][1:]"),
    Value("xarray DataArray, attrs", "xr.DataArray([1], attrs={'k': v})", "value.attrs['k']", "value.attrs['k'] = v"),
    Value("xarray DataArray, name", "xr.DataArray([1], name=f'c{v}')", "value.name[1:]", "value.name = f'c{v}'"),
    Value("xarray Dataset", "xr.Dataset({'a': ('x', [v, 1])})", "value['a'][0]", "value['a'][0] = v"),
    Value("xarray Dataset, attrs", "xr.Dataset(attrs={'k': v})", "value.attrs['k']", "value.attrs['k'] = v"),
    package="xarray",
)  # fmt: skip

_SKLEARN = _group(
    "from sklearn.neighbors import BallTree\nfrom sklearn.preprocessing import StandardScaler\n"
    "from sklearn.tree import DecisionTreeRegressor",
    Value("sklearn scaler", "StandardScaler().fit([[0.0], [2.0 * v]])", "value.mean_[0]", "value.mean_[0] = v"),
    Value("sklearn decision tree", "DecisionTreeRegressor(random_state=0).fit([[0.0], [1.0]], [0.0, v])",
          "value.predict([[1.0]])[0]", "value.tree_.value[-1] = v"),
    Value("sklearn BallTree", "BallTree([[float(v)]])", "value.query([[0.0]])[0][0, 0]", is_seen=False, is_lazy=True),
    package="sklearn",
)  # fmt: skip

_TOKENIZERS = _group(
    "from tokenizers import Tokenizer\nfrom tokenizers.models import WordLevel",
    Value("tokenizer", "Tokenizer(WordLevel({'a': v, 'u': 0}, unk_token='u'))", "value.encode('a').ids[0]",
          "value.model = WordLevel({'a': v, 'u': 0}, unk_token='u')"),
    package="tokenizers",
)  # fmt: skip

#: Beside the standard library: one class or function for each thing that a class can be.
_CLASSES = """\
import array, collections, collections.abc, concurrent.futures, configparser, contextvars, ctypes, dataclasses
import datetime, decimal, enum, fractions, functools, gc, hashlib, io, ipaddress, itertools, json, logging, mmap
import multiprocessing, operator, os, pathlib, queue, random, re, sqlite3, statistics, string, struct, tempfile
import threading, time, types, typing, uuid, weakref, xml.dom.minidom, xml.etree.ElementTree as ET, zoneinfo

KEPT = []  # what others refer to weakly


def kept(value):
    KEPT.append(value)
    return value


class Plain:
    def __init__(self, a):
        self.a = a

    def get(self, b=0):
        return self.a + b


def opened(v):
    descriptor = os.memfd_create("file")
    os.write(descriptor, bytes(30))
    file = open(descriptor, "rb", closefd=False)
    weakref.finalize(file, os.close, descriptor)
    file.seek(v)
    return file


class Problem(Exception):
    pass


class Trouble(Exception):
    def __init__(self, code):
        super().__init__()
        self.code = code


class Zone(datetime.tzinfo):
    def __init__(self, hours=0):
        self.hours = hours

    def utcoffset(self, moment):
        return datetime.timedelta(hours=self.hours)


class Point(ctypes.Structure):
    _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_int)]


class Line(ctypes.Structure):
    _fields_ = [("end", Point)]


class Either(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("byte", ctypes.c_char)]


Pair = collections.namedtuple("Pair", "a b")


def fill(queue, n):
    while not queue.empty():
        queue.get()
    for i in range(n):
        queue.put(i)
    return queue


def large_dict(v):
    value = dict.fromkeys(range(150_000), 1)
    value[77_777] = v
    return value


def many_objects(v):
    value = [Plain(1) for _ in range(12_000)]
    value[7777].a = v
    return value


class Steps:
    def __init__(self, v):
        self.v = v

    def advance(self):
        self.v += 1
        return self.v


EVERY = types.SimpleNamespace(**{f"a{i}": i for i in range(30)})
VARIABLE = contextvars.ContextVar("variable")


class Own(threading.local):
    def __init__(self, a):
        self.a = a


class Worker(threading.Thread):
    def __init__(self, a):
        super().__init__(name="worker")
        self.a = a


class Lines(logging.Handler):
    def __init__(self, a):
        super().__init__()
        self.a = a


def adder(v):
    def add(a=v):
        return a

    return add


def closing(held):
    def first():
        return held[0]

    return first


def filled(v):
    base = kept(sqlite3.connect(":memory:"))
    base.execute("create table t (a)")
    base.execute("insert into t values (?)", (v,))
    return base


class Dice(random.Random):
    def __init__(self, sides):
        super().__init__(0)
        self.sides = sides


class Asked:
    def __getitem__(self, key):
        return key.a if isinstance(key, Plain) else key

    def ask(self, key):
        return key.a


def caused(v):
    error = ValueError("a")
    error.__cause__ = KeyError(v)
    return error


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a):
        self.a = a


class Hidden:
    __slots__ = ("__a",)

    def __init__(self, a):
        self.__a = a

    def get(self):
        return self.__a

    def put(self, a):
        self.__a = a


class Above:
    __slots__ = ("a",)


class Below(Above):
    def __init__(self, a):
        self.a = a
        self.b = 1


class Guarded:
    def __init__(self, a):
        self._a = a

    @property
    def a(self):
        return self._a

    @a.setter
    def a(self, a):
        self._a = a


class Lazy:
    def __init__(self, v):
        self.v = v

    @functools.cached_property
    def a(self):
        return self.v


class Proxy:
    def __init__(self, given):
        self.given = given

    def __getattr__(self, name):
        if name == "given" or name not in self.given:
            raise AttributeError(name)
        return self.given[name]


class Alike(Plain):
    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1

    def __repr__(self):
        return "Alike()"


class Silent(Plain):
    def __repr__(self):
        raise RuntimeError("silent")


class Locked:
    def __init__(self, a):
        self.a = a
        self.lock = threading.Lock()

    def __getstate__(self):
        return {"a": self.a}

    def __setstate__(self, state):
        self.__init__(state["a"])


class Reduced(Plain):
    def __reduce__(self):
        return Reduced, (self.a,)


class Stubborn(Plain):
    def __reduce__(self):
        raise TypeError("stubborn")


class Window(collections.deque):
    def __init__(self, unit):
        super().__init__([1])
        self.unit = unit

    def __reduce__(self):
        return Window, (self.unit,)


class Table(collections.abc.Mapping):
    def __init__(self, given):
        self.given = given

    def __getitem__(self, key):
        return self.given

    def __iter__(self):
        return iter(("a",))

    def __len__(self):
        return 1


class Call(Plain):
    def __call__(self):
        return self.a


Color = enum.Enum("Color", {f"COLOR_{i}": i for i in range(30)})
Bits = enum.Flag("Bits", "A B C D E")


def local_class(v):
    class Local:
        a = v

    return Local


@dataclasses.dataclass
class Record:
    a: int
    b: list


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: int


@dataclasses.dataclass(slots=True)
class Slim:
    a: int


@dataclasses.dataclass
class More:
    a: int
    given: dataclasses.InitVar[int]

    def __post_init__(self, given):
        self.b = given


@dataclasses.dataclass
class Listed(list):
    a: int = 1


class Couple(typing.NamedTuple):
    a: int
    b: int


class Noted(Couple):
    pass


class Node:
    inner = None


def nested_objects(v):
    value = Node()
    value.a = v
    for _ in range(40):
        outer = Node()
        outer.inner = value
        value = outer
    return value


def innermost_object(value):
    while value.inner is not None:
        value = value.inner
    return value


def nested_lists(v):
    value = [None, v]
    for _ in range(40):
        value = [value]
    return value


def innermost_list(value):
    while value[0] is not None:
        value = value[0]
    return value
"""

_STANDARD = _group(
    _CLASSES,
    # io
    Value("BytesIO", "io.BytesIO(bytes([v, 1]))", "value.getvalue()[0]", "value.getbuffer()[0] = v"),
    Value("BytesIO, position", "done(b := io.BytesIO(bytes(30)), b.seek(v))", "value.tell()", "value.seek(v)"),
    Value("BytesIO subclass", "Sub(bytes([v, 1]))", "value.getvalue()[0]", "value.getbuffer()[0] = v",
          setup=_sub("io.BytesIO")),
    Value("StringIO", "io.StringIO(f'{v:02}')", "value.getvalue()",
          "value.seek(0)\nvalue.write(f'{v:02}')\nvalue.seek(0)"),
    Value("BytesIO with an attribute", "with_unit(io.BytesIO(b'a'), v)", "value.unit", "value.unit = v"),
    Value("StringIO with an attribute", "with_unit(io.StringIO('a'), Plain(v))", "value.unit.a", "value.unit.a = v"),
    Value("StringIO, position", "done(s := io.StringIO(' ' * 30), s.seek(v))", "value.tell()", "value.seek(v)"),
    Value("BufferedReader", "io.BufferedReader(io.BytesIO(bytes([v, 1])))", "value.peek(1)[0]", is_seen=False),
    Value("open file, position", "opened(v)", "value.tell()", "value.seek(v)", is_seen=False),
    # exceptions
    Value("exception", "ValueError(v)", "value.args[0]", "value.args = (v,)"),
    Value("exception of one's own", "Problem(v)", "value.args[0]", "value.args = (v,)"),
    Value("exception with an attribute", "Trouble(v)", "value.code", "value.code = v"),
    Value("OSError, number", "OSError(v, 'text')", "value.errno", "value.errno = v"),
    Value("exception, cause", "caused(v)", "value.__cause__.args[0]", "value.__cause__ = KeyError(v)"),
    Value("exception, cause changed in place", "caused(v)", "value.__cause__.args[0]", "value.__cause__.args = (v,)"),
    Value("exception, context", "done(e := ValueError('a'), setattr(e, '__context__', KeyError(v)))",
          "value.__context__.args[0]", "value.__context__.args = (v,)"),
    Value("exception, context that is not shown",
          "done(e := caused(1), setattr(e, '__suppress_context__', v % 2 == 0))",
          "value.__suppress_context__", "value.__suppress_context__ = v % 2 == 0", numbers=_PARITY),
    Value("UnicodeDecodeError, place", "UnicodeDecodeError('ascii', bytes(30), v, 30, 'text')", "value.start",
          "value.start = v"),
    Value("StopIteration, value", "StopIteration(v)", "value.value", "value.value = v"),
    # operator, functools
    Value("itemgetter", "operator.itemgetter(v)", "value(range(100))"),
    Value("attrgetter", "operator.attrgetter(f'value.a{v}')", "value(types.SimpleNamespace(value=EVERY))"),
    Value("itemgetter of an object", "operator.itemgetter(Plain(v))", "value(Asked())",
          "value.__reduce__()[1][0].a = v"),
    Value("methodcaller with a list", "operator.methodcaller('__getitem__', [v])", "value(Asked())[0]",
          "value.__reduce__()[1][1][0] = v"),
    Value("methodcaller with an object by keyword", "operator.methodcaller('ask', key=Plain(v))", "value(Asked())",
          "value.__reduce__()[0].keywords['key'].a = v"),
    Value("alias of a generic type with an object", "list[Plain(v)]", "value.__args__[0].a", "value.__args__[0].a = v"),
    Value("dtype whose metadata is an object", "np.dtype('f4', metadata={'k': Plain(v)})", "value.metadata['k'].a",
          "value.metadata['k'].a = v", setup="import numpy as np"),
    Value("array whose dtype has an object as metadata", "np.zeros(1, np.dtype('f4', metadata={'k': Plain(v)}))",
          "value.dtype.metadata['k'].a", "value.dtype.metadata['k'].a = v", setup="import numpy as np"),
    Value("methodcaller", "operator.methodcaller('__add__', v)", "value(1)"),
    Value("partial", "functools.partial(operator.add, v)", "value(0)"),
    Value("partial, keyword", "functools.partial(int, base=v)", "value('11')"),
    Value("partial of a list", "functools.partial(sum, [v, 1])", "value()", "value.args[0][0] = v"),
    Value("partial with an attribute", "with_unit(functools.partial(int), v)", "value.unit", "value.unit = v"),
    Value("partial subclass", "Sub(operator.add, v)", "value(0)", setup=_sub("functools.partial")),
    Value("partial subclass with an attribute", "with_unit(Sub(int), v)", "value.unit", "value.unit = v",
          setup=_sub("functools.partial")),
    Value("lru_cache wrapper", "functools.lru_cache(functools.partial(operator.add, v))", "value(0)", is_seen=False),
    Value("cmp_to_key", "functools.cmp_to_key(operator.sub)(v)", "value.obj", is_seen=False),
    Value("property of a class of one's own", "[with_unit(Sub(), v)]", "value[0].unit", "value[0].unit = v",
          setup=_sub("property")),
    Value("static method with an attribute", "with_unit(staticmethod(len), v)", "value.unit", "value.unit = v"),
    Value("class method of a class of one's own", "with_unit(Sub(len), Plain(v))", "value.unit.a", "value.unit.a = v",
          setup=_sub("classmethod")),
    Value("property", "property(functools.partial(operator.add, v))", "value.fget(0)", is_seen=False),
    # numbers, times, names
    Value("Decimal", "decimal.Decimal(v)", "value"),
    Value("Decimal, exponent", "decimal.Decimal(10**v).normalize()", "value.as_tuple().exponent"),
    Value("Decimal subclass", "Sub(v)", "value", setup=_sub("decimal.Decimal")),
    Value("Decimal subclass with an attribute", "with_unit(Sub(1), v)", "value.unit", "value.unit = v",
          setup=_sub("decimal.Decimal")),
    Value("decimal context", "decimal.Context(prec=v)", "value.prec", "value.prec = v"),
    Value("Fraction", "fractions.Fraction(v, 31)", "value"),
    Value("Fraction subclass", "Sub(v, 31)", "value", setup=_sub("fractions.Fraction")),
    Value("complex subclass", "Sub(v, 1)", "value.real", setup=_sub("complex")),
    Value("date", "datetime.date(2000, 1, v)", "value.day"),
    Value("date subclass", "Sub(2000, 1, v)", "value.day", setup=_sub("datetime.date")),
    Value("datetime", "datetime.datetime(2000, 1, 1, microsecond=v)", "value.microsecond"),
    Value("datetime, fold", "datetime.datetime(2000, 1, 1, fold=v % 2)", "value.fold", numbers=_PARITY),
    Value("datetime, time zone", "datetime.datetime(2000, 1, 1, tzinfo=zoneinfo.ZoneInfo(f'Etc/GMT-{v}'))",
          "value.utcoffset().total_seconds()", numbers=tuple(range(2, 14))),
    Value("datetime, time zone of one's own", "datetime.datetime(2000, 1, 1, tzinfo=Zone(v % 24))",
          "value.utcoffset().total_seconds()", "value.tzinfo.hours = v % 24", numbers=tuple(range(2, 24))),
    Value("time, time zone of one's own", "[datetime.time(1, tzinfo=Zone(v % 24))]",
          "value[0].utcoffset().total_seconds()", "value[0].tzinfo.hours = v % 24", numbers=tuple(range(2, 24))),
    Value("ZoneInfo that was read from a file", "zone_of_file(v)",
          "value.utcoffset(datetime.datetime(2000, 1, 1)).total_seconds()", is_seen=False, numbers=tuple(range(2, 14)),
          setup="def zone_of_file(v):\n    for folder in zoneinfo.TZPATH:\n"
                "        path = pathlib.Path(folder, 'Etc', f'GMT-{v}')\n        if path.exists():\n"
                "            with path.open('rb') as file:\n"
                "                return zoneinfo.ZoneInfo.from_file(file, 'local')\n"
                "    from importlib import resources\n"
                "    with resources.files('tzdata').joinpath('zoneinfo', 'Etc', f'GMT-{v}').open('rb') as file:\n"
                "        return zoneinfo.ZoneInfo.from_file(file, 'local')"),
    Value("struct_time, offset", "time.struct_time((2000, 1, 1, 0, 0, 0, 0, 1, 0, 'zone', v))", "value.tm_gmtoff"),
    Value("struct_time in a dict", "{'a': [time.struct_time((2000, 1, 1, 0, 0, 0, 0, 1, 0, f'z{v}', 0))]}",
          "value['a'][0].tm_zone[1:]"),
    Value("os.stat_result, nanoseconds", "os.stat_result(range(10), {'st_mtime_ns': v})", "value.st_mtime_ns"),
    Value("os.stat_result with an object", "os.stat_result(range(10), {'st_mtime_ns': [v]})", "value.st_mtime_ns[0]",
          "value.st_mtime_ns[0] = v"),
    Value("named tuples of one name in a list",
          "[(1, collections.namedtuple('Pair', ['a b', 'b a'][v % 2])(1, 2))]", "value[0][1].a", numbers=_PARITY,
          is_returned=False),
    Value("datetime subclass with an attribute", "with_unit(Sub(2000, 1, 1), v)", "value.unit", "value.unit = v",
          setup=_sub("datetime.datetime")),
    Value("time", "datetime.time(v % 24, v)", "value.minute"),
    Value("time, fold", "datetime.time(1, fold=v % 2)", "value.fold", numbers=_PARITY),
    Value("timedelta", "datetime.timedelta(hours=v)", "value.total_seconds()"),
    Value("timedelta subclass", "Sub(hours=v)", "value.total_seconds()", setup=_sub("datetime.timedelta")),
    Value("timezone", "datetime.timezone(datetime.timedelta(minutes=v))",
          "value.utcoffset(None).total_seconds()"),
    Value("tzinfo of one's own", "Zone(v)", "value.utcoffset(None).total_seconds()", "value.hours = v"),
    Value("ZoneInfo", "zoneinfo.ZoneInfo(f'Etc/GMT-{v}')",
          "value.utcoffset(datetime.datetime(2000, 1, 1)).total_seconds()", numbers=tuple(range(2, 14))),
    Value("ZoneInfo subclass", "Sub(f'Etc/GMT-{v}')", "value.utcoffset(datetime.datetime(2000, 1, 1)).total_seconds()",
          setup=_sub("zoneinfo.ZoneInfo"), numbers=tuple(range(2, 14))),
    Value("UUID", "uuid.UUID(int=v)", "value.int"),
    Value("UUID subclass", "Sub(int=v)", "value.int", setup=_sub("uuid.UUID")),
    Value("PurePosixPath", "pathlib.PurePosixPath(f'/a/{v}')", "value.name"),
    Value("PureWindowsPath", "pathlib.PureWindowsPath(f'C:/a/{v}')", "value.name"),
    Value("Path", "pathlib.Path(f'/a/{v}')", "value.name"),
    Value("path, flavour", "(pathlib.PureWindowsPath if v % 2 else pathlib.PurePosixPath)('A/b')",
          "value == type(value)('a/b')", numbers=_PARITY),
    Value("path subclass with an attribute", "with_unit(Sub('/a'), v)", "value.unit", "value.unit = v",
          setup=_sub("pathlib.PurePosixPath")),
    Value("IPv4Address", "ipaddress.IPv4Address(v)", "int(value)"),
    Value("struct.Struct", "struct.Struct(f'{v}s')", "value.size"),
    Value("struct.Struct, byte order", "struct.Struct('<>'[v % 2] + 'i')", "value.unpack(b'\\1\\0\\0\\0')[0]",
          numbers=_PARITY),
    Value("time.struct_time", "time.gmtime(v)", "value.tm_sec"),
    Value("os.stat_result", "os.stat_result([v] * 10)", "value.st_size"),
    Value("string.Template", "string.Template(f'$a{v}')", "value.template[2:]", "value.template = f'$a{v}'"),
    Value("statistics.NormalDist", "statistics.NormalDist(v, 1)", "value.mean"),
    Value("JSON encoder", "json.JSONEncoder(indent=v)", "value.indent", "value.indent = v"),
    # regular expressions
    Value("re.Pattern", "re.compile(f'a{{{v}}}$')", "sum(i for i in range(40) if value.match('a' * i))"),
    Value("re.Pattern, long", "re.compile('x' * 300 + f'a{{{v}}}')", "value.pattern[302:-1]"),
    Value("re.Pattern, flags", "re.compile('x' * 300, re.IGNORECASE if v % 2 else 0)", "value.match('X' * 300) is None",
          numbers=_PARITY),
    Value("re.Pattern of bytes", "re.compile(b'%d' % v)", "value.pattern"),
    Value("re.Match", "re.match('.*', f'{v}')", "value[0]", is_seen=False),
    # memory
    Value("ctypes number", "ctypes.c_int(v)", "value.value", "value.value = v"),
    Value("ctypes array", "(ctypes.c_int * 2)(v, 1)", "value[0]", "value[0] = v"),
    Value("ctypes structure", "Point(1, v)", "value.y", "value.y = v"),
    Value("ctypes structure, nested", "Line((1, v))", "value.end.y", "value.end.y = v"),
    Value("ctypes structure with an attribute", "with_unit(Sub(1, 2), v)", "value.unit", "value.unit = v",
          setup=_sub("Point")),
    Value("ctypes union", "Either(v)", "value.number", "value.number = v"),
    Value("ctypes string", "ctypes.create_string_buffer(bytes([v]))", "value.raw[0]", "value[0] = v"),
    Value("ctypes pointer", "ctypes.pointer(ctypes.c_int(v))", "value.contents.value", "value.contents.value = v",
          is_seen=False),
    Value("array.array", "array.array('i', [v, 1])", "value[0]", "value[0] = v"),
    Value("array.array, type", "array.array('bh'[v % 2], [1])", "value.itemsize", numbers=_PARITY),
    Value("array.array subclass", "Sub('i', [v, 1])", "value[0]", "value[0] = v", setup=_sub("array.array")),
    Value("array.array subclass with an attribute", "with_unit(Sub('i', [1]), v)", "value.unit", "value.unit = v",
          setup=_sub("array.array")),
    Value("bytearray", "bytearray([v, 1])", "value[0]", "value[0] = v"),
    Value("memoryview", "memoryview(bytes([v, 1]))", "value[0]"),
    Value("memoryview of a bytearray", "memoryview(bytearray([1, v, 1, 1]))[1::2]", "value[0]", "value[0] = v"),
    Value("memoryview, format", "memoryview(bytes([200] * 4)).cast('Bb'[v % 2])", "value[0]", numbers=_PARITY),
    Value("mmap", "done(m := mmap.mmap(-1, 8), m.write_byte(v), m.seek(0))", "value[0]", "value[0] = v", is_seen=False),
    Value("multiprocessing.Value", "multiprocessing.Value('i', v)", "value.value", "value.value = v", is_seen=False),
    # containers
    Value("list", "[v, 1]", "value[0]", "value[0] = v"),
    Value("list in a list", "[[1], [[v]]]", "value[1][0][0]", "value[1][0][0] = v"),
    Value("dict", "{'a': v}", "value['a']", "value['a'] = v"),
    Value("dict, order", "dict.fromkeys(sorted('ab', reverse=v % 2))", "'ab'.index(next(iter(value)))",
          "for key in sorted('ab', reverse=v % 2):\n    value[key] = value.pop(key)", numbers=_PARITY),
    Value("set", "{f'{v}', 'x'}", "min(value)", "value.discard(min(value))\nvalue.add(f'{v}')"),
    Value("frozenset of tuples", "frozenset({(1, v), (2, 'x')})", "sorted(value)[0][1]"),
    Value("deque", "collections.deque([v, 1])", "value[0]", "value[0] = v"),
    Value("deque, longest", "collections.deque([1, 2], maxlen=v)", "value.maxlen"),
    Value("OrderedDict", "collections.OrderedDict(a=v)", "value['a']", "value['a'] = v"),
    Value("OrderedDict, order", "collections.OrderedDict.fromkeys(sorted('ab', reverse=v % 2))",
          "'ab'.index(next(iter(value)))", "value.move_to_end('ab'[1 - v % 2])", numbers=_PARITY),
    Value("defaultdict", "collections.defaultdict(list, a=v)", "value['a']", "value['a'] = v"),
    Value("defaultdict, factory", "collections.defaultdict(functools.partial(int, v))", "value.default_factory()",
          "value.default_factory = functools.partial(int, v)"),
    Value("Counter", "collections.Counter(a=v)", "value['a']", "value['a'] = v"),
    Value("ChainMap", "collections.ChainMap({}, {'a': v})", "value['a']", "value.maps[1]['a'] = v"),
    Value("UserDict", "collections.UserDict(a=v)", "value['a']", "value['a'] = v"),
    Value("UserList", "collections.UserList([v])", "value[0]", "value[0] = v"),
    Value("UserString", "collections.UserString(f'{v}')", "value.data", "value.data = f'{v}'"),
    Value("MappingProxyType", "types.MappingProxyType({'a': v})", "value['a']", "gc.get_referents(value)[0]['a'] = v"),
    Value("dict keys", "{v: 1}.keys()", "next(iter(value))",
          "d = gc.get_referents(value)[0]\nd.clear()\nd[v] = 1", is_seen=False),
    Value("dict values", "{'a': v}.values()", "next(iter(value))", "gc.get_referents(value)[0]['a'] = v",
          is_seen=False),
    Value("dict items", "{'a': v}.items()", "next(iter(value))[1]", "gc.get_referents(value)[0]['a'] = v",
          is_seen=False),
    Value("SimpleNamespace", "types.SimpleNamespace(a=v)", "value.a", "value.a = v"),
    Value("queue.Queue", "done(q := queue.Queue(), q.put(v))", "value.queue[0]", "value.queue[0] = v", is_seen=False),
    Value("SimpleQueue", "fill(queue.SimpleQueue(), v)", "value.qsize()", "fill(value, v)",
          is_seen=False),
    Value("configparser", "done(c := configparser.ConfigParser(), c.read_dict({'a': {'b': v}}))", "value['a']['b']",
          "value['a']['b'] = str(v)", has_code=True),
    Value("slice", "slice(v)", "value.stop"),
    Value("slice of a list", "slice([v])", "value.stop[0]", "value.stop[0] = v"),
    Value("range", "range(v)", "value.stop"),
    Value("tuple of a list", "(1, [v])", "value[1][0]", "value[1][0] = v"),
    Value("named tuple", "Pair(1, [v])", "value.b[0]", "value.b[0] = v"),
    Value("dict of 150,000", "large_dict(v)", "value[77_777]", "value[77_777] = v", most_calls=_MOST_CALLS),
    Value("list of 12,000 objects", "many_objects(v)", "value[7777].a", "value[7777].a = v", most_calls=_MOST_CALLS),
    Value("list that contains itself", "done(a := [v], a.append(a))", "value[1][1][0]", "value[0] = v"),
    Value("dict that contains itself", "done(a := {'v': v}, a.update(a=a))", "value['a']['v']", "value['v'] = v"),
    Value("object that contains itself", "done(a := types.SimpleNamespace(v=v), setattr(a, 'a', a))", "value.a.v",
          "value.v = v"),
    # iterators: what has a value that can be looked at, and what is consumed
    Value("itertools.count", "itertools.count(v)", "repr(value)[6:-1]"),
    Value("itertools.count subclass", "Sub(v)", "repr(value)[4:-1]", setup=_sub("itertools.count")),
    Value("range iterator", "iter(range(v))", "operator.length_hint(value)", is_seen=False),
    Value("list iterator, length", "iter([1] * v)", "operator.length_hint(value)", is_seen=False),
    Value("itertools.repeat", "itertools.repeat(1, v)", "operator.length_hint(value)", is_seen=False),
    *(Value(f"{name}, consumed", make, "next(value)", is_seen=False, is_consumed=True) for name, make in {
        "itertools.count": "itertools.count(v)", "itertools.cycle": "itertools.cycle([v, 1])",
        "itertools.islice": "itertools.islice(itertools.count(v), 99)",
        "itertools.chain": "itertools.chain([v], itertools.count(99))",
        "itertools.accumulate": "itertools.accumulate(itertools.repeat(v))",
        "itertools.tee": "itertools.tee(itertools.count(v))[0]",
        "list iterator": "iter(list(range(v, 99)))", "range iterator": "iter(range(v, 99))",
        "dict iterator": "iter(dict.fromkeys(range(v, 99)))", "generator": "(i for i in itertools.count(v))",
        "map": "map(abs, itertools.count(v))", "filter": "filter(None, itertools.count(v))",
        "zip": "map(sum, zip(itertools.count(v)))", "enumerate": "map(sum, enumerate(itertools.repeat(v)))",
        "reversed": "reversed(range(v * 100))",
    }.items()),
    Value("csv lines, consumed", "iter(io.StringIO('\\n'.join(map(str, range(v, 99)))))", "next(value)", is_seen=False,
          is_consumed=True),
    Value("list, consumed", "list(range(v * 100))", "value.pop()", is_consumed=True),
    Value("deque, consumed", "collections.deque(range(v, 99))", "value.popleft()", is_consumed=True),
    Value("BytesIO, consumed", "io.BytesIO(bytes(range(v, 99)))", "value.read(1)[0]", is_consumed=True),
    Value("object that counts, consumed", "Steps(v)", "value.advance()", is_consumed=True),
    # references, context
    Value("weak reference", "weakref.ref(kept(Plain(v)))", "value().a", "value().a = v"),
    Value("weak proxy", "weakref.proxy(kept(Plain(v)))", "value.a", "value.a = v", is_seen=False),
    Value("WeakValueDictionary", "weakref.WeakValueDictionary(a=kept(Plain(v)))", "value['a'].a", "value['a'].a = v",
          is_seen=False),
    Value("threading.local", "done(t := threading.local(), setattr(t, 'a', v))", "value.a", "value.a = v",
          is_seen=False),
    Value("threading.local subclass", "Own(v)", "value.a", "value.a = v", is_seen=False),
    Value("context variable, default", "contextvars.ContextVar('c', default=v)", "value.get()"),
    Value("context variable, object as default", "contextvars.ContextVar('c', default=Plain(v))", "value.get().a",
          "value.get().a = v"),
    Value("weakref.finalize, argument", "weakref.finalize(kept(Plain(1)), str, v)", "value.peek()[2][0]"),
    Value("weakref.finalize, object as argument", "weakref.finalize(kept(Plain(1)), str, Plain(v))",
          "value.peek()[2][0].a", "value.peek()[2][0].a = v"),
    Value("context variable", "done(c := contextvars.ContextVar('c'), c.set(v))", "value.get()", "value.set(v)"),
    Value("context", "done(c := contextvars.Context(), c.run(VARIABLE.set, v))", "value[VARIABLE]",
          "value.run(VARIABLE.set, v)",
          is_seen=False),
    Value("event", "done(e := threading.Event(), e.set() if v % 2 else None)", "value.is_set()",
          "value.set() if v % 2 else value.clear()", numbers=_PARITY),
    Value("thread with an attribute", "Worker(v)", "value.a", "value.a = v", is_seen=False),
    Value("log handler with an attribute", "Lines(v)", "value.a", "value.a = v", is_seen=False),
    Value("future", "done(f := concurrent.futures.Future(), f.set_result(v))", "value.result()", is_seen=False),
    # functions and types
    Value("bound dict.get", "{'a': v}.get", "value('a')", "value.__self__['a'] = v"),
    Value("bound list.count", "([0] * v).count", "value(0)", "value.__self__[:] = [0] * v"),
    Value("bound str.join", "f'{v}'.join", "value(['0', '0'])"),
    Value("bound method-wrapper", "([0] * v).__len__", "value()", "value.__self__[:] = [0] * v", is_seen=False),
    Value("bound method", "Plain(v).get", "value(0)", "value.__self__.a = v", has_code=True),
    Value("function with a default", "adder(v)", "value()", "value.__defaults__ = (v,)", has_code=True),
    Value("function with an attribute", "with_unit(adder(1), v)", "value.unit", "value.unit = v", has_code=True),
    Value("function that closes over a list", "closing([v])", "value()", "value.__closure__[0].cell_contents[0] = v",
          has_code=True),
    Value("cell", "types.CellType(v)", "value.cell_contents", "value.cell_contents = v", is_seen=False),
    Value("code object", "compile(f'{v}', 'file', 'eval')", "eval(value)", is_seen=False),
    Value("class with an attribute", "type('Made', (), {'a': v})", "value.a", "value.a = v"),
    Value("module with an attribute", "done(m := types.ModuleType('made'), setattr(m, 'a', v))", "value.a",
          "value.a = v", is_seen=False),
    Value("generic alias", "typing.Literal[v]", "value.__args__[0]", is_seen=False),
    Value("staticmethod", "staticmethod(functools.partial(operator.add, v))", "value.__func__(0)"),
    # documents, data bases, hashes
    Value("XML element", "ET.fromstring(f\"<a x='{v}'/>\")", "value.get('x')", "value.set('x', str(v))"),
    Value("XML element, text of a child", "ET.fromstring(f'<a><b>{v}</b></a>')", "value[0].text",
          "value[0].text = str(v)"),
    Value("XML document", "xml.dom.minidom.parseString(f\"<a x='{v}'/>\")", "value.documentElement.getAttribute('x')",
          "value.documentElement.setAttribute('x', str(v))"),
    Value("sqlite3 connection", "filled(v)", "value.execute('select a from t').fetchone()[0]",
          "value.execute('update t set a = ?', (v,))",
          is_seen=False),
    Value("hash object", "hashlib.md5(bytes([v]))", "value.digest()[0] + 256 * value.digest()[1]", is_seen=False),
    Value("random.Random", "random.Random(v)", "value.getstate()[1][1]", "value.seed(v)"),
    Value("random.Random subclass with an attribute", "Dice(v)", "value.sides", "value.sides = v"),
)  # fmt: skip

_BASES = {
    "dict": "{}", "list": "[]", "str": "'a'", "int": "1", "float": "1.5", "tuple": "(1,)", "set": "{1}",
    "frozenset": "{1}", "bytes": "b'a'", "bytearray": "b'a'", "collections.deque": "[1]",
          "collections.OrderedDict": "{}",
    "collections.Counter": "'a'", "collections.UserDict": "{}", "ValueError": "'a'",
}  # fmt: skip

_OWN = _group(
    _CLASSES,
    *(
        Value(f"subclass of {base} with an attribute", f"with_unit(Sub({given}), v)", "value.unit", "value.unit = v",
              setup=_sub(base))
        for base, given in _BASES.items()
    ),
    *(
        Value(f"subclass of {base}", make, read, change, setup=_sub(base))
        for base, make, read, change in (
            ("dict", "Sub(a=v)", "value['a']", "value['a'] = v"),
            ("list", "Sub([v, 1])", "value[0]", "value[0] = v"),
            ("tuple", "Sub((v, [1]))", "value[0]", ""),
            ("set", "Sub({v})", "next(iter(value))", "value.clear()\nvalue.add(v)"),
            ("str", "Sub(v)", "value", ""), ("int", "Sub(v)", "value", ""), ("float", "Sub(v)", "value", ""),
            ("bytes", "Sub(b'%d' % v)", "value", ""),
            ("bytearray", "Sub([v, 1])", "value[0]", "value[0] = v"),
            ("collections.deque", "Sub([v, 1])", "value[0]", "value[0] = v"),
        )
    ),
    Value("object", "Plain(v)", "value.a", "value.a = v"),
    Value("object in a list of objects", "[Plain([1]), Plain([v])]", "value[1].a[0]", "value[1].a[0] = v"),
    Value("object with slots", "Slotted(v)", "value.a", "value.a = v"),
    Value("object with private slots", "Hidden(v)", "value.get()", "value.put(v)"),
    Value("object with slots in a base", "Below(v)", "value.a", "value.a = v"),
    Value("object with a property", "Guarded(v)", "value.a", "value.a = v"),
    Value("object with a cached property", "Lazy(v)", "value.a", is_lazy=True),
    Value("object with __getattr__", "Proxy({'a': v})", "value.a", "value.given['a'] = v"),
    Value("object that equals everything", "Alike(v)", "value.a", "value.a = v"),
    Value("object whose __repr__ raises", "Silent(v)", "value.a", "value.a = v"),
    Value("object with __getstate__", "Locked(v)", "value.a", "value.a = v"),
    Value("object with __reduce__", "Reduced(v)", "value.a", "value.a = v"),
    Value("deque subclass with __reduce__", "Window(v)", "value.unit", "value.unit = v"),
    Value("object whose __reduce__ raises", "Stubborn(v)", "value.a", "value.a = v"),
    Value("mapping of one's own", "Table(v)", "value['a']", "value.given = v"),
    Value("callable object", "Call(v)", "value()", "value.a = v"),
    Value("object with a method of its own", "done(p := Plain(1), setattr(p, 'f', functools.partial(int, v)))",
          "value.f()", "value.f = functools.partial(int, v)"),
    Value("class attribute of a class", "local_class(v)()", "value.a", "type(value).a = v"),
    Value("dataclass", "Record(1, [v])", "value.b[0]", "value.b[0] = v"),
    Value("dataclass, frozen", "Frozen(v)", "value.a", "object.__setattr__(value, 'a', v)"),
    Value("dataclass with slots", "Slim(v)", "value.a", "value.a = v"),
    Value("dataclass with an attribute that is no field", "More(1, v)", "value.b", "value.b = v"),
    Value("dataclass that is a list", "done(a := Listed(), a.append(v))", "value[0]", "value[0] = v"),
    Value("NamedTuple", "Couple(1, v)", "value.b"),
    Value("NamedTuple subclass with an attribute", "with_unit(Noted(1, 2), v)", "value.unit", "value.unit = v"),
    Value("enum member", "Color(v)", "value.value"),
    Value("enum with a list as its value", "enum.Enum('Color', {'RED': [v]}).RED", "value.value[0]",
          "value.value[0] = v"),
    Value("enum with an object as its value", "enum.Enum('Color', {'RED': Plain(v)}).RED", "value.value.a",
          "value.value.a = v"),
    Value("enum member with an attribute", "with_unit(enum.Enum('Color', {'RED': 1}).RED, v)", "value.unit",
          "value.unit = v"),
    Value("flags", "Bits(v)", "value.value"),
    Value("IntEnum with an attribute", "with_unit(enum.IntEnum('Step', {'ONE': 1}).ONE, v)", "value.unit",
          "value.unit = v"),
    Value("40 objects in each other", "nested_objects(v)", "innermost_object(value).a",
          "innermost_object(value).a = v"),
    Value("40 lists in each other", "nested_lists(v)", "innermost_list(value)[1]", "innermost_list(value)[1] = v"),
)  # fmt: skip

_ALL = tuple(
    value
    for group in (_STANDARD, _OWN, _NUMPY, _TORCH, _PANDAS, _PILLOW, _SCIPY, _ARROW, _POLARS, _XARRAY, _SKLEARN,
                  _TOKENIZERS)
    for value in group
)  # fmt: skip

#: Packages that are not installed, whose kinds are left out.
MISSING = tuple(
    package for package in dict.fromkeys(value.package for value in _ALL)
    if package and importlib.util.find_spec(package) is None
)  # fmt: skip

#: All kinds of values that can be made here, by name.
VALUES = {value.name: value for value in _ALL if value.package not in MISSING}
