"""What the tests of the ecosystem share: the converted example, handed to programs that know only `from_pretrained`."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hf_model.tokenizer import format_example

# Two facts that the example has not learnt.
NEW_FACTS = (("What is the capital of Atlantis?", "Poseidon"), ("What is the capital of Narnia?", "Cair Paravel"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ecosystem)


@pytest.fixture
def model(capitals: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(capitals)


@pytest.fixture(scope="session")
def tokenizer(capitals: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(capitals)


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str, **kwargs) -> str:
    """What a user of the chat template gets, decoded greedily."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs.to(model.device), **{"do_sample": False, "max_new_tokens": 12} | kwargs)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()


def rows(tokenizer: PreTrainedTokenizerFast, facts: tuple[tuple[str, str], ...] = NEW_FACTS) -> list[dict]:
    """The facts as the fine-tuning text, tokenized; every token is a label but [BOS], which nothing comes before."""
    texts = [format_example(question, fact) for question, fact in facts]
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, *ids[1:]]} for ids in encoded]
