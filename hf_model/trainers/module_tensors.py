"""A module that was read, under this project's names: the fields of the configuration, the tensors, and notes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_model.errors import some_of
from hf_model.trainers.module_head import Head
from hf_model.trainers.module_roles import Embedding, Layer, Norm


@dataclass(frozen=True)
class Found:
    """What was found out about a module. Parameters have the module's own names."""

    embedding: Embedding
    scale: float
    """What the embedding is multiplied by."""
    position_name: str
    """The parameter or buffer that holds the positions; empty if none does."""
    layers: Sequence[Mapping[str, str]]
    """For each layer, in the order in which they run, a name without its number to the parameter's name."""
    layer: Layer
    """The form of each layer, with names without a number."""
    head: Head
    epsilon: float


def options_of(found: Found, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of `CustomGPTConfig`, without the dropout."""
    assert found.layer.attention is not None
    vocab_size, C = tensors["transformer.wte.weight"].shape
    n_head, scale = found.layer.attention.n_head, found.layer.attention.scale
    H = len(tensors["transformer.h.0.mlp.c_fc.weight"])
    return {
        "vocab_size": vocab_size,
        "block_size": len(tensors["transformer.wpe.weight"]),
        "n_layer": len(found.layers),
        "n_head": n_head,
        "n_embd": C,
        "bias": any(name.startswith("transformer.") and name.endswith(".bias") for name in tensors),
        "activation_function": found.layer.activation,
        "layer_norm_epsilon": found.epsilon,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "n_inner": None if H == 4 * C else H,
        "norm_first": found.layer.norm_first,
        "final_norm": found.head.norm is not None,
        "head_bias": found.head.linear.bias is not None,
        "attention_scale": None if scale == (C // n_head) ** -0.5 else scale,
    }


def tensors_of(found: Found, own: Mapping[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """Tensors under the names of `CustomGPTForCausalLM`.

    Args:
        own: the module's parameters, on the CPU.
        positions: all of them, (block_size, C).
    """
    embedding = found.embedding.matrix(own)
    C = embedding.shape[1]
    state: dict[str, Tensor | None] = {
        "transformer.wte.weight": _times(embedding.contiguous(), found.scale),
        "transformer.wpe.weight": positions.to(embedding.dtype),
    }
    for i, names in enumerate(found.layers):
        again = names in found.layers[:i]
        in_layer = {template: own[name].clone() if again else own[name] for template, name in names.items()}
        state |= {f"transformer.h.{i}.{name}": p for name, p in _layer_tensors(found.layer, in_layer, C).items()}
    if found.head.norm is not None:
        state |= _norm_tensors("transformer.ln_f", found.head.norm, own, C)
    return _filled(state) | _head_tensors(found, own)


def notes_of(found: Found, own: Mapping[str, Tensor]) -> list[str]:
    """What was folded or left out, in words."""
    notes = []
    if found.head.scale != 1:
        untied = ", which is therefore no longer tied to the embedding" if _is_copied(found, own) else ""
        notes.append(f"your logits' factor {found.head.scale:.6g} became part of the head{untied}")
    used = {found.embedding.name, found.position_name} | found.head.names()
    used |= {names[template] for names in found.layers for template in found.layer.names()}
    if unused := [name for name in own if name not in used]:
        table = "" if found.position_name else "it became part of the table of positions, or "
        has_factor = any(own[name].numel() == 1 for name in unused)
        factor = "it became a factor of a matrix, or " if has_factor else ""
        notes.append(f"left out, because {table}{factor}no logit depends on it: {some_of(unused, 3)}")
    return notes


def _is_copied(found: Found, own: Mapping[str, Tensor]) -> bool:
    """Whether the head's matrix is that of the embedding."""
    embedding = found.embedding.matrix(own)
    return torch.equal(found.head.linear.matrix(own, embedding.shape[1]), embedding)


def _head_tensors(found: Found, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrix of the head, unless it is tied, and its bias."""
    head, tensors = found.head, {}
    matrix = head.linear.matrix(own, found.embedding.matrix(own).shape[1])
    if not (_is_copied(found, own) and found.scale == head.scale == 1):
        tensors["lm_head.weight"] = _times(matrix.contiguous(), head.scale)
    if (bias := head.linear.vector(own, len(matrix))) is not None:
        tensors["lm_head.bias"] = _times(bias, head.scale)
    return tensors


def _times(tensor: Tensor, factor: float) -> Tensor:
    """The product; the tensor itself if the factor is 1."""
    return tensor if factor == 1 else tensor * factor


def _layer_tensors(layer: Layer, own: Mapping[str, Tensor], width: int) -> dict[str, Tensor | None]:
    """One layer's tensors under this project's names; None for a bias that the layer does not have."""
    C = width
    assert layer.attention is not None and layer.up is not None and layer.down is not None
    tensors: dict[str, Tensor | None] = {}
    for place, norm in zip(("ln_1", "ln_2"), layer.norms, strict=True):
        tensors |= _norm_tensors(place, norm, own, C)
    parts = [linear.matrix(own, C) for linear in layer.projections]
    biases = [linear.vector(own, len(matrix)) for linear, matrix in zip(layer.projections, parts, strict=True)]
    rows = layer.attention.rows
    tensors["attn.c_attn.weight"] = _rows(torch.cat(parts), rows)
    tensors["attn.c_attn.bias"] = None
    if any(bias is not None for bias in biases):
        joined = [part.new_zeros(len(part)) if bias is None else bias for bias, part in zip(biases, parts, strict=True)]
        tensors["attn.c_attn.bias"] = _rows(torch.cat(joined), rows)
    tensors["attn.c_proj.weight"], tensors["attn.c_proj.bias"] = torch.eye(C, dtype=parts[0].dtype), None
    H = layer.up.matrix(own, C).shape[0]
    linears = {"attn.c_proj": (layer.output, C, C), "mlp.c_fc": (layer.up, C, H), "mlp.c_proj": (layer.down, H, C)}
    for place, (linear, n_in, n_out) in linears.items():
        if linear is not None:
            tensors[f"{place}.weight"] = linear.matrix(own, n_in).contiguous()
            tensors[f"{place}.bias"] = linear.vector(own, n_out)
    return tensors


def _rows(joined: Tensor, rows: Tensor) -> Tensor:
    """The rows in that order; the tensor itself if they stand so already."""
    return joined if torch.equal(rows, torch.arange(len(rows))) else joined[rows]


def _norm_tensors(place: str, norm: Norm, parameters: Mapping[str, Tensor], width: int) -> dict[str, Tensor | None]:
    weight = None if norm.weight is None else parameters[norm.weight].reshape(width)
    bias = None if norm.bias is None else parameters[norm.bias].reshape(width)
    return {f"{place}.weight": torch.ones(width) if weight is None else weight, f"{place}.bias": bias}


def _filled(state: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The tensors, with zeros for a bias that some layers of the model have and others do not."""
    has_bias = any(tensor is not None for name, tensor in state.items() if name.endswith(".bias"))
    filled = {}
    for name, tensor in state.items():
        if tensor is not None:
            filled[name] = tensor
        elif has_bias:
            weight = state[name.removesuffix("bias") + "weight"]
            assert weight is not None
            filled[name] = weight.new_zeros(weight.shape[0])
    return filled
