"""Writes a folder that appears whole or not at all, and deletes nothing but what it knows to be its own.

While a folder `hf` is written there is a folder `.hf.TOKEN.partial` beside it, with the file MARK in it, which the run
holds locked; `new` in it becomes `hf`. Every folder carries a list of its files with their hashes, MANIFEST: a folder
is replaced only if it holds nothing but these files, unchanged.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_model.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two converters at once on one target are not kept apart
    fcntl = None  # type: ignore[assignment]

MANIFEST = ".manifest.json"
WRITER = "custom-gpt-hf"
MARK = "made-by-custom-gpt-hf"
MOVE = "move it away, or choose another --output_dir"
MAX_MANIFEST_BYTES = 2**20


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that must not be written.

    Raises:
        UserError: `target` is a file, a symbolic link, a folder that exists (without `overwrite`), or one that holds
            anything but what this program wrote into it, or may not be changed (with it).
    """
    try:
        str(target).encode()
    except UnicodeEncodeError:
        raise UserError(f"{target}: is a name that is not UTF-8, which the libraries cannot write") from None
    with disk_errors(target):
        if target.is_symlink():
            raise UserError(f"{target}: is a symbolic link; name the folder itself")
        if not target.exists():
            return
        if not target.is_dir():
            raise UserError(f"{target}: is a file, not a folder")
        if not any(target.iterdir()):
            return
        if not overwrite:
            raise UserError(f"{target}: exists already; choose another --output_dir or add --overwrite")
        if not os.access(target, os.W_OK | os.X_OK):
            raise UserError(f"{target}: cannot be written (its files may not be deleted by you)")
        listed = read_manifest(target)
        if listed is None:
            lacks = f"list of files that this program wrote ({MANIFEST})"
            if not (target / "config.json").exists():
                lacks = "model (no config.json)"
            raise UserError(f"{target}: holds no {lacks}, so --overwrite does not replace it: {MOVE}")
        for name in files_in(target):
            if name != MANIFEST and name not in listed:
                raise UserError(f"{target}: holds {name!r}, which --overwrite would delete: move it away first")
            if name != MANIFEST and not is_unchanged(target / name, listed[name]):
                raise UserError(
                    f"{target}: {name!r} is not what this program wrote, and --overwrite would delete it: "
                    "move it away first"
                )


@contextmanager
def whole_folder(target: Path, overwrite: bool = False, warn: Callable[[str], None] = warnings.warn) -> Iterator[Path]:
    """Give a folder to write into, and put it in `target`'s place when the block ends well.

    A run that was killed leaves a folder behind under a name of its own; the next one on the same target clears it.

    Args:
        target: the folder to make; its parents are made too, and removed again if the block fails.
        overwrite: replace a folder that this program wrote.
        warn: called with a line on what could not be tidied up; the new folder is right all the same.

    Raises:
        UserError: as `check_target`, the place cannot be written, or another run is writing the same target.
    """
    with disk_errors(target):
        target = resolved(target)
        check_target(target, overwrite)
        with _parents(target.parent), _workplace(target, warn) as place:
            new, old = place / "new", place / "old"
            new.mkdir()
            yield new
            _write_manifest(new)
            _sync_tree(place)
            check_target(target, overwrite)
            _put_in_place(new, target, old)
            try:  # the folder is there: what fails from now on is no error
                for folder in (place, target.parent):
                    sync(folder)
            except OSError as error:
                warn(f"{target}: is complete, but may not outlast a loss of power ({error.strerror})")


def resolved(path: Path) -> Path:
    """Where a path leads, by way of links too, but for one that has its last name.

    Raises:
        UserError: a link on the way leads nowhere.
    """
    with disk_errors(path):
        is_name = path.name not in ("", "..")
        for link in path.parents if is_name else (path, *path.parents):
            if link.is_symlink() and not link.exists():
                raise UserError(f"{path}: cannot be written ({link} is a symbolic link that leads nowhere)")
        return Path(os.path.realpath(path.parent), path.name) if is_name else Path(os.path.realpath(path))


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the errors of a full, failing or read-only disk into the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None


# What a folder holds, and whose it is.


def files_in(folder: Path) -> list[str]:
    """The relative names of all that a folder holds at any depth: files, links, empty folders."""
    names = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        inner = files_in(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else []
        names += [f"{entry.name}/{name}" for name in inner] or [entry.name]
    return names


def read_manifest(folder: Path) -> dict[str, str] | None:
    """Name to hash of the files that this program wrote into a folder; None where it has no list of them."""
    try:
        if not stat.S_ISREG((folder / MANIFEST).lstat().st_mode):
            return None
        with (folder / MANIFEST).open("rb") as file:
            content = json.loads(file.read(MAX_MANIFEST_BYTES))
        is_ours = content["written_by"] == WRITER and isinstance(content["sha256"], dict)
        return content["sha256"] if is_ours else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def is_unchanged(path: Path, digest: str) -> bool:
    """Whether there is a regular file of this hash, no link or whatever else."""
    return stat.S_ISREG(path.lstat().st_mode) and hash_of(path) == digest


def hash_of(path: Path) -> str:
    """The SHA-256 of a file."""
    status = path.stat()
    # The same file, untouched since, is not read again: whatever writes to it sets its ctime.
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if state not in _hashes:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        _hashes[state] = digest.hexdigest()
    return _hashes[state]


_hashes: dict[tuple[int, ...], str] = {}


def _write_manifest(folder: Path) -> None:
    content = {"written_by": WRITER, "sha256": {name: hash_of(folder / name) for name in files_in(folder)}}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _discard(folder: Path, kept: Path, warn: Callable[[str], None]) -> None:
    """Delete what this program wrote into a folder of its own; what somebody else put there goes to `kept`."""
    if not _is_folder(folder):
        return
    listed = read_manifest(folder)
    if listed is not None:  # it was finished once, and stood where others could write into it
        for name in files_in(folder):
            if name in listed and is_unchanged(folder / name, listed[name]):
                (folder / name).unlink()
        ours = _folders(listed)
        left = [name for name in files_in(folder) if not (name in ours and _is_folder(folder / name))]
        if left := [name for name in left if name != MANIFEST]:
            folder.rename(kept)
            warn(f"{kept}: holds {left[0]!r}, which stood in the folder that was replaced")
            return
    shutil.rmtree(folder)


def _is_folder(path: Path) -> bool:
    """Whether there is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _folders(names: Iterable[str]) -> set[str]:
    return {str(parent) for name in names for parent in Path(name).parents}


# Beside the folder: the place of a run, and what earlier runs left.


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make a folder and its parents, and remove those that were made if the block fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        for path in made:
            with suppress(OSError):
                sync(path.parent)
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def _workplace(target: Path, warn: Callable[[str], None]) -> Iterator[Path]:
    """A folder beside the target that is this run's alone; gone when the block ends."""
    place = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    place.mkdir()
    try:
        with held(place / MARK, os.O_CREAT | os.O_EXCL) as is_held:
            if not is_held or not _clear_leftovers(target, place, warn):
                raise UserError(f"{target}: another conversion is writing it")
            yield place
    finally:
        _dissolve(place, target, warn)


def _clear_leftovers(target: Path, mine: Path, warn: Callable[[str], None]) -> bool:
    """Clear the places of runs on this target that were killed; False if one of them is still at it."""
    name = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.partial")
    for entry in list(os.scandir(target.parent)):
        place = Path(entry.path)
        if place == mine or not name.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
            continue
        with suppress(OSError):  # it was killed before it put its mark there
            place.rmdir()
        with suppress(OSError), held(place / MARK) as is_held:  # without a mark it is not ours
            if not is_held:
                return False
            _dissolve(place, target, warn)
    return True


def _dissolve(place: Path, target: Path, warn: Callable[[str], None]) -> None:
    """End a run: bring back the older folder if there is no newer one, and delete what is ours."""
    new, old = place / "new", place / "old"
    try:
        for path in (new, old):
            if os.path.lexists(path) and not _is_folder(path):  # no run makes a link or a file there
                warn(f"{place}: is left alone: {path.name!r} in it is no folder")
                return
        if old.exists() and not os.path.lexists(target):
            old.rename(target)
        for index, folder in enumerate((new, old)):
            _discard(folder, target.with_name(f"{target.name}.replaced-{place.name.split('.')[-2]}{index}"), warn)
        (place / MARK).unlink(missing_ok=True)
        place.rmdir()
    except FileNotFoundError:
        pass  # another run has cleared it
    except OSError as error:
        warn(f"{place}: is left over and cannot be deleted ({error.strerror})")


def _put_in_place(new: Path, target: Path, old: Path) -> None:
    """Where the target is missing or empty this is one step, which fails if somebody has put something there."""
    if target.exists() and any(target.iterdir()):
        if not _exchange(new, target):
            target.rename(old)
            new.rename(target)
        return
    if os.name == "nt" and target.exists():
        target.rmdir()
    new.rename(target)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that there is no moment without either; False where the system cannot."""
    return _rename(one, other, 2) == 0


def publish(private: Path, path: Path) -> None:
    """Give a file its final name, in one step where the system can.

    Raises:
        FileExistsError: there is something of that name already.
    """
    status = _rename(private, path, 1)
    if status == errno.EEXIST or (status and os.path.lexists(path)):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if status:
        private.rename(path)
    sync(path.parent)


def create_file(path: Path, content: bytes) -> None:
    """Write a new file, to the disk.

    Raises:
        FileExistsError: there is something of that name already.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        write_synced(descriptor, content)
    finally:
        os.close(descriptor)


def write_synced(descriptor: int, content: bytes) -> None:
    """Write to an open file; it is on the disk when this returns."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
    os.fsync(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under a private name, and put it in the place of what has its name, a link's own place too."""
    private = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        create_file(private, content)
        private.replace(path)
    except BaseException:
        private.unlink(missing_ok=True)
        raise


def _rename(one: Path, other: Path, how: int) -> int:
    """Linux's renameat2, 1 to replace nothing and 2 to swap: 0, or the error's number."""
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None, use_errno=True), "renameat2"):
        return errno.ENOSYS
    at_fdcwd = -100
    return ctypes.get_errno() if library.renameat2(at_fdcwd, bytes(one), at_fdcwd, bytes(other), how) else 0


@contextmanager
def held(path: Path, flags: int = 0) -> Iterator[bool]:
    """Hold the lock of a regular file while the block runs; False if another process has it, or deletes the file."""
    if not flags & os.O_CREAT and not stat.S_ISREG(path.lstat().st_mode):
        raise FileNotFoundError(errno.ENOENT, "There is no regular file", str(path))
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | flags, 0o600)
    try:
        yield lock(descriptor, path)
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path) -> bool:
    """Take the lock of an open file; False if another process has it, or `path` is another file by now."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _sync_tree(folder: Path) -> None:
    """Have a folder and all in it on the disk, not just in the system's memory."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            _sync_tree(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            sync(Path(entry.path))
    sync(folder)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
