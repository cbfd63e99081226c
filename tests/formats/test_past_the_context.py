"""Past the context: each card says what its engine does there, and the engine does it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_model.errors import UserError
from hf_model.formats.gguf import run_llama_cpp
from tests.formats.conftest import Exported
from tests.tiny import SIZES

CONTEXT = SIZES["block_size"]
TOO_LONG = [5] * (CONTEXT + 1)
SAYS = {
    "transformers": f"goes on past the context of {CONTEXT} with the last {CONTEXT} tokens",
    "gpt2": "IndexError",
    "gguf": "ends its process",
    "ctranslate2": "stops there with a RuntimeError",
    "onnx": "stops there with an error",
    "checkpoint": f"goes on with the last {CONTEXT} tokens",
}
WRITES_WITH = {"gguf": ["gguf"], "ctranslate2": ["ctranslate2"], "onnx": ["onnx", "onnxscript"]}


def written(format: str, export: Exported) -> Path:
    for package in WRITES_WITH.get(format, []):
        pytest.importorskip(package, reason=f"{package} is not installed (the `{format}` extra)")
    return export(format, {}, verify=False)[0]


@pytest.mark.parametrize("format", SAYS)
def test_the_card_says_what_happens(format: str, export: Exported) -> None:
    card = (written(format, export) / "README.md").read_text(encoding="utf-8")
    assert SAYS[format] in " ".join(card.split())


def test_stock_gpt2_raises_an_index_error(export: Exported) -> None:
    model = AutoModelForCausalLM.from_pretrained(written("gpt2", export))
    model(torch.tensor([TOO_LONG[1:]]))
    with pytest.raises(IndexError):
        model(torch.tensor([TOO_LONG]))


def test_ctranslate2_raises_a_runtime_error(export: Exported) -> None:
    folder = written("ctranslate2", export)
    import ctranslate2

    generator = ctranslate2.Generator(str(folder))
    generator.forward_batch([TOO_LONG[1:]])
    with pytest.raises(RuntimeError):
        generator.forward_batch([TOO_LONG])


def test_llama_cpp_ends_its_process(export: Exported) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the `gguf` extra)")
    file = written("gguf", export) / "model-f32.gguf"
    run_llama_cpp(file, TOO_LONG[1:], 1, [])
    with pytest.raises(UserError, match=r"llama\.cpp ended with status -"):
        run_llama_cpp(file, TOO_LONG, 1, [])
