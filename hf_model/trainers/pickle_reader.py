"""What a pickle says, read without running any of it: plain values, records of tensors, and stand-ins for the rest.

A pickle is a program: its opcodes build values, and call functions that it names. Here the opcodes build dicts, lists,
tuples, strings and numbers, and of all calls only those are understood that make a dict, bytes or a tensor. Everything
else becomes a stand-in, which only remembers what was said of it. So no opcode takes longer than its own bytes.
"""

import io
import pickletools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_model.errors import UserError

# Far above what real checkpoints need (some hundred bytes for a tensor, a dozen globals), far below what takes minutes.
MAX_PICKLE_BYTES = 4 * 2**20
MAX_OPERATIONS = 500_000
MAX_GLOBALS = 100
MAX_NAME = 1000
MAX_DIMENSIONS = 8

# What torch needs to make tensors and bytes, and no more of what its own safe loading lets pass.
TORCH_GLOBALS = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|complex)"
    r"|torch\.(\w+Storage|storage\.\w+Storage|Size|device|b?float\w+|u?int\d+|bool|complex\d+)"
    r"|torch\._utils\._rebuild_(tensor(_v2|_v3)?|parameter)|torch\.nn\.parameter\.Parameter"
)
# Plain records of the standard library and of NumPy that trainers of this family pickle.
HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path"
    r"|numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
)


@dataclass(eq=False, slots=True, repr=False)  # a repr would go through all that it holds
class StandIn:
    """Takes the place of a class, a function or an object: keeps what was pickled of it, and has none of its code."""

    name: str
    """Module and name of the class or function."""
    args: tuple[Any, ...] = ()
    """What it was called with; of a class or function itself nothing."""
    state: Any = None


@dataclass(frozen=True, eq=False)
class StoredBytes:
    """Where a tensor's values are: the key of a storage, and how many values of what type that has."""

    key: str
    dtype: str
    """A torch storage class's name, such as `"FloatStorage"`."""
    length: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as the file describes it; nothing of it has been read."""

    storage: StoredBytes
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None = None
    """A torch dtype's name, where the storage does not tell."""
    is_plain: bool = True
    """Whether its values are the storage's own, not their negatives or conjugates."""


def kind_of(value: Any) -> str:
    """What a user would call a value."""
    if isinstance(value, StandIn):
        return value.name.rpartition(".")[2]
    return "Tensor" if isinstance(value, StoredTensor) else type(value).__name__


def read_pickle(file: io.BytesIO) -> tuple[Any, list[StoredBytes]]:
    """The value of the pickle at the file's position, which moves to the pickle's end, and the storages it speaks of.

    Raises:
        UserError: a later protocol than `torch.save` writes, code, or a pickle made to take up time and memory.
        ValueError, IndexError, KeyError, TypeError: not a pickle, or not one of tensors and plain values.
    """
    machine = _Machine()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.proto > 2 or (opcode.name == "PROTO" and argument != 2):
            raise UserError("is of a pickle protocol that cannot be read safely: save it with torch.save's own, 2")
        if number > MAX_OPERATIONS:
            raise UserError(TOO_MUCH)
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, argument)
    return machine.stack.pop(), machine.storages


TOO_MUCH = "is built to take up time and memory: not written by a training script"
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS_AND_TEXTS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"),
}


@dataclass
class _Machine:
    """Pickle's stack, with what each of its opcodes leaves there."""

    stack: list[Any] = field(default_factory=list)
    below: list[list[Any]] = field(default_factory=list)
    """What stands under each mark."""
    memo: dict[int, Any] = field(default_factory=dict)
    names: dict[str, StandIn] = field(default_factory=dict)
    storages: list[StoredBytes] = field(default_factory=list)
    work: int = 0
    """What calls have gone through that the pickle may name again and again, in values and characters."""

    def step(self, name: str, argument: Any) -> None:
        if name in NUMBERS_AND_TEXTS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(self.named(argument))
        elif name != "PROTO":
            getattr(self, f"do_{name}", self.unknown)()

    def unknown(self) -> None:
        raise ValueError("an opcode that torch.save does not write")

    def since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def do_MARK(self) -> None:  # noqa: N802
        self.below.append(self.stack)
        self.stack = []

    def do_POP(self) -> None:  # noqa: N802
        self.stack.pop()

    def do_POP_MARK(self) -> None:  # noqa: N802
        self.since_mark()

    def do_EMPTY_DICT(self) -> None:  # noqa: N802
        self.stack.append({})

    def do_EMPTY_LIST(self) -> None:  # noqa: N802
        self.stack.append([])

    def do_EMPTY_TUPLE(self) -> None:  # noqa: N802
        self.stack.append(())

    def do_LIST(self) -> None:  # noqa: N802
        values = self.since_mark()
        self.stack.append(values)

    def do_TUPLE(self) -> None:  # noqa: N802
        values = self.since_mark()
        self.stack.append(tuple(values))

    def do_DICT(self) -> None:  # noqa: N802
        values = self.since_mark()
        self.stack.append({})
        self.set_items(values)

    def do_TUPLE1(self) -> None:  # noqa: N802
        self.put_tuple(1)

    def do_TUPLE2(self) -> None:  # noqa: N802
        self.put_tuple(2)

    def do_TUPLE3(self) -> None:  # noqa: N802
        self.put_tuple(3)

    def put_tuple(self, length: int) -> None:
        self.stack.append(tuple([self.stack.pop() for _ in range(length)][::-1]))

    def do_APPEND(self) -> None:  # noqa: N802
        self.extend([self.stack.pop()])

    def do_APPENDS(self) -> None:  # noqa: N802
        self.extend(self.since_mark())

    def do_SETITEM(self) -> None:  # noqa: N802
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def do_SETITEMS(self) -> None:  # noqa: N802
        self.set_items(self.since_mark())

    def do_BUILD(self) -> None:  # noqa: N802
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, StandIn):
            items = target.state if isinstance(target.state, dict) else {}
            self.count(len(items))
            target.state = {**items, **state} if items and isinstance(state, dict) else state
        elif not isinstance(target, dict):  # of a dict it is attributes, such as a state dict's `_metadata`
            raise TypeError("sets the state of what is no object")

    def do_REDUCE(self) -> None:  # noqa: N802
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, args))

    do_NEWOBJ = do_REDUCE  # noqa: N815

    def do_BINPERSID(self) -> None:  # noqa: N802
        """torch's way to write down a storage: ("storage", class, key, device, length), and in older files a view."""
        named = self.stack.pop()
        if not isinstance(named, tuple) or not 5 <= len(named) <= 6:
            raise ValueError("a persistent id that is no storage")
        kind, storage, key, _, length, *view = named
        if kind != "storage" or not isinstance(key, str) or not _is_size(length) or any(view):
            raise ValueError("a persistent id that is no storage")
        self.storages.append(StoredBytes(key, kind_of(storage), length))
        self.stack.append(self.storages[-1])

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, StandIn):
            raise TypeError("appends to what is no list")

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, StandIn):  # of a class that is a dict
            target.state = target.state if isinstance(target.state, dict) else {}
            target = target.state
        if not isinstance(target, dict):
            raise TypeError("sets an item of what is no dict")
        target.update(zip(map(_key, values[::2]), values[1::2], strict=True))

    def named(self, argument: str) -> StandIn:
        """The class or function of a name, which must be one that plain data have."""
        if len(argument) > MAX_NAME:
            raise UserError(TOO_MUCH)
        name = argument.replace("__builtin__ ", "builtins ").replace(" ", ".")  # Python 2's name, as pickled
        if not TORCH_GLOBALS.fullmatch(name) and not _is_harmless(name):
            raise UserError(
                f"names {name}, which is not data: it was not loaded, since that could run code. Save only the "
                "state dict and plain values: torch.save({'model': model.state_dict(), 'model_args': {...}}, path)"
            )
        self.names.setdefault(name, StandIn(name))
        if len(self.names) > MAX_GLOBALS:
            raise UserError(TOO_MUCH)
        return self.names[name]

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, StandIn) or not isinstance(args, tuple):
            raise TypeError("calls what is no function")
        is_named = self.names.get(function.name) is function  # and not what a call of it has given
        understood: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": self.ordered_dict,
            "_codecs.encode": self.encode,
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor_v2,
            "torch._utils._rebuild_tensor_v3": _tensor_v3,
            "torch._utils._rebuild_parameter": _parameter,
        }
        if is_named and function.name in understood:
            return understood[function.name](*args)
        return StandIn(function.name, args)

    def encode(self, text: str, encoding: str = "") -> Any:
        """How a pickle of protocol 2 writes bytes."""
        if encoding != "latin1":
            return StandIn("_codecs.encode")
        self.count(len(text))
        return text.encode("latin1")

    def ordered_dict(self, pairs: Any = ()) -> dict[Any, Any]:
        if not isinstance(pairs, (list, tuple)):
            raise TypeError("a dict of what is no list")
        self.count(len(pairs))
        return {_key(key): value for key, value in pairs}

    def count(self, work: int) -> None:
        self.work += work
        if self.work > MAX_PICKLE_BYTES:
            raise UserError(TOO_MUCH)


def _is_harmless(name: str) -> bool:
    """Whether a stand-in may take the place of this global: plain records that trainers of this family pickle.

    Besides the listed ones these are classes (capitalised names) of the user's own code or of a third-party package.
    """
    module, _, attribute = name.rpartition(".")
    package = module.split(".")[0]
    is_foreign = package not in sys.stdlib_module_names and package not in ("torch", "numpy")
    return HARMLESS.fullmatch(name) is not None or (is_foreign and attribute[:1].isupper())


def _key(value: Any) -> Any:
    """A dict's key: what is neither text nor a small number stands for itself alone, and nothing of it is hashed."""
    if isinstance(value, int) and value.bit_length() > 64:
        return StandIn("builtins.int")
    is_plain = value is None or isinstance(value, (str, int, float, bytes))
    return value if is_plain or isinstance(value, StandIn) else StandIn(f"builtins.{kind_of(value)}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**60


def _sizes(values: Any) -> tuple[int, ...]:
    if isinstance(values, StandIn) and values.name == "torch.Size":
        (values,) = values.args
    if not isinstance(values, (tuple, list)) or len(values) > MAX_DIMENSIONS or not all(map(_is_size, values)):
        raise ValueError("a tensor's sizes are no sizes")
    return tuple(values)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any = None, metadata: Any = None) -> Any:
    if not isinstance(storage, StoredBytes) or not _is_size(offset):
        raise TypeError("a tensor without a storage")
    shape, stride = _sizes(shape), _sizes(stride)
    if len(shape) != len(stride):
        raise ValueError("a tensor of as many sizes as strides")
    return StoredTensor(storage, offset, shape, stride, kind_of(dtype) if dtype else None, is_plain=not metadata)


def _tensor_v2(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None) -> Any:
    return _tensor(storage, offset, shape, stride, metadata=metadata)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    return _tensor(storage, offset, shape, stride, dtype, metadata)


def _parameter(data: Any, requires_grad: Any = None, hooks: Any = None) -> Any:
    return data
