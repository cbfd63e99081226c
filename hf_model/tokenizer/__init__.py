"""What a tokenizer was saved as, to a `PreTrainedTokenizerFast` and the prompt format of its model."""

from hf_model.tokenizer.characters import check_characters, is_of_characters
from hf_model.tokenizer.files import read_tokenizer
from hf_model.tokenizer.find import AUTO, FoundTokenizer, ModelInfo, find_tokenizer
from hf_model.tokenizer.probes import example_prompt, probes
from hf_model.tokenizer.prompt import (
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
from hf_model.tokenizer.wrap import check_fits, convert_tokenizer, save_tokenizer, switch_off, unused_ids

__all__ = [
    "AUTO",
    "BOS",
    "CHAT_TEMPLATE",
    "EOS",
    "PAD",
    "UNK",
    "FoundTokenizer",
    "ModelInfo",
    "check_characters",
    "check_fits",
    "convert_tokenizer",
    "example_prompt",
    "find_tokenizer",
    "format_example",
    "format_prompt",
    "is_of_characters",
    "probes",
    "prompt_text",
    "read_tokenizer",
    "save_tokenizer",
    "switch_off",
    "takes_instructions",
    "unused_ids",
]
