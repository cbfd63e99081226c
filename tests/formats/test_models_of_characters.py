"""A model of characters, without special tokens or instructions, in the formats whose engines are installed."""

import pickle
from pathlib import Path

import pytest

from examples.plain_gpt import save_checkpoint
from hf_model.conversion import convert
from tests.tiny import gpt

CHARACTERS = "\n abcdef"
PACKAGES = {"gpt2": [], "checkpoint": [], "gguf": ["gguf", "llama_cpp"], "ctranslate2": ["ctranslate2"]}


@pytest.mark.parametrize("format", PACKAGES)
def test_is_converted_and_verified_and_its_card_shows_text_that_it_knows(format: str, tmp_path: Path) -> None:
    for package in PACKAGES[format]:
        pytest.importorskip(package)
    ids = dict(enumerate(CHARACTERS))
    meta = {"vocab_size": len(ids), "stoi": {char: i for i, char in ids.items()}, "itos": ids}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    save_checkpoint(tmp_path / "ckpt.pt", gpt(vocab_size=len(ids), tied=True), iter_num=1)
    lines: list[str] = []
    folder = convert(tmp_path / "ckpt.pt", tmp_path / "meta.pkl", tmp_path / "out", format=format, report=lines.append)
    assert lines[-1].startswith("verified")
    assert "Instruction:" not in (folder / "README.md").read_text(encoding="utf-8")
