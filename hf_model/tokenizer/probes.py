"""Texts to try a model with, out of its own vocabulary."""

from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from hf_model.errors import UserError
from hf_model.tokenizer.characters import is_of_characters
from hf_model.tokenizer.prompt import example_texts, fitted, prompt_text, takes_instructions

QUESTION = "What is the capital of France?"
BEGINNINGS = ("Once upon a time", "The ", "\n")
RAW_EXAMPLE = " Two  spaces, 12345 and it's 'quotes'.<|endoftext|>"
UNICODE = "Ünïcödé, 漢字, العربية, 🙂\t\u00a0end "


def example_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt that a newcomer can try: a question, or the beginning of a text that the tokenizer knows."""
    if takes_instructions(tokenizer) and _is_known(tokenizer, QUESTION):
        return QUESTION
    known = tokenizer.get_vocab()
    if is_of_characters(tokenizer):
        some = "".join(sorted(char for char in known if char.isalnum())[:3]) or min(known, key=known.__getitem__)
        return next((text for text in BEGINNINGS if known.keys() >= set(text)), some)
    words = (token for token in known if token.isalpha())
    return next((text for text in (*BEGINNINGS, *words) if _is_known(tokenizer, text, whole=True)), BEGINNINGS[0])


def probes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts that a written tokenizer must encode as its source does; those that it cannot encode are left out."""
    if is_of_characters(tokenizer):
        known = tokenizer.get_vocab()
        every = "".join(sorted(known, key=known.__getitem__))
        return every, every[::-1], "".join(character * 2 for character in every)
    if takes_instructions(tokenizer):
        texts: tuple[str, ...] = (prompt_text(tokenizer, QUESTION), *_example(tokenizer), UNICODE)
    else:
        some = " ".join(sorted(tokenizer.get_vocab(), key=len)[:: len(tokenizer) // 100 + 1])
        texts = "Once upon a time, there was\n\na cat.\n", RAW_EXAMPLE, UNICODE, some
    return tuple(text for text in texts if _is_known(tokenizer, text))


def _example(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """A text to train on; none if the chat template refuses answers."""
    asked = fitted(tokenizer, "Summarize the text.", "Two  spaces,\na new line, 12345 and 'quotes'.")
    with suppress(UserError):
        return ("".join(example_texts(tokenizer, "Done.", *asked)),)
    return ()


def _is_known(tokenizer: PreTrainedTokenizerBase, text: str, whole: bool = False) -> bool:
    """Whether a text can be encoded; `whole`: without the unknown token.

    Tokenizers without an unknown token may refuse what they do not know.
    """
    try:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    except Exception:  # tokenizers raises nothing narrower
        return False
    return bool(ids) and not (whole and tokenizer.unk_token_id in ids)
