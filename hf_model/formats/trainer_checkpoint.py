"""Back to a trainer: the `ckpt.pt` that the original's scripts, or nanoGPT's, resume and fine-tune from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_model.errors import UserError
from hf_model.formats.cards import write_card
from hf_model.formats.target import TANH_GELU, Options, same_bits
from hf_model.loading import Loaded, Source
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.trainers import read_checkpoint

FILE = "ckpt.pt"
ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
EXACT_GELU = ("gelu", "gelu_python")

USE = {
    "original": """\
Give the file to the fine-tuning script in place of the pre-trained checkpoint: the weights stand under
`model_state_dict`, and `GPT(GPTConfig(**checkpoint["model_args"]))` makes their model.""",
    "nanogpt": """\
Put the file into nanoGPT's `out_dir` and start `train.py` with `--init_from=resume`.""",
}
PAST_CONTEXT = (
    "Past its context the trainer's own `generate` goes on with the last {block_size} tokens, as the folder for "
    "transformers does."
)
NO_TRAINING_STATE = {
    "original": (
        "The state of the optimizer is gone: there is no `optimizer_state_dict`. Start a new optimizer and warm up the "
        "learning rate again."
    ),
    "nanogpt": (
        "The state of the optimizer is gone: `optimizer` is an AdamW that has made no step, with nanoGPT's two groups. "
        "Warm up the learning rate again. `weight_decay` and the betas stand in it, nanoGPT's defaults (0.1, 0.9 and "
        "0.95): other values of `train.py` are overridden by them."
    ),
}


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write `ckpt.pt` and its card.

    Raises:
        UserError: the model is none that such a trainer could make.
    """
    notes = [*check_expressible(loaded.model, options.like), NO_TRAINING_STATE[options.like]]
    progress = loaded.checkpoint.progress if loaded.checkpoint is not None else {}
    save(content(loaded.model, progress, options.like), folder / FILE)
    use = USE[options.like]
    write_card(folder, loaded, options, "a checkpoint of its trainer", use, PAST_CONTEXT, *notes, library="pytorch")
    return [f"note: {note}" for note in notes]


def save(what: dict[str, Any], path: Path) -> None:
    """`torch.save`, with its errors like those of any other writing.

    Raises:
        OSError: the disk is full.
    """
    try:
        with path.open("wb") as file:  # given the path alone, torch does not say what went wrong
            torch.save(what, file)
    except RuntimeError as error:  # it ends the file all the same, and complains that a part of it is missing
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def check_expressible(model: CustomGPTForCausalLM, like: str) -> list[str]:
    """What the user must set in the trainer himself, since `model_args` has no word for it.

    Raises:
        UserError: it is something that the trainer's model does not have.
    """
    config = model.config
    notes = []
    if config.layer_norm_epsilon != 1e-5:
        raise UserError(f"its LayerNorms have an epsilon of {config.layer_norm_epsilon}, and the trainer's 1e-5")
    if like == "nanogpt" and not config.tie_word_embeddings:
        raise UserError("its head is not tied to its embedding, and nanoGPT's always is: use --like original")
    if like == "original" and config.tie_word_embeddings:
        notes.append(
            "`model_args` has no word for a tied head: the trainer's model must tie it, or it trains the two apart."
        )
    if config.activation_function in TANH_GELU:
        notes.append(
            f"`model_args` has no word for {config.activation_function}: the trainer's model must have the tanh "
            "form of GELU in its MLP."
        )
    elif config.activation_function not in EXACT_GELU:
        raise UserError(f"its activation is {config.activation_function}, which a trainer of this family does not have")
    return notes


def content(model: CustomGPTForCausalLM, progress: dict[str, Any], like: str) -> dict[str, Any]:
    """What the trainer's own script would have saved, as far as a model tells."""
    weights = trainer_weights(model)
    model_args = {name: getattr(model.config, name) for name in ARGUMENTS}
    iter_num = progress.get("iter_num", 0)
    if like == "nanogpt":
        return {
            "model": weights,
            "optimizer": fresh_optimizer(model),
            "model_args": model_args,
            "iter_num": iter_num,
            "best_val_loss": progress.get("best_val_loss", 1e9),  # what train.py starts with
            "config": {},
        }
    losses: dict[str, Any] = {name: progress[name] for name in ("loss", "best_val_loss") if name in progress}
    return {"iter_num": iter_num, "model_state_dict": weights, "model_args": model_args, **losses}


def trainer_weights(model: CustomGPTForCausalLM) -> dict[str, torch.Tensor]:
    """The state dict, a tied head among it as the same tensor; no tensor drags a larger storage along."""
    weights = {
        name: tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def fresh_optimizer(model: CustomGPTForCausalLM) -> dict[str, Any]:
    """The state of nanoGPT's AdamW before its first step: matrices decay, vectors do not, in the model's order."""
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if (p.ndim >= 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()


def verify(folder: Path, source: Source, options: Options) -> str:
    """Read the file by the reader of such files, and compare tensors and sizes.

    Raises:
        UserError: something differs.
    """
    model = source.load(needs_tokenizer=False).model
    written = read_checkpoint(folder / FILE)
    architecture = asdict(written.architecture())
    for name, value in architecture.items():
        if value != getattr(model.config, name):
            raise UserError(f"{folder / FILE}: says {name}={value}, its source {getattr(model.config, name)}")
    expected = model.state_dict()
    if astray := written.state_dict.keys() ^ expected.keys():
        raise UserError(f"{folder / FILE}: {', '.join(sorted(astray))} is on one side only")
    for name, tensor in expected.items():
        got = written.state_dict[name]
        if got.dtype != tensor.dtype or not same_bits(tensor.contiguous(), got):
            raise UserError(f"{folder / FILE}: {name} differs from {source.path}: the disk or the memory is faulty")
    tensors = f"{len(expected)} tensors equal bit for bit{options.to_rounded()}"
    return f"{tensors}, {len(architecture)} sizes and settings the same"
