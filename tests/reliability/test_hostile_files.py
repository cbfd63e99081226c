"""A checkpoint from a stranger runs nothing, takes time and memory by its own size only, and is refused in one line."""

import argparse
import importlib
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_model.errors import MAX_MESSAGE, UserError
from hf_model.trainers import read_checkpoint
from hf_model.trainers.pickle_reader import MAX_PICKLE_BYTES
from tests.reliability.files import Calls, bounded, plain_pickle, rezip, save, save_pickle, view, weights

WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"


class Marker:
    """Code of a stranger's in every place that pickle looks for some; all of it shows by a file."""

    path: Path
    MEMBER = 1

    def __init__(self, value: int = 0):
        self.value = value

    def __setstate__(self, state: dict) -> None:
        self.path.touch()

    def __hash__(self) -> int:
        self.path.touch()
        return 0

    def __eq__(self, other: object) -> bool:
        self.path.touch()
        return False


EXPLOITS: dict[str, Callable[[str], Any]] = {
    "os.system": lambda path: Calls(os.system, f"touch {path}"),
    "subprocess": lambda path: Calls(subprocess.check_output, ["touch", path]),
    "eval": lambda path: Calls(eval, f"open({path!r}, 'w')"),
    "exec": lambda path: Calls(exec, f"open({path!r}, 'w')"),
    "open": lambda path: Calls(open, path, "w"),
    "a pickle in a pickle": lambda path: Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {path}"))),
    "nested reducers": lambda path: Calls(Calls(getattr, Calls(importlib.import_module, "os"), "mkdir"), path),
    "torch.save": lambda path: Calls(torch.save, {}, path),
    "torch's own functions": lambda path: Calls(torch.UntypedStorage.from_file, path, True, 8),
    "a harmless class's method": lambda path: Calls(Calls(getattr, Calls(Path, path), "touch")),
    "a class's method": lambda path: Calls(Calls(getattr, Path, "touch"), Calls(Path, path)),
    "a method before a member": lambda path: (
        Calls(Calls(getattr, Calls(Path, path), "touch")),
        Calls(getattr, Marker, "MEMBER"),
    ),
}
PLACES: dict[str, Callable[[Any], Any]] = {
    "the whole file": lambda exploit: exploit,
    "config": lambda exploit: {"model": weights(), "config": {"out_dir": exploit}},
    "the optimizer": lambda exploit: {"optimizer_state_dict": {"state": [exploit]}, "model": weights()},
    "a weight": lambda exploit: {"model": weights() | {"transformer.wte.weight": exploit}},
    "a key": lambda exploit: {"model": {exploit: torch.ones(1)}},
}
FORMATS: dict[str, Callable[[Path, Any], Path]] = {
    "zip": lambda path, content: save(path, content),
    "older format": lambda path, content: save(path, content, _use_new_zipfile_serialization=False),
    **{
        f"zip, protocol {protocol}": lambda path, content, protocol=protocol: save(
            path, content, pickle_protocol=protocol
        )
        for protocol in (3, 4, 5)
    },
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.mark.parametrize("exploit", EXPLOITS.values(), ids=EXPLOITS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_an_exploit_is_refused_before_it_runs(
    form: Callable, place: Callable, exploit: Callable, tmp_path: Path, marker: Path
) -> None:
    path = form(tmp_path / "ckpt.pt", place(exploit(str(marker))))
    with pytest.raises(UserError, match=r"ckpt\.pt: ([\w.]+: )?refers to \S+\. Functions, .* \(nothing was run"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("exploit", EXPLOITS.values(), ids=EXPLOITS)
def test_the_exploits_are_real(exploit: Callable, tmp_path: Path, marker: Path) -> None:
    path = save(tmp_path / "ckpt.pt", {"config": exploit(str(marker))})
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_never_run(protocol: int, tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(plain_pickle({"model": weights(), "config": EXPLOITS["os.system"](str(marker))}, protocol))
    message = r"config: refers to posix\.system" if protocol >= 2 else "is not a torch.save checkpoint"
    with pytest.raises(UserError, match=rf"ckpt\.pt: {message}"):
        read_checkpoint(path)
    assert not marker.exists()


class Repeats:
    """Pickled as a call with the same bytes, many times: each call takes a few bytes of the file."""

    def __init__(self, raw: bytes):
        self.raw = raw

    def __reduce__(self) -> tuple:
        return torch.storage._load_from_bytes, (self.raw,)


def small_and_deep() -> torch.nn.Module:
    """2**32 modules by their paths, in a file of a few kilobytes."""
    module = torch.nn.Linear(1, 1)
    for _ in range(32):
        module = torch.nn.ModuleDict({"a": module, "b": module})
    return module


def far_head() -> dict[str, Any]:
    names = [f"blocks.0.sa.heads.{head}.{part}.weight" for head in (0, 999_999) for part in ("key", "query", "value")]
    others = ["token_embedding_table.weight", "blocks.0.ln1.weight"]
    return {name: torch.ones(2, 2) for name in (*names, *others)}


@pytest.mark.parametrize(
    "content",
    [small_and_deep, far_head, lambda: {"model": {".".join("a" * 450): torch.ones(1) for _ in range(200)}}],
    ids=["shared modules", "a head of a high number", "long names"],
)
def test_a_small_file_takes_little_time_and_memory(content: Callable[[], Any], tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt.pt", content())
    with bounded(), pytest.raises(UserError):
        read_checkpoint(path)


def test_one_storage_that_a_plain_pickle_loads_many_times_is_refused(tmp_path: Path) -> None:
    raw = save(tmp_path / "a.pt", torch.ones(2**18).untyped_storage(), _use_new_zipfile_serialization=False)
    content = raw.read_bytes()
    path = tmp_path / "ckpt.pkl"
    path.write_bytes(pickle.dumps({"model": [Repeats(content) for _ in range(400)]}))
    with bounded(), pytest.raises(UserError, match="holds more than"):
        read_checkpoint(path)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_storage_inside_a_plain_pickle_is_never_run(depth: int, tmp_path: Path, marker: Path) -> None:
    """`torch.storage._load_from_bytes` loads a file from bytes; so such bytes are a file that may call a function."""
    inner = save(tmp_path / "inner.pt", EXPLOITS["os.system"](str(marker)), _use_new_zipfile_serialization=False)

    class Loads:
        def __init__(self, raw: bytes):
            self.raw = raw

        def __reduce__(self) -> tuple:
            return torch.storage._load_from_bytes, (self.raw,)

    raw = inner.read_bytes()
    for _ in range(depth - 1):
        raw = save(tmp_path / "outer.pt", Loads(raw), _use_new_zipfile_serialization=False).read_bytes()
    path = tmp_path / "ckpt.pkl"
    path.write_bytes(pickle.dumps({"model": Loads(raw)}))
    with pytest.raises(UserError, match="nothing was run"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"model": weights(), "config": {"optimizer": Calls(os.system, "true")}},
            r"config\.optimizer: refers to \w+\.system",
        ),
        ({"runs": [{}, {"log": os.remove}]}, r"runs\.1\.log: refers to \w+\.remove"),
        ({"model": {Calls(eval, "1"): 1}}, r"model: refers to builtins\.eval"),
        ({"args": argparse.Namespace(lr=Calls(exec, ""))}, r"args\.lr: refers to builtins\.exec"),
        (Calls(eval, "1"), r"refers to builtins\.eval"),
    ],
    ids=["a value", "a function in a list", "a key", "an attribute", "the whole file"],
)
def test_the_refusal_names_what_it_refused_and_its_place(content: object, message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt.pt", content)
    with pytest.raises(UserError, match=rf"ckpt\.pt: {message}\. .* Save only the weights"):
        read_checkpoint(path)


PYTHON_2 = {
    "commands Popen": "subprocess.Popen",
    "commands getoutput": "subprocess.getoutput",
    "__builtin__ eval": "builtins.eval",
    "cPickle loads": "pickle.loads",
    "os getcwdu": "os.getcwd",
    "popen2 popen3": "popen2.popen3",
}
CODE = [
    *("posix system", "nt system", "subprocess Popen", "builtins getattr", "builtins __import__", "builtins open"),
    *("functools reduce", "pickle loads", "_pickle Unpickler", "runpy run_path", "shutil rmtree", "ctypes CDLL"),
    *("types FunctionType", "types CodeType", "importlib import_module", "io FileIO", "webbrowser open", "pip main"),
    *(
        "torch.hub load",
        "torch load",
        "torch.storage _load_from_bytes",
        "numpy load",
        "numpy.testing._private.utils runstring",
    ),
    *("train get_lr", "os.path join", "multiprocessing Process", "threading Thread", "logging FileHandler"),
]


@pytest.mark.parametrize("name", [*CODE, *PYTHON_2])
@pytest.mark.parametrize("where", ["called", "called and thrown away", "only named"])
def test_code_is_refused_by_its_name_of_today(name: str, where: str, tmp_path: Path) -> None:
    called = {"called": b")R", "called and thrown away": b")R0N", "only named": b""}[where]
    path = save_pickle(tmp_path / "ckpt.pt", PROTO + b"c" + name.replace(" ", "\n").encode() + b"\n" + called + STOP)
    with pytest.raises(UserError, match=f"refers to {PYTHON_2.get(name, name.replace(' ', '.'))}"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["torch.hub load", "numpy load", "joblib load"])
def test_a_function_that_is_called_is_refused_although_the_file_makes_an_object_of_it(
    name: str, tmp_path: Path
) -> None:
    function = b"c%b\n%b\n" % tuple(name.encode().split())
    path = save_pickle(tmp_path / "ckpt.pt", PROTO + function + b")\x810" + function + b")R" + STOP)
    with pytest.raises(UserError, match=f"refers to {name.replace(' ', '.')}"):
        read_checkpoint(path)


def test_a_name_that_leads_out_of_a_package_is_refused(tmp_path: Path) -> None:
    out = b"\x80\x04\x8c\x05train\x8c\x10subprocess.Popen\x93."
    with pytest.raises(UserError, match=r"refers to train\.subprocess\.Popen"):
        read_checkpoint(save_pickle(tmp_path / "ckpt.pt", out))


def test_a_harmless_class_is_read_without_its_code(tmp_path: Path, marker: Path, monkeypatch) -> None:
    monkeypatch.setattr(Marker, "path", marker, raising=False)
    content = {"model": weights(), "model_args": Marker(3), "config": {"out_dir": Path("out")}, "rng": Calls(Marker, 1)}
    path = save(tmp_path / "ckpt.pt", content)
    assert list(read_checkpoint(path).state_dict) == list(weights())
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_class_that_stands_in_for_the_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt.pt", argparse.Namespace(model=1))
    with pytest.raises(UserError, match=r"ckpt\.pt: holds a Namespace, not a dict"):
        read_checkpoint(path)


def test_methods_that_the_file_hides_are_not_called(tmp_path: Path) -> None:
    class Hides:
        def __reduce__(self) -> tuple:
            hidden = dict.fromkeys(("items", "get", "keys", "__iter__"), argparse.Namespace)
            return OrderedDict, (), hidden, None, iter({"model": weights()}.items())

    path = save(tmp_path / "ckpt.pt", Hides())
    assert list(read_checkpoint(path).state_dict) == list(weights())


def entries(path: Path, *added: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "a", compression) as archive:
        for name, content in added:
            archive.writestr(name, content)
    return path


def patched(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def claiming_terabytes(path: Path) -> Path:
    """The central directory's first entry states sizes of 2**42 bytes, in a zip64 field of its own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ckpt/data.pkl", plain_pickle({}, 2))
        entry = archive.infolist()[0]
        entry.file_size = entry.compress_size = 2**42
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "trick, message",
    [
        (lambda path: entries(path, ("/etc/passwd", b"x")), "holds entries with paths outside of the archive"),
        (lambda path: entries(path, ("ckpt/../../x", b"x")), "holds entries with paths outside of the archive"),
        (lambda path: entries(path, ("ckpt/data.pkl", b"x")), "holds two entries of one name"),
        (lambda path: entries(path, ("ckpt/version", b"x")), "holds two entries of one name"),
        (lambda path: entries(path, ("ckpt/x/data.pkl", b"x")), "is a zip file, but not one written by torch.save"),
        (
            lambda path: entries(path, ("ckpt/data/99", bytes(10**7)), compression=zipfile.ZIP_DEFLATED),
            "is a compressed archive",
        ),
        (claiming_terabytes, "claims to hold more than its size"),
        (lambda path: patched(path, b"data.pkl", b"data.pkx"), "is a zip file, but not one written by torch.save"),
        (lambda path: rezip(path, {"byteorder": b"middle"}), "is damaged or was not written to its end"),
        (lambda path: rezip(path, {"data/0": b""}), "is damaged"),
    ],
    ids=[
        "an absolute name",
        "a name that climbs out",
        "two pickles",
        "two entries of one name",
        "a pickle elsewhere",
        "a compressed bomb",
        "terabytes claimed",
        "no pickle",
        "an unknown byte order",
        "a missing tensor",
    ],
)
def test_a_zip_trick_is_refused(trick: Callable, message: str, tmp_path: Path) -> None:
    path = trick(save(tmp_path / "ckpt.pt", {"model": weights()}))
    with pytest.raises(UserError, match=rf"ckpt\.pt: {message}"):
        read_checkpoint(path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_many_entries_are_only_slow_by_their_number(tmp_path: Path) -> None:
    path = entries(save(tmp_path / "ckpt.pt", {"model": weights()}), *((f"ckpt/x/{i}", b"") for i in range(20_000)))
    with bounded():
        assert list(read_checkpoint(path).state_dict) == list(weights())


NAME = "transformer.wte.weight"


@pytest.mark.parametrize(
    "changed, message",
    [
        (lambda w: {NAME: view(w[NAME], 0, (10**6, 10**6), (0, 0))}, "claims more values than the file holds"),
        (lambda w: {NAME: view(w[NAME], 0, (10**6, 10**6), (10**6, 1))}, "is damaged|there is not enough memory"),
        (lambda w: {NAME: view(w[NAME], 10**9, (300, 32), (32, 1))}, "is damaged"),
        (lambda w: {NAME: view(w[NAME], 0, (300, 32), (-32, 1))}, "is damaged"),
        (lambda w: {NAME: view(w[NAME], -32, (300, 32), (32, 1))}, "is damaged"),
        (lambda w: {"transformer.wpe.weight": w[NAME][:16]}, "share their values, which only the embedding and"),
        (lambda w: {NAME: w[NAME].to(torch.complex64)}, "is not a dense floating-point tensor"),
        (
            lambda w: {NAME: torch.quantize_per_tensor(w[NAME], 0.1, 0, torch.qint8)},
            "was saved as another kind of tensor .*_rebuild_qtensor",
        ),
        (lambda w: {NAME: w[NAME].to(torch.float8_e4m3fn)}, "is not a dense floating-point tensor of 16|is damaged"),
        (
            lambda w: {NAME: Calls(torch._utils._rebuild_wrapper_subclass, torch.Tensor, torch.float32, (300, 32))},
            "was saved as another kind of tensor",
        ),
    ],
    ids=[
        "stride 0",
        "a size past the storage",
        "an offset past the storage",
        "a negative stride",
        "a negative offset",
        "two weights in one place",
        "complex",
        "quantized",
        "8 bits",
        "no storage",
    ],
)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:.*quantize_per_tensor")
def test_a_tensor_trick_is_refused(changed: Callable, message: str, is_zip: bool, tmp_path: Path) -> None:
    honest = weights()
    content = {"model": honest | changed(honest)}
    path = save(tmp_path / "ckpt.pt", content, _use_new_zipfile_serialization=is_zip)
    with bounded(), pytest.raises(UserError, match=rf"ckpt\.pt: .*({message})"):
        read_checkpoint(path)


def test_a_storage_that_reaches_into_the_next_one_is_refused(tmp_path: Path) -> None:
    state = {WTE: torch.ones(1000), WPE: torch.zeros(1000), "transformer.h.0.ln_1.weight": torch.ones(4)}
    path = save(tmp_path / "ckpt.pt", {"model": state})
    with zipfile.ZipFile(path) as archive:
        content = archive.read("ckpt/data.pkl")
    longer = content.replace(b"M" + struct.pack("<H", 1000), b"M" + struct.pack("<H", 1100))
    assert longer != content
    rezip(path, {"data.pkl": longer})
    assert torch.load(path, mmap=True)["model"][WTE].shape == (1100,)  # what happens without the check
    with pytest.raises(UserError, match=rf"is damaged: the bytes of '{WTE}' are not those that were written"):
        read_checkpoint(path)


PROTO, STOP, EMPTY_DICT, SETITEM, NONE = b"\x80\x02", b".", b"}", b"s", b"N"


def number(value: int) -> bytes:
    """LONG1: an integer of up to 255 bytes."""
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def key(opcodes: bytes) -> bytes:
    """A pickle of a dict whose key is what the opcodes leave on the stack."""
    return PROTO + EMPTY_DICT + opcodes + NONE + SETITEM + STOP


def doubling(levels: int) -> bytes:
    """A tuple of two of the tuple before, `levels` times over: 5 bytes a level, 2 to their number to hash."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))


BOMBS = {
    "a key that takes 2**60 steps to hash": key(doubling(60)),
    "a key that takes all of the C stack to hash": key(b")" + b"\x85" * 10**5),
    "a set of such a key": PROTO + b"c__builtin__\nset\n(]" + doubling(60) + b"atR" + STOP,
    "keys of one hash": PROTO + EMPTY_DICT + b"".join(number(i * (2**61 - 1)) + b"Ns" for i in range(1, 10**5)) + STOP,
    "many classes": PROTO + b"".join(f"cm\nA{i}\n".encode() for i in range(10**5)) + STOP,
    "more values than a model's": PROTO + b"X" + struct.pack("<I", MAX_PICKLE_BYTES) + bytes(MAX_PICKLE_BYTES) + STOP,
    "a bytearray of a terabyte": PROTO + b"c__builtin__\nbytearray\n" + number(2**40) + b"\x85R" + STOP,
    "a tensor of a terabyte": PROTO + b"ctorch\nTensor\n" + number(2**40) + b"\x85R" + STOP,
    "a string that claims four gigabytes": PROTO + b"X" + struct.pack("<I", 2**32 - 1) + b"x" + STOP,
    "a memo of four billion places": PROTO + EMPTY_DICT + b"r" + struct.pack("<I", 2**32 - 1) + STOP,
    "a list in itself": PROTO + b"]q\x00h\x00a" + STOP,
    "lists in lists in lists": PROTO + b"]" * 10**5 + b"a" * (10**5 - 1) + STOP,
    "many marks": PROTO + b"(" * 10**5 + STOP,
    "nothing on the stack": PROTO + b"R" + STOP,
    "no end": PROTO + EMPTY_DICT,
    "nothing": b"",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
def test_a_bomb_goes_off_in_neither_time_nor_memory(bomb: bytes, is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    if is_zip:
        save_pickle(path, bomb)
    else:
        save(path, None, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(PROTO + NONE + STOP, bomb, 1))
    with bounded(), pytest.raises(UserError, match=r"ckpt\.pt: (is |holds |refers )"):
        read_checkpoint(path)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
def test_what_is_too_much_is_said_with_the_way_to_go_on(is_zip: bool, tmp_path: Path, monkeypatch: Any) -> None:
    path = save(tmp_path / "ckpt.pt", {"log": [None] * 10_000}, _use_new_zipfile_serialization=is_zip)
    monkeypatch.setattr("hf_model.trainers.pickle_reader.STEPS_OF_ANY_FILE", 1000)
    with pytest.raises(UserError, match=r"more than about [34],\d+ values\. Save only the weights and plain values"):
        read_checkpoint(path)
    monkeypatch.setattr("hf_model.trainers.archive.MAX_PICKLE_BYTES", 5000)
    with pytest.raises(UserError, match=r"MiB of values beside its tensors\. Save|more than about [23],\d+ values"):
        read_checkpoint(path)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize(
    "log",
    [[float(i) for i in range(10_000)], [{"step": i, "loss": 1.5, "lr": 1e-3} for i in range(2000)], [*range(10_000)]],
    ids=["losses", "entries", "tokens"],
)
def test_a_longer_log_may_take_more_steps(log: list, is_zip: bool, tmp_path: Path, monkeypatch: Any) -> None:
    content = {"model": weights(), "model_args": {"n_head": 2}, "log": log}
    path = save(tmp_path / "ckpt.pt", content, _use_new_zipfile_serialization=is_zip)
    monkeypatch.setattr("hf_model.trainers.pickle_reader.STEPS_OF_ANY_FILE", 5000)
    read_checkpoint(path).architecture()


def test_a_very_long_name_makes_a_short_message(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt.pt", {"model": {"\x1b[2J\n" * 10**6: torch.ones(1)}})
    with bounded(), pytest.raises(UserError) as raised:
        read_checkpoint(path).architecture()
    assert len(str(raised.value)) <= MAX_MESSAGE
    assert str(raised.value).isprintable()


class TestTheZipLayout:
    """One directory, and entries that it alone tells of: what is scanned is what is loaded."""

    def test_a_second_directory_is_not_taken(self, tmp_path: Path) -> None:
        honest = save(tmp_path / "a.pt", {"model": weights()}).read_bytes()
        other = save(tmp_path / "b.pt", {"model": weights(n_layer=1)}).read_bytes()
        for content in (
            honest + other,
            honest + bytes(30),
            other[: other.index(b"PK\x01\x02")] + honest,
            honest + b"PK",
        ):
            path = tmp_path / "ckpt.pt"
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"ckpt\.pt: (is damaged|holds entries)"):
                read_checkpoint(path)

    def test_names_that_differ_in_case_are_two_of_one_name(self, tmp_path: Path) -> None:
        path = entries(save(tmp_path / "ckpt.pt", {"model": weights()}), ("ckpt/DATA.pkl", b"x"))
        with pytest.raises(UserError, match="holds two entries of one name"):
            read_checkpoint(path)

    @pytest.mark.parametrize("old, new", [(b"ckpt/data/0FB", b"ckpt/data/1FB"), (b"PK\x03\x04", b"PK\x03\x05")])
    def test_an_entry_s_own_header_must_agree(self, old: bytes, new: bytes, tmp_path: Path) -> None:
        path = save(tmp_path / "ckpt.pt", {"model": weights()})
        content = path.read_bytes()
        at = content.rindex(old) if old in content else content.rindex(b"PK\x03\x04")
        path.write_bytes(content[:at] + new + content[at + len(new) :])
        with pytest.raises(UserError, match=r"ckpt\.pt: "):
            read_checkpoint(path)


MEGABYTE = b"X" + struct.pack("<I", 10**6) + bytes(10**6)
ONES = b"K\x01" * 10**5


def again(callable_name: bytes, value: bytes, argument: bytes = b"h\x02\x85") -> bytes:
    """A call of one thing with one value a hundred thousand times over, which stand in the memo as 1 and 2."""
    return b"c" + callable_name + b"\nq\x01" + value + b"q\x02" + (b"h\x01" + argument + b"R") * 10**5


REPEATED = {
    "a text encoded": again(b"_codecs\nencode", MEGABYTE, b"h\x02X\x06\x00\x00\x00latin1\x86"),
    "a text in another codec": again(b"_codecs\nencode", MEGABYTE, b"h\x02X\x04\x00\x00\x00idna\x86"),
    "a list made a size": again(b"torch\nSize", b"(" + ONES + b"l"),
    "a list made a dict": again(b"collections\nOrderedDict", b"](" + b"K\x01K\x01\x86" * 10**5 + b"e"),
    "a list made a set": again(b"__builtin__\nset", b"](" + ONES + b"e"),
    "counters of counters": again(b"collections\nCounter", b"}", b"h\x02\x85Rq\x02h\x01h\x02\x85"),
    "equal keys": b"}" + MEGABYTE + b"q\x01Ns" + MEGABYTE + b"q\x02Ns" + b"h\x02Ns" * 10**5,
    "a parameter with a long tail": b"ctorch._utils\n_rebuild_parameter\nq\x01(N"
    + ONES
    + b"tq\x02"
    + b"h\x01h\x02R" * 10**5,
    "a size as a key": b"}ctorch\nSize\n(" + ONES + b"t\x85RK\x01s",
}


DOUBLED = doubling(60)
CLASS = b"cm\nA\n"
REPEATED |= {
    "a class's arguments in a key": EMPTY_DICT + CLASS + DOUBLED + b"\x85RK\x01s",
    "a NumPy number of such a type": EMPTY_DICT + b"X\x04\x00\x00\x00loss"
    + b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + DOUBLED + b"\x85RX\x01\x00\x00\x00a\x86Rs",
    "a storage with a long tail": CLASS + b"q\x03(X\x07\x00\x00\x00storageh\x03X\x01\x00\x00\x000NK\x01"
    + b"N" * 10**5 + b"tq\x02" + b"h\x02Q" * 10**5,
    "a long name": b"cm\nA" + b"a" * 10**6 + b"\n",
}  # fmt: skip


@pytest.mark.parametrize("opcodes", REPEATED.values(), ids=REPEATED)
def test_a_call_again_and_again_takes_no_more_than_its_bytes(opcodes: bytes, tmp_path: Path) -> None:
    path = save_pickle(tmp_path / "ckpt.pt", PROTO + opcodes + STOP)
    with bounded(), pytest.raises(UserError, match=r"ckpt\.pt: (is |holds )"):
        read_checkpoint(path)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("check_bytes", [True, False], ids=["checked", "not checked"])
class TestStorages:
    """What the file does not hold is in no weight, whether or not checksums are compared."""

    def test_that_are_missing(self, is_zip: bool, check_bytes: bool, tmp_path: Path) -> None:
        path = save(tmp_path / "ckpt.pt", {"model": weights()}, _use_new_zipfile_serialization=is_zip)
        if is_zip:
            rezip(path, {"data/3": None})
        else:
            path.write_bytes(path.read_bytes()[:-1000])
        with bounded(), pytest.raises(UserError, match=r"ckpt\.pt: is damaged"):
            read_checkpoint(path, check_bytes=check_bytes)

    def test_that_are_smaller_than_claimed(self, is_zip: bool, check_bytes: bool, tmp_path: Path) -> None:
        state = {WTE: torch.ones(1000), "transformer.h.0.ln_1.weight": torch.ones(4)}
        path = save(tmp_path / "ckpt.pt", state, _use_new_zipfile_serialization=is_zip)
        small, large = b"M" + struct.pack("<H", 1000), b"J" + struct.pack("<i", 10**8)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                content = archive.read("ckpt/data.pkl")
            rezip(path, {"data.pkl": content.replace(small, large)})
        else:
            path.write_bytes(path.read_bytes().replace(small, large))
        with bounded(), pytest.raises(UserError, match=r"ckpt\.pt: is damaged"):
            read_checkpoint(path, check_bytes=check_bytes)

    def test_of_which_a_weight_is_a_view_with_gaps(self, is_zip: bool, check_bytes: bool, tmp_path: Path) -> None:
        honest = weights()
        wide = torch.rand(300, 64)
        content = {"model": honest | {NAME: wide[:, ::2]}, "model_args": {"n_head": 4}}
        path = save(tmp_path / "ckpt.pt", content, _use_new_zipfile_serialization=is_zip)
        read = read_checkpoint(path, check_bytes=check_bytes).state_dict[NAME]
        assert torch.equal(read, wide[:, ::2]) and read.is_contiguous()

    @pytest.mark.parametrize(
        "view", [torch._neg_view, lambda w: torch.complex(w, w).conj()], ids=["negative", "conjugate"]
    )
    def test_of_which_a_weight_is_another_view(
        self, view: Callable, is_zip: bool, check_bytes: bool, tmp_path: Path
    ) -> None:
        honest = weights()
        content = {"model": honest | {NAME: view(honest[NAME])}}
        path = save(tmp_path / "ckpt.pt", content, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(UserError, match=rf"ckpt\.pt: '{NAME}' is (the negative or conjugate view|not a dense)"):
            read_checkpoint(path, check_bytes=check_bytes)

    def test_that_two_weights_share(self, is_zip: bool, check_bytes: bool, tmp_path: Path) -> None:
        wide = torch.rand(300, 64)
        content = {"model": weights() | {NAME: wide[:, ::2], "lm_head.weight": wide[:, 1::2]}}
        path = save(tmp_path / "ckpt.pt", content, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(UserError, match="share their values"):
            read_checkpoint(path, check_bytes=check_bytes)


def test_a_tar_file_of_the_older_names_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    with tarfile.open(path, "w") as archive:
        for name in ("pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=r"is not a torch\.save checkpoint"):
        read_checkpoint(path)


def test_keys_of_storages_are_not_hashed_before_they_are_known_to_be_names(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt.pt", {"model": {}}, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    none = PROTO + b"]q\x00" + STOP
    assert none in content
    path.write_bytes(content.replace(none, PROTO + b"]" + doubling(60) + b"a" + STOP))
    with bounded(seconds=20), pytest.raises(UserError, match=r"ckpt\.pt: is damaged"):
        read_checkpoint(path)
