"""The trainers of the family: how to know their files, and which activation their models have."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from hf_model.trainers.names import EXACT, FAMILY, TORCH_TANH, WRITTEN_OUT_TANH, Names

# minGPT's model types: layers, heads, width. Its checkpoint lacks the heads; its config.json may have only the type.
MINGPT_TYPES = {
    "openai-gpt": (12, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "gopher-44m": (8, 16, 512),
    "gpt-mini": (6, 6, 192),
    "gpt-micro": (4, 4, 128),
    "gpt-nano": (3, 3, 48),
}


@dataclass(frozen=True)
class Trainer:
    """What is known of the models of a trainer."""

    activation: str = EXACT
    why: str = ""
    """Why it has this activation, in words; empty for the original, and if nothing shows it."""
    is_known: bool = True
    """Whether the file shows the activation. If not, `activation` is the likeliest one."""
    dropout: float = 0.1
    """The dropout of a file that states none."""


def find_trainer(
    names: Names,
    weights_key: str | None,
    keys: Set[str],
    model_args: dict[str, Any],
    *,
    has_config_object: bool,
    has_masks: bool,
    has_biases: bool,
    is_tied: bool,
) -> Trainer:
    """The trainer that writes such files.

    Args:
        names: whose names the weights have.
        weights_key: the key of the weights, None for a bare state dict.
        keys: the file's other keys.
        model_args: the sizes that the file states.
        has_config_object: whether `config` is an object of a class, not a dict.
        has_masks: whether there are causal masks among the weights.
    """
    if len(names.forms) > 1:
        return Trainer(is_known=False)
    if names.activation is not None:
        return Trainer(names.activation, f"{names.trainer}'s")
    if names is FAMILY and weights_key == "model_state_dict":
        return Trainer()
    if weights_key == "model" and has_config_object and keys >= {"step", "val_loss"}:
        return Trainer(TORCH_TANH, "build-nanogpt's default: a config object, step and val_loss", dropout=0.0)
    if weights_key == "model" and keys >= {"model_args", "iter_num", "best_val_loss"}:
        if "bias" not in model_args:
            return Trainer(WRITTEN_OUT_TANH, "nanoGPT's default until January 2023: its model_args have no bias")
        return Trainer(
            EXACT, "nanoGPT's default since June 2023; if it trained with an older one: --activation gelu_new"
        )
    if weights_key is None and has_masks and has_biases and not is_tied:
        return Trainer(WRITTEN_OUT_TANH, "minGPT's default: a bare state dict with causal masks and biases")
    if has_masks and has_biases:
        return Trainer(WRITTEN_OUT_TANH, "causal masks and biases are in llm.c's and older trainers' files", False)
    return Trainer(is_known=False)
