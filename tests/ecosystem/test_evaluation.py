"""EleutherAI's harness on the example's questions."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from examples.capitals.train import examples
from examples.evaluation.questions import QUESTIONS
from hf_model.batch import answer_file
from hf_model.generation import Sampling
from hf_model.records import read_records
from hf_model.tokenizer import save_tokenizer
from tests.tiny import ROOT

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (the `ecosystem` extra)")

LIMIT = 120


def test_the_questions_are_those_that_the_example_learnt() -> None:
    assert read_records(QUESTIONS) == examples()


def test_the_score_of_lm_eval_is_our_own_exact_match_count(
    model: PreTrainedModel, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The example knows every answer; with noise on its weights it is right now and then.
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.6 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "noisy")
    save_tokenizer(tokenizer, tmp_path / "noisy")
    records = read_records(QUESTIONS)[:LIMIT]
    answer_file(model, tokenizer, records, tmp_path / "answers.jsonl", 32, Sampling(temperature=0, max_new_tokens=20))
    answered = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    right = sum(record["response"] == record["output"] for record in answered)
    assert 0 < right < LIMIT

    monkeypatch.chdir(ROOT)  # the task names its questions from there
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "noisy"), "trust_remote_code": True},
        tasks=["capitals"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(ROOT / "examples" / "evaluation")),
        limit=LIMIT,
        batch_size=32,
        device="cpu",
        bootstrap_iters=0,
    )
    assert results["results"]["capitals"]["exact_match,strip"] == pytest.approx(right / LIMIT)
