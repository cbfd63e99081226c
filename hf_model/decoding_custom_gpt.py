"""What makes `generate` fast: a cache with room to grow and, on a CPU, a lean step that the cache carries.

At each token the plain model spends much of its time on Python, masks and copies of its cache, and not every library
reads a matrix for a single row as fast as the memory gives it. So `generate` hands a `GrowingCache` to every forward.
For a model with nothing unusual about it (`is_plain`) it holds a `LeanStep`, the same computation with fewer operators,
made once for each call of `generate`: between calls the weights may be exchanged, within one they must not be.
CUSTOM_GPT_PLAIN_DECODE=1 in the environment leaves everything to the plain model.

Which library multiplies was measured, on two cores of an AMD EPYC and of an Intel Xeon:

| weights        | one row                     | a batch of steps, a window | other rows                            |
|----------------|-----------------------------|----------------------------|---------------------------------------|
| float32        | MKL, a part for each thread | oneDNN                     | MKL, up to 256 rows in parts          |
| float32, Intel | MKL, to 3 rows or if SMALL  | oneDNN                     | MKL                                   |
| half precision | PyTorch's own               | a float32 copy, kept       | a float32 copy of one matrix at a time |
| PyTorch's own everywhere: other dtypes, no AVX, bfloat16 where the processor has instructions for it         |

oneDNN keeps about a megabyte for each number of rows that it has met, so it gets those that come again and again.
Parts and oneDNN add up in another order than the plain model: logits differ by rounding, in float32 by some 1e-6 of
their spread. With weights in half precision, everything between the products is in float32.
"""

import os
from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, DynamicLayer

HALF = (torch.float16, torch.bfloat16)
GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}
SMALL = 2**20  # weights; a matrix of fewer is MKL's on Intel's processors
COPY_HEAD_AT = 24  # tokens of one sequence: from here on a second copy of the head's matrix pays


class GrowingLayer(DynamicLayer):
    """A layer whose keys and values are the beginning of larger tensors: new ones are written behind them."""

    key_room: Tensor | None = None  # (B, nh, more than S, hs); the next token makes it where there is none
    value_room: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # there, nothing may be written over
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, past = key_states.shape[2], self.get_seq_length()
        self.key_room = with_room(self.key_room, self.keys, key_states, past)
        self.value_room = with_room(self.value_room, self.values, value_states, past)
        self.key_room.narrow(2, past, new).copy_(key_states)
        self.value_room.narrow(2, past, new).copy_(value_states)
        self.keys, self.values = (room.narrow(2, 0, past + new) for room in (self.key_room, self.value_room))
        if self.keys.dtype == key_states.dtype:
            return self.keys, self.values
        return self.keys.to(key_states.dtype), self.values.to(key_states.dtype)

    def __getstate__(self) -> dict[str, object]:
        """For copies: with a room in common, one would write over the other's tokens."""
        own = {name: getattr(self, name).clone() for name in ("keys", "values") if self.is_initialized}
        return self.__dict__ | {"key_room": None, "value_room": None} | own


def with_room(room: Tensor | None, states: Tensor, new: Tensor, past: int) -> Tensor:
    """The room, if the states are its beginning and the new ones fit in behind them, or else a larger one."""
    total, dtype = past + new.shape[2], torch.promote_types(states.dtype, new.dtype) if past else new.dtype
    if (
        room is not None
        and room.shape[2] >= total
        and room.dtype == dtype
        and room.is_inference() == torch.is_inference_mode_enabled()  # or it could not be written to
        # `crop` leaves the states where they are. All other changes make new tensors of them.
        and (room.data_ptr(), room.stride(), len(room)) == (states.data_ptr(), states.stride(), len(states))
    ):
        return room
    room = new.new_empty(*new.shape[:2], total + total // 4 + 32, new.shape[3], dtype=dtype)
    if past:
        room.narrow(2, 0, past).copy_(states)
    return room


class GrowingCache(DynamicCache):
    """Stands for a `DynamicCache` within `generate`, and has its list of layers: who gave that one finds it filled."""

    def __init__(self, cache: DynamicCache, model: PreTrainedModel):
        self.__dict__ |= cache.__dict__
        missing = model.config.n_layer - len(cache.layers)
        for i, layer in enumerate(cache.layers + [DynamicLayer() for _ in range(missing)]):
            growing = GrowingLayer()
            growing.__dict__ |= layer.__dict__
            self.layers[i : i + 1] = [growing]
        self.step = LeanStep(model) if is_plain(model) else None

    def logits(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        positions: Tensor,
        keep: int | Tensor,
        **others: object,
    ) -> Tensor | None:
        """What the model's forward gives, by the lean step; None if it is not for that."""
        if self.step is None or input_ids is None or not input_ids.is_cpu or torch.is_grad_enabled():
            return None
        if type(keep) is not int or any(value is not None and value is not False for value in others.values()):
            return None  # something that only the plain model does
        B, T = input_ids.shape
        if attention_mask is not None and attention_mask.shape != (B, self.get_seq_length() + T):
            return None
        if int(positions.max()) >= self.step.block_size:
            return None  # the plain model says what is wrong
        return self.step(input_ids, attention_mask, positions, self, min(keep or T, T))


def can_grow(cache: object) -> TypeGuard[DynamicCache]:
    """Whether this is the library's ordinary cache, not one of the other kinds, which somebody has chosen."""
    if not isinstance(cache, DynamicCache) or type(cache) not in (DynamicCache, GrowingCache) or cache.offloading:
        return False
    return all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers)


def settle(cache: object, dtype: torch.dtype) -> None:
    """At the end of `generate`: a cache without a step, and in the dtype of the model, where the step has float32."""
    if isinstance(cache, GrowingCache):
        cache.step = None
    for layer in cache.layers if isinstance(cache, DynamicCache) else ():
        if isinstance(layer, GrowingLayer) and layer.is_initialized and layer.keys.dtype != dtype:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
            layer.key_room = layer.value_room = None


Product = Callable[[Tensor], Tensor]  # (rows, in) -> (rows, out)


def product(weight: Tensor, bias: Tensor | None, rows: int, regular: bool, copied: bool) -> Product:
    """The product with a matrix (out, in), by the table above."""
    # An older PyTorch, under which a converted folder may run, does not tell what the processor can do.
    processor: dict = getattr(torch.cpu, "get_capabilities", dict)()
    has_avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    has_mkl = torch.backends.mkl.is_available()
    has_onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    if weight.dtype in HALF:
        if rows == 1 or not has_avx or (weight.dtype == torch.bfloat16 and processor.get("avx512_bf16", False)):
            return lambda x: F.linear(x.to(weight.dtype), weight, bias).float()
        wide_bias = None if bias is None else bias.float()
        if regular and rows <= 256:
            return product(weight.float(), wide_bias, rows, regular, copied)
        return lambda x: F.linear(x, weight.float(), wide_bias)
    if weight.dtype == torch.float32 and has_avx:
        is_intel = "Intel" in processor.get("cpu_name", "")
        divides = weight.is_contiguous() and len(weight) % torch.get_num_threads() == 0
        if has_mkl and not is_intel and divides and (rows == 1 or (rows <= 256 and not regular)):
            return in_parts(weight, bias, copied)
        if has_onednn and regular and not (has_mkl and is_intel and (rows <= 3 or weight.numel() < SMALL)):
            return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def in_parts(weight: Tensor, bias: Tensor | None, copied: bool) -> Product:
    """MKL by itself multiplies a matrix and a single row on one thread. `copied`: stored in the order of reading."""
    n, (n_out, n_in) = torch.get_num_threads(), weight.shape
    parts = weight.view(n, n_out // n, n_in).transpose(1, 2)
    parts = parts.contiguous() if copied else parts

    def multiply(x: Tensor) -> Tensor:
        y = torch.bmm(x.expand(n, *x.shape), parts)  # (n, rows, out / n)
        y = y.view(1, n_out) if len(x) == 1 else y.transpose(0, 1).reshape(-1, n_out)
        return y if bias is None else y + bias

    return multiply


class LeanStep:
    """The forward pass of a model, for any number of tokens behind those of a cache."""

    def __init__(self, model: PreTrainedModel):
        config, decoder = model.config, model.transformer
        self.wte, self.wpe, self.head = decoder.wte.weight, decoder.wpe.weight, model.lm_head
        self.n_head, self.block_size, self.gelu = config.n_head, config.block_size, GELU[config.activation_function]
        self.dtype = torch.float32 if model.dtype in HALF else model.dtype
        self.norms = [(self.norm(block.ln_1), self.norm(block.ln_2)) for block in decoder.h]
        self.ln_f = self.norm(decoder.ln_f)
        self.linears = [(h.attn.c_attn, h.attn.c_proj, h.mlp.c_fc, h.mlp.c_proj) for h in decoder.h]
        self.known: dict[tuple[nn.Linear, int, bool, bool], list[Product]] = {}
        self.tokens = 0  # of a single sequence

    def norm(self, layer: nn.LayerNorm) -> Product:
        weight, bias = (None if p is None else p.to(self.dtype) for p in (layer.weight, layer.bias))
        return lambda x: torch.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)

    def products(self, linears: tuple[nn.Linear, ...], rows: int, regular: bool, copied: bool = False) -> list[Product]:
        key = (linears[0], rows, regular, copied)
        if key not in self.known:
            self.known[key] = [product(layer.weight, layer.bias, rows, regular, copied) for layer in linears]
        return self.known[key]

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: GrowingCache, last: int
    ) -> Tensor:
        """Logits (B, last, V) of the T given tokens, whose keys and values are added to the cache."""
        (B, T), past = input_ids.shape, cache.get_seq_length()
        regular = T == 1 or T == self.block_size
        mask = visible(attention_mask, T, past)
        x = F.embedding(input_ids, self.wte).to(self.dtype) + F.embedding(position_ids, self.wpe).to(self.dtype)
        x = x.view(B * T, -1)  # (B T, C)
        for layer, linears, (ln_1, ln_2) in zip(cache.layers, self.linears, self.norms, strict=True):
            c_attn, attn_proj, c_fc, mlp_proj = self.products(linears, B * T, regular)
            query, key, value = c_attn(ln_1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4).unbind()
            key, value = layer.update(key, value)  # (B, nh, S, hs)
            y = F.scaled_dot_product_attention(query, key, value, mask, 0.0, T > 1 and mask is None)
            x = x + attn_proj(y.transpose(1, 2).reshape(B * T, -1))
            x = x + mlp_proj(F.gelu(c_fc(ln_2(x)), approximate=self.gelu))
        self.tokens += B * T == 1
        (head,) = self.products((self.head,), B * last, regular, B * T == 1 and self.tokens >= COPY_HEAD_AT)
        x = x.view(B, T, -1)[:, T - last :].reshape(B * last, -1)
        return head(self.ln_f(x)).view(B, last, -1)


def visible(attention_mask: Tensor | None, new: int, past: int) -> Tensor | None:
    """Which tokens each new one sees (B or 1, 1, T, S); None where it sees all up to itself."""
    padding = None if attention_mask is None or attention_mask.all() else attention_mask[:, None, None] == 0
    if padding is None and (new == 1 or past == 0):
        return None
    seen = torch.ones(1, 1, new, past + new, dtype=torch.bool).tril(past)
    return seen if padding is None else seen & ~padding | seen.triu(past)  # padding sees itself


def is_plain(model: PreTrainedModel) -> bool:
    """Whether the lean step computes what the modules would: classes it knows, on the CPU, untampered."""
    config, activation = model.config, model.config.activation_function
    if os.environ.get("CUSTOM_GPT_PLAIN_DECODE") or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu") or nn.modules.module._has_any_global_hook() or activation not in GELU:
        return False
    if config._attn_implementation != "sdpa" or config.output_attentions or config.output_hidden_states:
        return False
    numbers = {"eps": config.layer_norm_epsilon, "scaling": (config.n_embd // config.n_head) ** -0.5}
    known = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList, type(ACT2FN[activation]))
    return all(
        not module.training
        and (type(module) in known or type(module).__module__ == type(model).__module__)
        and all(module.__dict__.get(name, number) == number for name, number in numbers.items())
        and not {"forward", "prepare_inputs_for_generation"} & module.__dict__.keys()
        and not (module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl or module._buffers)
        and all(
            name in ("weight", "bias")
            and type(weight) is nn.Parameter
            and weight.is_cpu
            and weight.dtype == model.dtype
            for name, weight in module._parameters.items()
            if weight is not None
        )
        for module in model.modules()
    )


__all__ = ["GrowingCache", "can_grow", "settle"]
