"""The folder that transformers' Auto classes load: its files, and the comparison with the source."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_model.checkpoint import read_checkpoint
from hf_model.description import rounding
from hf_model.errors import UserError
from hf_model.formats.model_card import model_card
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.vocabulary import format_example, format_prompt, read_tokenizer, save_tokenizer

TOKENIZER_PROBES = (
    format_prompt("What is the capital of France?"),
    format_example("Summarize the text.", "Done.", "Two  spaces,\na new line, 12345 and 'quotes'."),
    "Ünïcödé, 漢字, العربية, 🙂\t\u00a0end ",
)
VERIFY_BYTES = 256 * 2**20  # how much is compared before memory is let go


def write(
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    name: str,
    max_shard_size: str = "5GB",
    rounded: str = "",
) -> None:
    """Write a model, its tokenizer and its card into a folder.

    Args:
        folder: an empty folder.
        name: what the card calls the model.
        max_shard_size: the largest safetensors file, such as `"5GB"`.
        rounded: what became of the weights, for the card (`description.rounding`).

    Raises:
        OSError: the disk is full.
    """
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except SafetensorError as error:  # its own form of a full disk
        raise OSError(str(error)) from None
    for weights in folder.glob("*.safetensors"):  # which safetensors lets nobody read but their owner
        shutil.copymode(folder / "config.json", weights)
    save_tokenizer(tokenizer, folder)
    (folder / "README.md").write_text(model_card(model.config, name, rounded), encoding="utf-8")


def verify(folder: Path, checkpoint_path: str | Path, tokenizer_path: str | Path) -> str:
    """Load a folder back by the Auto classes and compare it with its source.

    Returns:
        What was compared, in words.

    Raises:
        UserError: a tensor or a token differs.
    """
    tokenizer, original = AutoTokenizer.from_pretrained(folder), read_tokenizer(tokenizer_path)
    for text in TOKENIZER_PROBES:
        expected = [tokenizer.bos_token_id, *original.encode(text, add_special_tokens=False).ids]
        if tokenizer(text).input_ids != expected:
            raise UserError(f"{folder}: the tokenizer encodes {text!r} differently from {tokenizer_path}")

    names = list(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    remaining = list(names)
    while remaining:
        # Both sides are mapped afresh for every few tensors, so that memory holds neither file whole.
        written = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        checkpoint = read_checkpoint(checkpoint_path, check_bytes=False)
        source = checkpoint.state_dict
        source.setdefault("lm_head.weight", source["transformer.wte.weight"])
        if astray := written.keys() ^ source.keys():
            raise UserError(f"{folder}: {', '.join(sorted(astray))} is on one side only")
        compared_bytes = 0
        while remaining and compared_bytes < VERIFY_BYTES:
            name = remaining.pop()
            tensor = written[name]
            if not _same_bits(tensor, source[name].to(tensor.dtype)):
                raise UserError(f"{folder}: {name} differs from {checkpoint_path}: the disk or the memory is faulty")
            compared_bytes += tensor.nbytes
    rounded = rounding(checkpoint.dtype, tensor.dtype)
    equal = f"{len(names)} tensors equal bit for bit" + (f" to the source's, {rounded}" if rounded else "")
    return f"{equal}, {len(TOKENIZER_PROBES)} texts encoded the same"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype are equal as bits: NaN is itself, and 0.0 is not -0.0."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))
