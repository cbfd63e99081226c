"""Writes a folder that appears whole or not at all."""

import ctypes
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_model.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two converters at once on one target are not kept apart
    fcntl = None  # type: ignore[assignment]

# What a converted folder consists of. Anything else in it is the user's, and never deleted.
OURS = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("README.md", "*.py"),
)


# The last line of the card of the formats whose files could be anybody's, such as a trainer's ckpt.pt: names, CRC32s.
SIGNATURE = re.compile(r"^<!-- custom-gpt-hf wrote these files: (\{.*\}) -->$", re.MULTILINE)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that must not be written.

    Raises:
        UserError: `target` is a file, a symbolic link, a folder that exists (without `overwrite`), or one that holds
            anything but a converted model (with it).
    """
    with disk_errors(target):
        if target.is_symlink():
            raise UserError(f"{target}: is a symbolic link; name the folder itself")
        if not target.exists():
            return
        if not target.is_dir():
            raise UserError(f"{target}: is a file, not a folder")
        entries = list(target.iterdir())
    if not entries:
        return
    if not overwrite:
        raise UserError(f"{target}: exists already; choose another --output_dir or add --overwrite")
    if (signed := _signed(target)) is not None:
        _check_signed(target, entries, signed)
        return
    if not (target / "config.json").is_file():
        raise UserError(f"{target}: holds no model (no config.json), so --overwrite does not replace it")
    for entry in entries:
        if entry.is_dir() or not any(entry.match(pattern) for pattern in OURS):
            raise UserError(f"{target}: holds {entry.name!r}, which --overwrite would delete: move it away first")


def sign(folder: Path) -> None:
    """Write into a folder's card which files it holds, so that `check_target` knows them again."""
    sums = {file.name: _checksum(file) for file in sorted(folder.iterdir()) if file.name != "README.md"}
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\n<!-- custom-gpt-hf wrote these files: {json.dumps(sums)} -->\n")


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(2**20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _signed(folder: Path) -> dict[str, int] | None:
    """Names and checksums of the files that the card says were written; None without such a card."""
    try:
        found = SIGNATURE.search((folder / "README.md").read_text(encoding="utf-8"))
        sums = json.loads(found[1]) if found else None
    except (OSError, ValueError):
        return None
    return sums if isinstance(sums, dict) else None


def _check_signed(target: Path, entries: list[Path], sums: dict[str, int]) -> None:
    """Refuse a folder with anything in it that was not written here, or was written anew since, as by a trainer."""
    for entry in entries:
        if entry.name != "README.md" and (not entry.is_file() or _checksum(entry) != sums.get(entry.name)):
            raise UserError(f"{target}: holds {entry.name!r}, which --overwrite would delete: move it away first")


@contextmanager
def whole_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder beside `target` to write into, and put it in `target`'s place when the block ends well.

    A run that was killed leaves files behind under names of their own; the next one on the same target clears them.

    Raises:
        UserError: as `check_target`, the place cannot be written, or another run is writing the same target.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 (resolve() would follow links)
    check_target(target, overwrite)
    lock, work, replaced = (target.with_name(f".{target.name}.{part}") for part in ("lock", "partial", "replaced"))
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(lock, target):
            _recover(target, replaced)
            _remove(work)
            work.mkdir()
            try:
                yield work
                check_target(target, overwrite)
                _put_in_place(work, target, replaced)
            finally:
                _remove(work)
                _recover(target, replaced)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the errors of a full, failing or read-only disk into the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None


def _put_in_place(work: Path, target: Path, replaced: Path) -> None:
    if target.exists() and not _exchange(work, target):
        target.rename(replaced)
    if not target.exists():
        work.rename(target)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that there is no moment without either; False where the system cannot."""
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "renameat2"):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(library.renameat2(at_fdcwd, bytes(one), at_fdcwd, bytes(other), rename_exchange) == 0)


def _recover(target: Path, replaced: Path) -> None:
    """Finish what a run left between its two renames: keep the new folder if it is there, else bring back the old."""
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    _remove(replaced)


def _remove(path: Path) -> None:
    """Delete a folder, or a link in its place, but never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(lock: Path, target: Path) -> Iterator[None]:
    """Hold a file beside the target, so that two runs on it cannot mix their files; gone when the block ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = os.path.samestat(os.fstat(descriptor), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            is_held = False
        if not is_held:  # another run has it, or has just deleted it at its end
            raise UserError(f"{target}: another conversion is writing it")
        try:
            yield
        finally:
            lock.unlink()
    finally:
        os.close(descriptor)
