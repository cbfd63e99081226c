"""The one error type for what a user can cause and mend."""

from collections.abc import Iterator
from contextlib import contextmanager

MAX_MESSAGE = 600
# What torch, the C library and the accelerators say when there is no more.
OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "can't start new thread")


class UserError(ValueError):
    """Says in one line what was wrong, where, and what to do. The command lines print it and exit with status 2.

    Names out of a file get into messages; whatever they hold, the message stays one line of printable characters.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: object, max_length: int = MAX_MESSAGE) -> str:
    """A text on one line, of printable characters; one that is too long keeps its start and its end."""
    line = " ".join(_shortened(str(text), 2 * max_length).split())
    return _shortened("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line), max_length)


def _shortened(text: str, max_length: int) -> str:
    if len(text) <= max_length:
        return text
    half = (max_length - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


@contextmanager
def memory_for(what: str, advice: str = "choose a narrower --dtype") -> Iterator[None]:
    """Turn the many ways in which memory runs out into the user's error."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, MemoryError) or any(phrase in str(error) for phrase in OUT_OF_MEMORY):
            raise UserError(f"there is not enough memory {what}: free some, or {advice}") from None
        raise
