"""What a tokenizer was saved as, to a `PreTrainedTokenizerFast` and the prompt format of its model."""

from hf_model.vocabulary.prompt import BOS, CHAT_TEMPLATE, EOS, PAD, UNK, format_example, format_prompt
from hf_model.vocabulary.tokenizer import check_vocabulary, convert_tokenizer, read_tokenizer, save_tokenizer

__all__ = [
    "BOS",
    "CHAT_TEMPLATE",
    "EOS",
    "PAD",
    "UNK",
    "check_vocabulary",
    "convert_tokenizer",
    "format_example",
    "format_prompt",
    "read_tokenizer",
    "save_tokenizer",
]
