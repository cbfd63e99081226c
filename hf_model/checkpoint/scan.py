"""What a pickle names and how big it gets, found without running any of it."""

import io
import pickletools
from collections.abc import Iterator
from typing import Any

from hf_model.errors import UserError

# Far above what real checkpoints need (some hundred bytes for a tensor, a dozen globals), far below what takes minutes.
MAX_PICKLE_BYTES = 4 * 2**20
MAX_GLOBALS = 100
MAX_TUPLE = 1000
MAX_WIDE_INTEGERS = 1000


def scan_pickle(file: io.BytesIO) -> set[str]:
    """The globals, as `module.name`, of the pickle at the file's position, which moves to the pickle's end.

    Runs the pickle's stack with sizes in place of values: 1, or for a tuple the number of values in it at any depth.
    Tuples and integers are what a few bytes can make slow to hash: a tuple that holds another one twice, which holds
    another one twice, and so on; integers that are equal modulo 2**61 - 1.

    Raises:
        UserError: a later protocol than `torch.save` writes, or a pickle made to take up time and memory.
        ValueError, IndexError, KeyError: not a pickle.
    """
    names: set[str] = set()
    stack: list[int] = []
    below: list[list[int]] = []  # what stands under each mark
    memo: dict[int, int] = {}
    wide_integers = 0
    operations: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(file)
    for opcode, argument, _ in operations:
        if opcode.proto > 2 or (opcode.name == "PROTO" and argument != 2):
            raise UserError("is of a pickle protocol that cannot be read safely: save it with torch.save's own, 2")
        if opcode.name == "GLOBAL":
            names.add(argument.replace("__builtin__ ", "builtins ").replace(" ", "."))  # Python 2's name, as pickled
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif isinstance(argument, int) and argument.bit_length() > 64:
            wide_integers += 1

        if opcode.name == "MARK":
            below.append(stack)
            stack = []
            continue
        taken: list[int] = []
        n_taken = len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:
            taken, stack = stack, below.pop()
            n_taken = opcode.stack_before.index(pickletools.markobject)
        if n_taken > len(stack):
            raise ValueError(f"{opcode.name} finds too few values")
        if n_taken:
            taken += stack[-n_taken:]
            del stack[-n_taken:]
        if opcode.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(1 + sum(taken))
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            stack.extend(1 for _ in opcode.stack_after)

        if len(names) > MAX_GLOBALS or wide_integers > MAX_WIDE_INTEGERS or (stack and stack[-1] > MAX_TUPLE):
            raise UserError("is built to take up time and memory: not written by a training script")
    return names
