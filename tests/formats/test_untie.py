"""A tied pair that the user wants to train apart: two equal matrices, in each format that can hold two."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_model import convert, load
from hf_model.errors import UserError
from hf_model.loading import Source
from tests.tiny import gpt, save_files

ENGINES = {"gguf": "llama_cpp", "ctranslate2": "ctranslate2", "onnx": "onnxruntime"}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return save_files(tmp_path, gpt(tied=True))


@pytest.mark.parametrize("format", ["transformers", "gpt2", "gguf", "ctranslate2", "onnx", "checkpoint"])
def test_each_format_holds_two_matrices_and_is_verified(format: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip(ENGINES.get(format, "torch"))
    lines: list[str] = []
    convert(*files, tmp_path / "out", format=format, untie=True, report=lines.append)
    assert any("head untied" in line for line in lines)
    assert any(line.startswith("head ") and "as asked" in line for line in lines)
    assert any(line.startswith("verified") for line in lines)


@pytest.mark.parametrize("source", ["a file", "a folder", "a module"])
def test_training_changes_the_two_apart(source: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    origin: Path | nn.Module = files[0]
    if source == "a folder":
        origin = convert(*files, tmp_path / "tied")
    elif source == "a module":
        origin = gpt(tied=True)
    model = Source.of(origin, files[1], untie=True).load().model
    head, embedding = model.lm_head.weight, model.transformer.wte.weight
    assert not model.config.tie_word_embeddings and torch.equal(head, embedding)
    with torch.no_grad():
        head.add_(1)
    assert not torch.equal(head, embedding)


def test_a_folder_keeps_them_apart(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = load(convert(*files, tmp_path / "hf", untie=True))
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()


def test_a_trainer_s_file_has_two_storages(files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = convert(*files, tmp_path / "out", format="checkpoint", untie=True)
    weights = torch.load(folder / "ckpt.pt", weights_only=True)["model_state_dict"]
    head, embedding = weights["lm_head.weight"], weights["transformer.wte.weight"]
    assert torch.equal(head, embedding) and head.data_ptr() != embedding.data_ptr()


def test_nanogpt_whose_heads_are_always_tied_is_told_to_leave_it_out(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="convert without --untie"):
        convert(*files, tmp_path / "out", format="checkpoint", like="nanogpt", untie=True)
    assert convert(*files, tmp_path / "out", format="checkpoint", like="nanogpt").is_dir()


def test_an_untied_head_stays_as_it_is(tmp_path: Path) -> None:
    model = gpt()
    lines: list[str] = []
    folder = convert(*save_files(tmp_path, model), tmp_path / "hf", untie=True, report=lines.append)
    assert not any(line.startswith("head ") for line in lines)
    assert torch.equal(load(folder)[0].lm_head.weight, model.lm_head.weight)
