"""README, changelog, docs and public docstrings agree with the code: figures, lists, names and links.

What a page says with a figure is in one of two tables: ``FROM_THE_CODE`` builds the words from the constant, so that
they are not found any more once it changes; ``NOT_FROM_THE_CODE`` has what no constant decides (versions, examples,
what was measured). A figure that is in neither fails.
"""

from __future__ import annotations

import ast
import dataclasses
import grp
import inspect
import os
import re
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zstandard
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL

import torchcache
from benchmarks import __main__ as benchmarks
from benchmarks import hits, state_check
from benchmarks.wrong_hits import compare as wrong_hits
from stress import pairs, state_programs, state_values
from stress.suites import SUITES
from torchcache import layout as rows
from torchcache.call import flights, repeats
from torchcache.checks import changed_inputs, distances, few_rows, moved_state, side_effects, verdicts
from torchcache.doors import datasets as dataset
from torchcache.inputs import sample_keys as own_keys
from torchcache.keys import (
    digest,
    encoding,
    in_turn,
    key_parts,
    registered,
    state,
    tensor_kinds,
    time_limit,
    watched,
    weights,
)
from torchcache.keys.fast import host_memory
from torchcache.kinds import Drop, Fault
from torchcache.options import CacheOptions
from torchcache.report.reasons import Reason
from torchcache.results import nodes, tree
from torchcache.results.array_nodes import ArrayNode
from torchcache.results.container_nodes import (
    CounterNode,
    DefaultDictNode,
    DictNode,
    KeyNode,
    ListNode,
    ObjectArrayNode,
    OrderedDictNode,
    TupleNode,
)
from torchcache.results.object_nodes import DataclassNode, NamedTupleNode, RegisteredNode, TensorNode
from torchcache.results.plain_nodes import ComplexNode, DeviceNode, DtypeNode, EnumNode, IntNode, SizeNode
from torchcache.storage import (
    access,
    backlogs,
    budget,
    contract,
    directory,
    environment,
    files,
    key_parts_file,
    lmdb,
    payloads,
    record,
    table,
    temporary,
    writer,
)
from torchcache.storage.directory import TRASH_PREFIX

ROOT = Path(__file__).parents[2]
FIGURE = re.compile(
    r"(?<![\w.\"'])-?\d(?:[\d,.]*\d)?(?:e-?\d+)?|\b(?:three|four|five|six|seven|eight|nine|ten|twelve|sixteen|twenty"
    r"|hundred|thousand|million|minute|hour|tenth|sixteenth|twentieth|quarter)\b"
)

WORDS = {3: "three", 4: "four", 5: "five", 9: "nine", 1000: "thousand", 3600.0: "an hour"}
ORDINALS = {8: "eighth"}
PARTS = {10: "tenth", 16: "sixteenth", 20: "twentieth"}


def word(number: float) -> str:
    """Return a number as the pages write it; one that has no word yet is found on no page."""
    return WORDS.get(number, f"{number:g}")


def part(share: float) -> str:
    """Return one divided by a number, as the pages write it."""
    return PARTS.get(round(1 / share), f"{share:g}")


def mode(bits: int) -> str:
    """Return the modes of a file or directory as the pages write them."""
    return f"{bits:04o}"


def mib(n_bytes: int) -> str:
    """Return bytes in the unit of which they are a whole number."""
    for name, unit in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes % unit == 0:
            return f"{n_bytes // unit} {name}"
    return f"{n_bytes} bytes"


def gb(n_bytes: float) -> str:
    """Return bytes in the decimal unit of which they are a whole number."""
    for name, unit in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes % unit == 0:
            return f"{n_bytes / unit:g} {name}"
    return f"{n_bytes} bytes"


def read(path: Path) -> str:
    """Return a page as one line, without the blocks that are run, or written by a program."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return " ".join(text.split())


def docstrings() -> str:
    """Return what the public objects say of themselves, as one line."""
    # The reference has what the options say of themselves.
    public = [getattr(torchcache, name) for name in torchcache.__all__ if name != "CacheOptions"]
    members = [member for item in public if inspect.isclass(item) for name, member in vars(item).items()
               if not name.startswith("_")]  # fmt: skip
    ours = [item for item in [*public, *members] if str(getattr(item, "__module__", "torchcache")).startswith("torchc")]
    return " ".join(" ".join((inspect.getdoc(item) or "").split()) for item in ours)


PAGES = {path.name: read(path) for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"))}
PAGES["docstrings"] = docstrings()

PRIVATE, GROUP = access.PRIVATE, access.GROUP
LEFT_FREE = (
    f"{gb(budget._MIN_FREE_BYTES)}, or {100 // budget._MIN_FREE_SHARE} % of a file system smaller than "
    f"{gb(budget._MIN_FREE_BYTES * budget._MIN_FREE_SHARE)}"
)
HIGHEST_LEVEL = zstandard.MAX_COMPRESSION_LEVEL
LOWEST_LEVEL = -100
STALE = word(budget.STALE_SECONDS)
DEFAULT, WORKER = f"{backlogs.DEFAULT_FLUSH_SECONDS:g}", f"{backlogs.WORKER_FLUSH_SECONDS:g}"
VERDICTS = contract.Verdict
VIT = state_check.VisionTransformer(state_check.NARROW)
SEGMENT, OFFSET, LENGTH = (struct.calcsize(f">{kind}") for kind in table.LOCATION.format.removeprefix(">"))
NAMESPACE = (table.MOST_NAMESPACES - 1).bit_length() // 8
PYTHON = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]

#: The versions of libraries that tests/clients runs with, short of their last number.
CLIENTS = {
    library: version.rpartition(".")[0]
    for library, _, version in (
        line.partition("==") for line in (ROOT / "requirements-clients.txt").read_text(encoding="utf-8").splitlines()
    )
}

FROM_THE_CODE = {
    "README.md": [
        f"Python {PYTHON} or newer",
        f"torchcache {hits.RIVAL}, and",
        f"answers with {word(len(wrong_hits.CACHES) - 1)} other caches",
    ],
    "usage.md": [f"results that no program touched for {STALE} make room"],
    "howto.md": [
        f"| sentence-transformers | `torchcache()(model.encode)` | {CLIENTS['sentence-transformers']} |",
        f"made with `num_classes=0` | {CLIENTS['timm']} |",
        f"`model.encode_image` or `model.encode_text` | {CLIENTS['open_clip_torch']} |",
        f"or the model | {CLIENTS['diffusers']} |",
        f"that `get_peft_model` returned | {CLIENTS['peft']} |",
        f"or a `LightningModule` | {CLIENTS['lightning']} |",
        f"or what `setup_module` returns | {CLIENTS['lightning']} |",
        f"or what `prepare` returns | {CLIENTS['accelerate']} |",
        f"removes what no program touched for {STALE}",
        f"what no program in another mode used for {STALE}",
    ],
    "inputs.md": [
        f"key in its first {own_keys._WHOLE_BATCHES} batches that find rows",
        f"then for one key in {PARTS[own_keys._WATCHED_SHARE].removesuffix('th')} (always the same ones)",
    ],
    "CHANGELOG.md": [f"takes more than {time_limit.MOST_SECONDS:g} seconds to look at"],
    "keys.md": [
        f"where the first one had up to {few_rows._LONE_ROWS} rows",
        f"rows were dropped {word(moved_state._DROPS_UNTIL_SAID)} times in a row",
        f"When more than {repeats._SAMPLES_UNTIL_SAID} samples were computed",
        f"after {word(verdicts._VACUOUS_CHECKS)} such batches the namespace is cached",
        f"If walking the code takes more than {time_limit.MOST_SECONDS:g} seconds of computing",
        f"It is XXH3 with {digest.DIGEST_BYTES * 8} bits",
        (
            f"the first and last {host_memory.PROBE_BYTES} bytes | in turn, at every "
            f"{ORDINALS[weights._CALLS_PER_TURN]} call, {weights._BYTES_IN_TURN // 1024} KiB per call and "
            f"1/{weights._HASHED_PER_BYTE_IN_TURN} of the bytes"
        ),
        f"the first and last {weights._ELEMENTS_AT_ENDS} elements | every {word(state._AUDIT_CALLS)} calls |",
        f"| nothing | every {word(state._AUDIT_CALLS)} calls |",
        f"its first or last {host_memory.PROBE_BYTES} bytes differ",
        f"{weights._BYTES_IN_TURN // 1024} KiB x (*n* - 20) are the bytes of all frozen tensors and",
        f"{weights._BYTES_PER_LEAF // 1024} KiB for each",
        f"Every {word(state._AUDIT_CALLS)} calls, for at most {state._AUDIT_SHARE * 100:g} % of",
        f"All of it is looked at again every {word(state._AUDIT_CALLS)} calls",
        f"| containers and attributes | {in_turn.MOST_ENTRIES:,} entries",
        (
            f"| {in_turn.MOST_ENTRIES:,} entries per call in turn: a list of 150,000 within "
            f"{-(-150_000 // in_turn.MOST_ENTRIES)} calls |"
        ),
        f"| arrays | {mib(in_turn.MOST_BYTES)} (",
        f"and {in_turn._SAMPLED_ELEMENTS:,} elements of each larger one | {mib(in_turn.MOST_BYTES)} per call in turn |",
        (
            f"beyond {registered._SMALL_VOCABULARY:,} tokens | the size and {registered._TOKENS} tokens | "
            f"every {watched.CALLS_BETWEEN_LOOKS} calls |"
        ),
        f"in turn counts as {word(in_turn._ENTRIES_PER_CONTAINER)} entries more",
        f"Objects that lie more than {encoding.DEEPEST} deep have no visible value",
        f"| float32 and wider, on the CPU | {distances._TOLERANCE:g} |",
        f"| float32 and wider, on an accelerator, where it may mean TF32 | {distances._ACCELERATOR_TOLERANCE:g} |",
        f"| float16 | {distances._TOLERANCES[torch.float16]:g} |",
        f'| bfloat16, or a float32 matmul precision below "highest" | {distances._TOLERANCES[torch.bfloat16]:g} |',
        f'| bfloat16, or a float32 matmul precision below "highest" | {distances._REDUCED_PRECISION_TOLERANCE:g} |',
        f"| float8 | {distances._FLOAT8_TOLERANCE:g} |",
        f"Integers may differ in a {part(distances._FLIPPED_SHARE)} of their places",
        f"at most {changed_inputs._MAX_WATCHED:,} tensors, arrays and containers",
        f"for the {len([*VIT.parameters()])} parameters and {len([*VIT.modules()])} modules of a ViT-B",
        f"some {round(len(state_values._ALL), -2)} kinds",
        f"in each of {word(len(state_programs.PLACES))} places",
        f"The first two make {pairs.CASES:,} pairs of calls each",
        f"- torchcache {hits.RIVAL}: the decorator",
        f"version {wrong_hits.REQUIREMENTS['torch-module-cache'].partition('==')[2]} never reads what it wrote",
    ],
    "reference.md": [
        r"'encoder-1'",
        f"{word(directory._MOST_WAITS)} times as long if others get it",
        f"others got it in turn for {word(directory._MOST_WAITS)} times as long",
        f"at its state, takes more than {time_limit.MOST_SECONDS:g} seconds.",
        (
            f"is more than {rows.MAX_TENSORS} tensors, or plain values that are more than {nodes.MAX_NODES:,}, more "
            f"than {tree.MAX_STRUCTURE_BYTES // 1024} KiB or more than {nodes.MAX_DEPTH} deep"
        ),
        f"stay free for others, such as checkpoints: writing stops before. `None`: {LEFT_FREE}.",
        f"| {LOWEST_LEVEL} (fastest) to {HIGHEST_LEVEL} (smallest), not 0. |",
        f"what nobody touched for {STALE}",
        f"After {word(side_effects._EFFECTS)} such calls in a row",
        f"(modes {mode(GROUP.directory_mode)} and {mode(GROUP.file_mode)}, whatever the umask)",
        f"`None`: {gb(writer.DEFAULT_QUEUE_BYTES)}, and {gb(writer.WORKER_QUEUE_BYTES)} in a worker process.",
        f"`None`: {DEFAULT}, and {WORKER} in a worker process.",
    ],
    "sharing.md": [
        f"If that takes more than {flights.JOIN_SECONDS:g} seconds",
        f"| nothing, within {WORKER} of the {MP_STATUS_CHECK_INTERVAL:g} seconds that torch gives a worker |",
        f"modes {mode(PRIVATE.directory_mode)} and {mode(PRIVATE.file_mode)}",
        f"the modes {mode(GROUP.directory_mode)} and {mode(GROUP.file_mode)}, whatever",
        f"(`chmod {mode(GROUP.directory_mode)}`)",
        f"({gb(budget._MIN_FREE_BYTES)}, or {100 // budget._MIN_FREE_SHARE} % of a small one)",
        f"{mib(files._MOST_READERS * files._READER_BYTES)} of each environment are its table of readers",
    ],
    "storage.md": [
        f"one leaf more behind its own, uint8 of shape `[{digest.DIGEST_BYTES}]`",
        f"modes are {mode(GROUP.directory_mode)} and {mode(GROUP.file_mode)}",
        f"{word(lmdb._MOST_READS)} times at most, and ends as a miss",
        f"after {word(temporary._GRACE_SECONDS)} if only workers did",
        f"namespace ({digest.DIGEST_BYTES} bytes)",
        f"namespace number ({NAMESPACE}) + first {table.INDEX_DIGEST_BYTES} bytes of the digest |",
        f"| segment ({SEGMENT}), offset ({OFFSET}), length ({LENGTH}; 0: all that follows) |",
        f"namespace number ({NAMESPACE}) + segment number ({SEGMENT})",
        "in nanoseconds (8)",
        f"{VERDICTS.UNKNOWN:d} not known, {VERDICTS.INDEPENDENT:d} independent, {VERDICTS.DEPENDENT:d} dependent",
        f"and up to {word(key_parts_file._MOST_STATES)} states",
        f"{VERDICTS.UNDECIDED:d} compared and undecided (rows of zeros), {VERDICTS.REPEATED:d} the same for copies",
        f"`[{ArrayNode.tag}, dtype, writable]` | a leaf that is a NumPy array",
        f"`[{CounterNode.tag}, key, value, ...]`, `[{DefaultDictNode.tag}, factory, key, value, ...]` | `Counter`",
        f"`[{ObjectArrayNode.tag}, [size...], item...]` | NumPy array of objects |",
        f"`[{TensorNode.tag}, class, [name...], [], value...]` | tensor of a derived class",
        f"`[{KeyNode.tag}, entry]` | key of a dict that is a path",
        "The last five are in the results of whole calls",
        f"`{key_parts_file._MAGIC.decode().strip()}` and a checksum",
        f"Digests have {key_parts._DIGEST_BYTES} bytes",
        f"of a namespace that nobody used for {STALE}",
        f"segments of up to {mib(table.SEGMENT_BYTES + 16)} in the order",
        f"nobody used for {STALE}, oldest first",
        f"| 1 | 1 | format version: {rows.FORMAT_VERSION} |",
        f"| {record._CODEC} | 1 | codec: {payloads.RAW} raw, {payloads.ZSTD} one zstd frame |",
        f"| {record._SIZE.start} | {record._SIZE.stop - record._SIZE.start} | size of the payload as stored, uint32 |",
        f"| {record._LAYOUT_FROM} | ... | structure",
        f"| {record._CHECKED_FROM} | 2 + {digest.DIGEST_BYTES} | digest of the sample |",
        f"| {record._CHECKSUM.start - 2} | 2 + {record._CHECKSUM_BYTES} | checksum: XXH3-64, seeded",
        f"| 0 | 1 | msgpack array of {record._PREFIX[0] & 15}: `0x{record._PREFIX[0]:x}` |",
        f"({rows.CONTIGUOUS} contiguous, {rows.CHANNELS_LAST} channels last, {rows.CHANNELS_LAST_3D} channels last in",
        f"{rows.MAX_LEAVES} leaves of {record.MAX_DIMENSIONS} dimensions and {mib(record.MAX_VALUE_BYTES)}",
        f"and a header {mib(record.MAX_HEADER_BYTES)}.",
        f"saves at least a {part(1 - payloads._WORTHWHILE)}",
        f"of at most {mib(tree.MAX_STRUCTURE_BYTES)}",
        f"`[{TupleNode.tag}, item...]`, `[{ListNode.tag}, item...]` | tuple, list |",
        f"`[{DictNode.tag}, key, value, ...]`, `[{OrderedDictNode.tag}, key, value, ...]` | dict, `Ordered",
        f"`[{NamedTupleNode.tag}, class, [field...], item...]` | named tuple |",
        f"`[{DataclassNode.tag}, class, [field...], [name...], item...]` | dataclass",
        f"`[{RegisteredNode.tag}, class, [field...] or nil, context, item...]` | class registered",
        f"`[{EnumNode.tag}, class, member, value or nil]` | enum member |",
        f"`[{IntNode.tag}, bin]` | int beyond 64 bits",
        (
            f"`[{ComplexNode.tag}, real, imaginary]`, `[{DtypeNode.tag}, name]`, `[{DeviceNode.tag}, name]`, "
            f"`[{SizeNode.tag}, int...]` | complex, `torch.dtype`, `torch.device`, `torch.Size` |"
        ),
        (
            f"a shape of at most {record.MAX_DIMENSIONS} dimensions that fits the memory format, at most "
            f"{mib(record.MAX_VALUE_BYTES)}"
        ),
        f"a reserve: a {part(1 / budget._RESERVE_SHARE)}, at least {mib(budget._LEAST_RESERVE_BYTES)} or a quarter",
        f"{', '.join(rows.DTYPE_SIZES)}.",
    ],
    "docstrings": [
        f"then for one key in {PARTS[own_keys._WATCHED_SHARE].removesuffix('th')} and for those that a batch",
    ],
}

#: Figures that no constant decides, as regular expressions: for all pages, and for one.
NOT_FROM_THE_CODE = {
    "": [
        r"dimensions? [01]\b",
        r"`batch_dim=1`",
        r"`(max_\w+=0|TORCHCACHE_DISABLED=1|verify_hits=0\.01)`",
        r"\(`?0\.01`? is one in a hundred|`0\.01` is one in a hundred",
        r"1 to 128 ASCII letters",  # test_options.py
        r"torchcache 0\.6|\.beside-0\.6",
    ],
    "README.md": [
        r"less than a minute",
        r"all 32 rows on disk",  # test_the_first_example_does_what_its_comments_say
        r'ARGS="--sentences 200 --epochs 2"',  # test_commands.py
    ],
    "CHANGELOG.md": [
        r"`batch_size=32`",
        r"en/1\.1\.0",
        r"torch 2\.9\b",
        r"\b0\.6\b",
        r'ARGS="--sentences 200 --epochs 2"',
    ],
    "howto.md": [
        r'version="minilm-2024-03"',
        # What was there on that day.
        r"for texts \| 5\.24 \||in its class \| 5\.24 \||that holds it \| 5\.2, 3\.1 \||transforms \| 1\.6 \|",
        r"at most three compilations|three more in inference mode",  # test_compile.py
    ],
    "usage.md": [r"The first three|in three places"],
    "inputs.md": [r"`stride=\(2, 2\)`", r"within 1e-5"],
    "keys.md": [
        r"one extra call of 3 to 8 rows",
        r"\(torch 2\.9\)|all bytes: \d+ GB/s",
        r"a ViT-B \(346 MB\) is gone through in [\d,]+ calls, or in \d+ if each of them hashes 64 images of 224 x 224",
        r"costs at most 3 % of a hit|milliseconds at each call: \d+ for a ViT-B",
        r"up to Python 3\.12",  # test_dict_versions.py
        r"\(0\.\d+ ms\)|10 GB/s for arrays, 1 us per string|\(13 GB/s here; a list of 1\.3 million[^)]*4 seconds\)",
        r"\d+ to \d+ microseconds for the",  # python -m benchmarks state
        r"takes \d+ \(2 cores, Python 3\.11\)",
        r"a list of 150,000",
        r"probability 1\b",
        r"three things agree|all three times|a hundred thousand files|one in a hundred hits",
        r"x\.mean\(0\)",
    ],
    "reference.md": [
        r"\(wav2vec 2\.0\)",
        r"So `1`, `True`, `1\.0`",
        r"`0\.0` and `-0\.0`",
        r"`f\(x, 3\)` and `f\(x, scale=3\)`",
        r"\| `[\d.e]+` \|",  # test_the_table_of_options_has_the_default_of_each
        r"cache and process\. `0`: nothing",
        r"a number \(`5e9`\)",
        r"\| `TORCHCACHE_DISABLED` \| `1` turns",
    ],
    "sharing.md": [
        r"\b9p\b",
        r"32 times",  # test_sharing_page.py
        r"computes 128 rows",
        r"## What it costs .*? \| Memory \|",  # measured by hand
    ],
    "storage.md": [
        r"`n \+ [23]`",
        r"its 4 kB pages",
        r"in three dimensions",
        r"about 30 bytes at two thirds fill",
        r"`0o?\d+`",
        r"first 8 bytes of the namespace",
        r"beyond 64 bits",
        r"\b[1-4]\. (The|A) ",
    ],
    "docstrings": [r"TORCHCACHE_DISABLED=1", r'\(1 and "1" differ\)'],
}


def covered(name: str) -> set[int]:
    """Return the positions of a page that one of the two tables has."""
    text = PAGES[name]
    known = [re.escape(words) for words in FROM_THE_CODE.get(name, ())]
    known += NOT_FROM_THE_CODE[""] + NOT_FROM_THE_CODE.get(name, [])
    return {i for words in known for found in re.finditer(words, text) for i in range(*found.span())}


@pytest.mark.parametrize(
    ("name", "words"), [(name, words) for name, several in FROM_THE_CODE.items() for words in several]
)
def test_a_figure_is_that_of_the_code(name, words):
    assert words in PAGES[name]


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_is_in_one_of_the_tables(name):
    text, known = PAGES[name], covered(name)
    missed = [text[max(0, m.start() - 40) : m.end() + 30] for m in FIGURE.finditer(text) if m.start() not in known]
    assert missed == []


# -- tables and lists ---------------------------------------------------------------------------------------------

REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """Return the rows of the first table under a heading of the reference, as lists of cells."""
    _, _, rest = REFERENCE.partition(f"\n{heading}\n")
    lines = [line for line in rest.partition("\n#")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


MODES = {"on", "read", "refresh", "require", "off"}
OPTIONS = {row[0].strip("` "): row for row in table("## Options")}
DEFAULTS = CacheOptions()


def test_the_table_of_options_has_each_option_once_in_the_order_of_the_code():
    assert list(OPTIONS) == [option.name for option in dataclasses.fields(CacheOptions)]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_table_of_options_has_the_default_of_each(name):
    given = CacheOptions.from_arguments({name: ast.literal_eval(OPTIONS[name][1].strip("`"))})
    assert getattr(given, name) == getattr(DEFAULTS, name)


#: Of each option another value than the default, and what it needs beside it.
OTHERS = {
    "max_memory_cache_size": 5e6,
    "max_persistent_cache_size": 5e9,
    "min_free_disk": 0,
    "memory_cache_device": None,
    "cache_dtype": torch.half,
    "zstd_compression": True,
    "zstd_compression_level": 5,
    "version": "2",
    "batch_dim": 1,
    "batch_size": 2,
    "progress": True,
    "unbatched": ("by",),
    "ignore": ("FACTOR",),
    "padded": {"x": "mask"},
    "eviction": "lru",
    "when_grad": "bypass",
    "check_rows": False,
    "verify_hits": 0.5,
    "queue_bytes": 1e6,
    "queue_timeout_seconds": 1,
    "lock_timeout_seconds": 1,
    "flush_timeout_seconds": 1,
    "mode": "read",
    "persistent_module_hash": "mine",
}
#: These decide where a value is, or whether there is a cache at all.
WHERE = {"enabled", "persistent", "persistent_cache_dir", "shared"}
FACTOR = 2.0


def scaled(x, mask, by):
    """Work on a sample."""
    return x * mask[:, :, None] * by * FACTOR


def test_each_option_is_tried_with_another_value():
    assert set(OTHERS) == set(OPTIONS) - WHERE
    assert {OPTIONS[name][2] for name in WHERE} == {"no"}


@pytest.mark.parametrize("name", OTHERS)
def test_another_value_of_an_option_starts_a_new_cache_where_the_table_says_so(name, tmp_path):
    def misses(**options):
        cached = torchcache.torchcache(persistent=True, persistent_cache_dir=tmp_path, **options)(scaled)
        cached(torch.arange(27.0).reshape(3, 3, 3), torch.ones(3, 3), 2)
        cached.cache_instance.flush()
        return cached.cache_instance.stats().misses

    assert misses() == 3
    beside = {"batch_size": 2} if name == "progress" else {}
    assert (misses(**beside, **{name: OTHERS[name]}) > 0) == (OPTIONS[name][2] != "no")


def test_what_the_module_hash_holds_of_the_options_is_named_everywhere():
    shaping = [option.name for option in dataclasses.fields(CacheOptions) if option.metadata["shapes_key"]]
    listed = ", ".join(f"`{name}`" for name in shaping[:-1]) + f" and `{shaping[-1]}`"
    for name in ("keys.md", "usage.md"):
        assert f"options {listed}" in PAGES[name].replace("*options* that shape what is stored:", "options")


def test_the_options_that_datasets_do_not_take_are_named():
    (listed,) = re.findall(r"take the same options, without (.*?), which", PAGES["reference.md"])
    assert set(re.findall(r"`(\w+)`", listed)) == set(dataset._REFUSED)


#: What ``tensor_kinds.py`` says of tensors of other kinds; one remedy is for all of them.
KINDS_OF_TENSORS = {Reason[name].value for name in re.findall(r"return Reason\.(\w+)", inspect.getsource(tensor_kinds))}


def test_the_table_of_reasons_has_each_reason_of_the_code():
    named = [row[0].strip("`") for row in table("## Reasons to go around the cache")]
    assert named == [reason.value for reason in Reason]
    assert KINDS_OF_TENSORS
    assert set(named) >= KINDS_OF_TENSORS


@pytest.mark.parametrize(("heading", "kinds"), [("### Faults", Fault), ("### Rows that were not stored", Drop)])
def test_the_tables_of_what_is_counted_have_each_kind_of_the_code(heading, kinds):
    assert [row[0].strip("`") for row in table(heading)] == [kind.value for kind in kinds]
    assert all(sentence.endswith(".") for row in table(heading) for sentence in row[1:])


def test_the_tables_of_the_reference_are_those_that_the_code_gives():
    again = "the code says something else; run: python docs/write_tables.py"
    write_tables = runpy.run_path(str(ROOT / "docs" / "write_tables.py"))
    assert write_tables["with_tables"](REFERENCE) == REFERENCE, again


def test_the_table_of_modes_has_each_mode_of_the_code():
    assert {row[0].strip('`"') for row in table("### Modes")} == MODES
    for name in MODES:
        cells = next(row for row in table("### Modes") if row[0] == f'`"{name}"`')
        options = CacheOptions(mode=name)
        assert (cells[1] == "yes") == options.looks_up
        assert ("on disk" in cells[3] and name != "require") == options.writes


def test_the_table_of_environment_variables_has_each_that_the_code_reads():
    read_by_code = set(re.findall(r'"(TORCHCACHE_[A-Z_]+[A-Z])"', CODE))
    assert {row[0].strip("`") for row in table("## Environment variables")} == read_by_code


def test_what_statistics_count_is_described():
    described = re.findall(r"^ {4}(\w+): ", inspect.getdoc(torchcache.CacheStats), re.MULTILINE)
    assert described == [counter.name for counter in dataclasses.fields(torchcache.CacheStats)]


def test_what_options_mean_is_described():
    described = re.findall(r"^ {4}(\w+): ", inspect.getdoc(CacheOptions), re.MULTILINE)
    assert described == list(OPTIONS)


# -- names --------------------------------------------------------------------------------------------------------

#: Names that are not ours, as the pages write them.
FOREIGN = {
    "classify_text", "collate_fn", "convert_to_tensor", "decode_images", "device_map", "dispatch_model", "encode_image",
    "fullgraph", "fused", "get_peft_model", "num_classes", "output_attentions", "setup_module", "use_cache",
    "hash_transform", "inplace", "load_state_dict", "metasync", "persistent_workers", "pickle_hashing", "push_to_hub",
    "random_split", "safe_load", "scale", "spectral_norm", "stride", "sync", "token_type_ids", "typed", "writemap",
}  # fmt: skip
CODE = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "torchcache").rglob("*.py"))


def inline(name: str) -> list[str]:
    """Return what a page writes as code inside of its sentences."""
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", PAGES[name])


def arguments() -> set[str]:
    """Return the names of the arguments of all public functions, classes and methods."""
    # The reference has what the options say of themselves.
    public = [getattr(torchcache, name) for name in torchcache.__all__ if name != "CacheOptions"]
    methods = [member for item in public for _, member in inspect.getmembers(item, inspect.isfunction)]
    callables = [item for item in [*public, *methods] if item.__name__ not in dir(torchcache.errors)]
    return {name for item in callables for name in inspect.signature(item).parameters} | set(OPTIONS)


@pytest.mark.parametrize("name", PAGES)
def test_each_option_that_a_page_sets_exists(name):
    known = arguments() | FOREIGN
    set_here = {argument for code in inline(name) for argument in re.findall(r"(?:^|[(, ])([a-z]\w*)=(?!=)", code)}
    attributes = {argument for code in inline(name) for argument in re.findall(r"torchcache_(\w+)", code)}
    assert {*set_here} - known == set()
    assert {*attributes} - set(OPTIONS) == set()


@pytest.mark.parametrize("name", PAGES)
def test_each_name_that_a_page_writes_as_code_is_in_the_code(name):
    written = {word for code in inline(name) for word in re.findall(r"(?<![\w.])[a-z]+(?:_[a-z0-9]+)+", code)}
    assert written - FOREIGN - set(re.findall(r"\w+", CODE)) == set()


@pytest.mark.parametrize("name", PAGES)
def test_each_counter_that_a_page_names_exists(name):
    counters = [counter for code in inline(name) for counter in re.findall(r"stats\(\)\.(\w+)", code)]
    assert [counter for counter in counters if not hasattr(torchcache.CacheStats(), counter)] == []


@pytest.mark.parametrize("name", PAGES)
def test_each_reason_that_a_page_gives_in_brackets_exists(name):
    given = set(re.findall(r"\(`([a-z]+(?:_[a-z]+)+)`\)", PAGES[name]))
    assert given - {kind.value for kind in (*Reason, *Drop)} - set(OPTIONS) == set()


@pytest.mark.parametrize("name", PAGES)
def test_each_file_and_command_that_a_page_names_exists(name):
    words = " ".join(inline(name))
    assert [
        path
        for path in re.findall(r"(?:examples|docs|benchmarks|stress)/\w+\.\w+", words)
        if not (ROOT / path).is_file()
    ] == []
    assert set(re.findall(r"(?:-m benchmarks|make bench ARGS=)\s*([a-z-]+)", words)) <= set(benchmarks.BENCHMARKS)
    assert set(re.findall(r"--suite (\w+)", words)) <= set(SUITES)


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_each_link_to_a_file_leads_there(name):
    """Sphinx checks those of the other pages."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[name])
    assert [link for link in links if not (ROOT / link).is_file()] == []


# -- examples -----------------------------------------------------------------------------------------------------

TEXTS = {name: (ROOT / ("docs" if (ROOT / "docs" / name).is_file() else ".") / name).read_text(encoding="utf-8")
         for name in PAGES if name != "docstrings"}  # fmt: skip


def blocks(name: str, language: str) -> list[str]:
    """Return the blocks of a page that Sphinx does not run."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[name], flags=re.MULTILINE | re.DOTALL)


def run(words: list[str], folder: Path, **environment: str) -> str:
    """Run a command as a user does, and return what it says."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TORCHCACHE_")}
    done = subprocess.run(
        words,
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_block_is_run_by_sphinx_or_here_or_by_the_test_of_the_sharing_page():
    fences = {(name, kind) for name, text in TEXTS.items() for kind in re.findall(r"^```(\S+)$", text, re.MULTILINE)}
    by_sphinx = {"{testcode}", "{testoutput}", "{doctest}", "{testsetup}", "{testcleanup}", "{toctree}", "{eval-rst}"}
    assert {(name, kind) for name, kind in fences if kind not in by_sphinx} == {
        ("README.md", "python"),
        ("howto.md", "console"),
        ("sharing.md", "python"),
        ("sharing.md", "console"),
        ("storage.md", "text"),
    }
    assert [block.partition("\n")[0] for block in blocks("sharing.md", "python")[:2]] == ["# workers.py", "# ranks.py"]
    assert (
        len(blocks("README.md", "python"))
        == len(blocks("howto.md", "console"))
        == len(blocks("storage.md", "text"))
        == 1
    )
    assert len(blocks("sharing.md", "python")) == len(blocks("sharing.md", "console")) == 3


def test_the_first_example_does_what_its_comments_say(tmp_path):
    (program,) = blocks("README.md", "python")
    hits, misses = re.search(r"# (\d+) memory hits, (\d+) misses\n", program).groups()
    (found,) = re.findall(
        r"The next run of the program finds all (\d+) rows on disk and computes none", PAGES["README.md"]
    )
    shown = "\nstats = backbone.cache_instance.stats()\nprint(stats.memory_hits, stats.store_hits, stats.misses)\n"
    (tmp_path / "first.py").write_text(program + shown)
    assert run([sys.executable, "first.py"], tmp_path).split() == [hits, "0", misses]
    assert run([sys.executable, "first.py"], tmp_path).split() == [hits, found, "0"]


def test_the_command_that_sets_up_logging_makes_the_file(tmp_path):
    (command,) = blocks("howto.md", "console")
    words = command.removeprefix("$ ").split()
    environment = dict(word.split("=") for word in words if "=" in word)
    (tmp_path / words[-1]).write_text(
        "import torch, torchcache\ntorchcache.torchcache()(torch.nn.Linear(2, 2))(torch.rand(2, 2))\n"
    )
    run([sys.executable, words[-1]], tmp_path, **environment)
    assert "module hash of Linear" in (tmp_path / environment["TORCHCACHE_LOG_FILE"]).read_text()


def test_the_commands_for_a_team_make_a_directory_that_its_example_takes(tmp_path):
    shared = tmp_path / "team" / "features"
    shared.parent.mkdir()
    command = blocks("sharing.md", "console")[2].removeprefix("$ ")
    group = grp.getgrgid(os.getgid()).gr_name
    run(["bash", "-ec", command.replace("/data/", f"{tmp_path}/").replace("chgrp team", f"chgrp {group}")], tmp_path)
    decorator = eval(blocks("sharing.md", "python")[2].replace("/data/", f"{tmp_path}/"), vars(torchcache))
    cached = decorator(scaled)
    cached(torch.ones(3, 3, 3), torch.ones(3, 3), 2)
    cached.cache_instance.flush()
    assert mode(cached.cache_instance.cache_dir.stat().st_mode & 0o7777) == mode(GROUP.directory_mode)


def test_the_directory_is_as_its_page_draws_it(tmp_path):
    directory = tmp_path / "made"
    cached = torchcache.torchcache(persistent=True, persistent_cache_dir=directory)(scaled)
    cached(torch.ones(3, 3, 3), torch.ones(3, 3), 2)
    cached.cache_instance.flush()
    (drawn,) = blocks("storage.md", "text")
    first, *lines = drawn.replace("<module hash>", cached.cache_instance.module_hash).splitlines()
    assert f" {mode(directory.stat().st_mode & 0o7777)}, " in first
    (files,) = [line for line in lines if "data.mdb" in line]
    for path in directory.rglob("*"):
        assert re.search(rf"(^|\s){re.escape(path.name)}(/|\s)", "\n".join(lines)), path
        if path.suffix == ".mdb":
            assert files.endswith(f" {mode(path.stat().st_mode & 0o7777)}")
    assert f".{environment._SET_ASIDE}/" in drawn
    assert f" {TRASH_PREFIX}<random>/" in drawn
