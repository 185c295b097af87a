"""Who may use a cache directory: its owner alone, or on purpose the members of a group, whatever the umask."""

from __future__ import annotations

import codecs
import contextlib
import os
import random
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.storage.children import ChildFailedError, in_child
from tests.storage.known_values import NAME, digest_of, digests_of, forget_environments, hits_of, put
from torchcache.errors import StoreError
from torchcache.storage.access import GROUP, PRIVATE
from torchcache.storage.contract import StoreSettings
from torchcache.storage.directory import LOCK_NAME, MARKER_NAME, CacheDirectory
from torchcache.storage.lmdb import LmdbStore

SETTINGS = StoreSettings(max_persistent_cache_size=1 << 26)
ALICE, BOB, TEAM, OUTSIDER = 61001, 61002, 61100, 61003

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")


@pytest.fixture
def place():
    """A directory that every user can reach and in which a team has one of its own, with the setgid bit."""
    path = Path("/tmp") / f"torchcache-test-{os.getpid()}-{random.Random().getrandbits(64):x}"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    team = path / "team"
    team.mkdir()
    os.chown(team, 0, TEAM)
    team.chmod(0o2775)
    codecs.lookup("ascii")  # other users may not be able to read what is imported late
    yield path
    shutil.rmtree(path)


def as_user(user, function, *args, groups=(TEAM,), umask=0o022):
    """Run something in a child that is somebody else."""

    def run():
        codecs.lookup("ascii")  # filelock asks for it, and this user may not be able to read the standard library
        os.setgroups(groups)
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        os.umask(umask)
        return function(*args)

    return in_child(run)


def open_as(path, access, **settings):
    return LmdbStore(
        CacheDirectory(path, access), NAME, StoreSettings(**{"max_persistent_cache_size": 1 << 26, **settings})
    )


def write(path, access, first, **settings):
    store = open_as(path, access, **settings)
    assert put(store, digests_of(range(first, first + 10)), nbytes=3000).rows == 10


def read(path, access):
    return sorted(hits_of(open_as(path, access), digests_of(range(40))))


def refusal(path, access):
    """Return why a directory, or what is in it, is refused for reading and for writing."""
    whys = []
    for use in (
        lambda: hits_of(open_as(path, access), [digest_of(0)]),
        lambda: put(open_as(path, access), [digest_of(0)]),
    ):
        with pytest.raises(StoreError) as caught:
            use()
        whys.append(str(caught.value))
    return " / ".join(whys)


def modes(path):
    return {
        str(entry.relative_to(path)): stat.S_IMODE(entry.stat().st_mode)
        for entry in [path, *path.rglob("*")]
        if not entry.is_symlink()
    }


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_what_one_member_wrote_is_the_others_too(place, umask):
    cache = place / "team" / "cache"
    as_user(ALICE, write, cache, GROUP, 0, umask=umask)
    assert as_user(BOB, read, cache, GROUP, umask=umask) == [*range(10)]
    as_user(BOB, write, cache, GROUP, 10, umask=umask)
    assert as_user(ALICE, read, cache, GROUP, umask=umask) == [*range(20)]
    assert modes(cache) == {
        ".": 0o2770,
        NAME: 0o2770,
        LOCK_NAME: 0o660,
        f"{NAME}/{MARKER_NAME}": 0o660,
        f"{NAME}/data.mdb": 0o660,
        f"{NAME}/lock.mdb": 0o660,
    }
    assert {entry.stat().st_gid for entry in [cache, *cache.rglob("*")]} == {TEAM}


def test_a_member_that_only_reads_needs_no_right_to_write(place):
    cache = place / "team" / "cache"
    as_user(ALICE, write, cache, GROUP, 0)
    subprocess.run(["chmod", "-R", "g-ws", cache], check=True)
    assert as_user(BOB, read, cache, GROUP.read_only()) == [*range(10)]
    with pytest.raises(ChildFailedError, match=f"user {ALICE}"):
        as_user(OUTSIDER, read, cache, GROUP.read_only(), groups=())


def test_members_share_one_budget_and_may_remove_what_another_made(place):
    cache = place / "team" / "cache"
    as_user(ALICE, write, cache, GROUP, 0)
    as_user(BOB, lambda: open_as(cache, GROUP).delete_all())
    assert as_user(ALICE, read, cache, GROUP) == []
    as_user(BOB, write, cache, GROUP, 0)
    assert as_user(ALICE, read, cache, GROUP) == [*range(10)]


def test_a_damaged_store_of_another_member_is_set_aside(place):
    cache = place / "team" / "cache"
    as_user(ALICE, write, cache, GROUP, 0)
    os.truncate(cache / NAME / "data.mdb", 8192)
    as_user(BOB, write, cache, GROUP, 10)
    assert as_user(ALICE, read, cache, GROUP) == [*range(10, 20)]


def test_who_is_not_in_the_group_is_refused_with_the_reason(place):
    cache = place / "team" / "cache"
    as_user(ALICE, write, cache, GROUP, 0)
    said = as_user(OUTSIDER, refusal, cache, GROUP, groups=())
    assert f"user {ALICE}" in said
    assert f"group {TEAM}" in said


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o000])
def test_a_private_cache_in_a_team_directory_is_private(place, umask):
    cache = place / "team" / "cache"
    as_user(ALICE, write, cache, PRIVATE, 0, umask=umask)
    assert all(mode & 0o077 == 0 for mode in modes(cache).values()), modes(cache)
    said = as_user(BOB, refusal, cache, PRIVATE)
    assert f"belongs to user {ALICE}" in said
    assert "shared='group'" in said
    assert as_user(ALICE, read, cache, PRIVATE) == [*range(10)]


def test_a_private_store_in_a_directory_that_others_can_write_too_is_refused_with_the_reason(place):
    """The reason is whose it is, and not that some file cannot be read."""
    cache = place / "shared"
    cache.mkdir()
    cache.chmod(0o1777)
    as_user(ALICE, write, cache, PRIVATE, 0)

    def look():
        with pytest.raises(StoreError) as caught:
            open_as(cache, PRIVATE).get_many(b"n" * 16, [digest_of(0)])
        return str(caught.value)

    assert f"belongs to user {ALICE}" in as_user(BOB, look)


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [(0o2777, "chmod o-w"), (0o2750, "chmod -R g+rwX,g+s"), (0o700, "chmod -R"), (0o770, "chmod -R g+rwX,g+s")],
)
def test_a_directory_that_is_not_fit_for_a_group_is_refused_with_the_remedy(place, mode, remedy):
    cache = place / "cache"
    cache.mkdir()
    os.chown(cache, ALICE, TEAM)
    cache.chmod(mode)
    assert remedy in as_user(ALICE, refusal, cache, GROUP)


def test_what_was_made_for_a_group_is_refused_by_who_asks_for_a_private_one(place):
    cache = place / "team" / "cache"
    as_user(ALICE, write, cache, GROUP, 0)
    said = as_user(ALICE, refusal, cache, PRIVATE)
    assert "writable by others" in said
    assert "shared='group'" in said


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_directories_above_that_are_missing_are_made_for_the_group_too(place, umask):
    cache = place / "team" / "experiment" / "one" / "cache"
    as_user(ALICE, write, cache, GROUP, 0, umask=umask)
    assert as_user(BOB, read, cache, GROUP, umask=umask) == [*range(10)]
    assert stat.S_IMODE((place / "team" / "experiment").stat().st_mode) == 0o2770


def test_the_remedy_opens_a_cache_that_its_owner_had_for_himself(place):
    cache = place / "team" / "cache"
    as_user(ALICE, write, cache, PRIVATE, 0)
    said = as_user(BOB, refusal, cache, GROUP)
    assert str(cache) in said
    assert "chmod -R g+rwX,g+s" in said
    subprocess.run(["chmod", "-R", "g+rwX,g+s", cache], check=True)
    as_user(BOB, write, cache, GROUP, 10)
    assert as_user(ALICE, read, cache, GROUP) == [*range(20)]


def test_the_lock_of_a_private_cache_that_its_owner_shares_now_is_opened_to_the_group(place):
    cache = place / "team" / "cache"
    cache.mkdir()
    os.chown(cache, ALICE, TEAM)
    cache.chmod(0o2770)
    as_user(ALICE, lambda: put(LmdbStore(CacheDirectory(cache), "alone", SETTINGS), [digest_of(0)]))
    with pytest.raises(ChildFailedError, match="let its owner remove it"):
        as_user(BOB, write, cache, GROUP, 0)
    as_user(ALICE, write, cache, GROUP, 0)
    as_user(BOB, write, cache, GROUP, 10)
    assert as_user(ALICE, read, cache, GROUP) == [*range(20)]


@pytest.mark.parametrize("access", [PRIVATE, GROUP], ids=["private", "group"])
def test_what_we_may_not_look_into_does_not_stop_writing(place, access):
    """The lost+found of a disk, or what a member made for himself alone."""
    cache = place / "team" / "cache"
    as_user(ALICE, write, cache, access, 0)
    found = cache / "lost+found"
    found.mkdir(mode=0o700)
    (found / "data.mdb").write_bytes(b"")
    as_user(ALICE, write, cache, access, 10)
    full = as_user(ALICE, lambda: open_as(cache, access, max_persistent_cache_size=300_000).put_many([]))
    assert not full.dropped
    as_user(
        ALICE,
        lambda: [
            put(open_as(cache, access, max_persistent_cache_size=300_000), [digest_of(n)], 3000) for n in range(90)
        ],
    )


def test_root_may_use_the_directory_of_a_user(place):
    """As in a container that runs as root, with a directory of the user's mounted."""
    cache = place / "mounted"
    cache.mkdir(mode=0o755)
    os.chown(cache, ALICE, ALICE)
    write(cache, PRIVATE, 0)
    assert read(cache, PRIVATE) == [*range(10)]
    forget_environments()


def test_a_file_that_an_outsider_put_there_is_not_opened(place):
    cache = place / "team" / "cache"
    as_user(ALICE, write, cache, GROUP, 0)
    os.chown(cache / NAME / "data.mdb", OUTSIDER, OUTSIDER)
    (cache / NAME / "data.mdb").chmod(0o666)

    def look():
        with contextlib.suppress(StoreError):
            return read(cache, GROUP)
        return "refused"

    assert as_user(ALICE, look) == "refused"


def test_members_that_start_at_the_same_moment_all_get_in(place):
    cache = place / "team" / "cache"

    def crowd():
        pids = []
        for member in range(6):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    os.setresuid(ALICE + member % 2, ALICE + member % 2, 0)
                    os.umask(0o077)
                    write(cache, GROUP, 10 * member, lock_timeout_seconds=20.0)
                    status = 0
                finally:
                    os._exit(status)
            pids.append(pid)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    def as_team():
        os.setgroups([TEAM])
        os.setresgid(TEAM, TEAM, TEAM)
        return crowd()

    for _ in range(3):
        assert in_child(as_team) == [0] * 6
        assert as_user(BOB, read, cache, GROUP) == [*range(40)]
        shutil.rmtree(cache)


def test_the_option_makes_a_cache_that_the_group_shares(place):
    from tests.storage.test_environment import call_twice

    def use(cache):
        stats, lines = call_twice(cache, shared="group")
        assert (dict(stats.faults), lines) == ({}, [])
        return stats.misses, stats.store_hits

    cache = place / "team" / "cache"
    call_twice(place / "warm")  # other users may not be able to read what is imported
    assert as_user(ALICE, use, cache, umask=0o077) == (8, 0)
    assert {mode & 0o777 for mode in modes(cache).values()} == {0o770, 0o660}
    assert as_user(BOB, use, cache, umask=0o077) == (0, 8)
