"""A cache directory on a file system that LMDB cannot use is refused in one line, and the run goes on in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.storage.children import in_child
from tests.storage.test_environment import call_twice
from torchcache.errors import StoreError
from torchcache.storage import filesystems
from torchcache.storage.directory import CacheDirectory

MOUNTS = """\
22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /data rw - nfs4 server:/export rw,vers=4.2
31 30 8:1 / /data/local\\040disk rw - xfs /dev/sdb1 rw
32 22 0:41 / /home/me/remote rw,nosuid - fuse.sshfs me@there: rw
33 22 0:42 / /lustre rw master:3 propagate_from:2 - lustre 10.0.0.1@tcp:/scratch rw
34 22 0:43 / /covered rw - nfs server:/old rw
35 34 0:44 / /covered rw - tmpfs tmpfs rw
36 22 0:45 / /w rw - 9p drvfs rw
a line that nobody can read
37 22 0:46 / /disk rw - fuseblk /dev/sdc1 rw
38 22 0:47 / /host rw - virtiofs share rw
39 22 0:48 / /mac rw - fakeowner /run/host_mark/Users rw
40 22 0:49 / /auto rw - autofs /etc/auto.home rw,fd=7
"""


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    """Let the system have the mounts above, and whatever a test adds."""
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTS)
    monkeypatch.setattr(filesystems, "_MOUNTS", path)
    return path


@pytest.mark.parametrize(
    ("path", "kind", "is_refused"),
    [
        ("/tmp/cache", "ext4", False),
        ("/", "ext4", False),
        ("/data", "nfs4", True),
        ("/data/cache/deep", "nfs4", True),
        ("/database/cache", "ext4", False),
        ("/data/local disk/cache", "xfs", False),
        ("/home/me/remote/x", "fuse.sshfs", True),
        ("/lustre/scratch", "lustre", True),
        ("/covered/x", "tmpfs", False),
        ("/w/c", "9p", True),
        ("/disk/cache", "fuseblk", True),
        ("/host/cache", "virtiofs", True),
        ("/mac/cache", "fakeowner", True),
        ("/auto/nobody/cache", "autofs", True),  # it mounted nothing
    ],
)
def test_the_nearest_mount_above_decides(mounts, path, kind, is_refused):
    assert filesystems.file_system_of(Path(path)) == kind
    assert filesystems.is_refused(kind) is is_refused


def test_a_link_is_followed_to_where_the_files_would_be(mounts, tmp_path):
    (tmp_path / "link").symlink_to("/lustre/scratch")
    assert filesystems.file_system_of(tmp_path / "link" / "cache") == "lustre"


@pytest.mark.parametrize(("kind", "is_refused"), [("nfs4", True), ("ext4", False)])
@pytest.mark.parametrize("path", ["/auto/me", "/auto/me/cache", "/auto/me/a/b"])
def test_what_is_mounted_on_demand_is_mounted_and_looked_at_again(mounts, monkeypatch, path, kind, is_refused):
    """Only the home directory is there; like the kernel, a stat mounts no last name of a path."""
    stat = filesystems.os.stat

    def mount_and_stat(asked, **options):
        name = str(asked)
        if name.startswith("/auto/me/"):
            with mounts.open("a") as file:
                file.write(f"50 40 0:60 / /auto/me rw - {kind} server:/home/me rw\n")
            if name != "/auto/me/.":
                raise FileNotFoundError(name)
            return stat("/", **options)
        return stat(asked, **options)

    monkeypatch.setattr(filesystems.os, "stat", mount_and_stat)
    assert filesystems.file_system_of(Path(path)) == kind
    if is_refused:
        with pytest.raises(StoreError, match=kind):
            filesystems.check_file_system(Path(path))
    else:
        filesystems.check_file_system(Path(path))


def test_a_system_that_does_not_tell_refuses_nothing(mounts):
    mounts.unlink()
    assert filesystems.file_system_of(Path("/data")) == ""
    filesystems.check_file_system(Path("/data"))


def test_the_refusal_names_a_place_on_this_machine(mounts, tmp_path):
    with mounts.open("a") as file:
        file.write(f"50 22 0:50 / {tmp_path}/remote rw - beegfs x rw\n")
    with pytest.raises(StoreError, match="beegfs") as caught:
        CacheDirectory(tmp_path / "remote" / "cache")
    assert caught.value.kind == "file_system"
    assert "such as /tmp/torchcache" in str(caught.value)
    assert not (tmp_path / "remote").exists()


def test_where_the_temporary_directory_is_remote_too_another_place_is_named(mounts, tmp_path, monkeypatch):
    with mounts.open("a") as file:
        file.write("50 22 0:50 / /tmp rw - nfs x rw\n")
    monkeypatch.setattr(filesystems.tempfile, "gettempdir", lambda: "/tmp")
    with pytest.raises(StoreError, match="such as /var/tmp/torchcache"):
        filesystems.check_file_system(Path("/data/cache"))


def test_the_refusal_needs_no_directory_for_temporary_files(mounts, monkeypatch):
    def find_none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(filesystems.tempfile, "gettempdir", find_none)
    with pytest.raises(StoreError, match="nfs4"):
        filesystems.check_file_system(Path("/data/cache"))


def test_a_cached_call_goes_on_in_memory_and_says_so_once(mounts, tmp_path):
    with mounts.open("a") as file:
        file.write(f"50 22 0:50 / {tmp_path}/remote rw - nfs4 x rw\n")

    def use():
        stats, lines = call_twice(tmp_path / "remote" / "cache")
        assert (stats.misses, stats.memory_hits, dict(stats.faults)) == (8, 16, {"file_system": 1})
        (line,) = lines
        return line

    assert "nfs4" in in_child(use)
    assert not (tmp_path / "remote").exists()


def test_this_machine_s_own_mounts_are_read():
    assert filesystems.file_system_of(Path("/proc/self")) == "proc"
