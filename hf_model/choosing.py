"""Chooses among the models that a file's names leave open, by their loss on a text."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError
from hf_model.folder import with_weights

LENGTH = 128  # tokens of a stretch at most
FIRST, MOST = 16, 1024  # stretches
PROBED = 64  # stretches that tell which positions were trained; with fewer, the first positions seem best by chance
MOST_PROBED = 4  # forms that are asked that
CLEARLY = 5.0  # standard errors
WELL_BELOW = 0.85  # of the text's entropy: a model that has learnt the text is below
NEAR = 0.2  # nats above the loss that the checkpoint states: its text and its stretches are others
TEXT_BYTES = 4 * 2**20  # read from the start of a text
SEED = 0
FINAL_NORM = "transformer.ln_f."
# Activations that differ too little from others: before a training ends, the wrong one can have the lower loss.
ALIKE = {"gelu": "gelu_new", "relu": "leaky_relu"}
CODE = "the code that makes the model, with --model train.py:GPT"


@dataclass(frozen=True)
class Chosen:
    """The form that fits a text best."""

    config: CustomGPTConfig
    why: str
    warning: str = ""
    """That only the beginning of its context is trained; "" if nothing shows it."""


def choose_form(
    forms: Sequence[CustomGPTConfig],
    state_dict: Mapping[str, torch.Tensor],
    ids: Sequence[int],
    stated: float | None = None,
) -> Chosen:
    """The form with the lowest loss on a text, if it is clearly the lowest, and low.

    The losses of all forms are compared on the same stretches of the text. A form that is 5 standard errors behind the
    best one is dropped, and the others are compared on twice as many stretches, until one is left. If a model predicts
    short stretches better than long ones, it was trained on short ones: only these tell its form.

    Args:
        forms: configurations that the weights fit.
        state_dict: the weights, under this project's names.
        ids: the text's tokens.
        stated: the loss that the checkpoint states, in nats.

    Raises:
        UserError: the text is too short, no form is clearly the best one, or none fits the text.
    """
    length, known = _trained_length(forms, state_dict, ids)
    stretches, entropy = _stretches(ids, length), _entropy(ids)
    compared = list(zip(forms, known, strict=True))
    for n in _doubled(FIRST, min(MOST, len(stretches))):
        for form, losses in compared:
            losses += _losses(form, state_dict, stretches[len(losses) : n])
        (best, lowest), *others = compared = sorted(compared, key=lambda one: sum(one[1]))
        ahead = [_standard_errors(losses, lowest) for _, losses in others]
        near = [other for other, errors in zip(others, ahead, strict=True) if errors < CLEARLY]
        if not near or sum(lowest) / n > WELL_BELOW * entropy:
            break
        compared = [(best, lowest), *near]
    mean, second = sum(lowest) / n, sum(others[0][1]) / n
    told = f"loss {mean:.3f}, and {second:.3f} for the next best form, {min(ahead):.0f} standard errors apart"
    other = ""
    if mean > WELL_BELOW * entropy:
        other = f"guessing by the frequency of each token alone has {entropy:.3f}"
    elif stated is not None and mean > stated + NEAR:
        other = f"the checkpoint states a loss of {stated:.3f}"
    if other:
        raise UserError(
            f"the best of {len(forms)} forms has a loss of {mean:.3f} on the text, and {other}: the model is of "
            f"another form, or has not learnt this text. Give its training text, or {CODE}"
        )
    if near:
        raise UserError(f"the text does not tell which form of the model is right ({told}). Give more text, or {CODE}")
    is_short = length < min(LENGTH, best.block_size)
    warning = f"the model predicts badly after about {length} tokens: it was trained on shorter texts than its context"
    return Chosen(best, told, warning if is_short else "")


def used_weights(config: CustomGPTConfig, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that a form uses: a final norm may be saved and never called."""
    return {name: one for name, one in state_dict.items() if config.final_norm or not name.startswith(FINAL_NORM)}


def describe_form(config: CustomGPTConfig) -> str:
    """What `choose_form` decides, in words."""
    norm = "norms before attention and MLP" if config.norm_first else "norms after attention and MLP"
    final = "" if config.final_norm else ", final norm unused"
    scale = "1/sqrt(head width)" if config.attention_scale is None else "1/sqrt(model width)"
    activation = config.activation_function
    alike = f" (the loss does not tell it from {ALIKE[activation]})" if activation in ALIKE else ""
    return f"{norm}{final}, attention times {scale}, {activation}{alike}"


def _doubled(first: int, most: int) -> Iterator[int]:
    while first < most:
        yield first
        first *= 2
    yield most


def _stretches(ids: Sequence[int], length: int) -> list[list[int]]:
    """The text in stretches of this length and the token after it, in random order."""
    stretches = [list(ids[start : start + length + 1]) for start in range(0, len(ids) - length, length)]
    random.Random(SEED).shuffle(stretches)
    if len(stretches) < FIRST:
        raise UserError(
            f"the text has {len(ids):,} tokens, and {FIRST * length + 1:,} are needed to choose. "
            f"Give more text, or {CODE}"
        )
    return stretches


def _trained_length(
    forms: Sequence[CustomGPTConfig], state_dict: Mapping[str, torch.Tensor], ids: Sequence[int]
) -> tuple[int, list[list[float]]]:
    """Up to how many tokens the model predicts well, and for each form the losses of stretches that are known by then.

    Some trainers use only the beginning of the context. With the positions behind it, the wrong form may have the lower
    loss. The forms that predict some beginning best are asked on more stretches.
    """
    longest = min(LENGTH, forms[0].block_size)
    stretches = _stretches(ids, longest)[:PROBED]
    first = [_losses_by_position(form, state_dict, stretches[:FIRST]) for form in forms]
    known = [losses.mean(1).tolist() for losses in map(torch.stack, first)]
    likeliest = sorted(range(len(forms)), key=lambda i: _by_length(torch.stack(first[i])).min())[:MOST_PROBED]
    losses = {
        i: torch.stack(first[i] + _losses_by_position(forms[i], state_dict, stretches[FIRST:])) for i in likeliest
    }  # (stretches, T)
    best = min(losses, key=lambda i: _by_length(losses[i]).min())
    length = int(_by_length(losses[best]).argmin()) + 1
    if length < longest:
        beginnings, rests = losses[best][:, :length].mean(1), losses[best][:, length:].mean(1)
        if _standard_errors(rests.tolist(), beginnings.tolist()) >= CLEARLY:
            return length, [[] for _ in forms]
    return longest, known


def _by_length(losses: torch.Tensor) -> torch.Tensor:
    """The mean loss of the first 1, 2, … tokens, (T,), of the losses of stretches, (stretches, T)."""
    return losses.mean(0).cumsum(0) / torch.arange(1, losses.shape[1] + 1)


def _losses(
    form: CustomGPTConfig, state_dict: Mapping[str, torch.Tensor], stretches: Sequence[Sequence[int]]
) -> list[float]:
    """The mean loss of each stretch, in nats."""
    return [losses.mean().item() for losses in _losses_by_position(form, state_dict, stretches)]


@torch.inference_mode()
def _losses_by_position(
    form: CustomGPTConfig, state_dict: Mapping[str, torch.Tensor], stretches: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """For each stretch the loss of each token, in nats, (T,)."""
    model = with_weights(form, {name: tensor.float() for name, tensor in used_weights(form, state_dict).items()})
    losses = []
    for stretch in stretches:
        ids = torch.tensor([stretch])  # (1, T + 1)
        logits = model(ids[:, :-1], use_cache=False).logits[0].float()  # (T, V)
        losses.append(cross_entropy(logits, ids[0, 1:], reduction="none"))
    return losses


def _entropy(ids: Sequence[int]) -> float:
    """The entropy of a text's tokens by their frequencies alone, in nats."""
    return -sum(n / len(ids) * math.log(n / len(ids)) for n in Counter(ids).values())


def _standard_errors(losses: Sequence[float], best: Sequence[float]) -> float:
    """By how many standard errors of their difference the best losses are lower than others."""
    behind = torch.tensor(losses, dtype=torch.float64) - torch.tensor(best, dtype=torch.float64)
    error = behind.std().item() / math.sqrt(len(behind))
    return behind.mean().item() / error if error > 0 else 0.0
