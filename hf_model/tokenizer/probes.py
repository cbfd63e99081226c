"""Texts to try a model with, out of its own vocabulary."""

from transformers import PreTrainedTokenizerBase

from hf_model.tokenizer.characters import is_of_characters
from hf_model.tokenizer.prompt import format_example, format_prompt, takes_instructions

QUESTION = "What is the capital of France?"
BEGINNINGS = ("Once upon a time", "The ", "\n")
UNICODE = "Ünïcödé, 漢字, العربية, 🙂\t\u00a0end "


def example_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt that a newcomer can try: a question, or the beginning of a text in characters that the model knows."""
    if takes_instructions(tokenizer):
        return QUESTION
    if not is_of_characters(tokenizer):
        return BEGINNINGS[0]
    known = tokenizer.get_vocab()
    some = "".join(sorted(char for char in known if char.isalnum())[:3]) or min(known, key=known.__getitem__)
    return next((text for text in BEGINNINGS if known.keys() >= set(text)), some)


def probes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts that a written tokenizer must encode as its source does."""
    if is_of_characters(tokenizer):
        known = tokenizer.get_vocab()
        every = "".join(sorted(known, key=known.__getitem__))
        return every, every[::-1], "".join(character * 2 for character in every)
    if takes_instructions(tokenizer):
        return (
            format_prompt(QUESTION),
            format_example("Summarize the text.", "Done.", "Two  spaces,\na new line, 12345 and 'quotes'."),
            UNICODE,
        )
    return "Once upon a time, there was\n\na cat.\n", " Two  spaces, 12345 and it's 'quotes'.<|endoftext|>", UNICODE
