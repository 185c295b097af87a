"""Who may use what lies under a cache directory: one user, or a group that was named on purpose."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from torchcache.errors import StoreError
from torchcache.kinds import Fault


@dataclass(frozen=True, slots=True)
class Access:
    """The modes of what we make, whatever the umask, and what we accept of what is there.

    Who only reads makes nothing, and accepts what is root's too: an administrator may fill a cache for everybody.

    Attributes:
        is_group: Whether members of the directory's group share it.
        directory_mode: Of directories; the group's have the setgid bit, so that what is made in them is the
            group's too.
        file_mode: Of files.
        is_read_only: Whether nothing is made, changed or removed.
    """

    is_group: bool
    directory_mode: int
    file_mode: int
    is_read_only: bool = False

    def read_only(self) -> Access:
        """Return the same for who only reads."""
        return replace(self, is_read_only=True)

    def make_directory(self, path: Path) -> None:
        """Make a directory with its final mode; if there is one already, leave it.

        Raises:
            OSError: If it cannot be made.
        """
        if not self.is_group:
            path.mkdir(mode=self.directory_mode, exist_ok=True)
            return
        if os.path.lexists(path):
            return
        # mkdir obeys the umask, and another member must not meet a directory that is still closed to it.
        unfinished = path.with_name(f".torchcache-{uuid.uuid4().hex}")
        unfinished.mkdir(mode=0o700)
        try:
            os.chmod(unfinished, self.directory_mode)
            os.rename(unfinished, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(unfinished)
            if not path.is_dir():  # else somebody was faster, and has put something into it
                raise

    def make_directories(self, path: Path) -> None:
        """Make a directory and those above it that are missing; the latter are the group's too, if it shares them."""
        if not self.is_group:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            for parent in reversed(path.parents):
                self.make_directory(parent)
        self.make_directory(path)

    def open_file(self, path: Path) -> None:
        """Give a file of our own the modes of a group's, if it is there: we may have made it for us alone before."""
        if self.is_group:
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    status = os.fstat(descriptor)
                    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                        os.fchmod(descriptor, self.file_mode)
                finally:
                    os.close(descriptor)

    def check_root(self, path: Path) -> None:
        """Check a ``persistent_cache_dir``.

        A private one may also be root's, or writable by a group or, with the sticky bit, by all: what lies in
        it is checked on its own. Root may use anybody's, as in a container that mounts a user's directory.

        Raises:
            StoreError: If it must not be used.
        """
        status = os.stat(path)
        _check_is_directory(path, status)
        if self.is_group:
            self._check_group(path, status)
        else:
            if os.geteuid():
                _check_owner(path, status, (os.geteuid(), 0))
            if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
                raise _refused(path, f"is writable by everybody ({_mode(status)}); {_OWN_OR_GROUP}")
        if not os.access(path, os.X_OK if self.is_read_only else os.W_OK | os.X_OK):
            use = "read" if self.is_read_only else "write"
            raise _refused(path, f"is not ours to {use} ({_mode(status)}, of {_user(status.st_uid)})")

    def check_directory(self, path: Path) -> None:
        """Check a directory that one of us made: not a link, and nobody else can put things into it.

        Raises:
            StoreError: If it must not be used.
        """
        status = os.lstat(path)
        _check_is_directory(path, status)
        if self.is_group:
            self._check_group(path, status)
            return
        _check_owner(path, status, self._owners())
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _refused(path, f"is writable by others ({_mode(status)}); chmod 700, or set shared='group'")

    def check_file(self, path: Path) -> None:
        """Refuse what is not a plain file of ours: LMDB would follow a link and hang on a FIFO.

        Raises:
            StoreError: If it is there and is none.
        """
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return
        is_ours = status.st_uid in self._owners() or (self.is_group and _is_member(status.st_gid))
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or not is_ours:
            raise StoreError(f"{path} is not a plain file of ours", kind=Fault.DAMAGED)

    def _owners(self) -> tuple[int, ...]:
        return (os.geteuid(), 0) if self.is_read_only else (os.geteuid(),)

    def _check_group(self, path: Path, status: os.stat_result) -> None:
        if status.st_mode & stat.S_IWOTH:
            raise _refused(path, f"is writable by everybody ({_mode(status)}), also with shared='group'; chmod o-w")
        if status.st_uid not in self._owners() and not _is_member(status.st_gid):
            raise _refused(path, f"belongs to {_user(status.st_uid)} and to the group {status.st_gid}, not to ours")
        if not self.is_read_only and not (status.st_mode & stat.S_IWGRP and status.st_mode & stat.S_ISGID):
            raise _refused(
                path,
                f"is closed to its group, or does not hand it on ({_mode(status)}), although shared='group'; "
                "let its owner run chmod -R g+rwX,g+s on it",
            )


PRIVATE = Access(is_group=False, directory_mode=0o700, file_mode=0o600)
GROUP = Access(is_group=True, directory_mode=0o2770, file_mode=0o660)

_OWN_OR_GROUP = "name a directory of your own, or share one with shared='group'"


def _check_is_directory(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise _refused(path, "is not a directory")


def _check_owner(path: Path, status: os.stat_result, allowed: tuple[int, ...]) -> None:
    if status.st_uid not in allowed:
        raise _refused(path, f"belongs to {_user(status.st_uid)}, not to us; {_OWN_OR_GROUP}")


def _is_member(group: int) -> bool:
    return group == os.getegid() or group in os.getgroups()


def _refused(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} {why}", kind=Fault.DIRECTORY)


def _mode(status: os.stat_result) -> str:
    return f"mode {stat.S_IMODE(status.st_mode):o}"


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
