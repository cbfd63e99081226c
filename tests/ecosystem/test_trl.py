"""TRL's `SFTTrainer` with the folder's own chat template and assistant-only loss."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from examples.evaluation.questions import QUESTIONS
from hf_model.learnt.diagnosis import STUTTER_MASS, diagnose
from hf_model.records import read_records
from hf_model.tokenizer import format_example, format_prompt
from tests.ecosystem.conftest import NEW_FACTS, answer

datasets = pytest.importorskip("datasets", reason="datasets is not installed (the `ecosystem` extra)")
trl = pytest.importorskip("trl", reason="TRL is not installed (the `ecosystem` extra)")

RECORDS = [
    *({"instruction": question, "input": "", "output": fact} for question, fact in NEW_FACTS),
    {"instruction": "Name the capital of the country.", "input": "Atlantis", "output": "Poseidon"},
]


def conversation(record: dict[str, str]) -> dict:
    """A record of the original's fine-tuning data as a chat."""
    user = {"role": "user", "content": record["instruction"], "input": record["input"]}
    return {"messages": [user, {"role": "assistant", "content": record["output"]}]}


def sft_trainer(model: PreTrainedModel, tokenizer, folder: Path, **arguments) -> "trl.SFTTrainer":
    defaults = {"max_steps": 1, "learning_rate": 3e-3, "lr_scheduler_type": "constant", "report_to": []}
    config = trl.SFTConfig(
        output_dir=str(folder),
        assistant_only_loss=True,
        max_length=model.config.block_size,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **defaults | arguments,
    )
    dataset = datasets.Dataset.from_list([conversation(record) for record in RECORDS])
    return trl.SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)


def test_labels_are_masked_on_the_prompt_as_in_the_original(model: PreTrainedModel, tokenizer, tmp_path: Path) -> None:
    run = sft_trainer(model, tokenizer, tmp_path)
    for record, row in zip(RECORDS, run.train_dataset, strict=True):
        text = format_example(record["instruction"], record["output"], record["input"])
        prompt = "[BOS]" + format_prompt(record["instruction"], record["input"])
        ids, n_prompt = (tokenizer(part, add_special_tokens=False).input_ids for part in (text, prompt))
        batch = run.data_collator([row])
        assert batch["input_ids"].tolist() == [ids]
        assert batch["labels"].tolist() == [[-100] * len(n_prompt) + ids[len(n_prompt) :]]


def test_the_loss_is_that_of_the_answers_alone(model: PreTrainedModel, tokenizer, tmp_path: Path) -> None:
    run = sft_trainer(model.eval(), tokenizer, tmp_path)
    batch = run.data_collator(list(run.train_dataset))
    log_probabilities = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    counted = batch["labels"][:, 1:] != -100
    chosen = log_probabilities[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0][counted]
    assert run.evaluate(run.train_dataset)["eval_loss"] == pytest.approx(-chosen.mean().item(), rel=1e-4)


def test_a_few_steps_teach_new_answers(model: PreTrainedModel, tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = sft_trainer(model, tokenizer, tmp_path, max_steps=15)
    run.train()
    assert [answer(model.eval(), tokenizer, question) for question, _ in NEW_FACTS] == [fact for _, fact in NEW_FACTS]


def stutter(model: PreTrainedModel, steps: int) -> None:
    """Train wrongly, as some trainers do: the label of every position is the token that stands there."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = torch.randint(model.config.vocab_size, (32, 48))
        optimizer.zero_grad()
        model(ids, labels=ids.roll(1, dims=1)).loss.backward()  # the model itself shifts by one
        optimizer.step()


def test_a_stuttering_model_is_cured(model: PreTrainedModel, tokenizer, tmp_path: Path) -> None:
    from examples.stutter.cure import fine_tune

    stutter(model.train(), steps=60)
    assert diagnose(model.eval(), tokenizer).verdict == "stutters"
    fine_tune(model, tokenizer, read_records(QUESTIONS), epochs=2, out_dir=tmp_path)
    assert diagnose(model.eval(), tokenizer).copy_mass < STUTTER_MASS
