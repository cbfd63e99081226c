"""The names and shapes of the model's tensors.

The Hugging Face model has nanoGPT's names. A state dict is checked against the table, and the model's sizes are read
from the shapes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_model.errors import UserError, some_of

if TYPE_CHECKING:
    import torch

# C = n_embd, H = the MLP's width, V = vocab_size, T = block_size; {i} is the layer. Linear weights are (out, in).
WEIGHTS = {
    "transformer.wte.weight": ("V", "C"),
    "transformer.wpe.weight": ("T", "C"),
    "transformer.h.{i}.ln_1.weight": ("C",),
    "transformer.h.{i}.attn.c_attn.weight": ("3C", "C"),  # q, k, v stacked
    "transformer.h.{i}.attn.c_proj.weight": ("C", "C"),
    "transformer.h.{i}.ln_2.weight": ("C",),
    "transformer.h.{i}.mlp.c_fc.weight": ("H", "C"),
    "transformer.h.{i}.mlp.c_proj.weight": ("C", "H"),
    "transformer.ln_f.weight": ("C",),
    "lm_head.weight": ("V", "C"),
}
BIASES = {
    "transformer.h.{i}.ln_1.bias": ("C",),
    "transformer.h.{i}.attn.c_attn.bias": ("3C",),
    "transformer.h.{i}.attn.c_proj.bias": ("C",),
    "transformer.h.{i}.ln_2.bias": ("C",),
    "transformer.h.{i}.mlp.c_fc.bias": ("H",),
    "transformer.h.{i}.mlp.c_proj.bias": ("C",),
    "transformer.ln_f.bias": ("C",),
}
FEWEST_HEADS = 4  # that are proposed: a smaller number is rare, and often wrong
SIZES = ("n_layer", "n_embd", "block_size", "vocab_size")


@dataclass(frozen=True)
class Architecture:
    """The model's sizes, from a state dict and its `model_args`. The fields are those of `CustomGPTConfig`."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool
    dropout: float
    tie_word_embeddings: bool
    n_inner: int | None = None
    """The MLP's width; None is four times `n_embd`."""
    head_bias: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor of the model, without a tied head."""
        C = self.n_embd
        size = {"C": C, "3C": 3 * C, "H": self.n_inner or 4 * C, "V": self.vocab_size, "T": self.block_size}
        table = WEIGHTS | (BIASES if self.bias else {}) | ({"lm_head.bias": ("V",)} if self.head_bias else {})
        return {
            template.format(i=layer): tuple(size[dim] for dim in dims)
            for template, dims in table.items()
            for layer in (range(self.n_layer) if "{i}" in template else (0,))
            if not (self.tie_word_embeddings and template == "lm_head.weight")
        }


def infer_architecture(
    state_dict: Mapping[str, "torch.Tensor"],
    model_args: Mapping[str, Any],
    n_head: int | None = None,
    stated_in: str = "model_args",
) -> Architecture:
    """Read the sizes from the tensors' shapes, and check every tensor and every size in `model_args`.

    Args:
        state_dict: tensors under clean names, with or without a tied `lm_head.weight`.
        model_args: the checkpoint's own, possibly empty. `bias` is ignored, since the weights show it.
        n_head: overrides `model_args["n_head"]`, the one size that no shape shows.
        stated_in: where `model_args` stand, for messages.

    Raises:
        UserError: a weight is missing, unknown or of the wrong shape, `model_args` contradicts the weights, or the
            number of heads is unknown or impossible.
    """
    wte, wpe = (_matrix(state_dict, f"transformer.{name}.weight") for name in ("wte", "wpe"))
    up = state_dict.get("transformer.h.0.mlp.c_fc.weight")
    n_inner = None if up is None or up.shape[0] == 4 * wte.shape[1] else up.shape[0]
    layers = {int(match[1]) for name in state_dict if (match := re.match(r"transformer\.h\.(\d{1,6})\.", name))}
    sizes = {
        "n_layer": len(layers),
        "n_embd": wte.shape[1],
        "block_size": wpe.shape[0],
        "vocab_size": wte.shape[0],
    }
    for name in SIZES:
        if model_args.get(name, sizes[name]) != sizes[name]:
            raise UserError(
                f"{stated_in} says {name}={model_args[name]!r}, but the weights say {sizes[name]}: "
                "one of them belongs to another model"
            )
    head = state_dict.get("lm_head.weight")
    if head is not None and head.ndim == 2 and head.shape[0] != sizes["vocab_size"]:
        raise UserError(
            f"its head has {head.shape[0]} rows, and its embedding has {sizes['vocab_size']}: a head that predicts "
            "tokens has one row for each token; a classifier's has one for each class"
        )
    architecture = Architecture(
        **sizes,
        n_head=_heads(n_head if n_head is not None else model_args.get("n_head"), sizes["n_embd"]),
        bias=any(name.endswith(".bias") and name != "lm_head.bias" for name in state_dict),
        dropout=_dropout(model_args.get("dropout", 0.1)),
        tie_word_embeddings=is_tied(state_dict),
        n_inner=n_inner,
        head_bias="lm_head.bias" in state_dict,
    )
    _check_shapes(state_dict, architecture.shapes())
    return architecture


def with_zero_biases(state_dict: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """The tensors, and zeros for each bias that no layer has, if the model has other biases. The result is the same."""
    filled = dict(state_dict)
    biases = {without_layer(name) for name in state_dict if name.endswith(".bias")}
    if biases - {"lm_head.bias"}:
        for name, weight in state_dict.items():
            bias = name.removesuffix("weight") + "bias"
            if without_layer(bias) in BIASES.keys() - biases:
                filled[bias] = weight.new_zeros(weight.shape[0])
    return filled


def without_layer(name: str) -> str:
    return re.sub(r"\.h\.\d+\.", ".h.{i}.", name)


def is_tied(state_dict: Mapping[str, "torch.Tensor"]) -> bool:
    """Whether the head is the token embedding: it is missing, in the same memory, or an equal copy."""
    head, embedding = state_dict.get("lm_head.weight"), state_dict["transformer.wte.weight"]
    return head is None or is_copied(head, embedding)


def is_copied(head: "torch.Tensor", embedding: "torch.Tensor") -> bool:
    """Whether two tensors have the same values. Two matrices that were trained apart never do."""
    is_same = head.data_ptr() == embedding.data_ptr() and head.shape == embedding.shape  # NaN equals nothing
    return head.dtype == embedding.dtype and (is_same or head.equal(embedding))


def _matrix(state_dict: Mapping[str, "torch.Tensor"], name: str) -> "torch.Tensor":
    if name not in state_dict:
        raise UserError(f"it lacks {name!r}")
    if state_dict[name].ndim != 2 or 0 in state_dict[name].shape:
        raise UserError(f"{name!r} has shape {tuple(state_dict[name].shape)}, not that of an embedding")
    return state_dict[name]


def _heads(n_head: Any, n_embd: int) -> int:
    if n_head is None:
        likely = n_embd // 64 if n_embd % 64 == 0 else 0
        usual = f" (most models have heads of 64, which makes {likely} here)" if likely >= FEWEST_HEADS else ""
        raise UserError(f"its weights do not tell the number of attention heads: give it with --n_head{usual}")
    if not isinstance(n_head, int) or isinstance(n_head, bool):
        raise UserError(
            f"n_head={n_head!r} is a {type(n_head).__name__}, not a whole number: give the right number with --n_head"
        )
    if n_head < 1 or n_embd % n_head:
        raise UserError(f"n_head={n_head!r} does not divide n_embd={n_embd}: give the right number with --n_head")
    return n_head


def _dropout(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"model_args says dropout={value!r}, which is not in [0, 1)")
    return float(value)


def _check_shapes(state_dict: Mapping[str, "torch.Tensor"], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if missing := [name for name in shapes if name not in state_dict]:
        raise UserError(f"it lacks {some_of(list(map(repr, missing)), 5)}")
    if unknown := [name for name in state_dict if name not in shapes and name != "lm_head.weight"]:
        raise UserError(f"it holds {some_of(list(map(repr, unknown)), 5)}, which this model has no place for")
    for name, shape in shapes.items():
        if tuple(state_dict[name].shape) != shape:
            raise UserError(f"{name!r} has shape {tuple(state_dict[name].shape)}, expected {shape}")
