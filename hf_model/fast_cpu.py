"""A model in a form made for decoding on a CPU. benchmarks/README.md shows what each part of it adds."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_model.folder import same_weights
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM

HALF = (torch.float16, torch.bfloat16)
HAS_AVX = torch.backends.cpu.get_cpu_capability().startswith("AVX")
HAS_ONEDNN = HAS_AVX and torch.backends.mkldnn.is_available()
PROCESSOR: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of PyTorch lack it
IS_INTEL = "Intel" in PROCESSOR.get("cpu_name", "")
ASKED = ("input_ids", "attention_mask", "past_key_values", "position_ids", "use_cache", "logits_to_keep", "return_dict")


def fast_on_cpu(model: CustomGPTForCausalLM) -> CustomGPTForCausalLM:
    """Give the model a form that decodes faster on a CPU, through the stock `generate`: a `FastCustomGPT`.

    Both models share the weights. Half-precision weights are also packed into a copy: if you change them, call this
    again (training drops the copy). The fast form runs no hooks, patched modules or adapters: put those on the plain
    model. The model itself is returned if it is in training, quantised or post-norm, or has weights not on the CPU or
    of another dtype than float32, float16 and bfloat16.
    """
    kinds = {(weight.device.type, weight.dtype) for weight in model.parameters()}
    is_usual = type(model) in (CustomGPTForCausalLM, FastCustomGPT) and model.config.norm_first  # a step is pre-norm
    is_usual = is_usual and not getattr(model.config, "quantization_config", None)
    if not is_usual or model.training or kinds not in [{("cpu", dtype)} for dtype in (torch.float32, *HALF)]:
        return model
    fast = same_weights(FastCustomGPT, model)
    if model.dtype in HALF and HAS_AVX and torch.backends.quantized.engine in ("x86", "fbgemm"):
        linears = [module for module in fast.modules() if isinstance(module, nn.Linear)]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # FBGEMM packs on one thread
            fast.packed = dict(zip(linears, pool.map(pack, linears), strict=True))
    return fast


def pack(layer: nn.Linear) -> Any:  # FBGEMM's copy of the weight; None if float16 cannot hold it
    wide = layer.weight.detach().float()
    error = (wide - wide.half().float()).abs()
    is_held = all((error.amax(dim) <= wide.abs().amax(dim) * 2**-11).all() for dim in (0, 1))
    return torch.ops.quantized.linear_prepack_fp16(wide, None) if is_held else None


def product(layer: nn.Linear, packed: Any) -> Any:
    """A function that computes the layer, (B, T, in) to (B, T, out), with the library that is fastest for it."""
    weight, bias, n = layer.weight, layer.bias, torch.get_num_threads()
    # Except on Intel's processors, MKL multiplies a single row on one thread. So each thread gets a part of the weight.
    is_cut = HAS_AVX and not IS_INTEL and weight.is_contiguous() and len(weight) % n == 0
    parts = weight.view(n, -1, layer.in_features).transpose(1, 2) if is_cut else None
    # oneDNN is faster for batches. But it keeps memory for each number of rows that it sees, so it gets no prompts.
    has_bf16 = weight.dtype == torch.bfloat16 and PROCESSOR.get("avx512_bf16", False)
    has_onednn = HAS_ONEDNN and weight.dtype == torch.float32 and not (IS_INTEL and weight.numel() < 2**20)

    def multiply(x: Tensor) -> Tensor:
        rows, T = x.shape[:2].numel(), x.shape[1]
        if packed is not None and weight.dtype in HALF and not (has_bf16 and rows >= 8):
            y = torch.ops.quantized.linear_dynamic_fp16(x, packed)
        elif rows == 1 and parts is not None and x.dtype == weight.dtype:
            y = torch.bmm(x.expand(n, 1, -1), parts).view(1, 1, -1)
        elif T == 1 and has_onednn and (rows > 3 or not IS_INTEL):
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        else:
            return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
        return y if bias is None else y + bias

    return multiply


def step_of(model: "FastCustomGPT") -> Any:
    """A forward pass with few calls: adds (B, T) tokens to a cache; logits (B, keep, V), in float32 or float64."""
    decoder, n_head, dtype = model.transformer, model.config.n_head, torch.promote_types(model.dtype, torch.float32)

    def fast(layer: nn.Module) -> Any:
        if isinstance(layer, nn.LayerNorm):
            weight, bias = (None if p is None else p.to(dtype) for p in (layer.weight, layer.bias))
            return lambda x: torch.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
        return product(layer, model.packed.get(layer)) if isinstance(layer, nn.Linear) else layer

    scale = model.config.attention_scale
    layers = [(h.ln_1, h.attn.c_attn, h.attn.c_proj, h.ln_2, h.mlp.c_fc, h.mlp.act, h.mlp.c_proj) for h in decoder.h]
    blocks, ln_f, head = [list(map(fast, block)) for block in layers], fast(decoder.ln_f), fast(model.lm_head)

    def step(ids: Tensor, mask: Tensor | None, positions: Tensor, cache: FastCache, keep: int) -> Tensor:
        (B, T), past = ids.shape, cache.get_seq_length()
        seen = None if mask is None or mask.all() else mask[:, None, None] != 0  # (B, 1, 1 or T, S), None for all
        is_causal = T > 1 and not past and seen is None  # the kernel's own mask
        if T > 1 and not is_causal:
            seen = torch.ones(T, past + T, dtype=torch.bool).tril(past) & (True if seen is None else seen)
        x = F.embedding(ids, decoder.wte.weight).to(dtype) + F.embedding(positions, decoder.wpe.weight).to(dtype)
        for layer, (ln_1, c_attn, c_proj, ln_2, c_fc, act, mlp_proj) in zip(cache.layers, blocks, strict=True):
            qkv = c_attn(ln_1(x)).view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
            kv = layer.add(qkv[1:])
            y = F.scaled_dot_product_attention(qkv[0], *kv, attn_mask=seen, is_causal=is_causal, scale=scale)
            x = x + c_proj(y.transpose(1, 2).reshape(B, T, -1))
            x = x + mlp_proj(act(c_fc(ln_2(x))))
        return head(ln_f(x[:, -keep:]))

    return step


class RoomyLayer(DynamicLayer):
    """Keys and values at the start of a larger tensor: a step writes behind them and copies nothing."""

    room: Tensor | None = None  # (2, B, nh, S or more, hs)
    written: Tensor | None = None  # the keys as `add` left them; other keys mean that somebody changed the cache

    def add(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (2, B, nh, T, hs) behind the others; return all of them, each (B, nh, S, hs)."""
        past, new = self.get_seq_length(), states.shape[3]
        if self.room is None or self.keys is not self.written or self.room.shape[3] < past + new:
            spare = states.new_empty(*states.shape[:3], (past + new) // 4 + 32, states.shape[4])
            old = torch.stack((self.keys, self.values)) if past else states[:, :, :, :0]
            self.room = torch.cat((old, states, spare), dim=3)
        self.room.narrow(3, past, new).copy_(states)
        self.keys, self.values = self.room.narrow(3, 0, past + new).unbind()
        self.written, self.is_initialized = self.keys, True
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)  # in float32 after a fast step in half precision
        return keys.to(key_states.dtype), values.to(key_states.dtype)


class FastCache(DynamicCache):
    """The cache that a `FastCustomGPT` makes in `generate`, with the step that fills it."""

    def __init__(self, model: "FastCustomGPT", layers: list[Any] | None = None):
        Cache.__init__(self, layers=layers or [RoomyLayer() for _ in model.transformer.h])
        self.model, self.step = model, step_of(model)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None, "step": None}  # so a copy of the cache does not copy the model


class FastCustomGPT(CustomGPTForCausalLM):
    """The plain model, except that `generate` makes a `FastCache` and fills it with the fast step."""

    packed: dict[nn.Linear, Any] = {}  # FBGEMM's copies of weights in half precision

    def plain(self) -> CustomGPTForCausalLM:
        """The same weights as a plain model: to train, compile or export it, or to put hooks or adapters on it."""
        return same_weights(CustomGPTForCausalLM, self)

    def train(self, mode: bool = True) -> "FastCustomGPT":
        self.packed = {} if mode else self.packed  # training changes the weights
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        self.plain().save_pretrained(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any) -> None:
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        made = model_kwargs.get("past_key_values")
        if isinstance(given, FastCache) or (given is None and type(made) is DynamicCache and not made.offloading):
            model_kwargs["past_key_values"] = FastCache(self, None if given is None else given.layers)

    @functools.wraps(CustomGPTForCausalLM.prepare_inputs_for_generation)  # `generate` reads the names of its arguments
    def prepare_inputs_for_generation(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, past_key_values=past_key_values, **kwargs)
        if isinstance(past_key_values, FastCache) and not inputs.keys() & {"past_key_values", "inputs_embeds"}:
            past_key_values.reset()  # past the context: fill it anew with the last tokens
            positions = self.transformer._position_ids(inputs["input_ids"], inputs.get("attention_mask"), None)
            inputs |= {"past_key_values": past_key_values, "position_ids": positions, "use_cache": True}
        return inputs

    @functools.wraps(CustomGPTForCausalLM.forward)
    def forward(self, *args: Any, **inputs: Any) -> Any:
        ids, mask, cache, positions = (inputs.get(name) for name in ASKED[:4])
        keep, more = inputs.get("logits_to_keep", 0), [*args, *(x for name, x in inputs.items() if name not in ASKED)]
        if (
            not (isinstance(cache, FastCache) and cache.model is self and isinstance(ids, Tensor) and ids.is_cpu)
            or (inputs.get("return_dict") is not True or any(x is not None and x is not False for x in more))
            or (not isinstance(keep, int) or positions is None or positions.max() >= self.config.block_size)
            or (mask is not None and mask.shape != (len(ids), cache.get_seq_length() + ids.shape[1]))
            or (self.training or self.config.output_attentions or self.config.output_hidden_states)
            or (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        ):
            return super().forward(*args, **inputs)
        with torch.inference_mode():
            logits = cache.step(ids, mask, positions, cache, keep)
        return CausalLMOutputWithPast(logits=logits.clone(), past_key_values=cache)
