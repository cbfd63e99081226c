"""`UserError`: the one error type for what a user can cause and mend; and warnings."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MAX_MESSAGE = 600
# What torch, the C library and the accelerators say when memory runs out.
OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "can't start new thread")


class UserError(ValueError):
    """Says in one line what is wrong, where, and what to do. The command lines print it and exit with status 2.

    A message may contain names from a stranger's file, so it is reduced to one line of printable characters.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: object, max_length: int = MAX_MESSAGE) -> str:
    """The text on one line, of printable characters. The middle of a long text is left out."""
    line = " ".join(_shortened(str(text), 2 * max_length).split())
    return _shortened("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line), max_length)


def some_of(names: Sequence[str], most: int) -> str:
    """The first names, and how many are left out.

    >>> some_of(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _shortened(text: str, max_length: int) -> str:
    if len(text) <= max_length:
        return text
    half = (max_length - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


@contextmanager
def memory_for(what: str, advice: str = "choose a narrower --dtype") -> Iterator[None]:
    """Turn the many errors of exhausted memory into a `UserError` with advice."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, MemoryError) or any(phrase in str(error) for phrase in OUT_OF_MEMORY):
            raise UserError(f"there is not enough memory {what}: free some, or {advice}") from None
        raise


def only_warnings(line: str, stacklevel: int = 4) -> None:
    """Make a line of a report that begins with "warning: " a warning of Python; leave other lines out.

    Args:
        stacklevel: as in `warnings.warn`. By default the warning names the caller of a function in `memory_for`.
    """
    if line.startswith("warning: "):
        warnings.warn(line.removeprefix("warning: "), stacklevel=stacklevel)
