"""Chooses among the models that a file's names leave open, by their loss on a text."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError
from hf_model.folder import with_weights

LENGTH = 128  # tokens of a stretch at most
FIRST, MOST = 16, 1024  # stretches
CLEARLY = 5.0  # standard errors
TEXT_BYTES = 4 * 2**20  # read from the start of a text
SEED = 0


@dataclass(frozen=True)
class Chosen:
    """The form that fits a text best."""

    config: CustomGPTConfig
    why: str


def choose_form(forms: Sequence[CustomGPTConfig], state_dict: Mapping[str, torch.Tensor], ids: Sequence[int]) -> Chosen:
    """The form with the lowest loss on a text, if it is clearly the lowest.

    The losses of two forms are compared on the same stretches of the text. More stretches are read until the lowest
    loss is 5 standard errors below each other one.

    Args:
        forms: configurations that the weights fit.
        state_dict: the weights, under this project's names.
        ids: the text's tokens.

    Raises:
        UserError: the text is too short, or no form is clearly the best one.
    """
    length = min(LENGTH, forms[0].block_size)
    stretches = [list(ids[start : start + length + 1]) for start in range(0, len(ids) - length, length)]
    random.Random(SEED).shuffle(stretches)
    if len(stretches) < FIRST:
        raise UserError(f"the text has {len(ids):,} tokens, too few to choose by: {FIRST * length + 1:,} are needed")
    losses: list[list[float]] = [[] for _ in forms]
    for n in _doubled(FIRST, min(MOST, len(stretches))):
        for form, known in zip(forms, losses, strict=True):
            known += _losses(form, state_dict, stretches[len(known) : n])
        means = [sum(known) / n for known in losses]
        best = means.index(min(means))
        ahead = [_standard_errors(known, losses[best]) for i, known in enumerate(losses) if i != best]
        if min(ahead) >= CLEARLY:
            break
    second = sorted(means)[1]
    told = f"loss {means[best]:.3f}, and {second:.3f} for the next best form, {min(ahead):.0f} standard errors apart"
    if min(ahead) < CLEARLY:
        raise UserError(f"the text does not tell which form of the model is right ({told}): give more text")
    return Chosen(forms[best], told)


def describe_form(config: CustomGPTConfig) -> str:
    """What `choose_form` decides, in words."""
    norm = "norms before attention and MLP" if config.norm_first else "norms after attention and MLP"
    scale = "1/sqrt(head width)" if config.attention_scale is None else "1/sqrt(model width)"
    return f"{norm}, attention times {scale}, {config.activation_function}"


def _doubled(first: int, most: int) -> Iterator[int]:
    while first < most:
        yield first
        first *= 2
    yield most


@torch.inference_mode()
def _losses(
    form: CustomGPTConfig, state_dict: Mapping[str, torch.Tensor], stretches: Sequence[Sequence[int]]
) -> list[float]:
    """The mean loss of each stretch, in nats."""
    model = with_weights(form, {name: tensor.float() for name, tensor in state_dict.items()})
    losses = []
    for stretch in stretches:
        ids = torch.tensor([stretch])  # (1, T + 1)
        logits = model(ids[:, :-1], use_cache=False).logits[0].float()  # (T, V)
        losses.append(cross_entropy(logits, ids[0, 1:]).item())
    return losses


def _standard_errors(losses: Sequence[float], best: Sequence[float]) -> float:
    """By how many standard errors of their difference the best losses are lower than others."""
    behind = torch.tensor(losses, dtype=torch.float64) - torch.tensor(best, dtype=torch.float64)
    error = behind.std().item() / math.sqrt(len(behind))
    return behind.mean().item() / error if error > 0 else 0.0
