"""The stock GPT-2 folder: the library's own class, without custom code, gives the reference's logits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from hf_model.errors import UserError
from hf_model.formats import gpt2
from tests.formats.conftest import Exported
from tests.tiny import EOS, SIZES
from tests.tiny import gpt as reference_gpt


def reference(shape: dict, weights: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return reference_gpt(**shape).to(weights).float()


@pytest.mark.parametrize("from_folder", [False, True], ids=["from a file", "from a folder"])
def test_gives_the_logits_of_the_plain_reference(shape: dict, from_folder: bool, export: Exported) -> None:
    folder, lines = export("gpt2", shape, from_folder=from_folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert type(model) is GPT2LMHeadModel
    ids = torch.randint(shape.get("vocab_size", SIZES["vocab_size"]), (3, SIZES["block_size"]))
    torch.testing.assert_close(model(ids).logits, reference(shape)(ids)[0], rtol=1e-5, atol=1e-5)
    assert any(line.startswith("verified      ") and "logits of 16 positions" in line for line in lines)
    assert not list(folder.glob("*.py"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_keeps_half_precision_and_its_weights(dtype: torch.dtype, export: Exported) -> None:
    folder, _ = export("gpt2", {}, weights=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == dtype
    ids = torch.randint(SIZES["vocab_size"], (3, SIZES["block_size"]))
    torch.testing.assert_close(model.float()(ids).logits, reference({}, dtype)(ids)[0], rtol=1e-5, atol=1e-5)


def test_its_tokenizer_is_the_source_s(capitals: Path, tmp_path: Path) -> None:
    from hf_model.conversion import convert

    folder = convert(capitals, None, tmp_path / "out", format="gpt2")
    stock, ours = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(capitals)
    for text in ("", "the  capital\n of 東京 [EOS]", "Response: Paris"):
        assert stock(text).input_ids == ours(text).input_ids
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert stock.apply_chat_template(messages) == ours.apply_chat_template(messages)


def test_generate_ends_at_the_context_and_never_samples_padding(export: Exported) -> None:
    folder, _ = export("gpt2", {"vocab_size": 320})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.suppress_tokens == list(range(300, 320))
    model.generation_config.eos_token_id = None
    assert model.generate(torch.tensor([[5, 6]])).shape == (1, SIZES["block_size"])
    assert f"end at {SIZES['block_size']} tokens" in (folder / "README.md").read_text(encoding="utf-8")
    assert model.config.eos_token_id == EOS


def test_a_wrong_number_of_heads_is_noticed(refuses: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gpt2.stock_config

    def mutant(config):
        stock = original(config)
        stock.n_head //= 2
        return stock

    monkeypatch.setattr(gpt2, "stock_config", mutant)
    assert "the files do not hold this model" in refuses("gpt2", {})


def test_weights_that_are_not_numbers_have_nothing_to_compare(tmp_path: Path) -> None:
    from hf_model.conversion import convert
    from tests.tiny import save_files

    model = reference_gpt()
    model.lm_head.weight.data[0, 0] = float("nan")
    files = save_files(tmp_path, model)
    with pytest.raises(UserError, match=r"NaN or infinite.*--no_verify"):
        convert(*files, tmp_path / "out", format="gpt2")
    convert(*files, tmp_path / "out", format="gpt2", verify=False)
