"""What the commands share: a parser whose errors are one line, imports in a hurry, and how a command ends."""

import argparse
import difflib
import gc
import importlib.metadata
import io
import logging
import os
import re
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

DISTRIBUTION = "custom-gpt-hf"
DEFAULT_CHECKPOINT = "out/finetune/ckpt.pt"
DEFAULT_TOKENIZER = "data/tokenizer/custom_gpt_tokenizer.json"
DTYPES = ("auto", "float32", "float16", "bfloat16")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
CHECKPOINTS = ("out*/**/*.pt", "log*/**/*.pt", "*.pt")  # where the trainers of the family put theirs
MOST_NAMED = 5
MOST_PROMPT_BYTES = 2**26  # of a pipe or a file; what never ends would fill the memory
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FILES = (".json", ".pkl", ".pickle", ".txt", ".bpe", ".pt", ".model")  # endings of files, which no name has
# The keys of hf_model.formats.FORMATS, and what some of them have to choose from; a test compares them.
FORMATS = ("transformers", "gpt2", "gguf", "ctranslate2", "onnx", "checkpoint")
GGUF_TYPES = ("f32", "f16", "q8_0")
SHARD_SIZE = r"[1-9]\d{0,5}(\.\d{1,6})?[KMGT]B"
QUANTIZATIONS = ("int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32")
TRAINERS = ("original", "nanogpt")


class OutputError(Exception):
    """Standard output or standard error cannot be written; its cause is the system's error."""


def show(text: str, end: str = "\n", file: TextIO | None = None) -> None:
    """Print at once.

    Raises:
        OutputError: the stream cannot be written.
    """
    try:
        print(text, end=end, file=file, flush=True)
    except OSError as error:
        raise OutputError from error


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, and which names the argument that was probably meant."""

    def __init__(self, **how: Any):
        super().__init__(**how)
        self.add_argument("--version", action=Version, nargs=0, help="show the version and exit")

    def error(self, message: str) -> NoReturn:
        """One line, without the usage of twenty arguments in front."""
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        if "_ARGCOMPLETE" in os.environ:  # a shell asks what the line could go on with
            import argcomplete

            argcomplete.autocomplete(self)
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._advice(unknown[0])}")
        return known

    def _advice(self, word: str) -> str:
        if not word.startswith("-"):
            return " (a text of more than one word needs quotes, and each value the name of its argument in front)"
        name = re.sub("-(?=.)", "_", word.lstrip("-").partition("=")[0]).lower()
        names = [option.removeprefix("--") for option in self._option_string_actions]
        close = difflib.get_close_matches(name, names, n=1)
        return f" (did you mean --{close[0]}?)" if close else ""


class Version(argparse.Action):
    """Shows this project's version and those of the libraries that decide how it behaves."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            own = importlib.metadata.version(DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError:  # a clone that was not installed
            from hf_model import __version__ as own
        libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
        print(f"{DISTRIBUTION} {own} ({libraries}, Python {sys.version.split()[0]})")
        parser.exit()


def number(
    convert: Callable[[str], float], minimum: float, *, exclusive: bool = False, maximum: float = float("inf")
) -> Callable[[str], float]:
    """An argparse type: a number in a range, `minimum` left out if `exclusive`."""

    def parse(text: str) -> float:
        value = convert(text)
        if not (minimum < value if exclusive else minimum <= value) or not value <= maximum or value == float("inf"):
            low = f"{'above' if exclusive else 'at least'} {minimum}"
            high = f" and at most {maximum}" if maximum < float("inf") else ""
            raise argparse.ArgumentTypeError(f"must be {low}{high}, got {text}")
        return value

    parse.__name__ = convert.__name__  # argparse names it in its own messages
    return parse


def printable(text: object, max_length: int = 600) -> str:
    """A text on one line; hf_model.errors has another one, but takes seconds to import."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text)[: 4 * max_length])
    return line if len(line) <= max_length else f"{line[: max_length // 2]}…{line[-max_length // 2 :]}"


@contextmanager
def no_garbage_search() -> Iterator[None]:
    """For imports: of their time, a quarter goes into looking through what they make, which all stays; more at exit.

    Ctrl-C and SIGTERM end the program at once: some of what is imported would make something else of an exception.
    """
    # The libraries import torchao where it is installed, and it tells of its kernels for other machines.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with (
        _handling(signal.SIGINT, signal.default_int_handler, lambda *_: os._exit(130)),
        _handling(signal.SIGTERM, _terminate, lambda *_: os._exit(143)),
        _no_garbage_search(),
    ):
        yield


@contextmanager
def _no_garbage_search() -> Iterator[None]:
    is_first, was_enabled = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
        if is_first:
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


class Terminated(BaseException):
    """SIGTERM, as an exception: so that what is half-written is cleared away."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


@contextmanager
def _handling(number: int, instead_of: Any, handler: Callable[..., object]) -> Iterator[None]:
    """Handle a signal while the block runs, if nobody else does: a shell's background program may ignore Ctrl-C."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(number) != instead_of:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, instead_of)


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    python_s = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = python_s


def run_command(run: Callable[[argparse.Namespace], None], parse: Callable[[], argparse.Namespace]) -> int:
    """Parse the arguments and run a command, and turn however it ends into a line and an exit status.

    0: done, or whoever read the output has seen enough. 2: an error that the user can mend. 130: Ctrl-C. 143: SIGTERM.
    Anything else is a bug, and its traceback is shown.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows a "?" rather than a traceback
    try:
        with _handling(signal.SIGTERM, signal.SIG_DFL, _terminate), _warnings_on_one_line():
            return _run(run, parse)
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143


def _run(run: Callable[[argparse.Namespace], None], parse: Callable[[], argparse.Namespace]) -> int:
    try:
        os.getcwd()  # noqa: PTH109 (the libraries ask for it, and fail in ways of their own)
    except OSError:
        return _failed("the current folder is gone: go to another one")
    try:
        try:
            run(parse())
        finally:
            if sys.stdout is not None:
                show("", end="")  # what argparse has written
    except ModuleNotFoundError as error:
        return _failed(f"{error.name} is not installed for {sys.executable}: see the README")
    except ImportError as error:  # a library's file that the memory has no place for
        return _failed(f"the libraries cannot be loaded ({error})")
    except MemoryError:
        return _failed("there is not enough memory")
    except OutputError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error.__cause__, BrokenPipeError):  # `| head`
            return 0
        reason = getattr(error.__cause__, "strerror", None) or error.__cause__
        return _failed(f"the output cannot be written ({reason})")
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except ValueError as error:
        from hf_model.errors import UserError

        if not isinstance(error, UserError):
            raise
        return _failed(error)
    return 0


def _failed(message: object) -> int:
    with suppress(OSError):  # of a standard error that is full
        print(f"{Path(sys.argv[0]).name}: error: {printable(message)}", file=sys.stderr, flush=True)
    return 2


def is_one_of_several() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process with others beside it."""
    return "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def check_file(parser: Parser, name: str, path: str | Path) -> None:
    """End in the parser's error if an argument's file is not there."""
    mode = mode_of(parser, name, path)
    if mode is None or stat.S_ISDIR(mode):  # what else it may be instead of a file, its reader tells
        parser.error(f"argument --{name}: there is no file {path}")


def mode_of(parser: Parser, name: str, path: str | Path) -> int | None:
    """What an argument's path leads to, as in `st_mode`; None for nothing. An error if that cannot be found out."""
    try:
        return Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        parser.error(f"argument --{name}: {path} cannot be reached ({error.strerror})")


def check_checkpoint(parser: Parser, path: str, what: str) -> None:
    """End in the parser's error if a checkpoint is not there, and name those that are."""
    mode = mode_of(parser, "checkpoint_path", path)
    if mode is not None and not (what and stat.S_ISDIR(mode)):
        return
    message = f"argument --checkpoint_path: there is no {what}{path}"
    found = [file for pattern in CHECKPOINTS for file in Path().glob(pattern) if file.is_file()]
    if path == DEFAULT_CHECKPOINT and not found:
        message += ", nor another checkpoint in out/ or log/: give one with --checkpoint_path"
    elif path == DEFAULT_CHECKPOINT:
        found.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        message += f"; there is {', '.join(map(str, found[:MOST_NAMED]))}{more}: give one with --checkpoint_path"
    parser.error(message)


def add_vocabulary(group: argparse._ArgumentGroup, default: str) -> None:
    """The arguments that say what a model's tokens are, and so what its prompts are."""
    group.add_argument(
        "--tokenizer_path",
        help=f"tokenizer JSON, nanoGPT's meta.pkl, vocab.json or encoder.json, gpt2, or a folder (default: {default})",
    )
    group.add_argument("--characters_of", metavar="TEXT", help="the training text of a model of characters, instead")
    group.add_argument("--raw", action="store_true", help="the prompt is raw text, though the tokenizer has [BOS]")


def vocabulary_of(parser: Parser, args: argparse.Namespace, is_folder: bool) -> str | None:
    """What to take the vocabulary of a model from, a converted folder or a file.

    A path, a name, `auto` where the user said nothing of a file, None for a folder's own and for a training text. The
    file must be there, or the text be a possible name of the Hub. What only a file can lack is refused for a folder.
    """
    if is_folder and (args.n_head or args.activation):
        parser.error("arguments --n_head and --activation: are for a .pt file; a folder's config.json tells")
    if is_folder and args.tokenizer_path is None:
        return None
    if args.characters_of is not None:
        if args.tokenizer_path is not None:
            parser.error("argument --characters_of: not allowed with argument --tokenizer_path")
        check_file(parser, "characters_of", args.characters_of)
        return None
    path = args.tokenizer_path
    if path is None:
        return "auto"
    is_there = path and mode_of(parser, "tokenizer_path", path) is not None
    if not is_there and (not HUB_NAME.fullmatch(path) or Path(path).suffix in FILES):
        parser.error(f"argument --tokenizer_path: there is no file {path}")
    return path
