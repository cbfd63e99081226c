"""A CTranslate2 folder, made by its own converter from the stock GPT-2 folder."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from hf_model.errors import UserError
from hf_model.formats import gpt2
from hf_model.formats.cards import write_card
from hf_model.formats.target import (
    Difference,
    MissingEngineError,
    Options,
    blamed_on,
    check,
    check_written_tokenizer,
    difference,
    exact,
    in_float32,
    logits_of,
    missing,
    n_compared,
    probe_ids,
    require,
)
from hf_model.loading import Loaded, Source
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import save_tokenizer

ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "relu", "silu", "swish")
# What rounding the weights may change, of the spread. Measured: 0.004 in float16, 0.02 in bfloat16 and int16, 0.06 in
# int8; with half of the heads, 0.2 to 2.
ALLOWED = {"float16": 0.01, "bfloat16": 0.05, "int16": 0.05, "int8": 0.15}

USE = """\
```python
import ctranslate2  # pip install ctranslate2
from transformers import AutoTokenizer

generator = ctranslate2.Generator("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")

prompt = tokenizer({prompt}).tokens()
result = generator.generate_batch([prompt], max_length={block_size} - len(prompt), include_prompt_in_result=False)[0]
print(tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True))
```"""
PAST_CONTEXT = (
    "A prompt and its answer end at {block_size} tokens: CTranslate2 stops there with a RuntimeError, while the folder "
    "for transformers goes on with the last {block_size} tokens. `max_length` counts new tokens: give it what the "
    "prompt leaves."
)
PADDING = "The vocabulary is padded: the tokens `<unused…>` mean nothing. Greedy search never took one; sampling might."


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write the folder: CTranslate2's files, the tokenizer that makes its tokens, and the card.

    Raises:
        UserError: CTranslate2 is not installed, or does not take the model.
    """
    require(["ctranslate2"], "ctranslate2")
    check_expressible(loaded.model)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        stock, made = Path(scratch) / "stock", Path(scratch) / "made"
        stock.mkdir()
        gpt2.write(loaded, stock, options)
        pad_vocabulary(stock, loaded.model.config.vocab_size)
        with blamed_on("CTranslate2 does not take the model"):
            run_converter(stock, made, options.quantization)
        name_special_tokens(made / "config.json")
        for file in sorted(made.iterdir()):
            file.rename(folder / file.name)
    save_tokenizer(loaded.tokenizer, folder)
    padding = PADDING if len(loaded.tokenizer) < loaded.model.config.vocab_size else ""
    what = f"CTranslate2 ({options.quantization or 'as it is'})"
    write_card(folder, loaded, options, what, USE, PAST_CONTEXT, padding, library="ctranslate2")
    return []


def check_expressible(model: CustomGPTForCausalLM) -> None:
    """Check what CTranslate2's GPT-2 does not read from a configuration.

    Raises:
        UserError: the model has another activation or epsilon than it knows.
    """
    if model.config.activation_function not in ACTIVATIONS:
        raise UserError(f"CTranslate2 does not know this model's activation, {model.config.activation_function}")
    if model.config.layer_norm_epsilon != 1e-5:
        raise UserError(f"CTranslate2's GPT-2 has an epsilon of 1e-5, this model {model.config.layer_norm_epsilon}")


def pad_vocabulary(folder: Path, vocab_size: int) -> None:
    """Give the rows of a padded vocabulary a name in a folder's tokenizer, since the converter counts tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = [f"<unused{index}>" for index in range(len(tokenizer), vocab_size)]
    if names:
        tokenizer.add_tokens(names)
        tokenizer.save_pretrained(folder)


def name_special_tokens(config: Path) -> None:
    """Give the special tokens that a vocabulary lacks a name: CTranslate2 does not load a configuration without one."""
    content = json.loads(config.read_text(encoding="utf-8"))
    for role, name in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
        content[role] = content.get(role) or name
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run_converter(stock: Path, output: Path, quantization: str | None) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(stock)).convert(str(output), quantization=quantization)


def verify(folder: Path, source: Source, options: Options) -> str:
    """Run the folder in CTranslate2, and compare log-probabilities with the model, and ids of texts.

    The files are judged by what they give in float32. CTranslate2 rounds activations to int8 as well, which alone takes
    it as far from the model as a wrong file would: that difference is told, not judged.

    Raises:
        MissingEngineError: CTranslate2 is not installed.
        UserError: something differs.
    """
    if absent := missing(["ctranslate2"], "ctranslate2"):
        raise MissingEngineError(absent)
    loaded = source.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    texts_encoded = check_written_tokenizer(folder, tokenizer)
    quantization = options.quantization or "float32"
    found = compared(folder, model, "float32")
    kind = next((kind for kind in ALLOWED if quantization.startswith(kind)), None)
    check(found, ALLOWED[kind] * found.spread if kind else exact(found), "the log-probabilities")
    words = f"by CTranslate2 in float32: {found.words('the log-probabilities')}"
    if quantization.startswith("int8"):
        words += f"; {int8_words(compared(folder, model, 'int8'))}"
    return f"{words}; {texts_encoded}"


def int8_words(found: Difference) -> str:
    """What int8 makes of the model: told, not judged, since a file with half of the heads is no further off."""
    share = found.largest / found.spread
    return (
        f"in int8, which rounds activations too, by up to {found.largest:.1e}, {share:.0%} of it: greedy answers that "
        "agree are no proof, so measure yours"
    )


def compared(folder: Path, model: CustomGPTForCausalLM, compute_type: str) -> Difference:
    """How far the folder's log-probabilities are from the model's, which is computed in float32."""
    from ctranslate2 import Generator

    ids, keep = probe_ids(model), n_compared(model)
    expected = logits_of(in_float32(model), ids, keep).log_softmax(-1)
    with blamed_on("CTranslate2 does not run it"):
        generator = Generator(str(folder), compute_type=compute_type)
        log_probs = generator.forward_batch([ids[0].tolist()], return_log_probs=True)
    return difference(expected, torch.from_numpy(np.array(log_probs)[0, -keep:]))
