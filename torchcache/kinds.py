"""What is counted by kind: faults, and why rows were not stored. What to do about each stands beside it."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class Kind(str, Enum):
    """A kind of something that is counted: its members are the strings that ``stats()`` shows."""

    def __str__(self) -> str:
        """Return the string alone, also in an f-string."""
        return str.__str__(self)


class _Mishap(Kind):
    """A kind of something that went wrong and stopped no call.

    Attributes:
        happened: What happened, as a sentence.
        remedy: What to do about it, as a sentence.
    """

    happened: str
    remedy: str

    def __new__(cls, value: str, happened: str = "", remedy: str = "") -> Self:
        """Make a member that is the string that ``stats()`` counts."""
        mishap = str.__new__(cls, value)
        mishap._value_ = value
        mishap.happened = happened
        mishap.remedy = remedy
        return mishap


class Fault(_Mishap):
    """A fault of the machine, or of what others wrote, that became a miss or cost rows their place on disk."""

    # Of a call that was computed.
    OTHER_BATCH_FAILED = (
        "other_batch_failed",
        "A call failed with some of its rows and succeeded with all of them.",
        "See the error in the log, and the reason of the same name.",
    )
    OTHER_LENGTH_FAILED = (
        "other_length_failed",
        "A row of a padded batch could not be computed with another padding.",
        "See the error in the log, and the reason of the same name.",
    )
    VERIFY_HITS = (
        "verify_hits",
        "Hits that were to be compared for verify_hits could not be computed again.",
        "See the error in the log. The hits were returned without the comparison.",
    )

    # Of what was kept.
    MEMORY = (
        "memory",
        "The memory tier could not grow, so rows were not kept in it.",
        "Lower max_memory_cache_size, or set memory_cache_device to a device with more memory.",
    )
    CORRUPT_RECORD = (
        "corrupt_record",
        "A record on disk failed a check, so its sample was computed and the record is replaced.",
        "Nothing, after a crash of the machine. If it keeps happening, check the disk.",
    )
    CORRUPT_RESULT = (
        "CorruptRecordError",
        "A class of the result refused to be rebuilt from its stored parts, so the call was computed.",
        "Return plain containers. The call counts under the reason result_cannot_be_rebuilt as well.",
    )

    # Of the directory.
    DIRECTORY = (
        "directory",
        "The cache directory cannot be made, or must not be used because of its owner or permissions.",
        "The log names the directory and what is wrong with it. Change that, or set persistent_cache_dir.",
    )
    FILE_SYSTEM = (
        "file_system",
        "The cache directory is on a file system of the network, of FUSE or of a virtual machine's host.",
        "Set persistent_cache_dir to a disk of this machine.",
    )
    FOREIGN = (
        "foreign",
        "A file or directory that torchcache did not make has the name that the cache needs. It is left alone.",
        "Choose another persistent_cache_dir or persistent_module_hash.",
    )
    READ_ONLY = (
        "read_only",
        "Something was to be changed in a cache directory that is only read.",
        "Change it from a program with mode='on'.",
    )
    LOCK = (
        "lock",
        "The lock file of the cache directory cannot be locked.",
        "If another user made it for a private cache, set another persistent_cache_dir, or let its owner remove it.",
    )
    LOCK_TIMEOUT = (
        "lock_timeout",
        (
            "Another process kept the lock of the cache directory for longer than lock_timeout_seconds, or others got "
            "it in turn for five times as long."
        ),
        "Nothing, if it is rare. Otherwise raise lock_timeout_seconds, or end the process if it is stuck.",
    )

    # Of the files in it.
    DAMAGED = (
        "damaged",
        "A file of the cache is damaged or truncated, or is not a file of torchcache.",
        "Nothing: the next write sets it aside and makes a new one. If it keeps happening, check the disk.",
    )
    FORMAT = (
        "format",
        "The files were written by a version of torchcache with another format. They are left alone.",
        "Choose another persistent_cache_dir, or remove the subdirectory that the log names.",
    )
    ABSENT = (
        "absent",
        "Another process removed the files while they were used.",
        "Nothing: the next write makes new ones.",
    )
    OVERWRITTEN = (
        "overwritten",
        "Other processes wrote so often that a read did not finish on unchanged pages, in several tries.",
        "Nothing: the samples were computed.",
    )
    NAMESPACES_FULL = (
        "namespaces_full",
        "The table of namespaces is full: there were too many states of the model.",
        "Call clear() on the cache.",
    )
    DISK = (
        "disk",
        "The system refused to read, write or map a file of the cache.",
        "See the error in the log: the disk may be full or failing, or memory may be short.",
    )
    FORK = (
        "fork",
        "A fork interrupted a change of the files, so this child process uses memory only.",
        "Start the process with the start method spawn, or while its parent does not write.",
    )

    # As LMDB names them.
    MAP_FULL = (
        "map_full",
        "A commit did not fit into LMDB's map of the file.",
        "Nothing: the rows are computed again when they are needed. If it keeps happening, clear() the cache.",
    )
    MAP_RESIZED = (
        "map_resized",
        "Another process enlarged LMDB's map of the file, and opening it again was not enough.",
        "Nothing: the next call opens it again.",
    )
    READERS_FULL = (
        "readers_full",
        "More processes and threads read the cache at once than LMDB has places for.",
        "Let fewer of them read at once.",
    )
    LMDB_LOCK = (
        "lmdb_lock",
        "LMDB could not use its own lock file.",
        "See the error in the log, and check the permissions of the directory that it names.",
    )
    LMDB = (
        "lmdb",
        "LMDB raised another error.",
        "See the error in the log.",
    )

    STORE = (
        "store",
        "The disk tier cannot be used for a reason that has no kind of its own.",
        "See the error in the log.",
    )


class Drop(_Mishap):
    """Why rows were returned and not stored; a fault counts with its own kind instead."""

    # Not to be kept by any tier: of a call that was computed.
    RANDOM_NUMBERS = (
        "random_numbers",
        "Random numbers were drawn while the rows were computed.",
        "See the reason of the same name.",
    )
    COLLECTIVES = (
        "collectives",
        "The rows were computed together with other ranks of the job.",
        "See the reason of the same name.",
    )
    STATE_MOVED = (
        "state_moved",
        "Weights or attributes changed while the rows were computed.",
        (
            "Nothing, if it is rare. Otherwise see in stats().moved what moved: name what shapes no result in "
            "ignore=(...), and do not change the rest during a call, from another thread for example."
        ),
    )
    ROWS_NOT_CHECKED = (
        "rows_not_checked",
        "It is not known yet whether the rows depend on their batch.",
        "Nothing: the first batch of two different samples settles it. Or set check_rows=False.",
    )
    PLAIN_VALUE_MAY_BE_BATCH_SIZE = (
        "plain_value_may_be_batch_size",
        "A plain number in the result equals the size of the batch, so it may not hold for other batches.",
        "Nothing: the rows of the first batch of another size are kept, if the number stays the same.",
    )

    # Not to be stored on disk.
    ROWS_DEPEND_ON_BATCH = (
        "rows_depend_on_batch",
        "It was found out meanwhile, by another process for example, that rows depend on their batch.",
        "See the reason of the same name.",
    )
    TOO_LARGE = (
        "too_large",
        "A value is too large for a record.",
        "Cache a part of the model that returns less.",
    )
    TOO_LARGE_TO_DESCRIBE = (
        "too_large_to_describe",
        "The plain values, names and shapes of a result are too large for the header of a record.",
        "Return large values as tensors, and fewer of them.",
    )

    # No room.
    QUEUE_FULL = (
        "queue_full",
        "The write queue stayed full for queue_timeout_seconds.",
        "Raise queue_bytes or queue_timeout_seconds, or use a faster disk.",
    )
    BUDGET = (
        "budget",
        "The cache directory has reached max_persistent_cache_size.",
        "Raise it, remove old subdirectories, or set eviction='lru'.",
    )
    MIN_FREE_DISK = (
        "min_free_disk",
        "The file system has no more than min_free_disk bytes left.",
        "Free some space, or lower min_free_disk.",
    )
