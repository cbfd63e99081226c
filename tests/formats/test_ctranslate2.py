"""The CTranslate2 folder: its engine gives the reference's log-probabilities, padded vocabularies among them."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_model.conversion import convert
from tests.formats.conftest import Exported
from tests.tiny import SIZES, gpt

ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed (the `ctranslate2` extra)")


@pytest.mark.parametrize("from_folder", [False, True], ids=["from a file", "from a folder"])
def test_gives_the_log_probabilities_of_the_plain_reference(shape: dict, from_folder: bool, export: Exported) -> None:
    folder, lines = export("ctranslate2", shape, from_folder=from_folder)
    ids = torch.randint(shape.get("vocab_size", 300), (2, SIZES["block_size"]))
    generator = ctranslate2.Generator(str(folder), compute_type="float32")
    got = np.array(generator.forward_batch(ids.tolist(), return_log_probs=True))
    torch.manual_seed(0)
    expected = gpt(**shape)(ids)[0].log_softmax(-1)
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)
    assert "by CTranslate2 in float32" in lines[-1] and "the log-probabilities of 16 positions" in lines[-1]


@pytest.mark.parametrize("quantization", ["int8", "float16", "bfloat16", "int16"])
def test_quantization_is_verified_and_int8_told(quantization: str, export: Exported) -> None:
    _, lines = export("ctranslate2", {}, quantization=quantization)
    said = re.search(r"; in int8, which rounds activations too, by up to \S+, (\d+)% of it: .*no proof", lines[-1])
    assert (said is not None) == (quantization == "int8")


def test_quantized_weights_are_smaller(capitals: Path, tmp_path: Path) -> None:
    sizes = [
        (convert(capitals, None, tmp_path / str(kind), format="ctranslate2", quantization=kind) / "model.bin")
        .stat()
        .st_size
        for kind in (None, "float16", "int8")
    ]
    assert sizes[0] > 1.8 * sizes[1] > 3 * sizes[2]


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16], ids=str)
def test_takes_half_precision(weights: torch.dtype, export: Exported) -> None:
    export("ctranslate2", {"vocab_size": 320}, weights=weights)


def test_answers_the_example_s_question(capitals: Path, tmp_path: Path) -> None:
    folder = convert(capitals, None, tmp_path / "out", format="ctranslate2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Instruction: What is the capital of France? Response:").tokens()
    result = ctranslate2.Generator(str(folder)).generate_batch([prompt], max_length=9, include_prompt_in_result=False)
    assert tokenizer.decode(result[0].sequences_ids[0]) == " Paris"


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_wrong_number_of_heads_is_noticed(
    quantization: str | None, refuses: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_model.formats import gpt2

    original = gpt2.stock_config

    def mutant(config):
        stock = original(config)
        stock.n_head //= 2
        return stock

    monkeypatch.setattr(gpt2, "stock_config", mutant)
    assert "the files do not hold this model" in refuses("ctranslate2", {}, quantization=quantization)
