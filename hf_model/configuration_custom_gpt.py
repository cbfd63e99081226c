"""Configuration of the CustomGPT model: the names of a checkpoint's `model_args`, mapped to the standard names."""

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.4"):
    raise ImportError("This folder's code needs transformers 5.4 or later; a folder of `--format gpt2` loads anywhere.")

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class CustomGPTConfig(PreTrainedConfig):
    """Configuration of a [`CustomGPTModel`], a GPT-2 style decoder in the nanoGPT tradition.

    Args:
        vocab_size: rows of the token embedding and of the output head, padding rows included.
        block_size: context length in tokens: the number of learned positions (`max_position_embeddings`).
        n_layer: number of blocks (`num_hidden_layers`).
        n_head: number of attention heads (`num_attention_heads`). Must divide `n_embd`.
        n_embd: width of the residual stream (`hidden_size`).
        bias: whether every LayerNorm and every Linear except `lm_head` has a bias.
        dropout: probability for the embedding sum, the attention weights and both output projections; in [0, 1).
        activation_function: activation of the MLP, a key of `transformers.activations.ACT2FN`: `"gelu"` is the exact
            (erf) form, `"gelu_new"` the tanh form of GPT-2 and of older relatives.
        layer_norm_epsilon: epsilon of every LayerNorm.
        initializer_range: standard deviation of new Linear and Embedding weights.
        use_cache: whether the model returns its keys and values for the next step.
        bos_token_id, eos_token_id, pad_token_id: ids of `[BOS]`, `[EOS]` and `[PAD]`.
        tie_word_embeddings: whether `lm_head.weight` is `transformer.wte.weight`.
        n_inner: width of the MLP; None is four times `n_embd`.
        norm_first: whether LayerNorm comes before attention and MLP (pre-norm), or after each sum (post-norm).
        final_norm: whether there is a LayerNorm before the head.
        head_bias: whether `lm_head` has a bias.
        attention_scale: factor of queries times keys; None is 1 / sqrt(n_embd / n_head).

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value of the wrong type, a size below 1, `n_embd` not divisible
            by `n_head`, `dropout` outside [0, 1), or an `activation_function` that `transformers` does not know.
    """

    model_type = "custom_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size",
    }
    # Query, key and value are one weight, so a contiguous shard does not hold whole heads. Each rank computes a shard
    # of `c_attn`, the shards are gathered, and every rank runs all heads.
    base_model_tp_plan = {
        "wte": "embedding_rowwise",
        "h.*.attn.c_attn": "colwise_gather_output",
        "h.*.attn.c_proj": "rowwise_split_input",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    }
    base_model_pp_plan = {
        "wte": (["input_ids"], ["inputs_embeds"]),
        "wpe": (["inputs_embeds", "position_ids"], ["inputs_embeds"]),
        "drop": (["inputs_embeds"], ["hidden_states"]),
        "h": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "ln_f": (["hidden_states"], ["hidden_states"]),
    }
    base_model_fsdp_plan = {
        "wte": "free_full_weight",
        "wpe": "free_full_weight",
        "h.*": "free_full_weight",
        "ln_f": "keep_full_weight",
    }

    vocab_size: int = 32000
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = True
    dropout: float | int = 0.1
    activation_function: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3
    pad_token_id: int | None = 1
    tie_word_embeddings: bool = False
    n_inner: int | None = None
    norm_first: bool = True
    final_norm: bool = True
    head_bias: bool = False
    attention_scale: float | None = None

    def validate_architecture(self) -> None:
        """Called by `@strict` when a configuration is made."""
        from transformers.activations import ACT2FN  # imports torch, which reading a configuration does not need

        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_inner"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if self.n_embd % self.n_head:
            raise ValueError(f"`n_embd` ({self.n_embd}) must be divisible by `n_head` ({self.n_head}).")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}.")
        if self.activation_function not in ACT2FN:
            raise ValueError(f"`activation_function` {self.activation_function!r} is not one of {', '.join(ACT2FN)}.")


__all__ = ["CustomGPTConfig"]
