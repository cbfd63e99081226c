"""Read files that come from users and strangers: up to a limit, as bytes, text or JSON."""

import json
import math
import stat
from pathlib import Path
from typing import Any

from hf_model.errors import UserError

MAX_DEPTH = 100  # of lists and dicts in each other
MAX_DIGITS = 400  # of an integer; longer ones take long to convert
LFS_POINTER = b"version https://git-lfs"  # how a file begins that stands for a large one
LFS_ADVICE = "is a git-lfs pointer, not the file itself: run `git lfs pull`"


def read_bytes(path: Path, max_bytes: int, *, streams: bool = False) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes.

    Args:
        streams: whether a pipe or a device is read too, until it ends.

    Raises:
        UserError: there is no such file, it is larger, it is a folder, pipe or device, or it cannot be read.
    """
    content = read_start(path, max_bytes + 1, streams=streams)
    if len(content) > max_bytes:
        raise UserError(f"{path}: is larger than {max_bytes:,} bytes")
    return content


def read_start(path: Path, n_bytes: int, *, streams: bool = False) -> bytes:
    """The first bytes of a regular file.

    Raises:
        UserError: there is no such file, it is a folder, pipe or device (without `streams`), it cannot be read, or it
            is Git LFS's pointer to a file.
    """
    try:
        if streams or stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
            with path.open("rb") as file:
                content = file.read(n_bytes)
            if content.startswith(LFS_POINTER):
                raise UserError(f"{path}: {LFS_ADVICE}")
            return content
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    raise UserError(f"{path}: is not a regular file")


def read_text(path: Path, max_bytes: int, *, streams: bool = False) -> str:
    """The content of a UTF-8 file of at most `max_bytes` bytes, without the byte order mark that some editors write.

    Raises:
        UserError: as `read_bytes`, or the file is not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes, streams=streams).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text. Stricter than `json.loads`: no NaN or Infinity, bounded depth and integers.

    Raises:
        ValueError: not JSON, a number that no float holds or of more than 400 digits, or nesting deeper than 100.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_float, parse_int=_parse_int)
    except RecursionError:
        raise ValueError(f"is nested deeper than {MAX_DEPTH}") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer) if isinstance(inner, (dict, list))]
        if not level:
            return value
    raise ValueError(f"is nested deeper than {MAX_DEPTH}")


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _refuse_constant(text: str) -> float:
    raise ValueError(f"holds {text}, which JSON does not allow")


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"holds the number {text[:20]}, which is too large")
    return number


def _parse_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"holds a number of {len(text)} digits")
    return int(text)
