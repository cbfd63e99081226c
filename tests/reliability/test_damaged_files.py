"""A damaged or wrong file ends in one line that names it and its trouble, exit status 2 and nothing written.

DAMAGED_BITS sets how many bits are flipped, one at a time.
"""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_model import loading
from hf_model.conversion import convert
from hf_model.errors import UserError
from hf_model.trainers import read_checkpoint
from tests.reliability.files import State, rezip, save, weights
from tests.tiny import CHECKPOINT, ROOT, TOKENIZER

FLIPS = int(os.environ.get("DAMAGED_BITS", "300"))
CPU = torch.device("cpu")


@pytest.fixture
def state() -> State:
    return weights(n_embd=8)


@pytest.fixture
def zipped(state: State, tmp_path: Path) -> Path:
    return save(tmp_path / "ckpt.pt", {"model": state, "model_args": {"n_head": 4}, "iter_num": 7})


@pytest.fixture
def legacy(state: State, tmp_path: Path) -> Path:
    content = {"model": state, "model_args": {"n_head": 4}, "iter_num": 7}
    return save(tmp_path / "old.pt", content, _use_new_zipfile_serialization=False)


def reads_the_same(path: Path, state: State) -> bool:
    """Whether a file gives this state dict, to the bit; False where it is refused."""
    try:
        checkpoint = read_checkpoint(path)
        assert checkpoint.architecture(n_head=4).n_layer == 2
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
        return False
    assert list(checkpoint.state_dict) == list(state)
    assert all(torch.equal(checkpoint.state_dict[name], weight) for name, weight in state.items())
    return True


def swap(floats: bytes) -> bytes:
    return np.frombuffer(floats, np.float32).byteswap().tobytes()


class TestCheckpoints:
    def test_cut_short_at_every_kind_of_place(self, zipped: Path, legacy: Path, state: State) -> None:
        n_places = 0
        for path in (zipped, legacy):
            whole = path.read_bytes()
            # Every place near the start and the end, where the structure is, and some between.
            places = {*range(100), *range(0, len(whole), 499), *range(len(whole) - 100, len(whole))}
            for place in sorted(places):
                path.write_bytes(whole[:place])
                assert not reads_the_same(path, state), place
            n_places += len(places)
        print(f"{n_places} files cut short, all refused")

    def test_a_flipped_bit_is_refused_or_changes_nothing(self, zipped: Path, state: State) -> None:
        whole = zipped.read_bytes()
        refused = 0
        chosen = random.Random(0)
        for _ in range(FLIPS):
            flipped = bytearray(whole)
            flipped[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
            zipped.write_bytes(flipped)
            refused += not reads_the_same(zipped, state)
        print(f"{FLIPS} bits flipped: {refused} files refused, {FLIPS - refused} read as if whole, 0 read otherwise")
        assert refused > FLIPS / 2  # the others are padding between the entries and fields that nobody reads

    def test_a_flipped_bit_in_any_weight_names_the_weight(self, zipped: Path, state: State) -> None:
        whole = zipped.read_bytes()
        for name, weight in state.items():
            flipped = bytearray(whole)
            flipped[whole.index(weight.numpy().tobytes()) + weight.nbytes // 2] ^= 1
            zipped.write_bytes(flipped)
            with pytest.raises(UserError, match=f"is damaged: the bytes of '{name}' are not those that were written"):
                read_checkpoint(zipped)

    def test_a_flipped_bit_in_the_optimizer_state_matters_to_nobody(self, state: State, tmp_path: Path) -> None:
        momentum = torch.rand(1000)
        path = save(tmp_path / "ckpt.pt", {"model": state, "optimizer_state_dict": {"exp_avg": momentum}})
        flipped = bytearray(path.read_bytes())
        flipped[flipped.index(momentum.numpy().tobytes())] ^= 1
        path.write_bytes(flipped)
        assert reads_the_same(path, state)

    def test_a_file_written_without_checksums_is_read(self, state: State, tmp_path: Path) -> None:
        torch.serialization.set_crc32_options(False)
        try:
            path = save(tmp_path / "ckpt.pt", {"model": state})
        finally:
            torch.serialization.set_crc32_options(True)
        with zipfile.ZipFile(path) as archive:
            assert {entry.CRC for entry in archive.infolist()} == {0}
        assert reads_the_same(path, state)

    def test_a_file_of_a_torch_before_byte_orders_is_read_and_checked(self, zipped: Path, state: State) -> None:
        rezip(zipped, {"byteorder": None})
        assert reads_the_same(zipped, state)
        zipped.write_bytes(zipped.read_bytes().replace(state["lm_head.weight"].numpy().tobytes()[:8], bytes(8)))
        assert not reads_the_same(zipped, state)

    def test_a_file_of_a_machine_of_the_other_byte_order_is_read(self, zipped: Path, state: State) -> None:
        order = b"big" if sys.byteorder == "little" else b"little"
        with zipfile.ZipFile(zipped) as archive:
            names = [name.partition("/")[2] for name in archive.namelist() if "/data/" in name]
            swapped = {name: swap(archive.read(f"ckpt/{name}")) for name in names}
        rezip(zipped, swapped | {"byteorder": order})
        assert reads_the_same(zipped, state)

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"", "is empty"),
            (b"<!DOCTYPE html><html>Sign in</html>", "is a web page, not a checkpoint"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                "is a git-lfs pointer, .*git lfs pull",
            ),
            (b'{"model": {}}', "is a JSON file, not a checkpoint"),
            (b"\x1f\x8b\x08\x00rest", "is gzip-compressed: unpack it first"),
            (b"\x00" * 1000, "is not a torch.save checkpoint"),
            (b"PK\x03\x04" + b"\x00" * 100, "is incomplete: the end of the file is missing"),
            (CHECKPOINT.read_bytes() + b"more", "is damaged or was not written to its end"),
            (b"PK\x05\x06" + b"\x00" * 18, "is not a torch.save checkpoint"),
            (b"\x93NUMPY\x01\x00", "is not a torch.save checkpoint"),
        ],
        ids=[
            "empty",
            "web page",
            "git-lfs",
            "JSON",
            "gzip",
            "zeros",
            "zip head",
            "zip with a tail",
            "empty zip",
            "npy",
        ],
    )
    def test_another_kind_of_file_is_named(self, content: bytes, message: str, tmp_path: Path) -> None:
        path = tmp_path / "ckpt.pt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"ckpt\.pt: {message}"):
            read_checkpoint(path)

    @pytest.mark.parametrize("length", [100, -1], ids=["in its header", "in its tensors"])
    def test_a_safetensors_file_cut_short_is_named(self, length: int, state: State, tmp_path: Path) -> None:
        save_file(state, tmp_path / "model.safetensors")
        content = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "ckpt.pt").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"ckpt\.pt: is damaged"):
            read_checkpoint(tmp_path / "ckpt.pt")

    @pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(1, 2))])
    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_a_torchscript_archive_says_how_to_save_its_weights(self, make: Callable, tmp_path: Path) -> None:
        torch.jit.save(make(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
        with pytest.raises(
            UserError, match=r"is a TorchScript archive.*torch\.save\(torch\.jit\.load\(path\)\.state_dict"
        ):
            read_checkpoint(tmp_path / "model.pt")

    def test_a_zip_of_the_checkpoint_says_to_unpack_it(self, zipped: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "ckpt.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(zipped, "ckpt.pt")
        with pytest.raises(UserError, match=r"ckpt\.zip: is a compressed archive, .*: unpack it first"):
            read_checkpoint(tmp_path / "ckpt.zip")

    @pytest.mark.parametrize(
        "path, message",
        [
            ("/tmp", "is a folder"),
            ("/dev/zero", "is not a regular file"),
            ("/dev/null/x", "cannot be read"),
            (f"/{'x' * 300}", "cannot be read"),
        ],
    )
    def test_what_is_no_file_is_refused(self, path: str, message: str) -> None:
        with pytest.raises(UserError, match=f"{path}: {message}"):
            read_checkpoint(path)


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (
        lambda path: path.write_bytes(TOKENIZER.read_bytes()[:20_000]),
        "is not the JSON of a `tokenizers` tokenizer",
    ),
    "empty": (lambda path: path.write_bytes(b""), "is not the JSON of a `tokenizers` tokenizer"),
    "a JSON of something else": (
        lambda path: path.write_text('{"vocab": {}}'),
        "is not the JSON of a `tokenizers` tokenizer",
    ),
    "a JSON a million levels deep": (
        lambda path: path.write_text('{"a":' * 10**6),
        "is not the JSON of a `tokenizers` tokenizer",
    ),
    "the checkpoint": (lambda path: shutil.copy(CHECKPOINT, path), "is not the JSON of a `tokenizers` tokenizer"),
    "a folder": (lambda path: path.mkdir(), "cannot be read"),
    "a hole": (
        lambda path: edited(path, lambda content: content["model"]["vocab"].update({"!": 5000})),
        "has a token with the id 5000, but .* has embeddings for 1024",
    ),
    "two tokens of one id": (
        lambda path: edited(path, lambda content: content["model"]["vocab"].update({"!": 5})),
        "has two tokens with the id 5",
    ),
    "ids past the embedding": (
        lambda path: edited(path, lambda content: content["model"]["vocab"].update(more=1024, yet_more=1025)),
        "has 1026 tokens, but .* has embeddings for 1024",
    ),
    "a merge of no token": (
        lambda path: edited(path, lambda content: content["model"]["merges"].append(["xyzzy", "plugh"])),
        "is not the JSON of a `tokenizers` tokenizer",
    ),
    "an unknown part": (
        lambda path: edited(path, lambda content: content.update(pre_tokenizer={"type": "Telepathy"})),
        "is not the JSON of a `tokenizers` tokenizer",
    ),
}


@pytest.mark.parametrize("make, message", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_will_not_do_is_named_and_nothing_is_written(
    make: Callable, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    make(path)
    with pytest.raises(UserError, match=rf"tokenizer\.json: {message}") as raised:
        convert(CHECKPOINT, path, tmp_path / "hf")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [path]


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return edit


def edit_weights(edit: Callable[[State], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        edit(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return apply


def cut(name: str, length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def as_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (cut("model.safetensors", 100_000), "cannot be loaded"),
    "weights empty": (cut("model.safetensors", 0), "cannot be loaded"),
    "a header of exabytes": (
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "cannot be loaded",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    "a pickle in place of safetensors": (as_a_pickle, "cannot be loaded"),
    "a weight missing": (
        edit_weights(lambda state: state.pop("transformer.h.1.ln_2.weight")),
        r"its config\.json and its weights do not belong together .*transformer\.h\.1\.ln_2\.weight",
    ),
    "a weight too many": (
        edit_weights(lambda state: state.update({"transformer.h.9.ln_2.weight": torch.ones(96)})),
        "its config.json and its weights do not belong together",
    ),
    "a weight of another shape": (
        edit_weights(lambda state: state.update({"transformer.ln_f.weight": torch.ones(97)})),
        "its config.json and its weights do not belong together",
    ),
    "a layer more in config.json": (edit_json("config.json", n_layer=4), "its config.json and its weights do not bel"),
    "a billion layers in config.json": (edit_json("config.json", n_layer=10**9), "its config.json and its weights do"),
    "a vocabulary of millions in config.json": (
        edit_json("config.json", vocab_size=5 * 10**6),
        "its config.json and its weights do not belong together",
    ),
    "a width that the heads do not divide": (edit_json("config.json", n_head=5), "cannot be loaded"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "holds no model"),
    "config.json cut short": (cut("config.json", 50), "cannot be loaded"),
    "another type of model": (edit_json("config.json", model_type="gpt2"), "holds a model of type 'gpt2'"),
    "an unknown type of model": (edit_json("config.json", model_type="xyzzy", auto_map={}), "cannot be loaded"),
    "code of its own": (
        edit_json("config.json", model_type="xyzzy", auto_map={"AutoConfig": "evil.Config"}),
        "cannot be loaded .*code of its own, which is not run",
    ),
    "a tokenizer with code of its own": (
        edit_json("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        "tokenizer_config.json says tokenizer_class=.Evil., which is not supported",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
    "tokenizer.json cut short": (cut("tokenizer.json", 20_000), "is not the JSON of a `tokenizers` tokenizer"),
    "a tokenizer of another model": (
        lambda folder: edited(folder / "tokenizer.json", lambda c: c["model"]["vocab"].update(more=1024)),
        "has 1025 tokens, but .* has embeddings for 1024",
    ),
}


@pytest.mark.parametrize("damage, message", FOLDERS.values(), ids=FOLDERS)
def test_a_damaged_folder_is_refused(damage: Callable, message: str, capitals: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(capitals, tmp_path / "hf")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    damage(folder)
    with pytest.raises(UserError, match=f"{folder}(/tokenizer.json)?: {message}") as raised:
        loading.load(folder, None, device=CPU)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "marker").exists()


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)


@pytest.mark.parametrize("script", ["convert_checkpoint.py", "generate.py"])
def test_the_command_line_says_it_in_one_line_and_exits_with_2(script: str, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(CHECKPOINT.read_bytes()[:-1000])
    arguments = ["--checkpoint_path", path, "--tokenizer_path", TOKENIZER]
    arguments += ["--prompt", "Hello"] if script == "generate.py" else ["--output_dir", tmp_path / "hf"]
    process = run(script, *arguments)
    assert process.returncode == 2
    assert process.stderr.startswith(f"{script}: error: {path}: is incomplete: the end of the file is missing")
    assert process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]
