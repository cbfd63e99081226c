"""What makes `generate` fast: a cache with room to grow, and, on a CPU, a lean forward pass that the cache carries.

The plain model of modeling_custom_gpt.py needs about as much time for Python, masks and concatenated caches as for its
weights, and for a single row of numbers not every library reads the weights as fast as the memory gives them. So
`generate` hands a `GrowingCache` to every forward. It may hold a `LeanStep`, the same computation with fewer operators
between the products. The step is made once for each call of `generate`, and only for a model with nothing unusual about
it (`is_plain`); CUSTOM_GPT_PLAIN_DECODE=1 in the environment leaves all to the plain model. The weights must not be
exchanged while `generate` runs; between its calls they may.

The products add up in another order than the plain model's: logits differ by rounding (in float32 some 1e-6 of their
spread). With weights in float16 or bfloat16, all between the products is computed in float32.
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

GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}


class GrowingLayer(DynamicLayer):
    """A layer whose keys and values are the beginning of a larger tensor: a new token is written behind them."""

    key_room: Tensor | None = None  # (B, nh, more than S, hs); None where the next token makes it
    value_room: Tensor | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> "GrowingLayer":
        new = cls()
        new.__dict__ |= layer.__dict__
        return new

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # neither likes tensors that are written to
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, past = key_states.shape[2], self.get_seq_length()
        self.key_room = with_room(self.key_room, self.keys, key_states, past)
        self.value_room = with_room(self.value_room, self.values, value_states, past)
        self.key_room.narrow(2, past, new).copy_(key_states)
        self.value_room.narrow(2, past, new).copy_(value_states)
        self.keys = self.key_room.narrow(2, 0, past + new)
        self.values = self.value_room.narrow(2, 0, past + new)
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search does this at every token: with the room, so that the next token finds it."""
        past = self.get_seq_length()
        if past and starts(self.key_room, self.keys) and starts(self.value_room, self.values):
            self.key_room, self.value_room = self.key_room[beam_idx], self.value_room[beam_idx]
            self.keys, self.values = self.key_room.narrow(2, 0, past), self.value_room.narrow(2, 0, past)
        else:
            super().reorder_cache(beam_idx)

    def settle(self, dtype: torch.dtype) -> None:
        """After `generate`: keys and values in the model's own dtype."""
        if self.is_initialized and self.keys.dtype != dtype:
            self.keys, self.values, self.key_room, self.value_room = (
                self.keys.to(dtype),
                self.values.to(dtype),
                None,
                None,
            )

    def __getstate__(self) -> dict[str, object]:
        """For copies, which must not share the room: each would write over the other's tokens."""
        state = self.__dict__ | {"key_room": None, "value_room": None}
        if self.is_initialized:
            state |= {"keys": self.keys.clone(), "values": self.values.clone()}
        return state


def with_room(room: Tensor | None, states: Tensor, new: Tensor, past: int) -> Tensor:
    """The room, if the states stand in it and the new ones fit behind them; or else a larger one with the states."""
    total = past + new.shape[2]
    if (
        starts(room, states)
        and room.shape[2] >= total
        and torch.promote_types(room.dtype, new.dtype) == room.dtype
        and room.is_inference() == torch.is_inference_mode_enabled()  # else it must not be written to
    ):
        return room
    B, nh, _, hs = new.shape
    room = new.new_empty(B, nh, total + total // 4 + 32, hs, dtype=torch.promote_types(states.dtype, new.dtype))
    if past:
        room.narrow(2, 0, past).copy_(states)
    return room


def starts(room: Tensor | None, states: Tensor) -> TypeGuard[Tensor]:
    """Whether the states are the beginning of the room: `crop` leaves them there, other changes make new tensors."""
    return (
        room is not None
        and states.data_ptr() == room.data_ptr()
        and states.stride() == room.stride()
        and states.shape[0] == room.shape[0]
    )


class GrowingCache(DynamicCache):
    """What `generate` has in place of a `DynamicCache`. It shares that one's list of layers.

    So whoever gave a cache to `generate` finds the tokens in it.
    """

    def __init__(self, cache: DynamicCache, model: PreTrainedModel):
        self.__dict__ |= cache.__dict__
        missing = model.config.n_layer - len(cache.layers)
        self.layers[:] = map(GrowingLayer.of, cache.layers + [DynamicLayer() for _ in range(missing)])
        self.step = LeanStep(model) if is_plain(model) else None

    def logits(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        logits_to_keep: int | Tensor,
        **others: object,
    ) -> Tensor | None:
        """Logits of a forward pass by the lean step, or None where it is to be the plain model's."""
        if self.step is None or input_ids is None or not input_ids.is_cpu or torch.is_grad_enabled():
            return None
        if any(value is not None and value is not False and name != "use_cache" for name, value in others.items()):
            return None  # outputs that only the plain model has
        T, total = input_ids.shape[1], self.get_seq_length() + input_ids.shape[1]
        if attention_mask is not None and attention_mask.shape != (len(input_ids), total):
            return None
        if int(position_ids.max()) >= self.step.block_size or type(logits_to_keep) is not int:
            return None  # the plain model says what is wrong with the first
        return self.step(input_ids, attention_mask, position_ids, self, min(logits_to_keep or T, T))


def can_grow(cache: object) -> bool:
    """Whether it is the library's ordinary cache, not one of its other kinds that somebody chose."""
    return (
        isinstance(cache, DynamicCache)
        and type(cache) in (DynamicCache, GrowingCache)
        and not cache.offloading
        and all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers)
    )


def settle(cache: object, dtype: torch.dtype) -> None:
    """After `generate`: a cache without the step, and in the model's own dtype."""
    if isinstance(cache, GrowingCache):
        cache.step = None
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, GrowingLayer):
            layer.settle(dtype)


Product = Callable[[Tensor], Tensor]  # (rows, in) -> (rows, out)


def by_mkl(weight: Tensor, bias: Tensor | None) -> Product:
    """PyTorch's own, as in the plain model."""
    return lambda x: F.linear(x, weight, bias)


def by_onednn(weight: Tensor, bias: Tensor | None) -> Product:
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def in_parts(weight: Tensor, bias: Tensor | None) -> Product:
    """A part of the matrix for each thread: MKL by itself multiplies a matrix and a single row on one."""
    n, (n_out, n_in) = torch.get_num_threads(), weight.shape
    parts = weight.view(n, n_out // n, n_in).transpose(1, 2)  # a view, no copy
    if n_out > n_in and os.environ.get("TR"):
        parts = parts.contiguous()

    def product(x: Tensor) -> Tensor:
        y = torch.bmm(x.expand(n, *x.shape), parts)
        y = y.view(1, n_out) if len(x) == 1 else y.transpose(0, 1).reshape(-1, n_out)
        return y if bias is None else y + bias

    return product


def in_half(weight: Tensor, bias: Tensor | None) -> Product:
    """In the weights' own precision."""
    return lambda x: F.linear(x.to(weight.dtype), weight, bias).float()


def in_float32(weight: Tensor, bias: Tensor | None) -> Product:
    """With the weights in float32, a piece of the matrix at a time, small enough for the processor's cache."""
    pieces = weight.split(max(1, PIECE // weight.shape[1]))
    wide_bias = None if bias is None else bias.float()

    def product(x: Tensor) -> Tensor:
        y = torch.cat([F.linear(x, piece.float()) for piece in pieces], dim=1)
        return y if wide_bias is None else y + wide_bias

    return product


HALF = (torch.float16, torch.bfloat16)
PIECE = 2**18


def product_of(linear: nn.Linear, rows: int, is_step: bool) -> Product:
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if weight.dtype in HALF:
        return in_half(weight, bias) if rows <= 1 else in_float32(weight, bias)
    if is_step and rows > 1:
        return by_onednn(weight, bias)
    if rows <= 256 and weight.is_contiguous() and weight.shape[0] % torch.get_num_threads() == 0:
        return in_parts(weight, bias)
    return by_mkl(weight, bias)


class LeanStep:
    """The forward pass of a model, for any number of tokens behind those of the cache."""

    def __init__(self, model: PreTrainedModel):
        config, decoder = model.config, model.transformer
        self.wte, self.wpe, self.blocks, self.lm_head = decoder.wte.weight, decoder.wpe.weight, decoder.h, model.lm_head
        self.n_head, self.block_size = config.n_head, config.block_size
        self.gelu = GELU[config.activation_function]
        self.dtype = torch.float32 if self.wte.dtype in HALF else self.wte.dtype
        self.norms = [(self.norm(block.ln_1), self.norm(block.ln_2)) for block in decoder.h]
        self.ln_f = self.norm(decoder.ln_f)
        self.heads: dict[tuple[int, bool], Product] = {}
        self.products: dict[tuple[int, bool], list[list[Product]]] = {}

    def norm(self, layer: nn.LayerNorm) -> Product:
        weight, bias = layer.weight.detach().to(self.dtype), None
        if layer.bias is not None:
            bias = layer.bias.detach().to(self.dtype)
        return lambda x: torch.layer_norm(x, weight.shape, weight, bias, layer.eps)

    def products_for(self, rows: int, is_step: bool) -> list[list[Product]]:
        """Those of each block, and last the head's."""
        if (rows, is_step) not in self.products:
            linears = [[b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj] for b in self.blocks]
            self.products[rows, is_step] = [[product_of(linear, rows, is_step) for linear in each] for each in linears]
        return self.products[rows, is_step]

    def head_for(self, rows: int, is_step: bool) -> Product:
        if (rows, is_step) not in self.heads:
            self.heads[rows, is_step] = product_of(self.lm_head, rows, is_step)
        return self.heads[rows, is_step]

    def mask(self, attention_mask: Tensor | None, new: int, past: int) -> Tensor | None:
        """Of shape (B or 1, 1, T, S); None where each token sees all tokens up to itself."""
        is_padded = attention_mask is not None and not attention_mask.all()
        if not is_padded and (new == 1 or past == 0):
            return None
        seen = torch.ones(new, past + new, dtype=torch.bool).tril(past)[None, None]
        if is_padded:
            seen = seen & (attention_mask[:, None, None] != 0) | seen.triu(past)  # padding sees itself
        return seen

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: GrowingCache, last: int
    ) -> Tensor:
        """Logits (B, last, V) of the T given tokens, whose keys and values are added to the cache."""
        B, T = input_ids.shape
        mask = self.mask(attention_mask, T, cache.get_seq_length())
        x = F.embedding(input_ids, self.wte).to(self.dtype) + F.embedding(position_ids, self.wpe).to(self.dtype)
        x = x.view(B * T, -1)  # (B T, C)
        for layer, (ln_1, ln_2), (c_attn, attn_proj, c_fc, mlp_proj) in zip(
            cache.layers, self.norms, self.products_for(B * T, T == 1), strict=True
        ):
            query, key, value = c_attn(ln_1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
            key, value = layer.update(key, value)  # (B, nh, S, hs)
            y = F.scaled_dot_product_attention(query, key, value, mask, 0.0, T > 1 and mask is None)
            x = x + attn_proj(y.transpose(1, 2).reshape(B * T, -1))
            x = x + mlp_proj(F.gelu(c_fc(ln_2(x)), approximate=self.gelu))
        x = x.view(B, T, -1)[:, T - last :].reshape(B * last, -1)
        return self.head_for(B * last, T == 1)(self.ln_f(x)).view(B, last, -1)


def is_plain(model: PreTrainedModel) -> bool:
    """Whether the lean step computes what the modules would: classes it knows, on the CPU, untampered."""
    config = model.config
    if os.environ.get("CUSTOM_GPT_PLAIN_DECODE") or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if config._attn_implementation != "sdpa" or config.activation_function not in GELU:
        return False
    if torch.is_autocast_enabled("cpu") or nn.modules.module._has_any_global_hook():
        return False
    eps, scaling = config.layer_norm_epsilon, (config.n_embd // config.n_head) ** -0.5
    known = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList, type(ACT2FN[config.activation_function]))
    return all(
        not module.training
        and module.__dict__.get("eps", eps) == eps
        and module.__dict__.get("scaling", scaling) == scaling
        and (type(module) in known or type(module).__module__ == type(model).__module__)
        and not REPLACED & module.__dict__.keys()
        and not (module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl or module._buffers)
        and all(
            parameter is None
            or (
                name in ("weight", "bias")
                and type(parameter) is nn.Parameter
                and parameter.device.type == "cpu"
                and parameter.dtype == model.dtype
            )
            for name, parameter in module._parameters.items()
        )
        for module in model.modules()
    )


REPLACED = {"forward", "prepare_inputs_for_generation"}

__all__ = ["GrowingCache", "can_grow", "settle"]
