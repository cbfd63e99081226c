"""Mutated files, thousands of them: the readers end in a result or in a UserError, in time and in memory.

FUZZ_INPUTS sets how many; FUZZ_SEED which. A failure leaves its input under the path that the assertion names.
"""

import argparse
import json
import os
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_model.errors import UserError
from hf_model.tokenizer import read_tokenizer
from hf_model.trainers import read_checkpoint
from tests.reliability.files import bounded, rezip, save, weights
from tests.tiny import gpt, save_tokenizer

INPUTS = int(os.environ.get("FUZZ_INPUTS", "1500"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


def mutate(content: bytes, chosen: random.Random) -> bytes:
    """One to four random edits, as fuzzers make them: of bits, of bytes, of whole stretches."""
    mutated = bytearray(content)
    for _ in range(chosen.randint(1, 4)):
        place, length = chosen.randrange(len(mutated) + 1), chosen.choice((1, 1, 2, 4, 8, 64))
        stretch = mutated[place : place + length]
        match chosen.randrange(7):
            case 0:
                mutated[place : place + 1] = bytes([stretch[0] ^ 1 << chosen.randrange(8)]) if stretch else b""
            case 1:
                mutated[place : place + length] = chosen.randbytes(length)
            case 2:
                mutated[place : place + length] = chosen.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * length
            case 3:
                del mutated[place : place + length]
            case 4:
                mutated[place:place] = stretch
            case 5:
                other = chosen.randrange(len(mutated) + 1)
                mutated[other:other] = stretch
            case 6 if chosen.random() < 0.2:
                del mutated[place:]
    return bytes(mutated)


def zip_bytes(path: Path, whole: bytes, chosen: random.Random) -> None:
    path.write_bytes(mutate(whole, chosen))


def zip_entry(path: Path, whole: bytes, chosen: random.Random) -> None:
    """Mutates an entry, mostly the pickle, and puts it back with a CRC32 that is right: past the first line."""
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
        name = "data.pkl" if chosen.random() < 0.8 else chosen.choice(names)
        rezip(path, {name: mutate(archive.read(f"ckpt/{name}"), chosen)})


def legacy_head(path: Path, whole: bytes, chosen: random.Random) -> None:
    """Mutates the pickles at the start of an older file, which has no checksum that would catch it."""
    path.write_bytes(mutate(whole[:4000], chosen) + whole[4000:])


def write_dict(path: Path, is_zip: bool = True) -> None:
    content = {
        "model": weights(n_embd=8, n_layer=1),
        "model_args": argparse.Namespace(n_head=4, dropout=np.float64(0.1)),
        "config": {"out_dir": Path("out"), "betas": (0.9, 0.95), "name": "run", "device": torch.device("cpu")},
        "best_val_loss": torch.tensor(1.5),
        "iter_num": 7,
    }
    save(path, content, _use_new_zipfile_serialization=is_zip)


def write_older(path: Path) -> None:
    write_dict(path, is_zip=False)


def write_module(path: Path) -> None:
    save(path, gpt(n_embd=8, n_layer=1, vocab_size=9))


def pickle_module(path: Path) -> None:
    path.write_bytes(pickle.dumps(gpt(n_embd=8, n_layer=1, vocab_size=9)))


def write_llm_c(path: Path) -> None:
    header = struct.pack("<8i", 20240326, 3, 4, 9, 1, 2, 8, 9).ljust(1024, b"\0")
    n_values = 9 * 8 + 4 * 8 + (12 * 8 * 8 + 13 * 8) + 2 * 8
    path.write_bytes(header + bytes(4 * n_values))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "write, edit",
    [
        (write_dict, zip_bytes),
        (write_dict, zip_entry),
        (write_older, zip_bytes),
        (write_older, legacy_head),
        (write_module, zip_entry),
        (pickle_module, zip_bytes),
        (write_llm_c, zip_bytes),
    ],
    ids=[
        *("zip", "entries of a zip", "older format", "pickles of the older format", "entries of a whole module"),
        *("a plain pickle of a module", "llm.c"),
    ],
)
def test_a_mutated_checkpoint_is_read_or_refused(write: Callable, edit: Callable, tmp_path: Path) -> None:
    chosen = random.Random(SEED)
    write(tmp_path / "ckpt.pt")
    whole = (tmp_path / "ckpt.pt").read_bytes()
    path = tmp_path / "ckpt.pt"

    def read() -> None:
        checkpoint = read_checkpoint(path)
        checkpoint.architecture(n_head=4)
        for weight in checkpoint.state_dict.values():
            weight.sum()

    assert_only_user_errors(lambda: edit(path, whole, chosen), read, path, INPUTS // 8)


def test_a_mutated_tokenizer_is_read_or_refused(tmp_path: Path) -> None:
    chosen = random.Random(SEED)
    whole = save_tokenizer(tmp_path / "tokenizer.json").read_bytes()
    # Short enough for the edits to hit more than the vocabulary.
    content = json.loads(whole)
    content["model"]["merges"] = content["model"]["merges"][:3]
    whole = json.dumps(content).encode()
    path = tmp_path / "tokenizer.json"

    def read() -> None:
        read_tokenizer(path).encode("Instruction: What is the capital of France? Response:")

    assert_only_user_errors(lambda: path.write_bytes(mutate(whole, chosen)), read, path, INPUTS // 4)


def assert_only_user_errors(write: Callable, read: Callable, path: Path, n_inputs: int) -> None:
    read_in_full = 0
    with bounded(seconds=10**6):
        for _ in range(n_inputs):
            write()
            start = time.perf_counter()
            try:
                read()
                read_in_full += 1
            except UserError as error:
                assert str(error).isprintable(), path
            except BaseException:  # a panic in Rust is no Exception
                pytest.fail(f"{path} makes the reader fail")
            assert time.perf_counter() - start < 10, path
    print(f"{n_inputs} inputs, {read_in_full} of them read, {n_inputs - read_in_full} refused")
