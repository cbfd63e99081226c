"""A meta.pkl of any protocol is read as plain data, and nothing in it ever runs."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from hf_model.errors import UserError
from hf_model.tokenizer.characters import read_meta
from tests.relatives import META
from tests.reliability.files import Calls, bounded

CONTENT = pickle.dumps(META)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("where", ["alone", "beside a meta", "as a key"])
def test_a_payload_never_runs(where: str, protocol: int, tmp_path: Path) -> None:
    payload = Calls(os.system, f"touch {tmp_path / 'ran'}")
    value = {"alone": payload, "beside a meta": {**META, "more": payload}, "as a key": {payload: 1}}[where]
    content = pickle.dumps(value, protocol)
    with pytest.raises(UserError, match=r"meta\.pkl: (more: )?refers to \w+\.system.* Save only dicts, lists"):
        read_meta(write(tmp_path / "meta.pkl", content))
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists()  # so it would have run


@pytest.mark.parametrize(
    "value, message",
    [
        ({"stoi": {"a": {"b"}}}, "stoi.a: holds a set"),
        ({"itos": [Path("x")]}, r"itos.0: holds a \w*Path"),
        (META | {"model": torch.nn.Linear}, "model: holds a Linear"),
        (META | {"sizes": {0.5: 1}}, "sizes: holds a float"),
    ],
    ids=str,
)
def test_an_object_is_refused_by_its_place(value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"meta\.pkl: {message}\. Save only dicts, lists, short texts and numbers"):
        read_meta(write(tmp_path / "meta.pkl", pickle.dumps(value)))


@pytest.mark.parametrize("length", range(len(CONTENT)))
def test_a_file_cut_short_is_damaged(length: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"meta\.pkl: is a damaged pickle, or not a pickle"):
        read_meta(write(tmp_path / "meta.pkl", CONTENT[:length]))


@pytest.mark.parametrize(
    "content",
    [b"text, not a pickle", b"\x80\x04.", b"\x80\x04K\x01e.", b"\x80\x04K\x01K\x02s.", b"]}a]s.", b"h\x05.", b"(e."],
)
def test_a_pickle_that_does_not_work_out_is_damaged(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a damaged pickle, or not a pickle"):
        read_meta(write(tmp_path / "meta.pkl", content))


def test_a_hundred_thousand_characters_are_read(tmp_path: Path) -> None:
    characters = [chr(0x10000 + number) for number in range(100_000)]
    stoi = {character: number for number, character in enumerate(characters)}
    for protocol in (0, 2, 5):
        content = pickle.dumps({"vocab_size": 100_000, "stoi": stoi, "itos": dict(enumerate(characters))}, protocol)
        assert read_meta(write(tmp_path / "meta.pkl", content)) == stoi


DEEP = b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
SMALL_FILES = {
    "dicts": b"}" * 2**20 + b".",
    "constants": b"N" * 2**21 + b".",
    "marks": b"(" * 2**20 + b".",
    "lists in lists": b"]" * 2**20 + b"a" * (2**20 - 1) + b".",
    "a key that takes 2**60 steps to hash": b"\x80\x02}" + DEEP[2:] + b"K\x01s.",
    "a value of 2**60 parts": b"\x80\x02}X\x04\x00\x00\x00stoi" + DEEP[2:] + b"s.",
    "an id of a million digits": b"\x80\x02}X\x0a\x00\x00\x00vocab_size\x8b" + b"\x00\x00\x10\x00" + b"\x01" * 2**20
    + b"X\x04\x00\x00\x00stoi}X\x01\x00\x00\x00aK\x00ss.",
}  # fmt: skip


@pytest.mark.parametrize("content", SMALL_FILES.values(), ids=SMALL_FILES)
def test_a_small_file_takes_little_time_and_memory(content: bytes, tmp_path: Path) -> None:
    with bounded(seconds=20), pytest.raises(UserError, match=r"meta\.pkl: "):
        read_meta(write(tmp_path / "meta.pkl", content))


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"meta\.pkl: is larger than"):
        read_meta(write(tmp_path / "meta.pkl", bytes(16 * 2**20 + 1)))
