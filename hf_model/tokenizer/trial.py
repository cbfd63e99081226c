"""Find a hostile tokenizer or chat template by what it does: another process uses it before this process does.

A tokenizer's JSON can multiply a text, take forever over a regular expression that backtracks, or crash the library. A
tokenizer passes if it encodes and decodes hard texts within a few seconds and little memory, with tokens in proportion
to the text. A chat template, which is a program, passes if it renders hard conversations with the same limits.

The user's cache keeps the checksums of those that passed, so that none is tried twice. A folder's own list
of checksums would prove nothing: whoever makes the folder makes the list.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from hf_model.errors import UserError, one_line

CHILD = Path(__file__).with_name("trial_child.py")
SECONDS = 60  # by the clock, for a busy machine; the process limits its own computing to fewer
MAX_TOKENIZER_BYTES = 2**27
MAX_CACHE_BYTES = 2**20  # a larger cache is begun anew
# The exit statuses of a process that computed too long. Windows has neither signal.
OUT_OF_TIME = {-number for name in ("SIGXCPU", "SIGKILL") if (number := getattr(signal, name, None))}


def check_by_trial(text: str, where: str | Path) -> None:
    """Try out the JSON of a `tokenizers` tokenizer, unless the same text has passed before.

    Args:
        where: the file, folder or name that an error message names.

    Raises:
        UserError: the library cannot read the tokenizer, or using it takes too much time or memory.
    """
    key = _key(text)
    if key not in _passed():
        _try_out("tokenizer", text, where)
        _remember(key)


def check_template_by_trial(template: str, special: dict[str, str], where: str | Path) -> None:
    """Try out a chat template, unless the same one has passed before.

    Args:
        special: the special tokens by role, which the template may write.
        where: the file or folder that an error message names.

    Raises:
        UserError: the template cannot be rendered, or takes too much time or memory.
    """
    text = json.dumps({"template": template, "special": special}, sort_keys=True)
    key = _key(text)
    if key not in _passed():
        _try_out("template", text, where)
        _remember(key)


def remember_ours(path: Path) -> None:
    """Remember that a tokenizer.json has passed: this project wrote the file, and its tokenizer has passed."""
    with suppress(OSError, UnicodeDecodeError):
        _remember(_key(path.read_text(encoding="utf-8")))


def _try_out(kind: str, text: str, where: str | Path) -> None:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    what = f"{where}: its chat template" if kind == "template" else f"{where}:"
    if not sys.executable or getattr(sys, "frozen", False):  # the executable is no Python
        raise UserError(
            f"{what} cannot be tried out: this program cannot start Python; run it with a Python interpreter"
        )
    # transformers, which renders a template, needs many packages.
    places = filter(os.path.isabs, sys.path) if kind == "template" else [Path(tokenizers.__file__).parent.parent]
    command = [sys.executable, "-I", str(CHILD), kind, *map(str, places)]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=SECONDS, env=environment)
        told, error, status = _told(done.stdout), done.stderr, done.returncode
    except subprocess.TimeoutExpired as timeout:
        told, error, status = _told(timeout.stdout or b""), b"", None
    except OSError as lack:
        raise UserError(f"{what} cannot be tried out: no process can be started ({lack.strerror})") from None
    if "passed" in told:
        return
    if "unreadable" in told:
        reason = one_line(told["unreadable"], 200)
        if kind == "template":
            raise UserError(f"{what} cannot be rendered: {reason}")
        raise UserError(f"{what} is not the JSON of a `tokenizers` tokenizer (Tokenizer.save writes one): {reason}")
    raise UserError(f"{what} cannot be used: {_seen(told, error, status)}")


def _seen(told: dict[str, Any], error: bytes, status: int | None) -> str:
    """Why a tokenizer did not pass."""
    if "refused" in told:
        return one_line(told["refused"], 200)
    doing = told.get("doing", "starting a process for it")
    if "memory" in told or b"memory allocation" in error:
        return f"{doing} takes too much memory"
    if status is None or status in OUT_OF_TIME:
        return f"{doing} takes longer than a few seconds"
    return f"{doing} crashes the library ({one_line(told.get('panic') or f'status {status}', 200)})"


def _told(output: bytes) -> dict[str, Any]:
    """What the process said. A later line replaces an earlier one with the same key. The last may be cut short."""
    told: dict[str, Any] = {}
    for line in output.splitlines():
        with suppress(ValueError):
            told |= json.loads(line)
    return told


def _key(text: str) -> str:
    """A checksum of what is tried, the trial and the libraries' versions."""
    versions = f"{tokenizers.__version__} {jinja2.__version__}".encode()
    return hashlib.sha256(b"\0".join((versions, CHILD.read_bytes(), text.encode()))).hexdigest()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "custom-gpt-hf", "tokenizers")


def _passed() -> set[str]:
    try:
        with _cache().open("rb") as file:
            return set(file.read(MAX_CACHE_BYTES).decode("ascii").split())
    except (OSError, RuntimeError, UnicodeDecodeError):  # RuntimeError: the user has no home
        return set()


def _remember(key: str) -> None:
    """Keep a checksum. If the cache cannot be written, the tokenizer is tried out again next time."""
    with suppress(OSError, RuntimeError):
        path = _cache()
        path.parent.mkdir(parents=True, exist_ok=True)
        is_full = path.exists() and path.stat().st_size + len(key) >= MAX_CACHE_BYTES
        with path.open("w" if is_full else "a", encoding="ascii") as file:
            file.write(f"{key}\n")
