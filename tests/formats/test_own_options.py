"""What each format does with an option that a GPT-2 does not have: holds it, folds it, or refuses it in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from hf_model import convert, load
from hf_model.errors import UserError
from tests.trainers.own_models import HEADS, HONEST, C, V, moved

PLAIN = ("gpt2", "gguf", "ctranslate2", "checkpoint")
ENGINES = {"gguf": "gguf", "ctranslate2": "ctranslate2"}


def own(name: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    (folder / "input.txt").write_text("".join(chr(33 + i) for i in range(V)))
    return moved(HONEST[name]()), {"characters_of": folder / "input.txt"}


@pytest.mark.parametrize("format", PLAIN)
@pytest.mark.parametrize(
    "name, says",
    [("post-norm", "post-norm"), ("no final norm", "no final LayerNorm"), ("biased head", "bias at its head")],
)
def test_a_plain_gpt2_refuses_what_it_cannot_hold(name: str, says: str, format: str, tmp_path: Path) -> None:
    model, options = own(name, tmp_path)
    with pytest.raises(UserError, match=says):
        convert(model, None, tmp_path / "made", format=format, **options)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["attention without a scale", "the lecture's first scale", "narrow MLP", "SiLU"])
def test_stock_gpt2_has_the_own_models_logits(name: str, tmp_path: Path) -> None:
    model, options = own(name, tmp_path)
    convert(model, None, tmp_path / "made", format="gpt2", **options)
    stock, ids = GPT2LMHeadModel.from_pretrained(tmp_path / "made"), torch.arange(30)[None]
    with torch.no_grad():
        expected = model.eval().everything(ids)  # type: ignore[operator]
        assert (stock(ids).logits - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("name", ["narrow MLP", "attention without a scale"])
def test_a_trainers_checkpoint_refuses_another_width_or_scale(name: str, tmp_path: Path) -> None:
    model, options = own(name, tmp_path)
    with pytest.raises(UserError, match="another width"):
        convert(model, None, tmp_path / "made", format="checkpoint", **options)


def test_post_norm_generates_the_same_with_and_without_a_cache(tmp_path: Path) -> None:
    model, options = own("post-norm", tmp_path)
    loaded, _ = load(model, None, device="cpu", **options)
    ids = torch.tensor([[5, 6]])
    with_cache, without = (loaded.generate(ids, do_sample=False, max_new_tokens=9, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize(
    "name",
    [
        *("post-norm", "post-norm, no final norm", "no final norm", "biased head", "attention without a scale"),
        *("narrow MLP", "SiLU", "quick GELU", "squared ReLU", "Mish"),
    ],
)
def test_onnx_holds_every_option(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, options = own(name, tmp_path)
    convert(model, None, tmp_path / "made", format="onnx", verify=False, **options)
    session = onnxruntime.InferenceSession(str(tmp_path / "made" / "model.onnx"))
    ids = torch.randint(V, (2, 30), generator=torch.Generator().manual_seed(0))
    inputs = {put.name: np.zeros((2, HEADS, 0, C // HEADS), np.float32) for put in session.get_inputs()[2:]}
    logits = session.run(None, {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 30), np.int64), **inputs})[0]
    with torch.no_grad():
        expected = model.eval().everything(ids)  # type: ignore[operator]
    assert (torch.from_numpy(logits) - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize(
    "format, name, says",
    [
        ("gguf", "SiLU", "has the activation silu: use"),
        ("ctranslate2", "Mish", "has the activation mish: use"),
        ("ctranslate2", "another epsilon", "epsilon"),
        ("checkpoint", "SiLU", "activation"),
        ("checkpoint", "another epsilon", "epsilon"),
    ],
)
def test_an_activation_or_epsilon_that_a_format_does_not_know_is_refused(
    format: str, name: str, says: str, tmp_path: Path
) -> None:
    pytest.importorskip(ENGINES.get(format, "torch"))
    model, options = own(name, tmp_path)
    with pytest.raises(UserError, match=says):
        convert(model, None, tmp_path / "made", format=format, **options)
