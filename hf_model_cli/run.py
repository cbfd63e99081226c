"""How a command runs and ends: signals, exit status, and what it prints."""

import argparse
import gc
import io
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

# Characters that move a terminal's cursor, change its state, or reverse the order of its text.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

A_FEW_SECONDS = 5.0
LOOK_AGAIN = 0.2  # seconds


def run_command(run: Callable[[argparse.Namespace], None], parse: Callable[[], argparse.Namespace]) -> int:
    """Parse the arguments, run the command, and return the exit status.

    0: done, or the reader of the output has closed it. 2: an error that the user can mend, in one line on standard
    error. 130: Ctrl-C. 143: SIGTERM. Any other exception is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a console cannot show becomes "?", not a traceback
    try:
        with handle_signal(signal.SIGTERM, signal.SIG_DFL, _terminate), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _run(run, parse)
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143


def _run(run: Callable[[argparse.Namespace], None], parse: Callable[[], argparse.Namespace]) -> int:
    try:
        os.getcwd()  # noqa: PTH109 (the libraries ask for it too, and fail in ways of their own)
    except OSError:
        return _fail("the current folder is gone: go to another one")
    try:
        try:
            run(parse())
        finally:
            if sys.stdout is not None:
                show("", end="")  # flushes what argparse has written
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed for {sys.executable}: see the README")
    except ImportError as error:  # for example, a library that does not fit into memory
        return _fail(f"the libraries cannot be loaded ({error})")
    except MemoryError:
        return _fail("there is not enough memory")
    except OutputError as error:
        discard_output()
        if isinstance(error.__cause__, BrokenPipeError):  # `| head`
            return 0
        return _fail(f"the output cannot be written ({getattr(error.__cause__, 'strerror', None) or error.__cause__})")
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except ValueError as error:
        from hf_model.errors import UserError  # takes seconds, and has been imported by whatever raised it

        if not isinstance(error, UserError):
            raise
        return _fail(error)
    return 0


def _fail(message: object) -> int:
    with suppress(OSError):  # standard error may be full
        print(f"{Path(sys.argv[0]).name}: error: {one_line(message)}", file=sys.stderr, flush=True)
    return 2


# Output


class OutputError(Exception):
    """Standard output or standard error cannot be written; the cause is the system's error."""


def show(text: str, end: str = "\n", file: TextIO | None = None, dim: bool = False) -> None:
    """Print at once. On a terminal, control characters are printed as escapes, and `dim` text is dim.

    Raises:
        OutputError: the stream cannot be written.
    """
    stream = sys.stdout if file is None else file
    if is_terminal(stream):
        text = CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
        if dim and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
            text = f"\x1b[2m{text}\x1b[22m"
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as error:
        raise OutputError from error


@contextmanager
def named_steps() -> Iterator[Callable[[str], None]]:
    """Yield a function that takes the name of each step of long work.

    After a few seconds of work, standard error gets a line for the present step and for each later one, and a line for
    every minute that a step takes.
    """
    began = time.monotonic()
    steps: list[tuple[str, float]] = []
    is_done = threading.Event()

    def watch() -> None:
        said: tuple[str, int] | None = None  # a step and its minute
        while not is_done.wait(LOOK_AGAIN):
            if steps and time.monotonic() - began > A_FEW_SECONDS:
                step, start = steps[-1]
                minutes = int(time.monotonic() - start) // 60
                if said != (step, minutes):
                    said = (step, minutes)
                    with suppress(OutputError):  # nobody reads it
                        show(
                            f"{one_line(step)} …" + (f" ({minutes} min)" if minutes else ""), file=sys.stderr, dim=True
                        )

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda step: steps.append((step, time.monotonic()))
    finally:
        is_done.set()
        watcher.join()


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def discard_output() -> None:
    """From now on, standard output goes nowhere: nobody reads it, or it cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(text: object, max_length: int = 600) -> str:
    """A text on one line of printable characters. (The one in hf_model.errors takes seconds to import.)"""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text)[: 4 * max_length])
    return line if len(line) <= max_length else f"{line[: max_length // 2]}…{line[-max_length // 2 :]}"


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    show(f"warning: {one_line(message)}", file=sys.stderr)


# Imports and signals


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch and transformers faster, and let Ctrl-C or SIGTERM end the program at once meanwhile.

    Some of these modules catch every exception while they are imported, a KeyboardInterrupt too.

    Raises:
        ImportError: they cannot be imported, perhaps because a variable such as HF_HUB_DOWNLOAD_TIMEOUT is no number.
    """
    for name in ("torchao", "torch.utils._pytree"):  # torchao reports its kernels for other machines
        logging.getLogger(name).setLevel(logging.ERROR)
    with (
        handle_signal(signal.SIGINT, signal.default_int_handler, lambda *_: os._exit(130)),
        handle_signal(signal.SIGTERM, _terminate, lambda *_: os._exit(143)),
        _no_garbage_collection(),
    ):
        try:
            yield
        except ValueError as error:
            raise ImportError(f"{error}; perhaps a variable of the environment has a wrong value") from error


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A quarter of the time of imports goes into searching new objects for garbage; there is none."""
    is_first, was_enabled = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
        if is_first:
            gc.freeze()  # spares the search at exit
    finally:
        if was_enabled:
            gc.enable()


class Terminated(BaseException):
    """SIGTERM as an exception, so that half-written files are removed."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


@contextmanager
def handle_signal(number: int, expected: Any, handler: Callable[..., object]) -> Iterator[None]:
    """Handle a signal while the block runs, if its handler is the expected one.

    A shell starts background programs with Ctrl-C ignored, and only the main thread may set a handler.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(number) != expected:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, expected)
