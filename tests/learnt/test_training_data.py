"""What is measured against training data, held against the plain model's own losses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from examples.plain_gpt import GPT, GPTConfig
from hf_model.errors import UserError
from hf_model.learnt.training_data import Alternative, Measurement, measure
from hf_model.tokenizer import convert_tokenizer, format_prompt
from tests.learnt.test_diagnosis import SMALL, characters, copier
from tests.tiny import CHECKPOINT, ROOT, TOKENIZER, gpt, load_plain, twin

QUESTIONS = ROOT / "examples" / "evaluation" / "questions.jsonl"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return convert_tokenizer(TOKENIZER, model_max_length=64)


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """The first questions of the example's."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    return write(tmp_path / "few.jsonl", *map(json.loads, lines[:40]))


class TestTokenIds:
    """nanoGPT's train.bin, which its prepare.py writes with NumPy."""

    def test_are_measured_as_the_text_that_they_stand_for(self, tmp_path: Path) -> None:
        model = GPT(GPTConfig(**SMALL | {"vocab_size": 1024})).eval()
        raw = load_plain(CHECKPOINT, TOKENIZER, raw=True)[1]
        text = QUESTIONS.read_text(encoding="utf-8")
        (tmp_path / "train.txt").write_text(text, encoding="utf-8")
        np.array(raw(text, add_special_tokens=False).input_ids, dtype=np.uint16).tofile(tmp_path / "train.bin")
        of_ids, of_text = (measure(twin(model), raw, tmp_path / name) for name in ("train.bin", "train.txt"))
        assert of_ids.is_text and of_ids.n_tokens == of_text.n_tokens > 1000
        assert (of_ids.loss, of_ids.beginnings) == (of_text.loss, of_text.beginnings)

    def test_suit_a_model_of_instructions_too(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        model = gpt(vocab_size=1024, block_size=64)
        np.arange(4, 964, dtype=np.uint16).tofile(tmp_path / "val.bin")
        measured = measure(twin(model), tokenizer, tmp_path / "val.bin")
        with torch.no_grad():
            losses = [cross_entropy(model(ids[None])[0][0, :-1], ids[1:]) for ids in torch.arange(4, 964).split(64)]
        assert measured.n_tokens == 960 and measured.n_exact is None
        assert measured.loss == pytest.approx(float(sum(losses) / len(losses)), rel=1e-4)

    def test_of_another_tokenizer_are_an_error(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        np.array([5, 50256, 7], dtype=np.uint16).tofile(tmp_path / "train.bin")
        with pytest.raises(UserError, match="token id 50256, but the tokenizer has 1024 tokens"):
            measure(twin(gpt(vocab_size=1024, block_size=64)), tokenizer, tmp_path / "train.bin")

    def test_of_an_empty_file_are_an_error(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        (tmp_path / "train.bin").touch()
        with pytest.raises(UserError, match="holds nothing to measure"):
            measure(twin(gpt(vocab_size=1024, block_size=64)), tokenizer, tmp_path / "train.bin")


def lines(measured: Measurement) -> list[str]:
    return [str(finding) for finding in measured.findings()]


def reference(model: GPT, tokenizer: PreTrainedTokenizerFast, path: Path) -> tuple[float, float, float]:
    """The answers' loss, and where the labels differ the loss with labels shifted and not, a record at a time."""
    every, shifted, unshifted = [], [], []
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        prompt = tokenizer(format_prompt(record["instruction"], record["input"])).input_ids
        ids = prompt + tokenizer(f" {record['output']}[EOS]", add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0][0]
        for t in range(len(prompt) - 1, len(ids) - 1):
            loss = float(cross_entropy(logits[t], torch.tensor(ids[t + 1])))
            every.append(loss)
            if t >= len(prompt) and ids[t] != ids[t + 1]:
                shifted.append(loss)
                unshifted.append(float(cross_entropy(logits[t], torch.tensor(ids[t]))))
    return tuple(sum(losses) / len(losses) for losses in (every, shifted, unshifted))


@pytest.mark.parametrize("kind", ["random", "copier"])
def test_the_losses_are_those_of_the_plain_model(kind: str, few: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = copier(SMALL) if kind == "copier" else gpt(**SMALL)
    measured = measure(twin(model), tokenizer, few)
    every, shifted, unshifted = reference(model, tokenizer, few)
    assert (measured.loss, measured.loss_shifted, measured.loss_unshifted) == pytest.approx(
        (every, shifted, unshifted), rel=1e-4
    )
    assert measured.as_dict()["perplexity"] == pytest.approx(math.exp(every), rel=1e-3)
    assert (measured.n_used, measured.n_all) == (40, 40)


def test_a_stutterer_is_called_one(few: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    measured = measure(twin(copier(SMALL)), tokenizer, few)
    text = "\n".join(lines(measured))
    assert measured.repeats
    assert f"answers' loss {measured.loss_shifted:.2f} with labels shifted by one, " in text
    assert "labels not shifted: this model was trained to repeat its current token" in text
    assert f"exact answers 0 of {measured.n_asked}" in text


def test_the_example_knows_its_data(few: Path) -> None:
    model, tokenizer = load_plain(CHECKPOINT, TOKENIZER)
    measured = measure(model, tokenizer, few)
    assert not measured.repeats
    assert measured.loss < 0.1 < 5 < measured.loss_unshifted
    assert measured.n_exact == measured.n_asked == 32
    assert all(record.own.strip() == record.answer for record in measured.worst)
    assert measured.better == []


def test_a_wrong_number_of_heads_is_found(few: Path) -> None:
    model, tokenizer = load_plain(CHECKPOINT, TOKENIZER, n_head=12)
    measured = measure(model, tokenizer, few)
    assert [(other.option, other.value) for other in measured.better] == [("n_head", 3)]
    assert any("--n_head 3 fits better than 12" in line for line in lines(measured))
    assert model.config.n_head == 12


def test_a_form_of_gelu_that_fits_is_told_from_one_that_does_not(few: Path) -> None:
    model, tokenizer = load_plain(CHECKPOINT, TOKENIZER)
    measured = measure(model, tokenizer, few)
    for gain, said in ((0.01, "warning: --activation gelu_new fits better than gelu: "), (-0.01, "gelu fits best: ")):
        other = Alternative("activation_function", "gelu_new", measured.chosen_loss - gain, math.copysign(5, gain))
        assert any(said in line for line in lines(replace(measured, alternatives=(other,))))


@pytest.mark.parametrize("chosen, other", [("gelu", "gelu_new"), ("gelu_new", "gelu"), ("gelu_pytorch_tanh", "gelu")])
def test_a_tie_between_the_forms_of_gelu_is_said_to_be_one(chosen: str, other: str, few: Path) -> None:
    model, tokenizer = load_plain(CHECKPOINT, TOKENIZER, activation=chosen)
    measured = measure(model, tokenizer, few)
    (line,) = [line for line in lines(measured) if line.startswith("activation")]
    assert line.startswith(f"activation    {chosen} and {other} tie: loss ")
    assert line.endswith("the data does not tell them apart")
    assert measured.better == []


def test_a_difference_that_is_certain_but_next_to_nothing_is_a_tie(few: Path) -> None:
    model, tokenizer = load_plain(CHECKPOINT, TOKENIZER)
    measured = measure(model, tokenizer, few)
    for ahead in (50.0, -50.0):
        loss = measured.chosen_loss - math.copysign(1e-6, ahead)
        close = replace(measured, alternatives=(Alternative("activation_function", "gelu_new", loss, ahead),))
        assert close.better == []
        assert any("gelu and gelu_new tie: " in line for line in lines(close))


def test_an_option_is_not_advised_where_its_loss_is_above_that_of_an_even_choice(few: Path) -> None:
    model, tokenizer = load_plain(CHECKPOINT, TOKENIZER)
    measured = replace(measure(model, tokenizer, few), loss=10.956, chosen_loss=10.956)
    for loss in (10.951, 7.0):  # an even choice among 1024 tokens has 6.93
        bad = replace(measured, alternatives=(Alternative("n_head", 1, loss, 9.0),))
        assert bad.better == []
        assert any(line.startswith("n_head        no value fits this data: 3 has loss 10.9") for line in lines(bad))
    good = replace(measured, alternatives=(Alternative("n_head", 1, 0.5, 9.0),))
    assert any("--n_head 1 fits better than 3: loss 0.5 against 10.96" in line for line in lines(good))


@pytest.mark.parametrize("gain", [0.0002, -0.0002])
def test_losses_that_differ_are_shown_with_digits_that_tell_them_apart(gain: float, few: Path) -> None:
    model, tokenizer = load_plain(CHECKPOINT, TOKENIZER)
    other = Alternative("n_head", 1, 5.1232 - gain, math.copysign(9, gain))
    measured = replace(measure(model, tokenizer, few), loss=5.1232, chosen_loss=5.1232, alternatives=(other,))
    (line,) = [line for line in lines(measured) if "n_head" in line]
    assert ("5.123 against 5.1232" in line) if gain > 0 else ("loss 5.1232, and 5.1234 with 1" in line)


def test_a_loss_above_an_even_choice_is_named(few: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = GPT(GPTConfig(**SMALL))
    model.lm_head.weight.data.normal_(std=2)
    (warning,) = [line for line in lines(measure(twin(model), tokenizer, few)) if "even choice among" in line]
    assert warning.startswith("warning: ")


def test_raw_text_is_measured_at_every_token(tmp_path: Path) -> None:
    text = "to be or not to be, that is the question\n" * 4
    tokenizer = characters(text)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    model = gpt(**SMALL | {"vocab_size": len(tokenizer), "block_size": 16})
    measured = measure(twin(model), tokenizer, tmp_path / "text.txt")
    ids = torch.tensor(tokenizer(text).input_ids)
    losses = []
    for stretch in ids.split(16):
        with torch.no_grad():
            losses += cross_entropy(model(stretch[None, :-1])[0][0], stretch[1:], reduction="none").tolist()
    assert measured.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert measured.n_exact is None
    assert measured.is_text
    for beginning, continuation in measured.beginnings:
        assert beginning + continuation in text


def test_the_same_sample_is_drawn_each_time_and_is_bounded(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_model.learnt.training_data.MOST_TOKENS", 500)
    model = twin(gpt(**SMALL))
    first, second = (measure(model, tokenizer, QUESTIONS) for _ in range(2))
    assert first == second
    assert first.n_tokens <= 500 and first.n_used < first.n_all == 900
    assert f"({first.n_used} of 900 records, {first.n_tokens} tokens, seed 0)" in lines(first)[0]


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "holds nothing to measure"),
        ('{"instruction": "a"}\n', "line 1: training data needs the answer too"),
        ('{"instruction": "a", "output": 3}\n', "line 1: training data needs the answer too"),
        ("no json\n", "line 1: is not a JSON object"),
        (json.dumps({"instruction": "long " * 500, "output": "x"}), "holds nothing to measure"),
    ],
)
def test_data_that_cannot_be_measured_is_refused_in_one_line(
    content: str, said: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        measure(twin(gpt(**SMALL)), tokenizer, tmp_path / "data.jsonl")
