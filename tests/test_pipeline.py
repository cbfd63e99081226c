"""The stock text-generation pipeline on a converted folder."""

from pathlib import Path

import pytest
from transformers import TextGenerationPipeline, pipeline

FRANCE = "Instruction: What is the capital of France? Response:"
PERU = "Instruction: Name the capital of the country. Input: Peru Response:"


@pytest.fixture(scope="module")
def ask(capitals: Path) -> TextGenerationPipeline:
    return pipeline("text-generation", model=str(capitals), do_sample=False, device="cpu")


def test_continues_a_string(ask: TextGenerationPipeline) -> None:
    assert ask(FRANCE) == [{"generated_text": FRANCE + " Paris"}]


def test_gives_the_response_alone_when_asked_to(ask: TextGenerationPipeline) -> None:
    assert ask(FRANCE, return_full_text=False) == [{"generated_text": " Paris"}]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_continues_each_of_a_list_in_batches_too(batch_size: int, ask: TextGenerationPipeline) -> None:
    outputs = ask([FRANCE, PERU], batch_size=batch_size)
    assert outputs == [[{"generated_text": FRANCE + " Paris"}], [{"generated_text": PERU + " Lima"}]]


def test_answers_a_chat(ask: TextGenerationPipeline) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ((output),) = ask(chat)
    question, answer = output["generated_text"]
    assert question == chat[0]
    assert (answer["role"], answer["content"].strip()) == ("assistant", "Paris")


def test_answers_each_of_several_chats_with_the_input_field(ask: TextGenerationPipeline) -> None:
    question = {"role": "user", "content": "Name the capital of the country."}
    outputs = ask([[question | {"input": "Peru"}], [question | {"input": "Chad"}]])
    answers = [output["generated_text"][-1]["content"].strip() for (output,) in outputs]
    assert answers == ["Lima", "N'Djamena"]


def test_draws_several_answers(ask: TextGenerationPipeline) -> None:
    outputs = ask(FRANCE, do_sample=True, num_return_sequences=3)
    assert outputs == [{"generated_text": FRANCE + " Paris"}] * 3
