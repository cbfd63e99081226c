"""Writes a folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_model.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two converters at once on one target are not kept apart
    fcntl = None  # type: ignore[assignment]


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that must not be written.

    Raises:
        UserError: `target` is a file, a symbolic link, a folder that exists (without `overwrite`), or one that is not a
            model's (with it).
    """
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
    if not (target / "config.json").is_file():
        raise UserError(f"{target}: holds no model (no config.json), so --overwrite does not replace it")


@contextmanager
def whole_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder beside `target` to write into, and put it in `target`'s place when the block ends well.

    A run that was killed leaves its folder behind under a name of its own; the next one on the same target clears it.

    Raises:
        UserError: as `check_target`, the place cannot be written, or another run is writing the same target.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 (resolve() would follow links)
    work, replaced = (target.with_name(f".{target.name}.{part}") for part in ("partial", "replaced"))
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be written ({error.strerror})") from None
    with _locked(work, target):
        _recover(target, replaced)
        for leftover in work.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield work
            check_target(target, overwrite)
            if target.exists():
                target.rename(replaced)
            work.rename(target)
        finally:
            if work.exists():
                shutil.rmtree(work, ignore_errors=True)
            _recover(target, replaced)


def _recover(target: Path, replaced: Path) -> None:
    """Finish what a run left between its two renames: keep the new folder if it is there, else bring back the old."""
    if replaced.exists():
        if target.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(target)


@contextmanager
def _locked(work: Path, target: Path) -> Iterator[None]:
    """Hold the folder being written, so that two runs on one target cannot mix their files."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(descriptor), work.stat())
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:  # held, or just renamed into place by its owner
            raise UserError(f"{target}: another conversion is writing it")
        yield
    finally:
        with suppress(OSError):
            os.close(descriptor)
