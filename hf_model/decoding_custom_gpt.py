"""Lean forward passes on a CPU, for `generate`: of the prompt, and of one new token at a time.

A step of the plain model costs about as much time in Python, masks and cache concatenation as in reading its weights.
Here the whole step is one TorchScript function, `decode`, without Python between the operators, and each layer's keys
and values stand in one tensor with room to grow. Its matrix products are, by the dtype of the model:

- float32: of steps, oneDNN's, which read the weights where they lie, at the speed of the memory. MKL is as fast or
  faster on Intel's processors for up to three rows, and for small matrices. On others it multiplies a matrix and a
  vector on one thread; it is faster for one row of a matrix that is small or has no more rows than columns, if each
  thread gets a part of it. oneDNN and the parts may add up in another order than the plain model's product: logits
  differ by rounding (some 1e-6 of their spread). Of prompts, MKL's alone, for oneDNN keeps about a megabyte for each
  number of rows.
- float16: FBGEMM's, of a packed copy of the weights. Those stay float16, everything else is computed in float32; the
  plain model's own float16 products are slow on a CPU, most of all for many rows.
- bfloat16: FBGEMM's as well, where float16 holds the weights (`fits_float16`). Where the processor has instructions for
  bfloat16, many rows are left to the plain model's own products, which are oneDNN's, memory included.
- other dtypes, processors without AVX2, a PyTorch without the library: the plain model's own, and the same bits.

The weights must not be exchanged while `generate` runs; between its calls they may.

CUSTOM_GPT_PLAIN_DECODE=1 in the environment, or a model with anything unusual about it (`is_plain`), leaves every step
to the plain model.
"""

import functools
import inspect
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
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
# Measured on two cores, the first on AMD's and Intel's, the others on Intel's with AMX:
SMALL = 2**20  # weights; a matrix of fewer is MKL's
MKL_ROWS_ON_INTEL = 3  # of larger ones; more rows are oneDNN's
BFLOAT16_ROWS = 8  # from which on a whole step is faster by bfloat16's own products, where the processor has them

Packed: Any = torch.classes.quantized.LinearPackedParamsBase


class Affine(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    parts: Tensor | None = None  # the weight's rows in a part for each thread, transposed: (n, in, out / n)
    mkl_rows: int = 0  # up to how many rows are faster by MKL than by oneDNN
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
    packed, parts, bias, rows = linear.packed, linear.parts, linear.bias, x.shape[0]
    if packed is not None:
        return torch.ops.quantized.linear_dynamic_fp16(x, packed)
    if onednn and rows > linear.mkl_rows:
        return torch.ops.mkldnn._linear_pointwise(x, linear.weight, bias, "none", [], "")
    if parts is not None and rows <= 256:  # more rows MKL spreads over the threads as well
        y = torch.bmm(x.expand(parts.shape[0], rows, x.shape[1]), parts).transpose(0, 1).reshape(rows, -1)
        return y if bias is None else y + bias
    return F.linear(x, linear.weight, bias)


def normalize(x: Tensor, norm: Affine, eps: float) -> Tensor:
    return torch.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, eps)


def decode(
    weights: Weights,
    ids: Tensor,  # (B, T)
    position_ids: Tensor,  # (B, T) or (1, T)
    mask: Tensor | None,  # (B, 1, T, S), or None: each token attends to all before it
    states: list[Tensor],  # for each layer, keys and values (2, B, nh, room, hs), `past` tokens of them filled;
    # or the same tensor for all layers, where nobody reads them afterwards
    past: int,  # 0 where T > 1
    last: int,  # how many tokens get logits
    eps: float,
    gelu: str,
) -> Tensor:
    """Logits (B, last, V) of T tokens for each row, whose keys and values are added to `states`."""
    B, T = ids.shape
    onednn = weights.onednn and (T == 1 or T == weights.wpe.shape[0])  # a step, or the window past the context
    dtype = weights.ln_f.weight.dtype
    x = F.embedding(ids, weights.wte).to(dtype) + F.embedding(position_ids, weights.wpe).to(dtype)  # (B, T, C)
    x = x.view(B * T, -1)
    for block, room in zip(weights.blocks, states):  # noqa: B905 TorchScript knows no `strict`
        nh, hs = room.shape[2], room.shape[4]
        qkv = project(normalize(x, block.ln_1, eps), block.c_attn, onednn).view(B, T, 3, nh, hs).permute(2, 0, 3, 1, 4)
        room.narrow(3, past, T).copy_(qkv[1:])
        key, value = room.narrow(3, 0, past + T).unbind(0)  # (B, nh, S, hs)
        y = F.scaled_dot_product_attention(qkv[0], key, value, mask, 0.0, T > 1 and mask is None)  # (B, nh, T, hs)
        x = x + project(y.transpose(1, 2).reshape(x.shape), block.attn_proj, onednn)
        hidden = F.gelu(project(normalize(x, block.ln_2, eps), block.c_fc, onednn), approximate=gelu)  # (B T, 4C)
        x = x + project(hidden, block.mlp_proj, onednn)
    x = x.view(B, T, -1).narrow(1, T - last, last).reshape(B * last, -1)
    return project(normalize(x, weights.ln_f, eps), weights.lm_head, onednn).view(B, last, -1)


@functools.cache
def scripted_decode() -> Callable[..., Tensor]:
    """`decode` in TorchScript, or as it is where there is no TorchScript."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.script(decode)
    except (AttributeError, OSError, RuntimeError):
        return decode


def vectorized() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def capabilities() -> Mapping[str, Any]:
    """What the processor can do; an older PyTorch, under which a converted folder may run, does not tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def is_for_fbgemm(model: Any, rows: int) -> bool:
    """Whether products of so many rows are FBGEMM's, if float16 holds the weights."""
    if model.dtype not in (torch.float16, torch.bfloat16):
        return False
    if not vectorized() or torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    has_own = model.dtype == torch.bfloat16 and has_onednn() and capabilities().get("avx512_bf16", False)
    return rows < BFLOAT16_ROWS or not has_own


def weights_of(model: Any, rows: int = 1, compared: bool = False) -> Weights:
    """The weights for products of so many rows: the model's own tensors, or packed ones.

    Those are kept as long as the model lives and does not change; `compared` says that they are known to be its own.
    """
    if is_for_fbgemm(model, rows):
        return packed_weights(model, compared)
    if model.dtype != torch.float32 or not vectorized():
        return gather(model, as_it_is)
    PACKED.pop(model, None)  # it may have had another dtype before
    if not torch.backends.mkl.is_available():
        return gather(model, as_it_is, has_onednn())
    is_intel = "Intel" in capabilities().get("cpu_name", "")
    return gather(model, for_intel if is_intel else in_parts, has_onednn())


def packed_weights(model: Any, compared: bool) -> Weights:
    """FBGEMM's copies, or the model's own tensors where float16 does not hold them."""
    known = PACKED.get(model)
    if known is None or not compared:
        state = [total for weight in model.parameters() for total in checksum(weight)]
        if known is None or not all(map(torch.equal, known[0], state)):
            fits = all(fits_float16(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear))
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # FBGEMM packs on one thread
                known = PACKED[model] = (state, gather(model, packed, each=pool.map) if fits else None)
    if known[1] is None:
        return gather(model, as_it_is)
    # Of equal tensors, those that the model has now: others, which it had before, may change and it will not.
    return known[1]._replace(wte=model.transformer.wte.weight, wpe=model.transformer.wpe.weight)


def fits_float16(weight: Tensor) -> bool:
    """Whether float16 holds a matrix, all finite: no value is off by more than 2^-11 of the largest one."""
    largest = max(abs(extreme.item()) for extreme in torch.aminmax(weight))  # NaN is passed on by both
    float16 = torch.finfo(torch.float16)
    least = 0 if weight.dtype == torch.float16 else float16.smallest_normal  # 2^-14; below it the steps stay at 2^-24
    return largest == 0 or least <= largest <= float16.max


def checksum(weight: Tensor) -> list[Tensor]:
    """Sums over rows and over columns of the bits: two rows that change places are seen, too. Of a vector, a copy."""
    if weight.ndim == 1:
        return [weight.detach().clone()]
    four = weight.is_contiguous() and weight.shape[1] % 4 == 0 and weight.storage_offset() % 4 == 0
    bits = weight.detach().view(torch.int64 if four else torch.int16)  # four values at a time, where memory allows
    return [bits.sum(0), bits.sum(1)]


PREPARING = threading.Lock()  # one thread packs or compiles, the others wait for it
PACKED: weakref.WeakKeyDictionary[Any, tuple[list[Tensor], Weights | None]] = weakref.WeakKeyDictionary()


def as_it_is(layer: Any) -> Affine:
    return Affine(layer.weight, layer.bias)


def in_parts(layer: Any) -> Affine:
    weight, n = layer.weight, torch.get_num_threads()
    if weight.ndim == 1 or not weight.is_contiguous() or weight.shape[0] % n:
        return as_it_is(layer)
    n_out, n_in = weight.shape
    parts = weight.detach().view(n, n_out // n, n_in).transpose(1, 2)
    return Affine(weight, layer.bias, parts, mkl_rows=int(n_out <= n_in or weight.numel() < SMALL))


def for_intel(layer: Any) -> Affine:
    return Affine(layer.weight, layer.bias, mkl_rows=sys.maxsize if layer.weight.numel() < SMALL else MKL_ROWS_ON_INTEL)


@torch.no_grad()
def packed(layer: Any) -> Affine:
    weight, bias = layer.weight.float(), None if layer.bias is None else layer.bias.float()
    if isinstance(layer, nn.LayerNorm):
        return Affine(weight, bias)
    return Affine(weight.new_empty(0), None, packed=torch.ops.quantized.linear_prepack_fp16(weight, bias))


def gather(model: Any, affine: Callable[[Any], Affine], onednn: bool = False, each: Callable = map) -> Weights:
    def block(layer: Any) -> Block:
        attn, mlp = layer.attn, layer.mlp
        return Block(*map(affine, (layer.ln_1, attn.c_attn, attn.c_proj, layer.ln_2, mlp.c_fc, mlp.c_proj)))

    decoder = model.transformer
    largest_first = [model.lm_head, *decoder.h]
    head, *blocks = each(lambda layer: affine(layer) if layer is model.lm_head else block(layer), largest_first)
    return Weights(decoder.wte.weight, decoder.wpe.weight, blocks, affine(decoder.ln_f), head, onednn)


class LeanForward:
    """One thread's `forward` while `generate` runs; anything that it does not know goes to the plain `forward`."""

    def __init__(self, model: Any, plain: Callable, plain_prepare: Callable, compared: bool):
        self.plain, self.plain_prepare = plain, plain_prepare
        self.model, self.compared = model, compared
        self.n_layer, self.n_head = model.config.n_layer, model.config.n_head
        self.head_dim = model.config.n_embd // model.config.n_head
        self.block_size = model.config.block_size
        self.positions = functools.partial(model.transformer._position_ids, past_key_values=None)
        self.eps, self.gelu = model.config.layer_norm_epsilon, GELU[model.config.activation_function]
        self.cache: Any = None  # whose keys and values stand in `states`
        self.adopted: Any = None  # its first layer's keys, as they were found
        self.states: list[Tensor] = []
        self.past = 0
        self.known: dict[bool, Weights] = {}

    def weights(self, rows: int) -> Weights:
        many = rows >= BFLOAT16_ROWS
        if many not in self.known:
            with PREPARING:
                scripted_decode()
                self.known[many] = weights_of(self.model, rows, self.compared)
            self.compared = self.compared or is_for_fbgemm(self.model, rows)
        return self.known[many]

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if self.fits_prompt(input_ids, attention_mask, position_ids, past_key_values, kwargs):
            return self.take_prompt(input_ids, attention_mask, past_key_values, **kwargs)
        if not self.fits(input_ids, attention_mask, position_ids, past_key_values, kwargs):
            self.settle()
            return self.plain(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
        if not self.holds(past_key_values):
            self.settle()
            self.adopt(past_key_values)
        elif self.past == self.states[0].shape[3]:
            self.states = [torch.cat([room, torch.empty_like(room)], dim=3) for room in self.states]
        mask = None if attention_mask is None or attention_mask.all() else attention_mask[:, None, None].bool()
        inputs = (input_ids, position_ids, mask, self.states, self.past)
        with torch.inference_mode():  # a little less to do for each operator
            logits = scripted_decode()(self.weights(len(input_ids)), *inputs, 1, self.eps, self.gelu)
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
            and (self.holds(cache) or is_filled_cache(cache, self.n_layer))
            and (attention_mask is None or attention_mask.ndim == 2)
            and kwargs.get("use_cache") is True
            and kwargs.get("return_dict") is not False
            and all(value is None or value is False or name in EXPECTED for name, value in kwargs.items())
        )

    def fits_prompt(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any, kwargs: dict[str, Any]
    ) -> bool:
        """Whether these are all tokens so far, with or without a cache to fill."""
        return (
            input_ids is not None
            and 1 < input_ids.shape[1] <= self.block_size
            and (attention_mask is None or attention_mask.shape == input_ids.shape)
            and (position_ids is None or bool((position_ids == self.positions(input_ids, attention_mask)).all()))
            and (cache is None or is_empty_cache(cache))
            and kwargs.get("use_cache") is (cache is not None)
            and kwargs.get("return_dict") is not False
            and type(logits_to_keep := kwargs.get("logits_to_keep", 0)) is int
            and logits_to_keep >= 0
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
        weights = self.weights(B * T)
        dtype, device = weights.ln_f.weight.dtype, input_ids.device
        mask = None
        if attention_mask is not None and not attention_mask.all():
            seen = torch.ones_like(attention_mask[0], dtype=torch.bool).expand(T, T).tril()
            padding = attention_mask[:, None, None] == 0
            mask = seen & ~padding | torch.eye(T, dtype=torch.bool, device=device)  # padding sees itself
        rooms = self.n_layer if cache is not None else 1  # one serves all layers, if nobody asks for it afterwards
        states = [torch.empty(2, B, self.n_head, T, self.head_dim, dtype=dtype, device=device) for _ in range(rooms)]
        position_ids = self.positions(input_ids, attention_mask)
        last = min(logits_to_keep or T, T)
        inputs = (weights, input_ids, position_ids, mask, states * (self.n_layer // rooms), 0, last)
        logits = scripted_decode()(*inputs, self.eps, self.gelu)
        if cache is not None:
            for layer in range(self.n_layer):  # the cache makes copies: of one layer at a time
                cache.update(*states.pop(0).to(weights.wte.dtype).unbind(), layer)
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
        known = self.holds(past_key_values) and self.past < self.block_size
        if not known or next_sequence_length != 1 or position_ids is None or kwargs.keys() - EXPECTED:
            return self.plain_prepare(input_ids, next_sequence_length=next_sequence_length, **inputs)
        return inputs | {"input_ids": input_ids[:, -1:], "position_ids": position_ids[:, -1:]}

    def holds(self, cache: Any) -> bool:
        """Whether `states` has this cache's tokens, and nobody has cropped or exchanged them meanwhile."""
        return cache is not None and cache is self.cache and cache.layers[0].keys is self.adopted

    def adopt(self, cache: Any) -> None:
        past = cache.get_seq_length()
        B, nh, _, hs = cache.layers[0].keys.shape
        room_for = max(past + 1, min(2 * past + 64, self.block_size))
        dtype = self.weights(B).ln_f.weight.dtype
        states = []
        for layer in cache.layers:
            room = torch.empty(2, B, nh, room_for, hs, dtype=dtype, device=layer.keys.device)
            room[0, :, :, :past], room[1, :, :, :past] = layer.keys, layer.values
            states.append(room)
        self.cache, self.past, self.states, self.adopted = cache, past, states, cache.layers[0].keys

    def settle(self) -> None:
        """Give the cache its tokens: until then its layers hold those that they had when it was adopted."""
        if self.holds(self.cache):
            for layer, room in zip(self.cache.layers, self.states, strict=True):
                keys, values = room[:, :, :, : self.past].to(layer.keys.dtype)
                layer.keys, layer.values = keys.contiguous(), values.contiguous()
        self.cache, self.states = None, []


class Dispatcher:
    """Stands in for the `forward` of a model: each thread that is in `generate` has its own."""

    def __init__(self, model: Any):
        self.plain, self.plain_prepare = model.forward, model.prepare_inputs_for_generation
        self.__signature__ = inspect.signature(self.plain)  # `generate` asks at every step
        self.prepare = functools.partial(self.dispatch_prepare)
        self.prepare.__signature__ = inspect.signature(self.plain_prepare)  # type: ignore[attr-defined]
        self.lean: dict[int, LeanForward] = {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("A model cannot be copied or pickled while it generates.")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # `generate` was asked to compile, and means the plain forward
            return self.plain(*args, **kwargs)
        return self.lean.get(threading.get_ident(), self.plain)(*args, **kwargs)

    def dispatch_prepare(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        lean = self.lean.get(threading.get_ident())
        return (lean.prepare if lean else self.plain_prepare)(*args, **kwargs)


def is_empty_cache(cache: Any) -> bool:
    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer and layer.get_seq_length() == 0 for layer in cache.layers
    )


def is_filled_cache(cache: Any, n_layer: int) -> bool:
    return (
        type(cache) is DynamicCache
        and len(cache.layers) == n_layer
        and all(type(layer) is DynamicLayer and layer.get_seq_length() > 0 for layer in cache.layers)
    )


REPLACED = {"forward", "prepare_inputs_for_generation"}


def is_plain(model: Any) -> bool:
    """Whether the lean step computes what the modules would: classes it knows, on the CPU, untampered."""
    config = model.config
    if os.environ.get("CUSTOM_GPT_PLAIN_DECODE") or torch.is_grad_enabled():
        return False
    if config._attn_implementation != "sdpa" or config.activation_function not in GELU:
        return False
    if torch.is_autocast_enabled("cpu") or nn.modules.module._has_any_global_hook():
        return False
    dtype, eps, scaling = model.dtype, config.layer_norm_epsilon, (config.n_embd // config.n_head) ** -0.5
    known = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList, type(ACT2FN[config.activation_function]))
    return all(
        not module.training
        and module.__dict__.get("eps", eps) == eps
        and module.__dict__.get("scaling", scaling) == scaling
        and (type(module) in known or type(module).__module__ == type(model).__module__)
        and (not REPLACED & module.__dict__.keys() or type(module.forward) is Dispatcher)
        and not (module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl or module._buffers)
        and all(
            parameter is None
            or (
                name in ("weight", "bias")
                and type(parameter) is nn.Parameter
                and parameter.device.type == "cpu"
                and parameter.dtype == dtype
            )
            for name, parameter in module._parameters.items()
        )
        for module in model.modules()
    )


INSTALLING = threading.Lock()
COMPARED = threading.local()  # `model`: whose packed weights this thread's last prompt went through


@contextmanager
def lean_decoding(model: Any, prompt: bool = False) -> Iterator[None]:
    """Within it, this thread's `model.forward` is lean wherever it can be, if there is nothing unusual about the model.

    `prompt` says that it is a prompt which comes, not the steps after it.
    """
    thread = threading.get_ident()
    compared = COMPARED.__dict__.pop("model", lambda: None)() is model  # the steps follow the prompt at once
    lean = None
    with INSTALLING:  # what `is_plain` looks at, another thread may be about to replace
        if is_plain(model):
            dispatcher = model.forward if type(model.forward) is Dispatcher else Dispatcher(model)
            outer = dispatcher.lean.get(thread)  # of a `generate` within whose steps this one runs
            if outer is not None:
                outer.settle()
            lean = dispatcher.lean[thread] = LeanForward(
                model, dispatcher.plain, dispatcher.plain_prepare, compared and not prompt
            )
            model.forward, model.prepare_inputs_for_generation = dispatcher, dispatcher.prepare
    try:
        yield
    finally:
        if lean is not None:
            with INSTALLING:
                if outer is not None:
                    dispatcher.lean[thread] = outer
                elif len(dispatcher.lean) > 1:
                    del dispatcher.lean[thread]
                else:
                    del model.forward, model.prepare_inputs_for_generation
            lean.settle()
            if prompt and lean.compared:
                COMPARED.model = weakref.ref(model)


__all__ = ["lean_decoding"]
