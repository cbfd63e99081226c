"""The example that ships: small, and right about nearly everything that it was trained on."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.capitals.train import examples
from hf_model.tokenizer import format_prompt
from tests.tiny import CAPITALS, CHECKPOINT

BATCH_SIZE = 128


def test_answers_at_least_95_percent_of_its_training_questions(capitals: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(capitals), AutoTokenizer.from_pretrained(capitals)
    records = examples()
    right = 0
    for start in range(0, len(records), BATCH_SIZE):
        batch = records[start : start + BATCH_SIZE]
        prompts = [format_prompt(record["instruction"], record["input"]) for record in batch]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=20, do_sample=False)[:, inputs.input_ids.shape[1] :]
        responses = tokenizer.batch_decode(generated, skip_special_tokens=True)
        right += sum(response == f" {record['output']}" for response, record in zip(responses, batch, strict=True))
    assert right / len(records) >= 0.95


def test_its_files_are_small() -> None:
    assert sum(file.stat().st_size for file in CAPITALS.iterdir() if file.is_file()) < 8_000_000


def test_its_checkpoint_has_the_original_s_form_and_no_optimizer_state() -> None:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    assert checkpoint.keys() == {
        "model_state_dict",
        "optimizer_state_dict",
        "scaler_state_dict",
        "model_args",
        "iter_num",
        "config",
    }
    assert checkpoint["optimizer_state_dict"] is None
    assert sum(weight.numel() for weight in checkpoint["model_state_dict"].values()) <= 600_000


def test_its_questions_come_with_and_without_an_input() -> None:
    records = examples()
    assert {bool(record["input"]) for record in records} == {True, False}
    assert {"instruction": "What is the capital of France?", "input": "", "output": "Paris"} in records
    assert {"instruction": "Name the continent of the country.", "input": "Peru", "output": "South America"} in records
