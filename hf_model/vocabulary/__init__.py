"""What a tokenizer was saved as, to a `PreTrainedTokenizerFast` and the prompt format of its model."""

from hf_model.vocabulary.characters import check_characters, is_of_characters
from hf_model.vocabulary.probes import example_prompt, probes
from hf_model.vocabulary.prompt import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    PAD,
    UNK,
    format_example,
    format_prompt,
    prompt_text,
    takes_instructions,
)
from hf_model.vocabulary.source import AUTO, Model, Vocabulary, take_vocabulary
from hf_model.vocabulary.tokenizer import check_vocabulary, convert_tokenizer, read_tokenizer, save_tokenizer

__all__ = [
    "AUTO",
    "BOS",
    "CHAT_TEMPLATE",
    "EOS",
    "PAD",
    "UNK",
    "Model",
    "Vocabulary",
    "check_characters",
    "check_vocabulary",
    "convert_tokenizer",
    "example_prompt",
    "format_example",
    "format_prompt",
    "is_of_characters",
    "probes",
    "prompt_text",
    "read_tokenizer",
    "save_tokenizer",
    "take_vocabulary",
    "takes_instructions",
]
