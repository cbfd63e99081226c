"""CustomGPT, a GPT-2 style decoder in the nanoGPT tradition, as a transformers model.

The names of the modules are the checkpoint's own, so its state dict loads as it is. On a CPU, `generate` computes the
same forward pass by `LeanStep` in decoding_custom_gpt.py: who changes one changes the other. Shapes in the comments:
B batch, T tokens given, S tokens seen (cached and given), C = n_embd, nh = n_head, hs = C / n_head, V = vocab_size.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from transformers import GenerationConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation.utils import GenerateOutput
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, sdpa_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_custom_gpt import CustomGPTConfig
from .decoding_custom_gpt import GELU, GrowingCache, LeanStep, can_grow, settle


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, nh, T, S)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value)  # (B, nh, T, hs)
    return output.transpose(1, 2).contiguous(), weights  # (B, T, nh, hs)


class CustomGPTAttention(nn.Module):
    def __init__(self, config: CustomGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.width = config.n_embd
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.dropout
        self.is_causal = True
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.writes_to_residual = True
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, C)
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, _ = hidden_states.shape
        query, key, value = (
            states.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, nh, T, hs)
            for states in self.c_attn(hidden_states).split((self.width, self.width, self.width), dim=-1)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, nh, S, hs)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (B, T, nh, hs)
        return self.resid_dropout(self.c_proj(output.reshape(B, T, -1))), weights


class CustomGPTMLP(nn.Module):
    def __init__(self, config: CustomGPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = ACT2FN[config.activation_function]
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.writes_to_residual = True
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class CustomGPTBlock(GradientCheckpointingLayer):
    def __init__(self, config: CustomGPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.attn = CustomGPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.mlp = CustomGPTMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attention_output, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class CustomGPTPreTrainedModel(PreTrainedModel):
    config: CustomGPTConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    _no_split_modules = ["CustomGPTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CustomGPTBlock, "attentions": CustomGPTAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Two projections of each layer write to the residual stream: scaled as in the GPT-2 paper. They carry a mark,
        # since the library does not call this for a module of custom code without parameters of its own.
        if getattr(module, "writes_to_residual", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)


class CustomGPTPositionEmbedding(nn.Embedding):
    """Adds to its first input, so that a pipeline stage which starts later can have an identity in its place."""

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return inputs_embeds + super().forward(position_ids)  # (B, T, C)


class CustomGPTModel(CustomGPTPreTrainedModel):
    """The decoder without a head: token ids to the hidden states after the last LayerNorm."""

    def __init__(self, config: CustomGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = CustomGPTPositionEmbedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([CustomGPTBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Token ids. Exactly one of `input_ids` and `inputs_embeds` must be given.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
                1 for tokens, 0 for padding, over the cached and the given tokens; or a mask of shape `(B, 1, T, S)`
                that is used as it is.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Positions in [0, block_size). By default they count the tokens that `attention_mask` leaves, so that
                a left-padded row gets the positions that it has alone.
            past_key_values (`Cache`, *optional*):
                The keys and values of the tokens before; filled in place.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, C)`, *optional*):
                Token embeddings to use instead of `wte(input_ids)`.
            use_cache (`bool`, *optional*):
                Whether to return `past_key_values`, a new `DynamicCache` where none is given.

        Returns:
            `BaseModelOutputWithPast` with `last_hidden_state` of shape `(B, T, C)`.

        Raises:
            `ValueError`: both or neither of `input_ids` and `inputs_embeds`, or a position past `block_size`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # (B, T, C)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is None:
            position_ids = self._position_ids(inputs_embeds, attention_mask, past_key_values)
        elif (
            position_ids.device.type == "cpu"  # elsewhere, to look at a value is to wait for the device
            and not torch.compiler.is_compiling()
            and (last := int(position_ids.max())) >= self.config.block_size
        ):
            raise ValueError(f"Position {last} is past the {self.config.block_size} learned positions (block_size).")
        hidden_states = self.drop(self.wpe(inputs_embeds, position_ids))  # (B, T, C)

        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values)

    def _position_ids(
        self, inputs: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Positions of the T given tokens, of shape (1, T), or (B, T) where a mask of shape (B, S) tells of padding."""
        T, device = inputs.shape[1], inputs.device  # ids or embeddings
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        # The length of a static cache is a tensor, which a compiler cannot ask.
        known = isinstance(past, int) or not torch.compiler.is_compiling()
        if known and past + T > self.config.block_size:
            raise ValueError(
                f"{past + T} tokens are more than the context of {self.config.block_size} (block_size): its positions "
                "are learned. Give a shorter input, or use `generate`, which goes on with the last block_size tokens."
            )
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        return torch.arange(T, device=device).unsqueeze(0) + past


def positions_kept(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Of (B, T, C): the last positions, or those that a tensor names, for all rows or for each, or as a mask (B, T)."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


class CustomGPTForCausalLM(CustomGPTPreTrainedModel, GenerationMixin):
    """The decoder with its language modelling head, `lm_head`: a Linear without a bias, tied or not."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CustomGPTConfig):
        super().__init__(config)
        self.transformer = CustomGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Token ids, usually `input_ids` themselves: the loss shifts them by one. -100 is ignored (the original
                trainer's -1 is not known here).
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                How many of the last positions get logits; 0 means all. Or the positions, as a tensor.

            The others are those of [`CustomGPTModel`].

        Returns:
            `CausalLMOutputWithPast` with `logits` of shape `(B, T, V)` and, with `labels`, a scalar `loss` in nats.
        """
        if isinstance(past_key_values, GrowingCache) and inputs_embeds is None and labels is None and use_cache:
            if position_ids is None and input_ids is not None:
                position_ids = self.transformer._position_ids(input_ids, attention_mask, past_key_values)
            logits = past_key_values.logits(input_ids, attention_mask, position_ids, logits_to_keep, **kwargs)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(positions_kept(outputs.last_hidden_state, logits_to_keep))  # (B, T, V)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """`generate` makes its cache here, or takes the one that it was given."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if can_grow(cache := model_kwargs.get("past_key_values")):
            step = LeanStep(self) if is_plain(self) else None
            model_kwargs["past_key_values"] = GrowingCache(cache, self.config.n_layer, step)

    def _prepare_static_cache(self, *args: Any, max_cache_len: int, **kwargs: Any) -> Cache:
        """No longer than the context: past it there is no cache, see `prepare_inputs_for_generation`."""
        return super()._prepare_static_cache(*args, max_cache_len=min(max_cache_len, self.config.block_size), **kwargs)

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> GenerateOutput | torch.LongTensor:
        output = None
        try:
            output = super().generate(*args, **kwargs)
            return output
        finally:
            for cache in (kwargs.get("past_key_values"), getattr(output, "past_key_values", None)):
                settle(cache, self.dtype)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in the library up to `block_size` tokens; from there on the model sees the last `block_size` of them.

        The learned positions start again from 0 in that window, which changes every key and value at every step: no
        cache can serve, so each token past the context costs a forward pass over the window, as in the original.
        """
        if (
            isinstance(past_key_values, GrowingCache)
            and past_key_values.step is not None
            and next_sequence_length == 1
            and input_ids.shape[1] <= self.config.block_size
            and inputs_embeds is None
            and kwargs.keys() == {"position_ids", "use_cache", "logits_to_keep"}
        ):  # one more token, and nothing that the library would have to look at
            kwargs["position_ids"] = kwargs["position_ids"][:, -1:]
            inputs = {"past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}
            return {"input_ids": input_ids[:, -1:], **inputs}
        # The prompt may be given as embeddings, with its ids or without; the tokens generated since are ids only.
        generated = input_ids
        if inputs_embeds is not None and kwargs.get("position_ids") is not None:
            generated = input_ids[:, input_ids.shape[1] + inputs_embeds.shape[1] - kwargs["position_ids"].shape[-1] :]
        total = generated.shape[1] + (inputs_embeds.shape[1] if inputs_embeds is not None else 0)
        window = self.config.block_size
        if total > window:
            if next_sequence_length is not None and next_sequence_length > 1 and not kwargs.get("is_first_iteration"):
                raise ValueError(
                    f"Assisted generation ends with the context of {window} tokens (block_size): past it, each new "
                    "token needs a forward pass of its own. Lower max_new_tokens or generate without an assistant."
                )
            if inputs_embeds is not None:
                inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(generated)], dim=1)[:, -window:]
                kwargs["is_first_iteration"] = True  # the library takes embeddings only then
            input_ids = input_ids[:, -window:]
            attention_mask = attention_mask[:, -window:] if attention_mask is not None else None
            next_sequence_length, kwargs["position_ids"] = None, None
            if isinstance(past_key_values, GrowingCache):
                past_key_values.reset()  # the window fills it again
            else:
                past_key_values, kwargs["use_cache"] = None, False
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


def is_plain(model: PreTrainedModel) -> bool:
    """Whether the lean step computes what the modules would: classes it knows, on the CPU, untampered."""
    config, activation = model.config, model.config.activation_function
    ordinary = (nn.Parameter, model.dtype, "cpu", torch.strided)
    unusual = [
        os.environ.get("CUSTOM_GPT_PLAIN_DECODE") or activation not in GELU,
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"),
        nn.modules.module._has_any_global_hook(),
        ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation) is not sdpa_attention_forward,
        ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation) is not sdpa_mask,
        config.output_attentions or config.output_hidden_states or not getattr(config, "is_causal", True),
        [m.layer_idx for m in model.modules() if "layer_idx" in vars(m)] != list(range(config.n_layer)),
        {(type(p), p.dtype, p.device.type, p.layout) for p in model.parameters()} != {ordinary},
    ]
    head_dim, gelu = config.n_embd // config.n_head, ACT2FN[activation]
    as_made = {"eps": config.layer_norm_epsilon, "scaling": head_dim**-0.5, "head_dim": head_dim, "max_norm": None}
    as_made |= {"is_causal": True, "act": getattr(gelu, "act", None)}
    known = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList, type(gelu))
    homes = ("torch", "transformers", type(model).__module__.partition(".")[0])  # of a class's forward
    return not any(unusual) and all(
        not module.training
        and (type(module) in known or type(module).__module__ == type(model).__module__)
        and all(repr(module.__dict__.get(name, value)) == repr(value) for name, value in as_made.items())
        and not {"forward", "prepare_inputs_for_generation"} & module.__dict__.keys()
        and getattr(type(module).forward, "__globals__", {}).get("__name__", "").partition(".")[0] in homes
        and not (module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl or module._buffers)
        and module._parameters.keys() <= {"weight", "bias"}
        for module in model.modules()
    )


# The two heads below take the library's forward, but not its `__init__`: that makes the decoder by `AutoModel`, which
# does not know it where this file is loaded as a folder's custom code.


class CustomGPTForSequenceClassification(GenericForSequenceClassification, CustomGPTPreTrainedModel):
    """The decoder with a label head, `score`, on the last token that is not `[PAD]`."""

    base_model_prefix = "transformer"

    def __init__(self, config: CustomGPTConfig):
        CustomGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = CustomGPTModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()


class CustomGPTForTokenClassification(GenericForTokenClassification, CustomGPTPreTrainedModel):
    """The decoder with a label head, `score`, on every token."""

    base_model_prefix = "transformer"

    def __init__(self, config: CustomGPTConfig):
        CustomGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = CustomGPTModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.n_embd, config.num_labels)
        self.post_init()


__all__ = [
    "CustomGPTForCausalLM",
    "CustomGPTForSequenceClassification",
    "CustomGPTForTokenClassification",
    "CustomGPTModel",
    "CustomGPTPreTrainedModel",
]
