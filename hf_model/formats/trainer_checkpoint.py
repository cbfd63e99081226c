"""A `ckpt.pt` for a trainer: the original's scripts fine-tune it, or nanoGPT's train.py resumes from it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_model.errors import UserError
from hf_model.formats.cards import write_card
from hf_model.formats.comparison import compared_with, equal_tensors, same_bits
from hf_model.formats.target import TANH_GELU, Options, check_plain_gpt2, engine_errors
from hf_model.loading import Loaded, Source
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.trainers import read_checkpoint

FILE = "ckpt.pt"
ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
EXACT_GELU = ("gelu", "gelu_python")

TRY_IT = TRY_IT_RAW = """\
{generate} --checkpoint_path {checkpoint} --tokenizer_path {tokenizer} --prompt {prompt}"""
USE = {
    "original": """\
Give `ckpt.pt` to the fine-tuning script in place of the pre-trained checkpoint. It holds the weights under
`model_state_dict`, and `GPT(GPTConfig(**checkpoint["model_args"]))` makes their model.""",
    "nanogpt": """\
Put `ckpt.pt` into nanoGPT's `out_dir` and start `train.py` with `--init_from=resume`.""",
}
PAST_CONTEXT = (
    "Past the context, the trainer's own `generate` goes on with the last {block_size} tokens, as the folder for "
    "transformers does."
)
NO_TRAINING_STATE = {
    "original": (
        "The optimizer's state is gone: there is no `optimizer_state_dict`. Start a new optimizer and warm up the "
        "learning rate again."
    ),
    "nanogpt": (
        "The optimizer's state is gone: `optimizer` is an AdamW that has made no step, with nanoGPT's two groups. "
        "Warm up the learning rate again. It holds nanoGPT's default `weight_decay` and betas (0.1, 0.9 and 0.95), "
        "which override the values that you give to `train.py`."
    ),
}


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write `ckpt.pt` and its card.

    Raises:
        UserError: such a trainer cannot make this model.
        OSError: the disk is full.
    """
    notes = [*check_supported(loaded.model, options.like), NO_TRAINING_STATE[options.like]]
    progress = loaded.checkpoint.progress if loaded.checkpoint is not None else {}
    save(content(loaded.model, progress, options.like), folder / FILE)
    past_context = PAST_CONTEXT.format(block_size=loaded.model.config.block_size)
    write_card(
        folder,
        loaded,
        options.card,
        what="to a checkpoint for its trainer",
        library="pytorch",
        use=USE[options.like],
        notes=[past_context, *notes],
    )
    return [f"note: {note}" for note in notes]


def save(what: dict[str, Any], path: Path) -> None:
    """`torch.save`.

    Raises:
        OSError: the disk is full.
    """
    with engine_errors(f"{path.name}: torch cannot save it", path.parent):
        torch.save(what, path)


def check_supported(model: CustomGPTForCausalLM, like: str) -> list[str]:
    """What the user must set in the trainer, because `model_args` cannot tell it.

    Raises:
        UserError: the trainer's model cannot be this one.
    """
    config = model.config
    notes = []
    check_plain_gpt2(config, "the trainer's model")
    if config.n_inner not in (None, 4 * config.n_embd) or config.attention_scale is not None:
        raise UserError("its MLP has another width than the trainer's, or its attention another scale")
    if config.layer_norm_epsilon != 1e-5:
        raise UserError(f"its LayerNorms have an epsilon of {config.layer_norm_epsilon}; the trainer's have 1e-5")
    if like == "nanogpt" and not config.tie_word_embeddings:
        is_equal = torch.equal(model.lm_head.weight, model.transformer.wte.weight)
        advice = "convert without --untie" if is_equal else "use --like original"
        raise UserError(f"its head is not tied to its embedding, and nanoGPT's always is: {advice}")
    if like == "original" and config.tie_word_embeddings:
        notes.append("`model_args` has no word for a tied head: tie it in the trainer's model, or it becomes untied.")
    if config.activation_function in TANH_GELU:
        notes.append(
            f"`model_args` has no word for {config.activation_function}: set GELU's tanh form in the trainer's MLP."
        )
    elif config.activation_function not in EXACT_GELU:
        raise UserError(f"its activation is {config.activation_function}, which no trainer of this family has")
    return notes


def content(model: CustomGPTForCausalLM, progress: dict[str, Any], like: str) -> dict[str, Any]:
    """What the trainer's own script would have saved, except the training state."""
    weights = trainer_weights(model)
    model_args = {name: getattr(model.config, name) for name in ARGUMENTS}
    iter_num = progress.get("iter_num", 0)
    if like == "nanogpt":
        return {
            "model": weights,
            "optimizer": fresh_optimizer(model),
            "model_args": model_args,
            "iter_num": iter_num,
            "best_val_loss": progress.get("best_val_loss", 1e9),  # train.py begins with this value
            "config": {},
        }
    losses: dict[str, Any] = {name: progress[name] for name in ("loss", "best_val_loss") if name in progress}
    return {"iter_num": iter_num, "model_state_dict": weights, "model_args": model_args, **losses}


def trainer_weights(model: CustomGPTForCausalLM) -> dict[str, torch.Tensor]:
    """The state dict. A tied head is one tensor under two names; no tensor brings a larger storage along."""
    weights = {
        name: tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def fresh_optimizer(model: CustomGPTForCausalLM) -> dict[str, Any]:
    """The state of nanoGPT's AdamW before its first step: weight decay for matrices, none for vectors."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()


def verify(folder: Path, source: Source, options: Options) -> str:
    """Read the file as a trainer's checkpoint, and compare its weights and sizes with the source.

    Raises:
        UserError: something differs.
    """
    model = source.load(needs_tokenizer=False).model
    written, expected = read_checkpoint(folder / FILE), model.state_dict()
    sizes = asdict(written.architecture())
    # A reader takes equal matrices for a tied pair; here it counts whether the file has one or two.
    head, embedding = written.state_dict["lm_head.weight"], written.state_dict["transformer.wte.weight"]
    sizes["tie_word_embeddings"] = head.data_ptr() == embedding.data_ptr()
    for name, value in sizes.items():
        if value != getattr(model.config, name):
            raise UserError(f"{FILE}: says {name}={value}, its source {getattr(model.config, name)}")
    if unmatched := written.state_dict.keys() ^ expected.keys():
        raise UserError(f"{FILE}: {', '.join(sorted(unmatched))} is on one side only")
    for name, tensor in expected.items():
        got = written.state_dict[name]
        if got.dtype != tensor.dtype or not same_bits(tensor.contiguous(), got):
            raise UserError(f"{FILE}: {name} differs from {source.path}: the disk or the memory is faulty")
    equal = equal_tensors(len(expected), options.card.rounded)
    return f"{compared_with(source)}{equal}, {len(sizes)} sizes and settings the same"
