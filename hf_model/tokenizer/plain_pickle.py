"""Plain data out of a pickle that nobody vouches for: its opcodes are walked here, and nothing is ever unpickled."""

import pickletools
from pathlib import Path
from typing import Any

from hf_model.errors import UserError

MAX_BYTES = 16 * 2**20  # a hundred thousand characters take three
MAX_OPERATIONS = 2**20  # 2^17 characters, both ways round, take eight each at most
MAX_DEPTH = 100
MAX_KEY = 1000  # characters of a key: equal ones are compared again and again
MAX_NUMBER = 2**32  # of a key: wider ones can be chosen so that a dict is slow
MAX_BITS = 63  # of an integer: wider ones are made to be slow

# Opcode to the value that it puts on the stack.
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# Opcodes whose argument is the value itself.
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
STORE = {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}
RECALL = {"GET", "BINGET", "LONG_BINGET"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain_pickle(path: Path) -> Any:
    """The dicts, lists, tuples, strings and numbers in a pickle of any protocol.

    Raises:
        UserError: the file cannot be read, is too big, is damaged or no pickle, or holds anything but plain data.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: is more than {MAX_BYTES // 2**20} MiB long, too much for a vocabulary")
    try:
        return _walk(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, UnicodeError):
        raise UserError(f"{path}: is a damaged pickle, or none") from None


def _walk(raw: bytes) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # what stands under each mark
    memo: dict[int, Any] = {}
    for number, (opcode, argument, position) in enumerate(pickletools.genops(raw)):
        name = opcode.name
        if number >= MAX_OPERATIONS or len(below) > MAX_DEPTH:
            raise UserError(
                f"takes more than {MAX_OPERATIONS} steps, or holds more than {MAX_DEPTH} values in each other: too "
                "much for a vocabulary"
            )
        if name in VALUES:
            if isinstance(argument, int) and argument.bit_length() > MAX_BITS:
                raise UserError("holds an integer that is no id of a vocabulary")
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in STORE:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in RECALL:
            stack.append(memo[argument])  # type: ignore[index]
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("DICT", "LIST", "TUPLE"):
            items, stack = stack, below.pop()
            stack.append(_pairs(items) if name == "DICT" else items if name == "LIST" else tuple(items))
        elif name in ("SETITEM", "APPEND"):
            count = 2 if name == "SETITEM" else 1
            items = stack[-count:]
            del stack[-count:]
            _put(stack[-1], items)
        elif name in ("SETITEMS", "APPENDS"):
            items, stack = stack, below.pop()
            _put(stack[-1], items)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            named = f", {argument!r}" if isinstance(argument, str) else ""
            raise UserError(
                f"holds more than plain data ({name} at byte {position}{named}), and a pickle can run code: it was not "
                "opened. Save dicts, strings and integers only"
            )
    raise ValueError("it has no end")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """A dict of keys and values in turn; other keys than strings and integers can be made slow to hash."""
    keys, values = items[::2], items[1::2]
    if len(keys) != len(values) or not all(map(_is_key, keys)):
        raise ValueError("these are no pairs")
    return dict(zip(keys, values, strict=True))


def _is_key(key: Any) -> bool:
    return len(key) <= MAX_KEY if isinstance(key, str) else isinstance(key, int) and abs(key) < MAX_NUMBER


def _put(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict):
        target.update(_pairs(items))
    else:
        target.extend(items)  # of anything but a list, this is an AttributeError
