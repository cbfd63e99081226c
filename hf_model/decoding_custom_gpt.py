"""Lean forward passes on a CPU, for `generate`: of one new token at a time, and in float16 of the prompt too.

A step of the plain model costs about as much time in Python, masks and cache concatenation as in reading its weights.
Here the whole step is one TorchScript function, `decode`, without Python between the operators, and each layer's keys
and values stand in one tensor with room to grow. Its matrix products are, by the dtype of the model:

- float32: oneDNN's, which read the weights where they lie, at the speed of the memory. They add up in another order
  than the plain model's: logits differ by rounding (some 1e-6 of their spread).
- float16: FBGEMM's, of a packed copy of the weights. Those stay float16, everything else is computed in float32; the
  plain model's own float16 products are slow on a CPU, most of all for many rows.
- bfloat16, or where PyTorch has neither library: the plain model's own, and the same bits.

CUSTOM_GPT_PLAIN_DECODE=1 in the environment, or a model with anything unusual about it (`is_plain`), leaves every step
to the plain model.
"""

import functools
import inspect
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}
EXPECTED = {"position_ids", "use_cache", "return_dict", "logits_to_keep"}  # arguments that a single token may come with


Packed: Any = torch.classes.quantized.LinearPackedParamsBase


class Affine(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    packed: Optional[Packed] = None  # noqa: UP045 weight and bias in FBGEMM's layout; a ScriptClass takes no `|`


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
    onednn: bool


def project(x: Tensor, linear: Affine, onednn: bool) -> Tensor:
    packed = linear.packed
    if packed is not None:
        return torch.ops.quantized.linear_dynamic_fp16(x, packed)
    if onednn:
        return torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, "none", [], "")
    return F.linear(x, linear.weight, linear.bias)


def normalize(x: Tensor, norm: Affine, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[1:], norm.weight, norm.bias, eps)


def decode(
    weights: Weights,
    ids: Tensor,  # (B, T)
    position_ids: Tensor,  # (B, T) or (1, T)
    mask: Tensor | None,  # (B, 1, T, S), or None: each token attends to all before it
    states: list[Tensor],  # for each layer, keys and values (2, B, nh, room, hs), `past` tokens of them filled
    past: int,  # 0 where T > 1
    last: int,  # how many tokens get logits
    eps: float,
    gelu: str,
) -> Tensor:
    """Logits (B, last, V) of T tokens for each row, whose keys and values are added to `states`."""
    B, T = ids.shape
    fast = weights.onednn
    x = F.embedding(ids, weights.wte) + F.embedding(position_ids, weights.wpe)  # (B, T, C)
    x = x.to(weights.ln_f.weight.dtype).view(B * T, -1)
    for block, room in zip(weights.blocks, states):  # noqa: B905 TorchScript knows no `strict`
        nh, hs = room.shape[2], room.shape[4]
        qkv = project(normalize(x, block.ln_1, eps), block.c_attn, fast).view(B, T, 3, nh, hs).permute(2, 0, 3, 1, 4)
        seen = room.narrow(3, 0, past + T)
        seen.narrow(3, past, T).copy_(qkv.narrow(0, 1, 2))
        key, value = seen.unbind(0)  # (B, nh, S, hs)
        y = F.scaled_dot_product_attention(qkv[0], key, value, mask, 0.0, T > 1 and mask is None)  # (B, nh, T, hs)
        x = x + project(y.transpose(1, 2).reshape(x.shape), block.attn_proj, fast)
        hidden = F.gelu(project(normalize(x, block.ln_2, eps), block.c_fc, fast), approximate=gelu)  # (B T, 4C)
        x = x + project(hidden, block.mlp_proj, fast)
    x = x.view(B, T, -1).narrow(1, T - last, last).reshape(B * last, -1)
    return project(normalize(x, weights.ln_f, eps), weights.lm_head, fast).view(B, last, -1)


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
    """The model's own tensors, or in float16 copies that are kept as long as the model lives and does not change."""
    vectorized = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if not (model.dtype == torch.float16 and vectorized and torch.backends.quantized.engine in ("x86", "fbgemm")):
        onednn = model.dtype == torch.float32 and vectorized and bool(torch.backends.mkldnn.enabled)
        return gather(
            model, lambda layer: Affine(layer.weight, layer.bias), onednn and torch.backends.mkldnn.is_available()
        )
    state = [checksum(weight.flatten()) for weight in model.parameters()]
    known = PACKED.get(model)
    if known is None or known[0] != state:
        known = PACKED[model] = (state, gather(model, packed, False))
    return known[1]


def checksum(values: Tensor) -> tuple[int, int]:
    """Of float16 values, four at a time where their place in memory allows."""
    four = values.numel() % 4 == 0 and values.storage_offset() % 4 == 0
    return values.data_ptr(), int(values.view(torch.int64 if four else torch.int16).sum())


PACKED: weakref.WeakKeyDictionary[Any, tuple[list, Weights]] = weakref.WeakKeyDictionary()


def packed(layer: Any) -> Affine:
    weight, bias = layer.weight.float(), None if layer.bias is None else layer.bias.float()
    if isinstance(layer, nn.LayerNorm):
        return Affine(weight, bias)
    return Affine(layer.weight, None, torch.ops.quantized.linear_prepack_fp16(weight, bias))


def gather(model: Any, affine: Callable[[Any], Affine], onednn: bool) -> Weights:
    def block(layer: Any) -> Block:
        attn, mlp = layer.attn, layer.mlp
        return Block(*map(affine, (layer.ln_1, attn.c_attn, attn.c_proj, layer.ln_2, mlp.c_fc, mlp.c_proj)))

    decoder = model.transformer
    head = affine(model.lm_head)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # FBGEMM packs on one thread
        blocks = list(pool.map(block, decoder.h))
    return Weights(decoder.wte.weight, decoder.wpe.weight, blocks, affine(decoder.ln_f), head, onednn)


class LeanForward:
    """One thread's `forward` while `generate` runs; anything that it does not know goes to the plain `forward`."""

    def __init__(self, model: Any, plain: Callable, plain_prepare: Callable):
        self.plain, self.plain_prepare = plain, plain_prepare
        self.model = model
        self.n_head, self.head_dim = model.config.n_head, model.config.n_embd // model.config.n_head
        self.block_size = model.config.block_size
        self.positions = functools.partial(model.transformer._position_ids, past_key_values=None)
        self.eps, self.gelu = model.config.layer_norm_epsilon, GELU[model.config.activation_function]
        self.cache: Any = None  # whose keys and values stand in `states`
        self.states: list[Tensor] = []
        self.past = 0

    @functools.cached_property
    def weights(self) -> Weights:
        return weights_of(self.model)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if torch.compiler.is_compiling():  # `generate` was asked to compile, and means the plain forward
            return self.plain(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
        if self.fits_prompt(input_ids, attention_mask, position_ids, past_key_values, kwargs):
            return self.take_prompt(input_ids, attention_mask, past_key_values, **kwargs)
        if not self.fits(input_ids, attention_mask, position_ids, past_key_values, kwargs):
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
            logits = scripted_decode()(self.weights, *inputs, 1, self.eps, self.gelu)
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
            input_ids is not None
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

    def fits_prompt(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any, kwargs: dict[str, Any]
    ) -> bool:
        """Whether these are all tokens so far of a model with packed weights, with or without a cache to fill."""
        return (
            self.weights.lm_head.packed is not None
            and input_ids is not None
            and 1 < input_ids.shape[1] <= self.block_size
            and (attention_mask is None or attention_mask.shape == input_ids.shape)
            and (position_ids is None or bool((position_ids == self.positions(input_ids, attention_mask)).all()))
            and (cache is None or (cache is not self.cache and is_plain_cache(cache, empty=True)))
            and kwargs.get("use_cache") is (cache is not None)
            and kwargs.get("return_dict") is not False
            and type(kwargs.get("logits_to_keep", 0)) is int
            and all(value is None or value is False or name in EXPECTED for name, value in kwargs.items())
        )

    def take_prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Any:
        B, T = input_ids.shape
        mask = None
        if attention_mask is not None and not attention_mask.all():
            seen = torch.ones(T, T, dtype=torch.bool).tril()
            mask = seen & attention_mask[:, None, None].bool() | torch.eye(T, dtype=torch.bool)  # padding sees itself
        states = [torch.empty(2, B, self.n_head, T, self.head_dim) for _ in self.weights.blocks]
        position_ids = self.positions(input_ids, attention_mask)
        inputs = (input_ids, position_ids, mask, states, 0, min(logits_to_keep or T, T))
        logits = scripted_decode()(self.weights, *inputs, self.eps, self.gelu)
        if cache is not None:
            for layer, room in enumerate(states):
                cache.update(*room.to(self.weights.wte.dtype).unbind(), layer)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

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
        dtype = self.weights.ln_f.weight.dtype
        for layer in cache.layers:
            B, nh, past, hs = layer.keys.shape
            room = torch.empty(2, B, nh, max(past + 1, min(2 * past + 64, self.block_size)), hs, dtype=dtype)
            room[0, :, :, :past], room[1, :, :, :past] = layer.keys, layer.values
            self.states.append(room)
            layer.keys, layer.values = room[:, :, :, :past].unbind()  # the model's dtype again when they are settled

    def settle(self) -> None:
        """Give the cache its tokens: until then its layers hold those that they had when it was adopted."""
        if self.cache is not None:
            for layer, room in zip(self.cache.layers, self.states, strict=True):
                layer.keys, layer.values = room[:, :, :, : self.past].to(self.weights.wte.dtype).unbind()
            self.cache, self.states = None, []


class Dispatcher:
    """Stands in for the `forward` of a model: each thread that is in `generate` has its own."""

    def __init__(self, model: Any):
        self.plain, self.plain_prepare = model.forward, model.prepare_inputs_for_generation
        self.__signature__ = inspect.signature(self.plain)  # `generate` asks at every step
        self.lean: dict[int, LeanForward] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.lean.get(threading.get_ident(), self.plain)(*args, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        lean = self.lean.get(threading.get_ident())
        return (lean.prepare if lean else self.plain_prepare)(*args, **kwargs)


def is_plain_cache(cache: Any, empty: bool = False) -> bool:
    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer and (layer.get_seq_length() == 0) == empty for layer in cache.layers
    )


REPLACED = {"forward", "prepare_inputs_for_generation"}


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
        and (type(module.forward) is Dispatcher or not REPLACED & module.__dict__.keys())
        and not (module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl)
        and all(
            type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.dtype == model.dtype
            for parameter in module.parameters(recurse=False)
        )
        for module in model.modules()
    )


INSTALLING = threading.Lock()


@contextmanager
def lean_decoding(model: Any, prompt: bool = False) -> Iterator[None]:
    """Within it, this thread's `model.forward` is lean wherever it can be, if there is nothing unusual about the model.

    Of all dtypes, float16 alone has lean forward passes of a `prompt`.
    """
    thread = threading.get_ident()
    with INSTALLING:
        dispatcher = None
        if (not prompt or model.dtype == torch.float16) and is_plain(model):
            dispatcher = model.forward if type(model.forward) is Dispatcher else Dispatcher(model)
            if thread in dispatcher.lean:
                dispatcher = None  # within another `generate` of this thread, which sees to it
            else:
                dispatcher.lean[thread] = LeanForward(model, dispatcher.plain, dispatcher.plain_prepare)
                model.forward, model.prepare_inputs_for_generation = dispatcher, dispatcher.prepare
    try:
        yield
    finally:
        if dispatcher is not None:
            with INSTALLING:
                dispatcher.lean.pop(thread).settle()
                if not dispatcher.lean:
                    del model.forward, model.prepare_inputs_for_generation


__all__ = ["lean_decoding"]
