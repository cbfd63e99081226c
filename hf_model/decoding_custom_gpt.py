"""What makes `generate` fast: a cache with room to grow and, on a CPU, a lean step that the cache carries.

`generate` hands a `GrowingCache` to every forward, so that no step copies the keys and values of those before. For a
model with nothing unusual about it (`is_plain`, beside it) it holds a `LeanStep`, the same computation by fewer
operators, made once for each `generate`: between two the weights may be exchanged, but a change within one may go
unseen to its end. CUSTOM_GPT_PLAIN_DECODE=1 is to do without the step.

Which library multiplies was measured, on two cores of an AMD EPYC and of an Intel Xeon:

| weights        | one row                     | a batch of steps, a window | other rows              |
|----------------|-----------------------------|----------------------------|-------------------------|
| float32        | MKL, a part for each thread | oneDNN                     | MKL, up to 256 in parts |
| float32, Intel | MKL, to 3 rows or if SMALL  | oneDNN                     | MKL                     |
| half precision | FBGEMM                      | FBGEMM                     | FBGEMM                  |
| PyTorch's own: other dtypes, no AVX; bfloat16 from 8 rows on where the processor has instructions for it |

oneDNN keeps about a megabyte for each number of rows that it has met, so it gets those that come again and again. It
and the parts add up in another order than the plain model: logits differ by rounding, in float32 by some 1e-6 of their
spread. FBGEMM reads a packed float16 copy and computes in float32, as does all that stands between the products.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

HALF = (torch.float16, torch.bfloat16)
GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}
SMALL = 2**20  # weights; a matrix of fewer is MKL's on Intel's processors
PACKED: WeakKeyDictionary[nn.Linear, tuple[Tensor, Any]] = WeakKeyDictionary()  # sums of a weight, FBGEMM's copy of it
Product = Callable[[Tensor], Tensor]  # (rows, in) -> (rows, out)


class GrowingLayer(DynamicLayer):
    """A layer whose keys and values are the beginning of a larger tensor: new ones are written behind them."""

    room: Tensor | None = None  # keys and values (2, B, nh, more than S, hs); the next token makes it where it is None

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # there, nothing may be written over
            return tuple(states.to(key_states.dtype) for states in super().update(key_states, value_states))
        return self.add(torch.stack((key_states, value_states)))

    def add(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values (B, nh, S, hs), the new ones of T tokens (2, B, nh, T, hs) behind the others."""
        if not self.is_initialized:
            self.lazy_initialization(*states)
        new, past = states.shape[3], self.get_seq_length()
        if not self.has_room(states.dtype, past + new):
            # In the wider of two dtypes: the lean step's keys are in float32 where a model's are not.
            old = torch.stack((self.keys, self.values)) if past else states[:, :, :, :0]
            spare = states.new_empty(*states.shape[:3], (past + new) // 4 + 32, states.shape[4])
            self.room = torch.cat((old, states, spare), dim=3)
        self.room.narrow(3, past, new).copy_(states)
        self.keys, self.values = self.room.narrow(3, 0, past + new).unbind()
        return self.keys.to(states.dtype), self.values.to(states.dtype)

    def has_room(self, dtype: torch.dtype, total: int) -> bool:
        """Whether keys and values are still the beginning of the room, and there is room for new ones behind them."""
        room = self.room
        if room is None or room.shape[3] < total or room.dtype != torch.promote_types(room.dtype, dtype):
            return False
        writable = room.is_inference() == torch.is_inference_mode_enabled()
        # `crop` leaves the states where they are. All other changes make new tensors of them.
        starts = self.keys.data_ptr() == room[0].data_ptr() and self.values.data_ptr() == room[1].data_ptr()
        return writable and starts and (len(self.keys), self.keys.stride()) == (room.shape[1], room.stride()[1:])

    def __getstate__(self) -> dict[str, object]:
        """For copies: with a room in common, one would write over the other's tokens."""
        own = {name: getattr(self, name).clone() for name in ("keys", "values") if self.is_initialized}
        return self.__dict__ | {"room": None} | own


class GrowingCache(DynamicCache):
    """Stands for a `DynamicCache` within `generate`, and has its list of layers: who gave that one finds it filled."""

    def __init__(self, cache: DynamicCache, n_layer: int, step: "LeanStep | None"):
        self.__dict__ |= cache.__dict__
        self.layers += [DynamicLayer() for _ in range(n_layer - len(self.layers))]
        for layer in self.layers:
            layer.__class__ = GrowingLayer
        self.step = step

    def logits(self, ids: Tensor | None, mask: Tensor | None, positions: Tensor, keep: Any, **others: Any) -> Any:
        """What the model's forward gives, by the lean step; None if it is not for that."""
        if self.step is None or ids is None or not ids.is_cpu or torch.is_grad_enabled():
            return None
        if type(keep) is not int or any(value is not None and value is not False for value in others.values()):
            return None  # something that only the plain model does
        (B, T), past = ids.shape, self.get_seq_length()
        if positions.max() >= self.step.block_size or (mask is not None and mask.shape != (B, past + T)):
            return None  # the plain model takes it, or says what is wrong
        with torch.inference_mode():  # a little less to do for each operator
            logits = self.step(ids, mask, positions, self, min(keep or T, T))
        return logits.clone()  # which can be written to outside

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"step": None}


def can_grow(cache: object) -> TypeGuard[DynamicCache]:
    """Whether this is the library's ordinary cache, not one of the other kinds, which somebody has chosen."""
    return type(cache) is DynamicCache and not cache.offloading and {*map(type, cache.layers)} <= {DynamicLayer}


def settle(cache: object, dtype: torch.dtype) -> None:
    """At the end of `generate`: the library's own cache again, in the model's dtype if that is half precision."""
    if type(cache) is GrowingCache:
        cache.__dict__.pop("step")
        cache.__class__ = DynamicCache
    for layer in cache.layers if isinstance(cache, DynamicCache) else ():
        if type(layer) is GrowingLayer:
            if layer.is_initialized:
                kept = dtype if dtype in HALF else layer.keys.dtype
                layer.keys, layer.values = (x.to(kept, copy=x.is_inference()) for x in (layer.keys, layer.values))
            layer.__dict__.pop("room", None)
            layer.__class__ = DynamicLayer


def product(layer: nn.Linear, matrix: Any, rows: int, regular: bool) -> Product:
    """The product with a layer's weight (out, in), by the table above; `matrix` is FBGEMM's copy of it, if any."""
    weight, bias = layer.weight, layer.bias
    processor: dict = getattr(torch.cpu, "get_capabilities", dict)()  # an older PyTorch does not tell
    has_mkl = torch.backends.mkl.is_available()
    has_onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    if weight.dtype in HALF:
        if matrix is None or (weight.dtype == torch.bfloat16 and rows >= 8 and processor.get("avx512_bf16", False)):
            return lambda x: F.linear(x.to(weight.dtype), weight, bias).float()
        multiply = torch.ops.quantized.linear_dynamic_fp16
        return lambda x: multiply(x, matrix) if bias is None else multiply(x, matrix) + bias
    if weight.dtype == torch.float32 and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        is_intel = "Intel" in processor.get("cpu_name", "")
        divides = weight.is_contiguous() and len(weight) % torch.get_num_threads() == 0
        if has_mkl and not is_intel and divides and (rows == 1 or (rows <= 256 and not regular)):
            return in_parts(weight, bias)
        if has_onednn and regular and not (has_mkl and is_intel and (rows <= 3 or weight.numel() < SMALL)):
            return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def packed(layers: list[nn.Linear]) -> dict[nn.Linear, Any]:
    """FBGEMM's copies, each kept while its layer lives and each row of its weight has the same sum, by random factors.

    To pack takes 1 s for 110M weights, to add them up 40 ms. None stands for what float16 does not hold.
    """
    weights = {layer: layer.weight.detach() for layer in layers}
    engine, processor = torch.backends.quantized.engine, torch.backends.cpu.get_cpu_capability()
    fbgemm = getattr(torch.ops.quantized, "linear_prepack_fp16", None) if engine in ("x86", "fbgemm") else None
    fours = all(w.is_contiguous() and w.shape[1] % 4 == w.storage_offset() % 4 == 0 for w in weights.values())
    if fbgemm is None or not fours or not processor.startswith("AVX") or layers[0].weight.dtype not in HALF:
        return {layer: PACKED.pop(layer, None) and None for layer in layers}

    def pack(layer: nn.Linear) -> None:
        wide = weights[layer].float()
        error = (wide - wide.half().float()).abs()
        fits = all((error.amax(dim) <= wide.abs().amax(dim) * 2**-11).all() for dim in (0, 1))
        PACKED[layer] = sums[layer], fbgemm(wide, None) if fits else None

    generator, width = torch.Generator().manual_seed(0), max(w.shape[1] for w in weights.values()) // 4
    factors = torch.randint(-(2**63), 2**63 - 1, (width,), generator=generator, device="cpu")
    sums = {layer: w.view(torch.int64) @ factors[: w.shape[1] // 4] for layer, w in weights.items()}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # FBGEMM packs on one thread
        list(pool.map(pack, [x for x in layers if x not in PACKED or not torch.equal(PACKED[x][0], sums[x])]))
    return {layer: PACKED[layer][1] for layer in layers}


def in_parts(weight: Tensor, bias: Tensor | None) -> Product:
    """MKL by itself multiplies a matrix and a single row on one thread."""
    n, (n_out, n_in) = torch.get_num_threads(), weight.shape
    parts = weight.view(n, n_out // n, n_in).transpose(1, 2)

    def multiply(x: Tensor) -> Tensor:
        y = torch.bmm(x.expand(n, *x.shape), parts).transpose(0, 1).reshape(-1, n_out)
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
        self.packed = packed([self.head, *(layer for linears in self.linears for layer in linears)])
        self.known: dict[tuple[int, int, bool], tuple[list[list[Product]], Product]] = {}

    def norm(self, layer: nn.LayerNorm) -> Product:
        weight, bias = (None if p is None else p.to(self.dtype) for p in (layer.weight, layer.bias))
        return lambda x: torch.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)

    def products(self, rows: int, last: int, regular: bool) -> tuple[list[list[Product]], Product]:
        """Of the layers, for so many rows, and of the head for its own."""
        if (key := (rows, last, regular)) not in self.known:
            blocks = [[product(x, self.packed.get(x), rows, regular) for x in linears] for linears in self.linears]
            self.known[key] = blocks, product(self.head, self.packed.get(self.head), last, regular)
        return self.known[key]

    def __call__(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: GrowingCache, last: int) -> Tensor:
        """Logits (B, last, V) of the T given tokens, whose keys and values are added to the cache."""
        (B, T), past = ids.shape, cache.get_seq_length()
        blocks, head = self.products(B * T, B * last, regular=T in (1, self.block_size))
        seen = visible(mask, T, past)
        x = F.embedding(ids, self.wte).to(self.dtype) + F.embedding(positions, self.wpe).to(self.dtype)
        x = x.view(B * T, -1)  # (B T, C)
        for layer, (c_attn, c_proj, c_fc, mlp_proj), (ln_1, ln_2) in zip(cache.layers, blocks, self.norms, strict=True):
            qkv = c_attn(ln_1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
            key, value = layer.add(qkv[1:])  # (B, nh, S, hs)
            y = F.scaled_dot_product_attention(qkv[0], key, value, seen, 0.0, T > 1 and seen is None)
            x = x + c_proj(y.transpose(1, 2).reshape(B * T, -1))
            x = x + mlp_proj(F.gelu(c_fc(ln_2(x)), approximate=self.gelu))
        x = x.view(B, T, -1)[:, T - last :].reshape(B * last, -1)
        return head(self.ln_f(x)).view(B, last, -1)


def visible(attention_mask: Tensor | None, new: int, past: int) -> Tensor | None:
    """Which tokens each new one sees (B or 1, 1, T, S); None where it sees all up to itself."""
    padding = None if attention_mask is None or attention_mask.all() else attention_mask[:, None, None] == 0
    if padding is None and (new == 1 or past == 0):
        return None
    seen = torch.ones(1, 1, new, past + new, dtype=torch.bool, device="cpu").tril(past)
    return seen if padding is None else seen & ~padding
