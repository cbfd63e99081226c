"""The diagnosis of a checkpoint's weights, held against models that are trained both ways here."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.functional import one_hot

from examples.capitals.train import encode, examples, train
from examples.plain_gpt import GPT, GPTConfig, save_checkpoint
from hf_model import diagnosis
from hf_model.conversion import convert
from hf_model.diagnosis import copied_share, non_finite
from hf_model.vocabulary import convert_tokenizer
from tests.tiny import TOKENIZER, save_tokenizer


def trained(shift: bool) -> GPT:
    """A small model after a few seconds on the example's questions, its labels shifted by one or not."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    rows = [encode(tokenizer, record) for record in examples()]
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": tokenizer.get_vocab_size()}
    model = GPT(GPTConfig(**sizes, bias=False, dropout=0.0))
    train(model, rows, epochs=4, lr=1e-2, mask_prompt=False, shift=shift)
    return model


def test_a_model_trained_on_unshifted_labels_gets_a_warning_and_its_twin_none(tmp_path: Path) -> None:
    warnings = {}
    for shift in (True, False):
        lines: list[str] = []
        save_checkpoint(tmp_path / "ckpt.pt", trained(shift), iter_num=1)
        convert(tmp_path / "ckpt.pt", TOKENIZER, tmp_path / f"{shift}", report=lines.append)
        warnings[shift] = [line for line in lines if line.startswith("warning:")]
    assert warnings[True] == []
    (warning,) = warnings[False]
    assert "Its labels were probably not shifted by one in fine-tuning" in warning
    assert "sampling options will not cure that" in warning


@pytest.mark.parametrize("copies, share", [("the prompt", 0), ("the response", 1)])
def test_the_share_counts_the_copied_tokens_of_responses(
    copies: str, share: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = convert_tokenizer(save_tokenizer(tmp_path / "tokenizer.json"), model_max_length=64)
    n_prompt = len(tokenizer("Instruction: Say it. Response:").input_ids)

    class Copier:
        config = SimpleNamespace(block_size=64)
        device = torch.device("cpu")

        def __call__(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            is_copied = (torch.arange(ids.shape[1]) < n_prompt) == (copies == "the prompt")
            predicted = torch.where(is_copied, ids, (ids - 1) % len(tokenizer))
            return SimpleNamespace(logits=one_hot(predicted, len(tokenizer)))

    answers = ("The cat sat on the mat.", "Yes.")
    monkeypatch.setattr(diagnosis, "PROBES", [("Say it.", answer, "") for answer in answers])
    assert copied_share(Copier(), tokenizer) == share


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_found(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, -2.0], [0.0, 65504.0]]).to(dtype)
    state_dict = {"sound": values}
    for bad in (float("nan"), float("inf"), float("-inf")):
        state_dict[str(bad)] = values.clone().index_fill_(1, torch.tensor(0), bad)
    assert non_finite(state_dict) == ["nan", "inf", "-inf"]
