"""The folder that transformers' Auto classes load, with the model's own code."""

from pathlib import Path

from hf_model.choosing import used_weights
from hf_model.descriptions import describe_rounding
from hf_model.errors import UserError
from hf_model.folder import check_weights, read_config, read_weights, with_weights
from hf_model.formats.cards import GENERATE, write_card
from hf_model.formats.comparison import check_tokenizer_files, compared_with, equal_tensors, same_bits
from hf_model.formats.target import Options, beyond_gpt2, save_model, write_tokenizer
from hf_model.loading import Loaded, Source
from hf_model.trainers import widest

TRY_IT = """\
{generate} --checkpoint_path {folder} --prompt {prompt}
pip install "transformers[serving]" && transformers serve {folder} --trust-remote-code"""
TRY_IT_RAW = f"""{TRY_IT}
curl http://localhost:8000/v1/completions -H "Content-Type: application/json" -d {{request}}"""
USE = f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# The folder's path, or its name on the Hub. It holds the model's code (modeling_custom_gpt.py): read it, then trust it.
model = AutoModelForCausalLM.from_pretrained({{{{ name }}}}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({{{{ name }}}}, trust_remote_code=True)

{GENERATE}
```"""
VERSION = "The model's code needs transformers 5.4 or later."
OLDER = "A folder of `--format gpt2` loads in older versions too."
NOTES = (
    "`generate` samples with temperature 0.8 and top_k 50 unless it is told otherwise (`generation_config.json`).",
    "`generate` goes on past the context of {block_size} with the last {block_size} tokens.",
)


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write a model with its code, its tokenizer and its card.

    Raises:
        OSError: the disk is full.
    """
    save_model(loaded.model, folder, options.max_shard_size)
    write_tokenizer(loaded.tokenizer, folder)
    config = loaded.model.config
    version = VERSION if beyond_gpt2(config) else f"{VERSION} {OLDER}"
    notes = [version, *(note.format(block_size=config.block_size) for note in NOTES)]
    what = "for Hugging Face transformers"
    write_card(folder, loaded, options.card, what=what, library="transformers", use=USE, notes=notes)
    return []


def verify(folder: Path, source: Source, options: Options) -> str:
    """Load a folder and compare its weights and its tokenizer with the source.

    Returns:
        What was compared, in words.

    Raises:
        UserError: a weight or a token differs.
    """
    texts = check_tokenizer_files(folder, source)
    config = read_config(folder)
    check_weights(folder, config)
    # Not by `from_pretrained`, which sets torch's default dtype for the other threads too.
    written = with_weights(config, read_weights(folder)).state_dict()
    weights = used_weights(config, source.weights())
    if unmatched := written.keys() ^ weights.keys():
        raise UserError(f"{', '.join(sorted(unmatched))} is on one side only")
    for name, tensor in written.items():
        if not same_bits(tensor, weights[name].to(tensor.dtype)):
            raise UserError(f"{name} differs from {source.path}: the disk or the memory is faulty")
    rounded = describe_rounding(widest(weight.dtype for weight in weights.values()), tensor.dtype)
    return f"{compared_with(source)}{equal_tensors(len(written), rounded)}, {texts}"
