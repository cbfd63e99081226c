"""A meta.pkl is read as plain data, of every protocol, and no payload in it ever runs."""

import os
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

import pytest

from hf_model.errors import UserError
from hf_model.tokenizer import plain_pickle
from hf_model.tokenizer.plain_pickle import read_plain_pickle
from tests.reliability.files import bounded

VALUES = {
    "a meta": {"vocab_size": 3, "stoi": {"a": 0, "Ж": 1, "🙂": 2}, "itos": {0: "a", 1: "Ж", 2: "🙂"}},
    "numbers": [0, 1, 255, 256, 65535, 65536, -1, 2**31, 2**40, -(2**40), 1.5, True, False, None],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "nested": {"a": [{"b": ["c"] * 3}, []], 7: {}},
    "a thousand characters": {chr(number): number for number in range(0x4E00, 0x4E00 + 1000)},
}


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_plain_data_is_what_pickle_reads(value: object, protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps(value, protocol)
    read = read_plain_pickle(write(tmp_path / "meta.pkl", content))
    assert read == pickle.loads(content)
    assert repr(read) == repr(value)  # True is not 1


def test_shared_values_are_remembered(tmp_path: Path) -> None:
    shared = ["a", "b"]
    assert read_plain_pickle(write(tmp_path / "meta.pkl", pickle.dumps([shared, shared]))) == [shared, shared]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("where", ["alone", "beside a meta", "as a key"])
def test_a_payload_never_runs(where: str, protocol: int, tmp_path: Path) -> None:
    payload = Payload(f"touch {tmp_path / 'ran'}")
    value = {"alone": payload, "beside a meta": {**VALUES["a meta"], "more": payload}, "as a key": {payload: 1}}[where]
    content = pickle.dumps(value, protocol)
    with pytest.raises(UserError, match=r"meta\.pkl: holds more than plain data .*: it was not opened"):
        read_plain_pickle(write(tmp_path / "meta.pkl", content))
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists()  # so it would have run


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(OrderedDict(a=1)),
        pickle.dumps({"a"}, protocol=2),
        pickle.dumps(Path("x")),
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x02(ios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02\x82\x01.",
        b"Pname\n.",
        pickle.dumps(b"bytes", protocol=4),
    ],
)
def test_other_opcodes_are_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds more than plain data"):
        read_plain_pickle(write(tmp_path / "meta.pkl", content))


def test_the_message_says_which_opcode_and_where(tmp_path: Path) -> None:
    path = write(tmp_path / "meta.pkl", b"\x80\x02cos\nsystem\n.")
    with pytest.raises(UserError, match=r"\(GLOBAL at byte 2, 'os system'\)"):
        read_plain_pickle(path)


META = pickle.dumps(VALUES["a meta"])


@pytest.mark.parametrize("length", range(len(META)))
def test_a_file_cut_short_is_damaged(length: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"meta\.pkl: (is a damaged pickle, or none|holds more than plain data)"):
        read_plain_pickle(write(tmp_path / "meta.pkl", META[:length]))


@pytest.mark.parametrize(
    "content",
    [b"text, not a pickle", b"\x80\x04.", b"\x80\x04K\x01e.", b"\x80\x04K\x01K\x02s.", b"]}a]s.", b"h\x05.", b"(e."],
)
def test_a_pickle_that_does_not_work_out_is_damaged(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a damaged pickle, or none"):
        read_plain_pickle(write(tmp_path / "meta.pkl", content))


def test_what_is_made_to_take_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {(2**61 - 1) * number: 0 for number in range(1, 50)}
    deep: tuple = ()
    for _ in range(50):
        deep = (deep, deep)
    as_key = b"\x80\x02}" + pickle.dumps(deep, 2)[2:-1] + b"K\x01s."  # a dict of it would be hashed here already
    for content in (pickle.dumps(wide, 2), as_key):
        with pytest.raises(UserError):
            read_plain_pickle(write(tmp_path / "meta.pkl", content))
    monkeypatch.setattr(plain_pickle, "MAX_BYTES", 2**20)
    with pytest.raises(UserError, match="is more than 1 MiB long"):
        read_plain_pickle(write(tmp_path / "meta.pkl", b"0" * (2**20 + 1)))


@pytest.mark.parametrize(
    "content",
    [
        b"}" * 2**24,
        b"N" * 2**24,
        b"(" * 2**21,
        b"\x80\x04}X\xe9\x03\x00\x00" + b"a" * 1001 + b"Ns.",
        pickle.dumps({2**32: 0}),
    ],
    ids=["dicts", "constants", "marks", "a long key", "a wide key"],
)
def test_a_small_file_takes_little_time_and_memory(content: bytes, tmp_path: Path) -> None:
    with bounded(seconds=20), pytest.raises(UserError, match=r"takes more than 1048576 steps|is a damaged pickle"):
        read_plain_pickle(write(tmp_path / "meta.pkl", content[: 2**24]))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_largest_vocabulary_of_characters_is_read(protocol: int) -> None:
    characters = [chr(0x10000 + number) for number in range(2**17)]
    stoi = {character: number for number, character in enumerate(characters)}
    content = pickle.dumps({"vocab_size": 2**17, "stoi": stoi, "itos": dict(enumerate(characters))}, protocol)
    assert sum(1 for _ in pickletools.genops(content)) < plain_pickle.MAX_OPERATIONS


def test_every_opcode_is_known_or_refused(tmp_path: Path) -> None:
    """An opcode that is not among the plain ones is never passed over."""
    plain = (
        plain_pickle.VALUES
        | plain_pickle.CONSTANTS.keys()
        | plain_pickle.STORE
        | plain_pickle.RECALL
        | plain_pickle.TUPLES.keys()
    )
    plain |= {"EMPTY_DICT", "EMPTY_LIST", "MARK", "DICT", "LIST", "TUPLE", "SETITEM", "SETITEMS", "APPEND", "APPENDS"}
    plain |= {"STOP", "PROTO", "FRAME"}
    refused = {opcode.name for opcode in pickletools.opcodes} - plain
    assert {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1"} <= refused
