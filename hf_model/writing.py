"""Writes single files that appear only when they are complete; locks files; forces files to the disk."""

import ctypes
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_model.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock: two runs at once on one target do not notice each other there
    fcntl = None  # type: ignore[assignment]

NO_REPLACE, EXCHANGE = 1, 2  # flags of Linux's renameat2


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the errors of a full, failing or read-only disk into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None


def write_file(path: Path, content: bytes, *, overwrite: bool, private: Path | None = None) -> None:
    """Write a file that appears only when it is complete. A link with its name is replaced, not followed.

    Args:
        private: the name of the file while it is incomplete, in the same folder; a random one by default.

    Raises:
        FileExistsError: the name is taken (without `overwrite`).
    """
    private = private or path.with_name(f".{secrets.token_hex(8)}.partial")
    file = private.open("xb")
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            private.replace(path)
        elif not rename_exactly(private, path, NO_REPLACE):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            private.rename(path)
        sync(path.parent)
    except BaseException:
        private.unlink(missing_ok=True)
        raise


def rename_exactly(one: Path, other: Path, flags: int) -> bool:
    """Linux's renameat2, which replaces nothing or exchanges two names in one step; False where it cannot."""
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "renameat2"):
        return False
    at_fdcwd = -100
    return bool(library.renameat2(at_fdcwd, bytes(one), at_fdcwd, bytes(other), flags) == 0)


@contextmanager
def locked(path: Path, flags: int = 0) -> Iterator[int | None]:
    """The descriptor of a regular file, locked during the block; None if another process has locked or deleted it."""
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        yield descriptor if _lock(descriptor, path) else None
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        return False


def sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
