"""What the commands say about a source, its model and its tokenizer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import (
    CHAT_TEMPLATE,
    TEMPLATES,
    FoundTokenizer,
    chat_template,
    end_of_answer,
    end_text,
    end_tokens,
    prompt_format,
)
from hf_model.trainers import Checkpoint
from hf_model.trainers.architecture import is_copied
from hf_model.trainers.names import FAMILY
from hf_model.trainers.pickle_reader import kind_of
from hf_model.trainers.tensors import dtype_name


def describe_architecture(config: CustomGPTConfig) -> str:
    return (
        f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, context {config.block_size}, "
        f"vocabulary {config.vocab_size}, {'with' if config.bias else 'no'} biases, "
        f"head {'tied' if config.tie_word_embeddings else 'untied'}, {config.activation_function}"
    )


def describe_parameters(model: CustomGPTForCausalLM) -> str:
    return f"{model.num_parameters():,} in {dtype_name(model.dtype)}"


def describe_source(path: Path, checkpoint: Checkpoint | None, is_module: bool) -> str:
    if is_module:
        return f"{path} (a model of your own class)"
    if checkpoint is None:
        return f"{path} (a folder)"
    place = f"weights under {checkpoint.weights_key!r}" if checkpoint.weights_key else checkpoint.kind
    if checkpoint.module_class:
        place = f"a whole {checkpoint.module_class}"
    progress = "".join(f", {name} {number:.6g}" for name, number in checkpoint.progress.items())
    return f"{checkpoint.path} ({place}{progress})"


def describe_tokenizer(found: FoundTokenizer) -> str:
    why = f", {found.why}" if found.why else ""
    return f"{found.taken} ({len(found.tokenizer)} {found.unit}{why})"


def describe_rounding(source: torch.dtype, dtype: torch.dtype) -> str:
    """What the conversion to `dtype` did to weights of dtype `source`; "" if it lost nothing."""
    if torch.promote_types(source, dtype) == dtype:
        return ""
    return f"rounded from {dtype_name(source)} to {dtype_name(dtype)}"


def checkpoint_choices(checkpoint: Checkpoint, n_head: int | None, activation: str) -> Iterator[tuple[str, str]]:
    """What to report about a trainer's file: what the user left open, what was chosen and why.

    Args:
        n_head, activation: what the user chose; None and `"auto"` leave it open.
    """
    if checkpoint.names is not FAMILY:
        yield "names", f"those of {checkpoint.names.trainer}"
    if n_head is None and (told := checkpoint.told_heads()):
        yield "heads", f"{told[0]} ({told[1]})"
    stated = checkpoint.model_args.get("n_head") or checkpoint.n_head
    if n_head is not None and stated not in (None, n_head):
        yield "warning", f"the model has {n_head} heads, as --n_head says, but the file says {stated}"
    if checkpoint.config_unused:
        yield "note", f"{checkpoint.config_unused}: it was not used"
    if checkpoint.no_biases:
        yield "biases", f"zeros for {', '.join(checkpoint.no_biases)}: the file has none in any layer"
    if "attn.c_proj" not in checkpoint.names.modules:
        yield "attention", "has no output projection in the file: the identity is written, with the same result"
    for name, value in checkpoint.unknown_args.items():
        ignored = f"{name}={shown(value)} in {checkpoint.stated_in} was ignored"
        yield "warning", f"{ignored}: the model may not compute what its trainer computes"
    if _has_copied_head(checkpoint.state_dict):
        yield "head", "tied: the file has an equal copy of the embedding"
    if checkpoint.has_head_alone:
        yield "head", "tied: the file has lm_head.weight alone, which is taken for the embedding too"
    if checkpoint.weights_key == "module" and checkpoint.dtype != torch.float32:
        half = dtype_name(checkpoint.dtype)
        yield (
            "note",
            f"DeepSpeed saved {half} weights here; its program zero_to_fp32 makes a file of the float32 ones",
        )
    yield from _activation_choices(checkpoint, activation)


def _has_copied_head(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the file holds the embedding a second time, as the head."""
    head, embedding = weights.get("lm_head.weight"), weights.get("transformer.wte.weight")
    if head is None or embedding is None or head.data_ptr() == embedding.data_ptr():
        return False
    return is_copied(head, embedding)


def _activation_choices(checkpoint: Checkpoint, activation: str) -> Iterator[tuple[str, str]]:
    trainer = checkpoint.trainer
    if activation not in ("auto", trainer.activation):
        yield "activation", f"{activation} (your choice; without it, {trainer.activation})"
    if activation != "auto" or len(checkpoint.names.forms) > 1:
        return  # the user has decided, or the loss has
    if not trainer.is_known:
        likely = f"the likeliest, since {trainer.why}" if trainer.why else "the most common"
        yield "activation", f"{trainer.activation} ({likely})"
        yield (
            "warning",
            "nothing in the file tells the activation. Names and shapes alone do not prove which model this is, "
            "and with a wrong activation the answers are worse. Choose it with --activation, check it with "
            "--inspect --training_data FILE, or give the code that makes the model, with --model train.py:GPT",
        )
    elif trainer.why:
        yield "activation", f"{trainer.activation} ({trainer.why})"


def tokenizer_choices(found: FoundTokenizer) -> Iterator[tuple[str, str]]:
    """What to report about a tokenizer: its notes, and the prompt format unless it is the default, instructions."""
    template = chat_template(found.tokenizer)
    ends = [*end_tokens(found.tokenizer), *filter(None, [end_text(found.tokenizer)])]
    end = " or ".join(ends) or "max_new_tokens only"
    if template is None:
        yield "prompt", f"raw text; a text ends at {end}"
    elif template != CHAT_TEMPLATE:
        name = next((name for name, ours in TEMPLATES.items() if ours == template), "a chat template of its own")
        turns = "several turns" if prompt_format(found.tokenizer).has_turns else "a single turn"
        no_end = "" if end_of_answer(found.tokenizer) else "the template writes no end of an answer, which "
        yield "prompt", f"{name}, of {turns}; {no_end or 'an answer '}ends at {end}"
    for note in found.notes:
        yield "note", note


def shown(value: Any) -> str:
    """A value of a file for a message."""
    return repr(value) if isinstance(value, (bool, int, float, str)) else f"a {kind_of(value)}"
