"""The one error type: always one line of printable characters; and what counts as a lack of memory."""

import errno

import pytest

from hf_model.errors import MAX_MESSAGE, UserError, memory_for, one_line


@pytest.mark.parametrize(
    "message, line",
    [
        ("as it is: 漢字 🙂", "as it is: 漢字 🙂"),
        ("two\n  lines\tand a tab", "two lines and a tab"),
        ("a \x1b[31mred\x07 name", r"a \x1b[31mred\x07 name"),
        ("an unpaired \ud800", r"an unpaired \ud800"),
    ],
)
def test_a_message_is_one_printable_line(message: str, line: str) -> None:
    assert str(UserError(message)) == line


def test_a_message_that_is_too_long_keeps_its_start_and_its_end() -> None:
    line = str(UserError("start " + "x" * 10**7 + " end"))
    assert len(line) <= MAX_MESSAGE
    assert line.startswith("start x")
    assert line.endswith("x end")
    assert len(one_line("y" * 500, max_length=120)) <= 120


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=repr,
)
def test_a_lack_of_memory_is_the_user_s_error(error: Exception) -> None:
    message = "there is not enough memory to think: free some, or choose a narrower --dtype"
    with pytest.raises(UserError, match=message), memory_for("to think"):
        raise error


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="the shapes differ"), memory_for("to think"):
        raise RuntimeError("the shapes differ")
