"""The Modelfile beside a GGUF: Ollama gets the model's prompt, context and sampling from it."""

import ast
import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_model.formats.ollama import modelfile
from hf_model.loading import Source
from hf_model.tokenizer import TEMPLATES, set_chat_template
from tests.templates import CHATML_LIKE, save_speaker, save_tokenizer

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def tokenizer(capitals: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(capitals)


def text_for(capitals: Path, tokenizer: PreTrainedTokenizerFast, **settings: object) -> str:
    model = AutoModelForCausalLM.from_pretrained(capitals)
    model.generation_config.update(**settings)
    return modelfile("model-f32.gguf", model, tokenizer, adds_bos=True)


def prompt_of(text: str) -> str:
    """What the template makes of the question: its two strings around the content."""
    before, after = re.search(r"\{\{ (\".*\") \}\}\{\{ \.Content \}\}\{\{ (\".*\") \}\}", text).groups()  # type: ignore
    assert not re.search(r"\\ud[89a-f]", before + after)  # Go has no escapes of surrogates
    return f"{ast.literal_eval(before)}{QUESTION}{ast.literal_eval(after)}"  # the other escapes are Python's too


def test_names_the_file_and_the_model_s_settings(capitals: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = text_for(capitals, tokenizer)
    assert text.startswith("FROM ./model-f32.gguf\n")
    wanted = {"num_ctx 64", "temperature 0.8", "top_k 50", "repeat_penalty 1.0", 'stop "[EOS]"'}
    assert wanted <= {line.removeprefix("PARAMETER ") for line in text.splitlines()}


def test_a_greedy_model_stays_greedy(capitals: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert "PARAMETER temperature 0\n" in text_for(capitals, tokenizer, do_sample=False)


def test_the_prompt_is_the_chat_template_s_but_for_the_beginning(
    capitals: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """llama.cpp puts [BOS] in front itself."""
    expected = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False)
    assert f"[BOS]{prompt_of(text_for(capitals, tokenizer))}" == expected


@pytest.mark.parametrize("quotes", ['"""', "{{ .System }}", "\\ \n }}"], ids=repr)
def test_no_template_can_break_out_of_it(quotes: str, capitals: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(capitals)
    tokenizer.chat_template = json.dumps(quotes).join(["{{", " + messages[0].content + '!' }}"])
    text = text_for(capitals, tokenizer)
    assert prompt_of(text) == f"{quotes}{QUESTION}!"
    assert text.count('"""') == 2


def test_characters_that_control_a_terminal_are_escapes_and_emoji_are_not(capitals: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(capitals)
    tokenizer.chat_template = "🙂 \x1b[2J\x9b\u202e{{ messages[0].content }}!"
    text = text_for(capitals, tokenizer)
    assert prompt_of(text) == f"🙂 \x1b[2J\x9b\u202e{QUESTION}!"
    assert "🙂" in text and not set("\x1b\x9b\u202e") & set(text)


def test_raw_text_is_the_prompt_itself(capitals: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(capitals)
    set_chat_template(tokenizer, None)
    assert 'TEMPLATE """{{ .Prompt }}"""' in text_for(capitals, tokenizer)


def test_alpaca_is_the_template_s_but_for_the_beginning(capitals: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(capitals)
    set_chat_template(tokenizer, TEMPLATES["alpaca"])
    prompt = prompt_of(text_for(capitals, tokenizer))
    assert prompt.startswith("Below is an instruction that describes a task. Write a response")
    assert prompt.endswith(f"\n\n### Instruction:\n{QUESTION}\n\n### Response:\n")


def test_chatml_keeps_the_turns_and_ends_at_its_token(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json", *CHATML_LIKE)
    loaded = Source(save_speaker(tmp_path, tokenizer, "\nParis"), tokenizer, chat_template="chatml").load()
    text = modelfile("model-f32.gguf", loaded.model, loaded.tokenizer, adds_bos=False)
    turns = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    assert f'TEMPLATE """{turns}"""' in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text


def test_another_template_of_several_turns_says_how_to_keep_them(capitals: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(capitals)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    text = text_for(capitals, tokenizer)
    assert prompt_of(text) == f"user: {QUESTION}\nassistant:"
    assert "# The model's chat template has several turns" in text
    assert "docs.ollama.com/template" in text
