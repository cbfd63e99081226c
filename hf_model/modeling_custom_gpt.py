"""CustomGPT, a GPT-2 style decoder in the nanoGPT tradition, as a transformers model.

The modules have the names of the trainer's checkpoint, so its state dict loads unchanged. Shapes in the comments:
B batch, T given tokens, S seen tokens (cached and given), C = n_embd, nh = n_head, hs = C / n_head, V = vocab_size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask
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
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights  # (B, T, nh, hs), (B, nh, T, S)


class CustomGPTAttention(nn.Module):
    def __init__(self, config: CustomGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
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
        B, T, C = hidden_states.shape
        query, key, value = (
            states.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, nh, T, hs)
            for states in self.c_attn(hidden_states).split((C, C, C), dim=-1)  # vLLM looks for three sizes here
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
            dropout=self.config.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (B, T, nh, hs)
        return self.resid_dropout(self.c_proj(output.reshape(B, T, -1))), weights


class CustomGPTMLP(nn.Module):
    def __init__(self, config: CustomGPTConfig):
        super().__init__()
        width = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.act = ACT2FN[config.activation_function]
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
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
        self.norm_first = config.norm_first

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        if not self.norm_first:  # as in the first Transformer: the norm of each sum
            attention_output, _ = self.attn(hidden_states, **kwargs)
            hidden_states = self.ln_1(hidden_states + attention_output)
            return self.ln_2(hidden_states + self.mlp(hidden_states))
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
        # The two projections of a layer that write to the residual stream are scaled as in the GPT-2 paper. The
        # library calls this for modules with parameters only, so the projections are marked, not their parents.
        if getattr(module, "writes_to_residual", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)


class CustomGPTPositionEmbedding(nn.Embedding):
    """Adds to its first input, so that a later pipeline stage can have an identity in its place."""

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
        self.ln_f: nn.Module = nn.Identity()
        if config.final_norm:
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
        """The hidden states of the given tokens.

        Args:
            input_ids: token ids (B, T). Give exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: (B, S), 1 for tokens and 0 for padding, over the cached and the given tokens; or a mask
                (B, 1, T, S) to use as it is.
            position_ids: (B, T), in [0, block_size). The default counts the tokens that `attention_mask` shows, so a
                left-padded row gets the positions that it has alone.
            past_key_values: keys and values of the tokens before; extended in place.
            inputs_embeds: token embeddings (B, T, C) in place of `wte(input_ids)`.
            use_cache: whether to return `past_key_values`, a new `DynamicCache` if none is given.

        Returns:
            `last_hidden_state` of shape (B, T, C).

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or a position past `block_size`.
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
            position_ids.device.type == "cpu"  # on a GPU, reading a value would wait for the device
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
        """Positions of the T given tokens: (B, T) if a mask (B, S) shows the padding, otherwise (1, T)."""
        T, device = inputs.shape[1], inputs.device  # ids or embeddings
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        # The length of a static cache is a tensor. Compiled code cannot branch on its value.
        known = isinstance(past, int) or not torch.compiler.is_compiling()
        if known and past + T > self.config.block_size:
            raise ValueError(
                f"{past + T} tokens are more than the context of {self.config.block_size} (block_size): its positions "
                "are learned. Give a shorter input, or use `generate`, which goes on with the last block_size tokens."
            )
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        return torch.arange(T, device=device).unsqueeze(0) + past


class CustomGPTForCausalLM(CustomGPTPreTrainedModel, GenerationMixin):
    """The decoder with its language modelling head, `lm_head`: a Linear, tied or not."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CustomGPTConfig):
        super().__init__(config)
        self.transformer = CustomGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
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
        """Logits of the next token, and the loss. Arguments that are not listed are those of [`CustomGPTModel`].

        Args:
            labels: token ids (B, T), usually `input_ids` themselves: the loss shifts them by one. -100 is ignored (not
                -1, as in the original trainer).
            logits_to_keep: the number of last positions that get logits, 0 for all; or the positions, as a tensor.

        Returns:
            `logits` of shape (B, T, V), or fewer positions, and with `labels` a scalar `loss` in nats.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states: torch.Tensor = outputs.last_hidden_state
        logits = self.lm_head(hidden_states[:, kept])  # (B, T kept, V)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_static_cache(self, *args: Any, max_cache_len: int, **kwargs: Any) -> Cache:
        """A static cache is no longer than the context: past it, no cache is used."""
        return super()._prepare_static_cache(*args, max_cache_len=min(max_cache_len, self.config.block_size), **kwargs)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any) -> Any:
        """A caller's `max_length` holds: in the library, the folder's `max_new_tokens` would take precedence."""
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for given in (kwargs, {} if generation_config is None else generation_config.to_dict()):
            if given.get("max_length") or given.get("max_new_tokens"):
                prepared.max_new_tokens = given.get("max_new_tokens")
                break
        return prepared, model_kwargs

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in the library. `generate` may use the first `new_num_tokens` ids then, and none of the padding rows."""
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None:
            self.generation_config.suppress_tokens = list(range(new_num_tokens, embedding.num_embeddings)) or None
        return embedding

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in the library up to `block_size` tokens; past them, the model sees the last `block_size` tokens.

        In that window the learned positions start from 0 again, so every key and value changes at every step. No cache
        can hold them: each token past the context takes a forward pass over the window, as in the original.
        """
        # The prompt may be given as embeddings, with or without its ids. Generated tokens are ids only.
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
                kwargs["is_first_iteration"] = True  # otherwise the library drops the embeddings
            input_ids = input_ids[:, -window:]
            attention_mask = attention_mask[:, -window:] if attention_mask is not None else None
            next_sequence_length, past_key_values = None, None
            kwargs["position_ids"], kwargs["use_cache"] = None, False
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class CustomGPTForSequenceClassification(GenericForSequenceClassification, CustomGPTPreTrainedModel):
    """The decoder with a label head, `score`, on the last token that is not padding."""

    base_model_prefix = "transformer"

    def __init__(self, config: CustomGPTConfig):
        CustomGPTPreTrainedModel.__init__(self, config)  # the mixin's own would ask AutoModel for the decoder
        self.num_labels = config.num_labels
        self.transformer = CustomGPTModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()


class CustomGPTForTokenClassification(GenericForTokenClassification, CustomGPTPreTrainedModel):
    """The decoder with a label head, `score`, on every token."""

    base_model_prefix = "transformer"

    def __init__(self, config: CustomGPTConfig):
        CustomGPTPreTrainedModel.__init__(self, config)  # the mixin's own would ask AutoModel for the decoder
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
