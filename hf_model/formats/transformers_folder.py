"""The folder that transformers' Auto classes load: its files, and the comparison with the source."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_model.errors import UserError
from hf_model.formats.cards import model_card
from hf_model.formats.target import Options, same_bits, save_weights
from hf_model.loading import Loaded, Source, describe_rounding
from hf_model.tokenizer import probes, save_tokenizer
from hf_model.trainers import widest

VERIFY_BYTES = 256 * 2**20  # how much is compared before memory is let go


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write a model, its tokenizer and its card into an empty folder.

    Raises:
        OSError: the disk is full.
    """
    model = loaded.model
    save_weights(model, folder, options.max_shard_size)
    save_tokenizer(loaded.tokenizer, folder)
    card = model_card(model.config, options.card, loaded.tokenizer, options.rounded)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return []


def verify(folder: Path, source: Source, options: Options) -> str:
    """Load a folder back by the Auto classes and compare it with its source.

    Returns:
        What was compared, in words.

    Raises:
        UserError: a tensor or a token differs.
    """
    vocabulary = source.find_tokenizer()
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), probes(vocabulary.tokenizer)
    for text in texts:
        if tokenizer(text, verbose=False).input_ids != vocabulary.encode(text):
            raise UserError(f"the tokenizer encodes {text!r} differently from {vocabulary.taken}")

    names = list(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    remaining = list(names)
    while remaining:
        # Both sides are mapped afresh for every few tensors, so that memory holds neither file whole.
        written = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        weights = source.weights()
        if astray := written.keys() ^ weights.keys():
            raise UserError(f"{', '.join(sorted(astray))} is on one side only")
        compared_bytes = 0
        while remaining and compared_bytes < VERIFY_BYTES:
            name = remaining.pop()
            tensor = written[name]
            if not same_bits(tensor, weights[name].to(tensor.dtype)):
                raise UserError(f"{name} differs from {source.path}: the disk or the memory is faulty")
            compared_bytes += tensor.nbytes
    rounded = describe_rounding(widest(weight.dtype for weight in weights.values()), tensor.dtype)
    equal = f"{len(names)} tensors equal bit for bit" + (f" to the source's, {rounded}" if rounded else "")
    return f"{equal}, {len(texts)} texts encoded the same"
