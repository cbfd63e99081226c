"""Checks of the files that arguments name, and prompts that are read from them, before the slow imports."""

import argparse
import difflib
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hf_model_cli.options import CHAT_TEMPLATES, CHECKPOINT_ENDINGS, DEFAULT_CHECKPOINT, HUB_NAME, Parser

FILE_ENDINGS = (".json", ".pkl", ".pickle", ".txt", ".bpe", ".pt", ".model", ".safetensors")  # no Hub name has these
PLACES = ("out*/**/*", "log*/**/*", "*")  # where the trainers of the family put their checkpoints
MOST_NAMED = 5
MOST_PROMPT_BYTES = 2**26  # a device or a pipe without an end would fill the memory
FROM_FILE = "FILE:"  # nanoGPT's prefix of a path that holds the prompt


def mode_of(parser: Parser, option: str, path: str | Path) -> int | None:
    """The `st_mode` of what a path leads to, None if nothing is there; a parser error if that cannot be found out."""
    try:
        return Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        parser.error(f"argument --{option}: {path} cannot be reached ({error.strerror})")


def check_file(parser: Parser, option: str, path: str | Path) -> None:
    """A parser error if no file is there."""
    mode = mode_of(parser, option, path)
    if mode is None or stat.S_ISDIR(mode):
        parser.error(f"argument --{option}: there is no file {path}")


def check_model(parser: Parser, args: argparse.Namespace) -> None:
    """Check that the model's files are there, and resolve `tokenizer_path`: `"auto"` looks for one."""
    if mode_of(parser, "checkpoint_path", args.checkpoint_path) is None:
        parser.error(f"argument --checkpoint_path: there is no {args.checkpoint_path}{_instead(args.checkpoint_path)}")
    args.tokenizer_path = _tokenizer(parser, args.tokenizer_path, args.characters_of)
    check_chat_template(parser, args)


def check_chat_template(parser: Parser, args: argparse.Namespace) -> None:
    template = args.chat_template
    if template is None:
        return
    for name in ("raw", "instructions"):
        if getattr(args, name):
            parser.error(f"argument --chat_template: not allowed with argument --{name}, which says the opposite")
    if template not in CHAT_TEMPLATES and mode_of(parser, "chat_template", template) is None:
        known = ", ".join(CHAT_TEMPLATES)
        parser.error(f"argument --chat_template: {template!r} is none of {known}, nor a file that is there")


def _instead(path: str) -> str:
    """What to give instead of a path that is not there; "" if nothing is known."""
    if HUB_NAME.fullmatch(path) and "/" in path and not path.endswith(FILE_ENDINGS) and not Path(path).parent.is_dir():
        return f"; download a model of the Hub first: hf download {path} --local-dir {Path(path).name}"
    found: set[Path] = set()
    with suppress(OSError):  # the path may be too long, or closed to us
        found.update(Path(path).parent.iterdir())
    found.update(file for pattern in PLACES for file in Path().glob(pattern))
    if found := {file for file in found if file.suffix in CHECKPOINT_ENDINGS and file.is_file()}:
        typed = "" if path == DEFAULT_CHECKPOINT else Path(path).name
        return f"; there is {_names(found, typed)}: give one with --checkpoint_path"
    if path == DEFAULT_CHECKPOINT:
        return ", nor another checkpoint in out/ or log/: give one with --checkpoint_path"
    return ""


def _names(files: Iterable[Path], name: str) -> str:
    """The paths of files: those whose name is near this one, the nearest first; then the others, the newest first."""
    newest = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
    near = difflib.get_close_matches(name, dict.fromkeys(file.name for file in newest), n=MOST_NAMED)
    nearest = sorted(newest, key=lambda file: near.index(file.name) if file.name in near else MOST_NAMED)
    more = f" and {len(nearest) - MOST_NAMED} more" if len(nearest) > MOST_NAMED else ""
    return ", ".join(map(str, nearest[:MOST_NAMED])) + more


def _tokenizer(parser: Parser, path: str | None, characters_of: str | None) -> str | None:
    """The tokenizer's path or Hub name; "auto" for a folder's own or to look for it; None for characters."""
    if characters_of is not None:
        if path is not None:
            parser.error("argument --characters_of: not allowed with argument --tokenizer_path")
        check_file(parser, "characters_of", characters_of)
        return None
    if path is None:
        return "auto"
    is_there = path and mode_of(parser, "tokenizer_path", path) is not None
    if not is_there and (not HUB_NAME.fullmatch(path) or path.endswith(FILE_ENDINGS)):
        parser.error(f"argument --tokenizer_path: there is no file {path}")
    return path


def read_prompt(path: str | None) -> str:
    """The text of a file, or of standard input for None.

    Raises:
        argparse.ArgumentTypeError: it cannot be read, is not UTF-8, or is too long.
    """
    name = "standard input" if path is None else path
    try:
        if path is not None:
            with Path(path).open("rb") as file:
                content = file.read(MOST_PROMPT_BYTES + 1)
        else:
            content = b"" if sys.stdin is None else sys.stdin.buffer.read(MOST_PROMPT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise argparse.ArgumentTypeError(f"{name} cannot be read ({getattr(error, 'strerror', error)})") from None
    return decoded(content, name)


def decoded(content: bytes, name: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark.

    Raises:
        argparse.ArgumentTypeError: they are not UTF-8, or too many.
    """
    if len(content) > MOST_PROMPT_BYTES:
        raise argparse.ArgumentTypeError(f"{name} is more than {MOST_PROMPT_BYTES // 2**20} MiB long")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte {content[error.start]:#04x} in position {error.start}"
        raise argparse.ArgumentTypeError(f"{name} is not UTF-8 text ({wrong})") from None


def read_prompt_file(path: str) -> str:
    """The prompt that a file holds, with newlines as Python's text mode has them.

    Raises:
        argparse.ArgumentTypeError: as `read_prompt`, or the file is empty.
    """
    text = read_prompt(path).replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise argparse.ArgumentTypeError(f"{path} is empty")
    return text
