"""What a checkpoint, a model and its files are, in the words that the command lines print."""

import torch

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import FoundTokenizer
from hf_model.trainers import Checkpoint


def describe_architecture(config: CustomGPTConfig) -> str:
    return (
        f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, context {config.block_size}, "
        f"vocabulary {config.vocab_size}, {'with' if config.bias else 'no'} biases, "
        f"head {'tied' if config.tie_word_embeddings else 'untied'}, {config.activation_function}"
    )


def describe_parameters(model: CustomGPTForCausalLM) -> str:
    return f"{model.num_parameters():,} in {dtype_name(model.dtype)}"


def describe_vocabulary(vocabulary: FoundTokenizer) -> str:
    why = f", {vocabulary.why}" if vocabulary.why else ""
    return f"{vocabulary.taken} ({len(vocabulary.tokenizer)} {vocabulary.unit}{why})"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounding(source: torch.dtype, dtype: torch.dtype) -> str:
    """What became of the weights, in words; "" if `dtype` holds whatever `source` does."""
    return (
        ""
        if torch.promote_types(source, dtype) == dtype
        else f"rounded from {dtype_name(source)} to {dtype_name(dtype)}"
    )


def describe_source(checkpoint: Checkpoint) -> str:
    place = f"weights under {checkpoint.weights_key!r}" if checkpoint.weights_key else "a bare state dict"
    progress = "".join(f", {name} {number:.6g}" for name, number in checkpoint.progress.items())
    return f"{checkpoint.path} ({place}{progress})"


def file_size(n_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"
