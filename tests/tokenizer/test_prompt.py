"""The prompt format and its chat template, against the strings of the format document written out by hand."""

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from hf_model.tokenizer import convert_tokenizer, format_example, format_prompt
from tests.tiny import EOS, TOKENIZER

ASKED = {"role": "user", "content": "What is the capital of France?"}
ANSWERED = {"role": "assistant", "content": "Paris"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED_WITH_INPUT = {"role": "user", "content": "Name the capital of the country.", "input": "Côte d'Ivoire"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return convert_tokenizer(TOKENIZER, model_max_length=64)


def test_the_prompt_is_the_format_document_s() -> None:
    assert format_prompt("Summarize.") == "Instruction: Summarize. Response:"
    assert format_prompt("Summarize.", "A text.") == "Instruction: Summarize. Input: A text. Response:"


def test_the_fine_tuning_text_is_the_format_document_s() -> None:
    assert format_example("Add.", "3") == "[BOS]Instruction: Add. Response: 3[EOS]"
    assert format_example("Add.", "3", "1 2") == "[BOS]Instruction: Add. Input: 1 2 Response: 3[EOS]"


CHATS = {
    "a question": ([ASKED], "[BOS]Instruction: What is the capital of France? Response:"),
    "a question with an input": (
        [ASKED_WITH_INPUT],
        "[BOS]Instruction: Name the capital of the country. Input: Côte d'Ivoire Response:",
    ),
    "an empty input": ([ASKED | {"input": ""}], "[BOS]Instruction: What is the capital of France? Response:"),
    "an answer": ([ASKED, ANSWERED], "[BOS]Instruction: What is the capital of France? Response: Paris[EOS]"),
    "a second question, alone": (
        [ASKED, ANSWERED, ASKED_WITH_INPUT],
        "[BOS]Instruction: Name the capital of the country. Input: Côte d'Ivoire Response:",
    ),
    "two answers, both to train on": (
        [ASKED, ANSWERED, ASKED_WITH_INPUT, {"role": "assistant", "content": "Yamoussoukro"}],
        "[BOS]Instruction: What is the capital of France? Response: Paris[EOS]"
        "[BOS]Instruction: Name the capital of the country. Input: Côte d'Ivoire Response: Yamoussoukro[EOS]",
    ),
    "a system message, left out": (
        [SYSTEM, ASKED],
        "[BOS]Instruction: What is the capital of France? Response:",
    ),
    "a system message before an answer, left out": (
        [SYSTEM, ASKED, ANSWERED],
        "[BOS]Instruction: What is the capital of France? Response: Paris[EOS]",
    ),
    "a list of text parts": (
        [
            {"role": "user", "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "one."}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Two"}]},
        ],
        "[BOS]Instruction: Add one. Response: Two[EOS]",
    ),
}


class TestChatTemplate:
    @pytest.mark.parametrize("add_generation_prompt", [True, False])
    @pytest.mark.parametrize("messages, text", CHATS.values(), ids=CHATS)
    def test_renders(
        self, messages: list[dict], text: str, add_generation_prompt: bool, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        how = {"add_generation_prompt": add_generation_prompt}
        assert tokenizer.apply_chat_template(messages, tokenize=False, **how) == text
        ids = tokenizer.apply_chat_template(messages, return_dict=True, **how).input_ids
        assert ids == tokenizer(text, add_special_tokens=False).input_ids

    @pytest.mark.parametrize("input_text", ["", "Côte d'Ivoire"])
    def test_gives_the_tokens_of_the_command_line_and_of_fine_tuning(
        self, input_text: str, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        question = {"role": "user", "content": "Name the capital.", "input": input_text}
        prompt = tokenizer(format_prompt("Name the capital.", input_text)).input_ids
        example = format_example("Name the capital.", "Paris", input_text)
        templated = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=True)
        assert templated.input_ids == prompt
        templated = tokenizer.apply_chat_template([question, ANSWERED], return_dict=True)
        assert templated.input_ids == tokenizer(example, add_special_tokens=False).input_ids

    def test_the_training_mask_covers_the_responses_and_their_end_tokens(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        messages = [ASKED, ANSWERED, ASKED_WITH_INPUT, {"role": "assistant", "content": "Yamoussoukro"}]
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        marked = [
            token_id
            for token_id, is_marked in zip(encoded.input_ids, encoded.assistant_masks, strict=True)
            if is_marked
        ]
        responses = tokenizer(" Paris[EOS] Yamoussoukro[EOS]", add_special_tokens=False).input_ids
        assert marked == responses
        assert marked.count(EOS) == 2

    def test_a_model_of_several_turns_is_given_them_all_when_told(self, tokenizer: PreTrainedTokenizerFast) -> None:
        rendered = tokenizer.apply_chat_template([ASKED, ANSWERED, ASKED], tokenize=False, multi_turn=True)
        question = "[BOS]Instruction: What is the capital of France? Response:"
        assert rendered == f"{question} Paris[EOS]{question}"

    @pytest.mark.parametrize(
        "message, error",
        [
            ({"role": "tool", "content": "42"}, "has the roles user and assistant, not tool"),
            ({"role": "user", "content": [{"type": "image", "url": "x.png"}]}, "reads text only, not image"),
        ],
    )
    def test_what_the_format_has_no_place_for_is_refused(
        self, message: dict, error: str, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        with pytest.raises(TemplateError, match=error):
            tokenizer.apply_chat_template([message], tokenize=False)
