"""What can be told of a model from its weights: values that are not finite, a stutter learnt in fine-tuning."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_model.vocabulary import format_example, format_prompt

# Ordinary instructions and answers. A model need not know them: whether it was trained on the next token or on the
# current one shows on any text.
PROBES = (
    ("What is the capital of France?", "The capital of France is Paris, a city on the river Seine.", ""),
    ("Name three primary colors.", "The three primary colors are red, blue and yellow.", ""),
    ("Summarize the following text.", "The cat slept all day.", "The cat lay on the mat and slept from dawn to dusk."),
    ("Give a tip for staying healthy.", "Eat fruit and vegetables, drink water and sleep well.", ""),
)
STUTTER_SHARE = 0.5


def non_finite(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or an infinity."""
    return [
        name
        for name, tensor in state_dict.items()
        if not all(extreme.isfinite() for extreme in torch.aminmax(tensor))  # NaN is passed on by both
    ]


@torch.inference_mode()
def copied_share(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of response positions at which the model's arg-max prediction is the current token.

    A model whose labels were not shifted in fine-tuning has learnt to repeat: its share is near 1. Its prompts tell
    less, since the loss usually leaves them out.
    """
    rows, lengths = [], []
    for instruction, response, input_text in PROBES:
        text = format_example(instruction, response, input_text)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]  # (T,)
        lengths.append(len(ids) - len(tokenizer(format_prompt(instruction, input_text)).input_ids))
        rows.append(ids[-model.config.block_size :].to(model.device))
    padded = pad_sequence(rows, batch_first=True)  # on the right, where no token sees it
    is_copied = model(padded, use_cache=False).logits.argmax(dim=-1) == padded
    responses = [
        is_copied[row, max(0, len(ids) - n_response) : len(ids) - 1]  # nothing follows [EOS]
        for row, (ids, n_response) in enumerate(zip(rows, lengths, strict=True))
    ]
    seen = torch.cat(responses)
    return int(seen.sum()) / max(len(seen), 1)
