"""Reads what a pickle holds without running it: plain values, descriptions of tensors, and stand-ins for the rest.

A pickle is a program: its opcodes build values and call functions. Here a call only makes a stand-in that remembers
the function's name and the arguments. The few calls that make dicts, objects and tensors are understood.
"""

import pickletools
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from mmap import mmap
from typing import IO, Any

from hf_model.errors import UserError, one_line

MAX_PICKLE_BYTES = 64 * 2**20
# A step takes at most 120 bytes of memory, and a million take a second. Long lists and logs take 3 to 9 bytes a step.
STEPS_OF_ANY_FILE, BYTES_PER_MORE_STEP = 5_000_000, 3
LARGE = ("EMPTY_DICT", "EMPTY_SET", "MARK")  # these count as two steps: one byte of the file takes 60 of memory
MAX_NAME = 1000
MAX_DEPTH = 100
MAX_DIMENSIONS = 64
# A dict compares long equal keys in full, and chosen large integers can make it search all its keys for each one.
MAX_KEY_LENGTH = 1000
MAX_KEY_NUMBER = 2**18

# Modules of the standard library whose classes hold data. Classes of other modules can start processes or run code.
DATA_MODULES = {
    *("abc", "array", "collections", "collections.abc", "dataclasses", "datetime", "decimal", "_decimal", "_pydecimal"),
    *("enum", "fractions", "ipaddress", "numbers", "pathlib", "pathlib._local", "random", "typing", "uuid", "zoneinfo"),
}
# Other names that stand for data. Most of them begin with a small letter.
DATA = re.compile(
    r"builtins\.(object|type|bool|int|float|complex|str|bytes|bytearray|tuple|list|dict|(frozen)?set|range|slice"
    r"|[A-Z]\w*)|collections\.(defaultdict|deque)|datetime\.(date|time|datetime|timedelta|timezone)|array\._?array\w*"
    r"|argparse\.Namespace|types\.(SimpleNamespace|MappingProxyType|GenericAlias|(None|Union|Ellipsis)Type)"
    r"|zoneinfo\.ZoneInfo\._unpickle|copyreg\._reconstructor|_codecs\.encode|functools\.partial|re\.(_compile|RegexFlag)"
    r"|_?operator\.(getitem|or_)"
    r"|_?io\.(Bytes|String)IO|time\.struct_time|os\.(stat_result|terminal_size)"
    r"|posix\.(uname|times)_result|platform\.uname_result|logging\.LogRecord|string\.Template"
    r"|torch\.(device|bool|half|float|double|short|int|long|strided|sparse_\w+"
    r"|([qu]*int|b?float|complex|bits)\d\w*|per_(tensor|channel)_\w+)"
    r"|torch\.((cuda\.)?amp\.grad_scaler\._refresh_per_optimizer_state|utils\.data\._utils\.collate\.default_collate)"
    r"|torch\.(serialization\._get_layout|nn\.functional\.\w+|_C\._nn\.\w+)|numpy\.(dtype|ndarray|recarray|record|matrix"
    r"|(bool|u?int|u?long|u?short|u?byte|float|double|half|single|complex|str|bytes|object|void|datetime|timedelta)\w*"
    r"|_?core\.multiarray\.(scalar|_reconstruct)|_?core\.numeric\._frombuffer|(_?core\.records|rec)\.rec\w+"
    r"|ma\.core\._mareconstruct|random\._pickle\.__\w+_ctor)"
)
# The functions by which libraries put their own objects together again, such as `torch._utils._rebuild_tensor_v2`.
REBUILDS = re.compile(r"_rebuild_\w+|_reconstruct\w*|_new_[A-Z]\w*|_unpickle_\w+|__pyx_unpickle_\w+")
STANDARD_LIBRARY = sys.stdlib_module_names | {"popen2", "new", "pipes", "imp", "distutils"}  # and earlier modules


@dataclass(eq=False, slots=True, repr=False)
class StandIn:
    """Takes the place of a class, a function or an object: keeps what was pickled, without the class's code."""

    name: str
    """Module and name of the class or function."""
    args: tuple[Any, ...] = ()
    """The arguments of the call. Empty for the class or function itself."""
    state: Any = None
    """The attributes, mostly a dict."""
    content: Any = None
    """The items of an object that is a dict, a list or a set."""

    def __repr__(self) -> str:
        return kind_of(self)  # what the object holds could be too long to print


@dataclass(frozen=True, eq=False)
class StoredBytes:
    """Where a tensor's values are: the key of a storage, the number of its values and their type."""

    key: str
    dtype: str
    """The name of a torch storage class, such as `"FloatStorage"`."""
    length: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as the file describes it. None of its values has been read."""

    storage: StoredBytes
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None = None
    """The name of a torch dtype, if it is not that of the storage."""
    is_plain: bool = True
    """Whether its values are the storage's own, not their negatives or conjugates."""


def kind_of(value: Any) -> str:
    """What a user would call a value."""
    if isinstance(value, StandIn):
        return value.name.rpartition(".")[2]
    return "Tensor" if isinstance(value, StoredTensor) else type(value).__name__


def dict_of(value: Any) -> Any:
    """The items of an object whose class is a dict; any other value itself."""
    return value.content if isinstance(value, StandIn) and isinstance(value.content, dict) else value


def fields_of(value: Any) -> dict[Any, Any] | None:
    """A dict, or the items or the attributes of an object; None for any other value."""
    fields = dict_of(value)
    fields = fields.state if isinstance(fields, StandIn) else fields
    return fields if isinstance(fields, dict) else None


def read_pickle(
    file: bytes | IO[bytes] | mmap,
    embedded: Callable[[bytes], StoredBytes] | None = None,
    budget: "Budget | None" = None,
) -> tuple[Any, list[StoredBytes]]:
    """The value of the pickle at the file's position, and the storages that the pickle refers to.

    The position moves to the end of the pickle.

    Args:
        embedded: reads a storage that stands in the pickle itself; None if there must be none.
        budget: counts the steps of several pickles together; None for one in proportion to the file.

    Raises:
        UserError: the pickle refers to code, or holds too much.
        Exception: of any kind, if it is damaged.
    """
    if budget is None:
        budget = Budget(len(file) if isinstance(file, (bytes, mmap)) else 0)
    machine = _Machine(embedded, budget=budget)
    for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]  # which an mmap serves too
        machine.budget.count(2 if opcode.name in LARGE else 1)
        if opcode.name == "STOP":
            break
        if opcode.name not in STEPS:
            raise ValueError(f"the opcode {opcode.name}")
        STEPS[opcode.name](machine, argument)
    (value,) = machine.last(1)
    if refused := machine.refused | {name: None for name in machine.unproven if name not in machine.classes}:
        found = find(value, lambda value: isinstance(value, StandIn) and value.name in refused)
        name, place = (found[0].name, found[1]) if found else (next(iter(refused)), "")
        raise UserError(
            f"{place}{': ' if place else ''}refers to {one_line(name, 100)}. Functions, and classes that can "
            f"act, are not read, since a file can use them to run code (nothing was run)"
        )
    return value, machine.storages


def find(
    value: Any, is_wanted: Callable[[Any], bool], path: tuple[str, ...] = (), seen: set[int] | None = None
) -> tuple[Any, str] | None:
    """The first wanted value inside another, and its place: the keys that lead to it, joined by dots.

    Raises:
        UserError: the values are nested too deep.
    """
    seen = set() if seen is None else seen  # one object can stand in many places
    if is_wanted(value):
        return value, ".".join(filter(None, path))
    if not isinstance(value, (dict, list, tuple, StandIn)) or id(value) in seen:
        return None
    if len(path) > MAX_DEPTH:
        raise UserError(f"holds values that are nested more than {MAX_DEPTH} deep")
    seen.add(id(value))
    found = (find(inner, is_wanted, (*path, key), seen) for key, inner in _parts(value))
    return next(filter(None, found), None)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield "", key
            yield one_line(key, 60) if isinstance(key, (str, int)) else kind_of(key), inner
    elif isinstance(value, StandIn):
        yield from (("", inner) for inner in (*value.args, value.state, value.content))
    else:
        yield from ((str(index), inner) for index, inner in enumerate(value))


def _is_capital(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _is_data(module: str, name: str) -> bool:
    """Whether a stand-in may take the place of a class, or of a function that only puts data together.

    A name that begins with a capital letter is taken for a class.
    """
    is_class = all(map(_is_capital, name.split(".")))
    if DATA.fullmatch(f"{module}.{name}"):
        return True
    if module.partition(".")[0] in STANDARD_LIBRARY:
        return is_class and module in DATA_MODULES
    return is_class or REBUILDS.fullmatch(name) is not None


def _key(value: Any) -> Any:
    """A dict's key: None, a short text or a small integer. A stand-in, compared by identity, replaces any other key."""
    if isinstance(value, (str, bytes)) and len(value) <= MAX_KEY_LENGTH:
        return value
    if value is None or isinstance(value, StandIn) or (isinstance(value, int) and abs(value) <= MAX_KEY_NUMBER):
        return value
    return StandIn(f"builtins.{kind_of(value)}", (value,))


class Budget:
    """Counts the steps of pickles that are read together. Longer pickles may take more steps."""

    def __init__(self, n_bytes: int = 0) -> None:
        self.steps, self.most = 0, STEPS_OF_ANY_FILE + n_bytes // BYTES_PER_MORE_STEP

    def count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.most:
            raise UserError(f"holds more than about {self.most:,} values")


@dataclass
class _Machine:
    """Pickle's stack and memo, and the names that the pickle refers to."""

    embedded: Callable[[bytes], StoredBytes] | None = None
    stack: list[Any] = field(default_factory=list)
    marked: list[list[Any]] = field(default_factory=list)
    """For each mark the stack below it."""
    memo: list[Any] = field(default_factory=list)
    names: dict[str, StandIn] = field(default_factory=dict)
    unproven: dict[str, None] = field(default_factory=dict)
    """Names of code, unless their use shows otherwise, in the order of the file."""
    refused: dict[str, None] = field(default_factory=dict)
    """Names of code that the pickle has used as such."""
    classes: set[str] = field(default_factory=set)
    """Names of which the pickle makes objects as of a class."""
    storages: list[StoredBytes] = field(default_factory=list)
    budget: Budget = field(default_factory=Budget)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def last(self, count: int) -> list[Any]:
        """Take the last values off the stack."""
        values = self.stack[-count:]
        if len(values) < count:
            raise IndexError("nothing on the stack")
        del self.stack[-count:]
        return values

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marked.pop()
        return values

    def remember(self, index: int | None) -> None:
        index = len(self.memo) if index is None else index
        if not 0 <= index <= self.budget.steps:  # writers number their values one by one
            raise ValueError("a place in the memo that is too high")
        self.memo.extend([None] * (index + 1 - len(self.memo)))
        self.memo[index] = self.stack[-1]

    def items(self, kind: type) -> Any:
        """The dict or list on top of the stack, or inside the stand-in there."""
        target = self.stack[-1]
        if isinstance(target, StandIn):
            target.content = kind() if target.content is None else target.content
            target = target.content
        if not isinstance(target, kind):
            raise TypeError(f"adds items to a value that is not a {kind.__name__}")
        return target

    def extend(self, values: list[Any]) -> None:
        self.items(list).extend(values)

    def update(self, values: list[Any]) -> None:
        self.items(dict).update(zip(map(_key, values[::2]), values[1::2], strict=True))

    def make_dict(self, values: list[Any]) -> None:
        self.push({})
        self.update(values)

    def build(self, target: Any, state: Any) -> Any:
        if isinstance(target, StandIn):
            target.state = state
        elif not isinstance(target, dict):  # a dict's attributes are dropped, such as `_metadata`
            raise TypeError("sets the state of a value that is not an object")
        return target

    def name(self, module: Any, name: Any) -> StandIn:
        """The stand-in of a class or function. Names from Python 2 become those of today."""
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > MAX_NAME:
            raise ValueError("a name that is not a text or too long")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full not in self.names:
            self.names[full] = StandIn(full)
            if not _is_data(module, name):
                self.unproven[full] = None
        return self.names[full]

    def member(self, owner: Any = None, name: Any = None, *more: Any) -> StandIn:
        """What pickle writes as `getattr(cls, name)`: a class inside a class (protocols 0 to 3), or an enum's member.

        Python 3.11.0 to 3.11.3 write members so. As in `_is_data`, a name with a capital letter is not a method's.
        """
        is_named = isinstance(owner, StandIn) and self.names.get(owner.name) is owner
        if more or not is_named or not isinstance(name, str) or len(name) > MAX_NAME:
            self.refused["builtins.getattr"] = None
            return StandIn("builtins.getattr", (owner, name))
        full = f"{owner.name}.{name}"
        if _is_capital(name) or DATA.fullmatch(full):
            self.unproven.pop("builtins.getattr", None)
        else:
            self.refused[full] = None
        return self.names.setdefault(full, StandIn(full))

    def storage(self, raw: Any = None) -> Any:
        """A storage that is written into the pickle, as `pickle.dump` does."""
        if isinstance(raw, StandIn) and raw.name == "_codecs.encode" and isinstance(raw.args[0], str):  # protocol 2
            raw = raw.args[0].encode("latin1")
        if self.embedded is None or not isinstance(raw, bytes):
            self.refused["torch.storage._load_from_bytes"] = None
            return None
        self.unproven.pop("torch.storage._load_from_bytes", None)
        self.storages.append(self.embedded(raw))
        return self.storages[-1]

    def persistent(self, written: Any) -> Any:
        """A storage. torch writes it as ("storage", class, key, device, length); older files add a view.

        Older files also write a module's class, as ("module", class, file, source).
        """
        if not isinstance(written, tuple) or not 4 <= len(written) <= 6:
            raise ValueError("a persistent id that is not a storage")
        kind, named, key, _, *more = written
        if kind == "module":
            return named
        if kind != "storage" or not isinstance(key, str) or not more or not _is_size(more[0]) or any(more[1:]):
            raise ValueError("a persistent id that is not a storage")
        self.storages.append(StoredBytes(key, kind_of(named), more[0]))
        return self.storages[-1]

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, StandIn) or not isinstance(args, tuple):
            raise TypeError("calls a value that is not a function")
        # An object that a call has made has the same name as its function, but is another stand-in.
        if function.name in UNDERSTOOD and self.names.get(function.name) is function:
            if len(args) > MAX_ARGS:
                raise TypeError("a call with too many arguments")
            return UNDERSTOOD[function.name](self, *args)
        if function.name in self.unproven:
            self.refused[function.name] = None
        return StandIn(function.name, args)

    def new(self, cls: Any, args: Any, content: Any = None) -> StandIn:
        """An object made by `cls.__new__`. So `cls` is a class, even if its name begins with a small letter."""
        if not isinstance(cls, StandIn) or not isinstance(args, tuple):
            raise TypeError("makes an object of a value that is not a class")
        if cls.name.partition(".")[0] not in STANDARD_LIBRARY:
            self.classes.add(cls.name)
        return StandIn(cls.name, args, content=content)

    def instance(self, cls: StandIn | None) -> Any:
        """A call in protocol 0 or 1. If `cls` is None, the first value behind the mark is the class."""
        values = self.since_mark()
        return self.call(cls or values.pop(0), tuple(values))


# What the opcodes do. The argument is what stands behind the opcode in the file.
STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _Machine.push),
    **dict.fromkeys(("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"), _Machine.push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(StandIn("builtins.set")),  # its items are not hashed
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.last(1) if machine.stack else machine.since_mark(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.last(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.last(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.last(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "DICT": lambda machine, _: machine.make_dict(machine.since_mark()),
    "FROZENSET": lambda machine, _: machine.push(StandIn("builtins.frozenset", content=machine.since_mark())),
    "APPEND": lambda machine, _: machine.extend(machine.last(1)),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, _: machine.extend(machine.since_mark())),
    "SETITEM": lambda machine, _: machine.update(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    "GLOBAL": lambda machine, named: machine.push(machine.name(*named.split(" ", 1))),
    "STACK_GLOBAL": lambda machine, _: machine.push(machine.name(*machine.last(2))),
    "REDUCE": lambda machine, _: machine.push(machine.call(*machine.last(2))),
    "NEWOBJ": lambda machine, _: machine.push(machine.new(*machine.last(2))),
    "NEWOBJ_EX": lambda machine, _: machine.push(machine.new(*machine.last(3))),
    "INST": lambda machine, named: machine.push(machine.instance(machine.name(*named.split(" ", 1)))),
    "OBJ": lambda machine, _: machine.push(machine.instance(None)),
    "BUILD": lambda machine, _: machine.push(machine.build(*machine.last(2))),
    "BINPERSID": lambda machine, _: machine.push(machine.persistent(*machine.last(1))),
}


def _ordered_dict(machine: _Machine, pairs: Any = ()) -> dict[Any, Any]:
    if not isinstance(pairs, (list, tuple)):
        raise TypeError("makes a dict of a value that is not a list")
    machine.budget.count(len(pairs))  # the file can give one list many times
    return {_key(key): value for key, value in pairs}


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**60


def _sizes(values: Any) -> tuple[int, ...]:
    if isinstance(values, StandIn) and values.name == "torch.Size":
        (values,) = values.args
    if not isinstance(values, (tuple, list)) or len(values) > MAX_DIMENSIONS or not all(map(_is_size, values)):
        raise ValueError("the sizes of a tensor are not sizes")
    return tuple(values)


def _tensor(_: _Machine, storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> StoredTensor:
    """`more` holds requires_grad and hooks, then the dtype in `_rebuild_tensor_v3`, then perhaps a view's metadata."""
    if not isinstance(storage, StoredBytes) or not _is_size(offset):
        raise TypeError("a tensor without a storage")
    shape, stride = _sizes(shape), _sizes(stride)
    if len(shape) != len(stride):
        raise ValueError("a tensor with more sizes than strides, or fewer")
    dtype, metadata = (more[2], more[3:]) if more[2:] and isinstance(more[2], StandIn) else (None, more[2:])
    return StoredTensor(storage, offset, shape, stride, kind_of(dtype) if dtype else None, not any(metadata))


def _of_type(machine: _Machine, function: Any, cls: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes. In a class that is not torch's own, the values may mean something else."""
    is_torch = isinstance(cls, StandIn) and cls.name in ("torch.Tensor", "torch.nn.parameter.Parameter")
    if is_torch and kind_of(function).startswith("_rebuild_tensor"):
        return machine.call(function, args)
    return StandIn(kind_of(cls), (function, cls, args), state)


# The calls that make dicts, objects and tensors.
UNDERSTOOD: dict[str, Callable[..., Any]] = {
    "builtins.getattr": _Machine.member,
    "collections.OrderedDict": _ordered_dict,
    "copyreg._reconstructor": lambda machine, cls, base, items: machine.new(cls, (), items),  # protocols 0 and 1
    "torch.storage._load_from_bytes": _Machine.storage,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": lambda machine, data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda machine, data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _of_type,
}
MAX_ARGS = 8  # of these calls
