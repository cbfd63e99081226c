"""Special tokens under any name: what begins a text and what ends it is found, said, and can be chosen."""

import re
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError
from hf_model.loading import own_tokenizer
from hf_model.tokenizer import (
    FoundTokenizer,
    ModelInfo,
    find_tokenizer,
    format_example,
    format_prompt,
    probes,
    save_tokenizer,
    takes_instructions,
)
from tests import relatives

TEXT = "Instruction: What is the capital of France? Response: Paris"
MODEL = ModelInfo(Path("ckpt.pt"), 320, 16)


def save(folder: Path, *special: str, template: str | None = None) -> Path:
    """Write a byte-level tokenizer with special tokens, and what its trainer puts around a text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 2, vocab_size=300, special_tokens=list(special), show_progress=False)
    backend: Tokenizer = tokenizer._tokenizer
    if template:
        used = [(token, backend.token_to_id(token)) for token in special if token in template]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def roles(tokenizer: PreTrainedTokenizerFast) -> tuple[str | None, str | None, str | None]:
    return tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token


def reread(found: FoundTokenizer, folder: Path) -> PreTrainedTokenizerFast:
    save_tokenizer(found.tokenizer, folder / "hf")
    return AutoTokenizer.from_pretrained(folder / "hf")


@pytest.mark.parametrize(
    "special, template, expected",
    [
        (("<s>", "</s>"), "<s> $A </s>", ("<s>", "</s>", "</s>")),
        (("<pad>", "<|begin|>", "<|stop|>"), "<|begin|> $A <|stop|>", ("<|begin|>", "<|stop|>", "<pad>")),
        (("<|bos|>", "<|endoftext|>"), "<|bos|> $A", ("<|bos|>", "<|endoftext|>", "<|endoftext|>")),
        (("<|endoftext|>",), "<|endoftext|> $A", ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>")),
        (("<|im_start|>", "<|im_end|>"), None, (None, "<|im_end|>", "<|im_end|>")),
        (("<|bos|>", "<|user|>"), None, (None, None, None)),
        (("[EOS]",), None, (None, "[EOS]", "[EOS]")),
        (("[BOS]", "</s>"), "[BOS] $A </s>", ("[BOS]", "</s>", "</s>")),
        ((), None, (None, None, None)),
    ],
    ids=str,
)
def test_they_are_found(special: tuple, template: str | None, expected: tuple, tmp_path: Path) -> None:
    path = save(tmp_path, *special, template=template)
    found = find_tokenizer(path, MODEL)
    bare = Tokenizer.from_file(str(path)).encode("Paris", add_special_tokens=False).ids
    for tokenizer in (found.tokenizer, reread(found, tmp_path)):
        assert roles(tokenizer) == expected
        begin = [tokenizer.bos_token_id] if expected[0] else []
        assert tokenizer("Paris").input_ids == [*begin, *bare]
        assert not takes_instructions(tokenizer)
    assert found.encode("Paris") == [*begin, *bare]


@pytest.mark.parametrize(
    "special, template, notes",
    [
        (("<s>", "</s>"), "<s> $A </s>", [r"<s> begins a text", r"</s> ends a text: the tokenizer puts it behind"]),
        (("<|bos|>", "<|x|>"), None, [r"does not put <\|bos\|> in front of a text; --bos_token '<\|bos\|>'"]),
        (("<|endoftext|>", "<|im_end|>"), None, [r"<\|endoftext\|> ends a text, not <\|im_end\|>; --eos_token"]),
        (("<|endoftext|>",), None, []),
        (("[BOS]", "[EOS]"), "[BOS] $A [EOS]", []),
    ],
    ids=str,
)
def test_what_was_found_is_said(special: tuple, template: str | None, notes: list, tmp_path: Path) -> None:
    said = find_tokenizer(save(tmp_path, *special, template=template), MODEL).notes
    assert len(said) == len(notes)
    assert all(re.search(pattern, note) for pattern, note in zip(notes, said, strict=True))


class TestChoices:
    def test_each_role_can_be_chosen(self, tmp_path: Path) -> None:
        path = save(tmp_path, "<|bos|>", "<|endoftext|>", "<|im_end|>", "<|fill|>")
        chosen = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|fill|>"}
        found = find_tokenizer(path, MODEL, **chosen)
        bare = Tokenizer.from_file(str(path)).encode("Paris").ids
        for tokenizer in (found.tokenizer, reread(found, tmp_path)):
            assert roles(tokenizer) == ("<|bos|>", "<|im_end|>", "<|fill|>")
            assert tokenizer("Paris").input_ids == found.encode("Paris") == [tokenizer.bos_token_id, *bare]
        assert found.notes == ()

    def test_they_come_before_what_the_tokenizer_tells(self, tmp_path: Path) -> None:
        path = save(tmp_path, "<s>", "</s>", "<|x|>", "<|y|>", template="<s> $A </s>")
        found = find_tokenizer(path, MODEL, bos_token="<|x|>", eos_token="<|y|>")
        assert roles(found.tokenizer) == ("<|x|>", "<|y|>", "<|y|>")
        assert found.tokenizer("a").tokens()[:-1] == ["<|x|>"]
        assert found.encode("a") == found.tokenizer("a").input_ids

    def test_of_a_model_of_instructions_too(self, tmp_path: Path) -> None:
        path = save(tmp_path, "[PAD]", "[BOS]", "[EOS]", "<|im_end|>", template="[BOS] $A [EOS]")
        tokenizer = reread(find_tokenizer(path, MODEL, eos_token="<|im_end|>"), tmp_path)
        assert roles(tokenizer) == ("[BOS]", "<|im_end|>", "[PAD]")
        assert takes_instructions(tokenizer)
        assert tokenizer("a").tokens()[0] == "[BOS]"

    def test_a_character_can_end_a_text(self, tmp_path: Path) -> None:
        found = find_tokenizer(relatives.save_meta(tmp_path / "meta.pkl"), MODEL, eos_token="\n")
        tokenizer = reread(found, tmp_path)
        assert tokenizer.eos_token_id == relatives.STOI["\n"]
        assert tokenizer(relatives.TEXT).input_ids == [relatives.STOI[character] for character in relatives.TEXT]

    @pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token"])
    def test_a_token_that_is_not_there_is_named(self, role: str, tmp_path: Path) -> None:
        path = save(tmp_path, "<s>", "</s>")
        with pytest.raises(UserError, match=rf"--{role} '<none>': .* no such token; .* are <s>, </s>"):
            find_tokenizer(path, MODEL, **{role: "<none>"})

    def test_they_stay_when_a_folder_is_converted_again(self, tmp_path: Path) -> None:
        path = save(tmp_path, "[PAD]", "[BOS]", "[EOS]", "<|x|>", "<|y|>", template="[BOS] $A [EOS]")
        first = reread(find_tokenizer(path, MODEL, bos_token="<|x|>", eos_token="<|y|>"), tmp_path)
        found = find_tokenizer(tmp_path / "hf", MODEL)
        assert roles(found.tokenizer) == roles(first) == ("<|x|>", "<|y|>", "[PAD]")
        assert found.tokenizer("a").input_ids == first("a").input_ids == found.encode("a")


class TestInstructions:
    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> PreTrainedTokenizerFast:
        """An instruction model whose trainer calls the special tokens otherwise."""
        path = save(tmp_path, "<pad>", "<s>", "</s>", template="<s> $A </s>")
        return reread(find_tokenizer(path, MODEL, instructions=True), tmp_path)

    def test_keep_their_format(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert takes_instructions(tokenizer)
        asked = [{"role": "user", "content": "Add.", "input": "1 2"}]
        answered = [*asked, {"role": "assistant", "content": "3"}]
        assert tokenizer.apply_chat_template(asked, tokenize=False) == f"<s>{format_prompt('Add.', '1 2')}"
        example = format_example("Add.", "3", "1 2", bos="<s>", eos="</s>")
        assert tokenizer.apply_chat_template(answered, tokenize=False) == example
        assert example == "<s>Instruction: Add. Input: 1 2 Response: 3</s>"

    def test_begin_but_do_not_end(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert tokenizer("Add.").tokens()[0] == "<s>"
        assert tokenizer("Add.").tokens()[-1] != "</s>"

    def test_are_compared_in_their_own_format(self, tokenizer: PreTrainedTokenizerFast) -> None:
        example = next(text for text in probes(tokenizer) if "Done." in text)
        assert (example[:3], example[-4:]) == ("<s>", "</s>")

    def test_stay_so_in_a_folder_that_is_converted_again(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        again = find_tokenizer(tmp_path / "hf", MODEL).tokenizer
        assert takes_instructions(again)
        assert (again.chat_template, roles(again)) == (tokenizer.chat_template, roles(tokenizer))
        assert again("Add.").input_ids == tokenizer("Add.").input_ids


def test_a_folder_whose_trainer_left_padding_on_is_read_without_it(tmp_path: Path) -> None:
    save_tokenizer(find_tokenizer(save(tmp_path, "<s>", "</s>"), MODEL).tokenizer, tmp_path / "hf")
    trained = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    trained.enable_padding(length=50)
    trained.save(str(tmp_path / "hf" / "tokenizer.json"))
    found = own_tokenizer(tmp_path / "hf", CustomGPTConfig())
    assert len(found.encode("Paris")) < 10
    assert ["padding" in note for note in found.notes] == [True]
