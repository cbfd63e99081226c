"""The stock `Trainer` on the converted example."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_model import loading
from tests.ecosystem.conftest import NEW_FACTS, answer, rows


def trainer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, **arguments) -> Trainer:
    defaults = {"max_steps": 12, "learning_rate": 3e-3, "save_strategy": "no", "logging_steps": 1, "report_to": []}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **defaults | arguments),
        train_dataset=rows(tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def trained(capitals: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A few steps on new facts, with a save half-way, and the folder that `save_model` wrote."""
    folder = tmp_path_factory.mktemp("trainer")
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(capitals), AutoTokenizer.from_pretrained(capitals)
    run = trainer(model, tokenizer, folder / "run", save_strategy="steps", save_steps=6)
    run.train()
    run.save_model(folder / "saved")
    return run, folder / "saved"


def test_a_few_steps_lower_the_loss(trained: tuple) -> None:
    run, _ = trained
    assert losses(run)[-1] < losses(run)[0] / 4


def test_a_few_steps_teach_new_answers(trained: tuple, model: PreTrainedModel, tokenizer) -> None:
    run, _ = trained
    questions = [question for question, _ in NEW_FACTS]
    facts = [fact for _, fact in NEW_FACTS]
    assert [answer(model, tokenizer, question) for question in questions] != facts
    assert [answer(run.model.eval(), tokenizer, question) for question in questions] == facts


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    trained: tuple, model: PreTrainedModel, tokenizer, tmp_path: Path
) -> None:
    run, _ = trained
    resumed = trainer(model, tokenizer, tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(Path(run.args.output_dir) / "checkpoint-6"))
    assert resumed.state.global_step == 12
    for name, weight in run.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight)


def test_the_saved_folder_loads_as_a_converted_one_does(trained: tuple, capitals: Path) -> None:
    run, saved = trained
    assert {file.name for file in capitals.iterdir()} - {"README.md", "special_tokens_map.json", ".manifest.json"} <= {
        file.name for file in saved.iterdir()
    }
    configs = [json.loads((folder / "config.json").read_text()) for folder in (capitals, saved)]
    assert configs[1]["auto_map"] == configs[0]["auto_map"]
    model, tokenizer = loading.load(saved, None, device=torch.device("cpu"))
    for name, weight in run.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    assert tokenizer("Hello").input_ids == AutoTokenizer.from_pretrained(capitals)("Hello").input_ids


def test_gradient_accumulation_equals_one_large_batch(capitals: Path, tokenizer, tmp_path: Path) -> None:
    weights = []
    for size, accumulation in ((2, 1), (1, 2)):
        model = AutoModelForCausalLM.from_pretrained(capitals, dropout=0.0)
        run = trainer(
            model,
            tokenizer,
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
        )
        run.train()
        weights.append(model.lm_head.weight)
    torch.testing.assert_close(weights[0], weights[1])


def test_evaluation_reports_the_mean_loss_per_token(model: PreTrainedModel, tokenizer, tmp_path: Path) -> None:
    (row, *_) = rows(tokenizer)
    ids = torch.tensor([row["input_ids"]])
    log_probabilities = model(ids).logits.log_softmax(-1)[0, :-1]
    expected = -log_probabilities.gather(1, ids[0, 1:, None]).mean().item()
    metrics = trainer(model, tokenizer, tmp_path).evaluate([row])
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
