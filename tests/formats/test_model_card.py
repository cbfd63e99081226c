"""The card of a converted model says what it is and how its prompt looks. (That its code runs: test_remote_code.)"""

import yaml

from hf_model import CustomGPTConfig
from hf_model.formats.model_card import model_card


def test_says_what_the_model_is() -> None:
    card = model_card(CustomGPTConfig(n_layer=3, n_head=3, n_embd=96, block_size=64, vocab_size=1024), "capitals")
    sentence = "3 layers, 3 heads, 96 wide, context 64, vocabulary 1024"
    assert sentence in " ".join(card.split())


def test_shows_the_prompt() -> None:
    card = model_card(CustomGPTConfig(), "capitals")
    assert "\n[BOS]Instruction: {instruction} Response:\n" in card
    assert "\n[BOS]Instruction: {instruction} Input: {input} Response:\n" in card
    assert "Response: Paris[EOS]" in card


def test_is_read_by_the_hub_as_a_text_generation_model() -> None:
    _, header, _ = model_card(CustomGPTConfig(), "capitals").split("---\n", 2)
    header = yaml.safe_load(header)
    assert (header["library_name"], header["pipeline_tag"]) == ("transformers", "text-generation")
