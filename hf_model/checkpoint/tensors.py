"""The weights among a file's values, each checked to be a tensor of its own that the file really holds."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from hf_model.checkpoint.architecture import is_tied
from hf_model.errors import UserError

WEIGHT_KEYS = ("model_state_dict", "model", "state_dict")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def plain_dict(value: Any) -> dict[Any, Any] | None:
    """A dict of the file's as nothing but a dict: the file can give an OrderedDict attributes that hide its methods."""
    return dict(dict.items(value)) if isinstance(value, dict) else None


def find_weights(content: dict[Any, Any]) -> tuple[str | None, dict[Any, Any]]:
    """The key under which the state dict stands, None where it is the content itself, and the state dict."""
    for key in WEIGHT_KEYS:
        if (weights := plain_dict(content.get(key))) is not None:
            return key, weights
    if any(isinstance(value, torch.Tensor) for name, value in content.items() if "." in str(name)):
        return None, content
    raise UserError(
        f"holds no weights under {', '.join(WEIGHT_KEYS)}; its keys are {', '.join(map(str, list(content)[:10]))}"
    )


def checked(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, each one of a floating-point dtype and all in its storage."""
    checked: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{name!r} in its state dict is a {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in WEIGHT_DTYPES:
            raise UserError(f"{name!r} is not a dense floating-point tensor of 16, 32 or 64 bits ({tensor.dtype})")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{name!r} claims more values than the file holds")
        checked[name] = tensor.detach()
    return checked


def check_places(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that overlap, a tied head aside: a small file could make a large model, and safetensors none."""
    tied = {"lm_head.weight"} if "transformer.wte.weight" in state_dict and is_tied(state_dict) else set()
    places = sorted((tensor.data_ptr(), tensor.nbytes, name) for name, tensor in state_dict.items() if name not in tied)
    for (start, size, name), (next_start, _, next_name) in pairwise(places):
        if start + size > next_start:
            raise UserError(f"{name!r} and {next_name!r} share their values, which only the embedding and lm_head may")
