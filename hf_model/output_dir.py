"""Writes a folder that appears only when it is complete, and deletes no file that this program did not write.

While the folder `hf` is written, a folder `.hf.TOKEN.partial` stands beside it, with these entries:
    made-by-custom-gpt-hf  the run holds this file locked
    new                    the folder that is being written, or one that is being deleted
    old                    the earlier folder `hf`, until it is known whether it may be deleted
A run that was killed leaves such a place behind. The next run on `hf` brings `old` back if `hf` is missing, and clears
the rest.

Each finished folder lists its files with their SHA-256 in MANIFEST. A folder that is replaced is deleted if every file
in it is listed and unchanged; otherwise it is kept under the first free name of `hf.1`, `hf.2` and so on.
"""

import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_model.errors import UserError, one_line
from hf_model.reading import parse_json, read_text
from hf_model.writing import EXCHANGE, disk_errors, locked, rename_exactly, sync

MANIFEST = ".manifest.json"
WRITER = "custom-gpt-hf"
MARK = "made-by-custom-gpt-hf"
MAX_MANIFEST_BYTES = 2**20


class Hashes:
    """The SHA-256 of the files in a folder, computed beside other work."""

    def __init__(self) -> None:
        self._begun: dict[tuple[str, int, int], Future[str]] = {}
        self._thread = ThreadPoolExecutor(1)

    def begin(self, folder: Path) -> None:
        """Hash the files that are there now, in a thread."""
        for name in _entries(folder):
            self._begun[self._version(folder, name)] = self._thread.submit(_hash, folder / name)

    def of(self, folder: Path) -> dict[str, str]:
        """Name to hash of each file. A file that has changed since `begin`, or is new, is hashed now."""
        self._thread.shutdown()
        begun = {name: self._begun.get(self._version(folder, name)) for name in _entries(folder)}
        return {name: future.result() if future else _hash(folder / name) for name, future in begun.items()}

    @staticmethod
    def _version(folder: Path, name: str) -> tuple[str, int, int]:
        found = (folder / name).stat()
        return name, found.st_size, found.st_mtime_ns


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that must not be written.

    Raises:
        UserError: `target` is a file, a symbolic link, a folder that holds something (without `overwrite`), or a folder
            that this user may not change (with it).
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
            raise UserError(f"{target}: is a file, not a folder; choose another --output_dir")
        if not any(target.iterdir()):
            return
        if not overwrite:
            raise UserError(
                f"{target}: exists already; choose another --output_dir or add --overwrite (in Python: overwrite=True)"
            )
        if not os.access(target, os.W_OK | os.X_OK):
            raise UserError(f"{target}: cannot be written (you may not change it); choose another --output_dir")


@contextmanager
def whole_folder(
    target: Path,
    overwrite: bool = False,
    say: Callable[[str], None] = warnings.warn,
    hashes: Hashes | None = None,
) -> Iterator[Path]:
    """Give a folder to write into, and put it in the target's place when the block ends without an error.

    Args:
        target: the folder to make. Its missing parents are made too, and removed again if the block fails.
        overwrite: replace a folder that exists. It is deleted or kept, as the top of this module says.
        say: called with a line that names the place where an older folder was kept, or with a warning that something
            could not be deleted or synced.
        hashes: hashes of the new files that were begun in the block.

    Raises:
        UserError: as `check_target`, the place cannot be written, or another run is writing the same target.
    """
    with disk_errors(target):
        target = resolved(target)
        check_target(target, overwrite)
        with _parents(target.parent), _workplace(target, say) as place:
            new = place / "new"
            new.mkdir()
            yield new
            content = {"written_by": WRITER, "sha256": (hashes or Hashes()).of(new)}
            (new / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            _sync_tree(place)
            check_target(target, overwrite)  # again: a file may have appeared while the block ran
            _put_in_place(place, target)
            try:  # the folder is in its place: a failure from here on is only a warning
                for folder in (place, target.parent):
                    sync(folder)
            except OSError as error:
                say(f"warning: {target}: is complete, but may not outlast a loss of power ({error.strerror})")


def resolved(path: Path) -> Path:
    """The path with the links in its parents followed. Its last name is kept, even if it is a link.

    Raises:
        UserError: a parent is a link that leads nowhere.
    """
    with disk_errors(path):
        has_name = path.name not in ("", "..")
        for link in path.parents if has_name else (path, *path.parents):
            if link.is_symlink() and not link.exists():
                raise UserError(f"{path}: cannot be written ({link} is a symbolic link that leads nowhere)")
        return Path(os.path.realpath(path.parent), path.name) if has_name else Path(os.path.realpath(path))


def difference(folder: Path) -> str:
    """How a folder differs from what this program wrote, such as "README.md was changed"; "" if it does not."""
    listed = _read_manifest(folder)
    if listed is None:
        return f"no conversion wrote it, or its {MANIFEST} is damaged"
    try:
        for name in _entries(folder):
            path = folder / name
            if name == MANIFEST:
                continue
            if name not in listed:
                return one_line(f"{name} was added")
            if not stat.S_ISREG(path.lstat().st_mode) or _hash(path) != listed[name]:
                return one_line(f"{name} was changed")
    except OSError as error:
        return one_line(f"{error.filename} cannot be read")
    return ""


def _read_manifest(folder: Path) -> dict[str, str] | None:
    """The SHA-256 of each file that this program wrote into a folder, by name; None without a valid list."""
    path = folder / MANIFEST
    try:
        content = parse_json(read_text(path, MAX_MANIFEST_BYTES))
        is_ours = content["written_by"] == WRITER and isinstance(content["sha256"], dict) and not path.is_symlink()
        return content["sha256"] if is_ours else None
    except (ValueError, TypeError, KeyError):  # `read_text` raises UserError, a ValueError
        return None


def _entries(folder: Path) -> list[str]:
    """The relative names of all files, links and empty folders in a folder, at any depth."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir()))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make a folder and its parents. If the block fails, remove those that were made."""
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
def _workplace(target: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """A locked folder beside the target, for this run alone. The end of the block deletes it."""
    place = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    place.mkdir()
    try:
        with locked(place / MARK, os.O_CREAT | os.O_EXCL) as descriptor:
            if descriptor is None or not _clear_leftovers(target, place, say):
                raise UserError(f"{target}: another conversion is writing it")
            yield place
    finally:
        _clear(place, target, say)


def _clear_leftovers(target: Path, mine: Path, say: Callable[[str], None]) -> bool:
    """Clear the places of killed runs on this target; False if one of the runs is still alive."""
    name = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.partial")
    for place in list(target.parent.iterdir()):
        if place == mine or not name.fullmatch(place.name) or place.is_symlink():
            continue
        with suppress(OSError):  # the run was killed before it made its MARK
            place.rmdir()
        with suppress(OSError), locked(place / MARK) as descriptor:  # without a MARK the folder is not ours
            if descriptor is None:
                return False
            _clear(place, target, say)
    return True


def _clear(place: Path, target: Path, say: Callable[[str], None]) -> None:
    """End a run: bring `old` back, keep it beside the target, or delete it; delete the rest of the place."""
    new, old = place / "new", place / "old"
    try:
        for path in (new, old):
            if path.is_symlink() or (path.exists() and not path.is_dir()):  # no run of ours makes these
                say(f"warning: {place}: is left alone: {path.name!r} in it is not a folder")
                return
        if old.exists() and not os.path.lexists(target):
            old.rename(target)
        if new.exists():
            shutil.rmtree(new)
        if old.exists() and (reason := difference(old)):
            names = (target.with_name(f"{target.name}.{number}") for number in itertools.count(1))
            kept = next(name for name in names if not os.path.lexists(name))
            old.rename(kept)
            say(f"kept          {kept} (the old folder: {reason})")
        elif old.exists():
            old.rename(new)  # if the deletion is interrupted, the next run continues it
            shutil.rmtree(new)
        (place / MARK).unlink(missing_ok=True)
        place.rmdir()
    except FileNotFoundError:
        pass  # another run has cleared the place
    except OSError as error:
        say(f"warning: {place}: is left over and cannot be deleted ({error.strerror})")


def _put_in_place(place: Path, target: Path) -> None:
    """Make `new` the target. A target that holds something becomes `old`."""
    new, old = place / "new", place / "old"
    if target.exists() and any(target.iterdir()):
        new.rename(old)  # `new` may be deleted, so it must never hold the earlier folder
        if not rename_exactly(old, target, EXCHANGE):
            old.rename(new)
            target.rename(old)
            new.rename(target)
        return
    if os.name == "nt" and target.exists():
        target.rmdir()
    new.rename(target)  # fails if somebody has put something there


def _sync_tree(folder: Path) -> None:
    """Force a folder and all files in it to the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for path in (*(Path(root, name) for name in names), Path(root)):
            sync(path)
