"""One new token at a time on a CPU: the lean step that `generate` takes after the prompt.

A step of the plain model costs about as much time in Python, masks and cache concatenation as in reading its weights.
Here the whole step is one TorchScript function, `decode`, without Python between the operators. It reads the weights
where they lie, and each layer's keys and values stand in one tensor with room to grow.

The operators are the plain step's own, so the logits are the same bits. CUSTOM_GPT_PLAIN_DECODE=1 in the environment,
or a model with anything unusual about it (`is_plain`), leaves every step to the plain model.
"""

import functools
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}
EXPECTED = {"position_ids", "use_cache", "return_dict", "logits_to_keep"}  # arguments that a single token may come with


class Affine(NamedTuple):
    weight: Tensor
    bias: Tensor | None


class Block(NamedTuple):
    ln_1: Affine
    c_attn: Affine
    attn_proj: Affine
    ln_2: Affine
    c_fc: Affine
    mlp_proj: Affine


class Weights(NamedTuple):
    wte: Tensor
    wpe: Tensor
    blocks: list[Block]
    ln_f: Affine
    lm_head: Affine


def project(x: Tensor, linear: Affine) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def normalize(x: Tensor, norm: Affine, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[1:], norm.weight, norm.bias, eps)


def decode(
    weights: Weights,
    ids: Tensor,  # (B, 1)
    position_ids: Tensor,  # (B, 1) or (1, 1)
    mask: Tensor | None,  # (B, 1, 1, S)
    states: list[Tensor],  # for each layer, keys and values (2, B, nh, room, hs), `past` tokens of them filled
    past: int,
    eps: float,
    gelu: str,
) -> Tensor:
    """Logits (B, 1, V) of one token for each row, whose keys and values are added to `states`."""
    x = (F.embedding(ids, weights.wte) + F.embedding(position_ids, weights.wpe)).squeeze(1)  # (B, C)
    for block, room in zip(weights.blocks, states):  # noqa: B905 TorchScript knows no `strict`
        nh, hs = room.shape[2], room.shape[4]
        qkv = project(normalize(x, block.ln_1, eps), block.c_attn).view(-1, 3, nh, 1, hs).transpose(0, 1)
        seen = room.narrow(3, 0, past + 1)
        seen.narrow(3, past, 1).copy_(qkv.narrow(0, 1, 2))
        key, value = seen.unbind(0)  # (B, nh, S, hs)
        y = F.scaled_dot_product_attention(qkv[0], key, value, mask)  # (B, nh, 1, hs)
        x = x + project(y.reshape(x.shape), block.attn_proj)
        hidden = F.gelu(project(normalize(x, block.ln_2, eps), block.c_fc), approximate=gelu)  # (B, 4C)
        x = x + project(hidden, block.mlp_proj)
    return project(normalize(x, weights.ln_f, eps), weights.lm_head).unsqueeze(1)


@functools.cache
def scripted_decode() -> Callable[..., Tensor]:
    """`decode` in TorchScript, or as it is where there is no TorchScript."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.script(decode)
    except (AttributeError, OSError, RuntimeError):
        return decode


def weights_of(model: Any) -> Weights:
    def affine(module: Any) -> Affine:
        return Affine(module.weight, module.bias)

    decoder = model.transformer
    blocks = [
        Block(
            *(affine(block.ln_1), affine(block.attn.c_attn), affine(block.attn.c_proj)),
            *(affine(block.ln_2), affine(block.mlp.c_fc), affine(block.mlp.c_proj)),
        )
        for block in decoder.h
    ]
    return Weights(decoder.wte.weight, decoder.wpe.weight, blocks, affine(decoder.ln_f), affine(model.lm_head))


class LeanForward:
    """Stands in for `forward` while `generate` decodes; anything but a plain next token goes to the plain `forward`."""

    def __init__(self, model: Any):
        self.plain, self.plain_prepare = model.forward, model.prepare_inputs_for_generation
        self.__signature__ = inspect.signature(self.plain)  # `generate` asks at every step
        self.thread = threading.get_ident()
        self.weights, self.decode = weights_of(model), scripted_decode()
        self.block_size = model.config.block_size
        self.eps, self.gelu = model.config.layer_norm_epsilon, GELU[model.config.activation_function]
        self.cache: Any = None  # whose keys and values stand in `states`
        self.states: list[Tensor] = []
        self.past = 0

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if torch.compiler.is_compiling():  # `generate` was asked to compile, and means the plain forward
            return self.plain(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
        if not self.fits(input_ids, attention_mask, position_ids, past_key_values, kwargs):
            if threading.get_ident() == self.thread:
                self.settle()
            return self.plain(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
        if past_key_values is not self.cache:
            self.settle()
            self.adopt(past_key_values)
        elif self.past == self.states[0].shape[3]:
            self.states = [torch.cat([room, torch.empty_like(room)], dim=3) for room in self.states]
        mask = None if attention_mask is None or attention_mask.all() else attention_mask[:, None, None].bool()
        inputs = (input_ids, position_ids, mask, self.states, self.past)
        with torch.inference_mode():  # a little less to do for each operator
            logits = self.decode(self.weights, *inputs, self.eps, self.gelu)
        self.past += 1
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def fits(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> bool:
        """Whether this is a step of one token for each row, with nothing asked for but logits and the cache."""
        return (
            threading.get_ident() == self.thread  # another thread's `generate` takes plain steps
            and input_ids is not None
            and input_ids.shape[1] == 1
            and position_ids is not None
            and int(position_ids.max()) < self.block_size  # past that, the plain forward says what is wrong
            and cache is not None
            and (cache is self.cache or is_plain_cache(cache))
            and (attention_mask is None or attention_mask.ndim == 2)
            and kwargs.get("use_cache") is True
            and kwargs.get("return_dict") is not False
            and all(value is None or value is False or name in EXPECTED for name, value in kwargs.items())
        )

    def prepare(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """`prepare_inputs_for_generation` of the steps that `fits` lets through, less its checks and copies."""
        inputs = {"past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}
        position_ids = kwargs.get("position_ids")
        known = past_key_values is not None and past_key_values is self.cache and self.past < self.block_size
        if not known or next_sequence_length != 1 or position_ids is None or kwargs.keys() - EXPECTED:
            return self.plain_prepare(input_ids, next_sequence_length=next_sequence_length, **inputs)
        return inputs | {"input_ids": input_ids[:, -1:], "position_ids": position_ids[:, -1:]}

    def adopt(self, cache: Any) -> None:
        self.cache, self.past, self.states = cache, cache.get_seq_length(), []
        for layer in cache.layers:
            B, nh, past, hs = layer.keys.shape
            room = layer.keys.new_empty(2, B, nh, max(past + 1, min(2 * past + 64, self.block_size)), hs)
            room[0, :, :, :past], room[1, :, :, :past] = layer.keys, layer.values
            self.states.append(room)
            layer.keys, layer.values = room[:, :, :, :past].unbind()

    def settle(self) -> None:
        """Give the cache its tokens: until then its layers hold those that they had when it was adopted."""
        if self.cache is not None:
            for layer, room in zip(self.cache.layers, self.states, strict=True):
                layer.keys, layer.values = room[:, :, :, : self.past].unbind()
            self.cache, self.states = None, []


def is_plain_cache(cache: Any) -> bool:
    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer and layer.get_seq_length() > 0 for layer in cache.layers
    )


def is_plain(model: Any) -> bool:
    """Whether the lean step computes what the modules would: classes it knows, on the CPU, untampered."""
    config = model.config
    if os.environ.get("CUSTOM_GPT_PLAIN_DECODE") or model.training or torch.is_grad_enabled():
        return False
    if config._attn_implementation != "sdpa" or config.activation_function not in GELU:
        return False
    if torch.is_autocast_enabled("cpu") or nn.modules.module._has_any_global_hook():
        return False
    known = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList, type(ACT2FN[config.activation_function]))
    return all(
        (type(module) in known or type(module).__module__ == type(model).__module__)
        and not {"forward", "prepare_inputs_for_generation"} & module.__dict__.keys()
        and not (module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl)
        and all(
            type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.dtype == model.dtype
            for parameter in module.parameters(recurse=False)
        )
        for module in model.modules()
    )


INSTALLING = threading.Lock()  # one thread's `generate` takes lean steps, the others meanwhile plain ones


@contextmanager
def lean_decoding(model: Any) -> Iterator[None]:
    """Within it, `model.forward` takes single tokens by the lean step, if there is nothing unusual about the model."""
    with INSTALLING:
        lean = LeanForward(model) if is_plain(model) else None
        if lean is not None:
            model.forward, model.prepare_inputs_for_generation = lean, lean.prepare
    try:
        yield
    finally:
        if lean is not None:
            with INSTALLING:
                lean.settle()
                del model.forward, model.prepare_inputs_for_generation


__all__ = ["lean_decoding"]
