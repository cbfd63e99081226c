"""Checks of the files that arguments name, and prompts that are read from them, before the slow imports."""

import argparse
import shlex
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hf_model_cli.options import CHAT_TEMPLATES, DEFAULT_CHECKPOINT, HUB_NAME, Parser

FILE_ENDINGS = (".json", ".pkl", ".pickle", ".txt", ".bpe", ".pt", ".model", ".safetensors")  # no Hub name has these
CHECKPOINTS = ("out*/**/*.pt", "log*/**/*.pt", "*.pt")  # where the trainers of the family put theirs
WEIGHTS = ("*.safetensors", "*.bin")
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
    """Check that the model's files are there, and resolve `checkpoint_path` and `tokenizer_path` to what they mean."""
    mode = mode_of(parser, "checkpoint_path", args.checkpoint_path)
    if mode is None:
        parser.error(f"argument --checkpoint_path: there is no {args.checkpoint_path}{_instead(args.checkpoint_path)}")
    if stat.S_ISDIR(mode):
        args.checkpoint_path = _model_in(parser, args.checkpoint_path)
    elif (file := Path(args.checkpoint_path)).name == "model.safetensors" and file.with_name("config.json").exists():
        args.checkpoint_path = str(file.parent)
    elif file.suffix == ".safetensors":
        code = f"import safetensors.torch as s, torch; torch.save(s.load_file({str(file)!r}), 'ckpt.pt')"
        parser.error(f"argument --checkpoint_path: {file} is not a checkpoint; make one: python -c {shlex.quote(code)}")
    is_folder = stat.S_ISDIR(mode_of(parser, "checkpoint_path", args.checkpoint_path) or 0)
    if is_folder and (args.n_head or args.activation):
        parser.error("arguments --n_head and --activation: are for a checkpoint; a folder's config.json tells")
    args.tokenizer_path = _tokenizer(parser, args.tokenizer_path, args.characters_of, is_folder)
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
        found.update(Path(path).parent.glob("*.pt"))
    found.update(file for pattern in CHECKPOINTS for file in Path().glob(pattern))
    if found := {file for file in found if file.is_file()}:
        return f"; there is {_names(found)}: give one with --checkpoint_path"
    if path == DEFAULT_CHECKPOINT:
        return ", nor another checkpoint in out/ or log/: give one with --checkpoint_path"
    return ""


def _names(files: Iterable[Path]) -> str:
    """The names of files, the newest first."""
    newest = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
    more = f" and {len(newest) - MOST_NAMED} more" if len(newest) > MOST_NAMED else ""
    return ", ".join(map(str, newest[:MOST_NAMED])) + more


def _model_in(parser: Parser, folder: str) -> str:
    """The path of the model in a folder: the folder itself, or the only checkpoint that it holds."""
    path = Path(folder)
    has_config = any(
        mode_of(parser, "checkpoint_path", path / name) is not None for name in ("config.json", "adapter_config.json")
    )
    if has_config and any(next(path.glob(pattern), None) for pattern in WEIGHTS):
        return folder
    found = [file for file in path.glob("*.pt") if file.is_file()]
    if len(found) == 1:
        return str(found[0])
    if not found and has_config:
        return folder  # whoever loads it says what is missing
    if found := found or [file for file in path.glob("*/*.pt") if file.is_file()]:
        parser.error(f"argument --checkpoint_path: {folder} holds {_names(found)}: give one of them")
    parser.error(f"argument --checkpoint_path: {folder} holds no model (no config.json) and no checkpoint (.pt)")


def _tokenizer(parser: Parser, path: str | None, characters_of: str | None, is_folder: bool) -> str | None:
    """The tokenizer's path or Hub name; "auto" to look for it; None for a folder's own and for characters."""
    if characters_of is not None:
        if path is not None:
            parser.error("argument --characters_of: not allowed with argument --tokenizer_path")
        check_file(parser, "characters_of", characters_of)
        return None
    if path is None:
        return None if is_folder else "auto"
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
