"""A CTranslate2 folder, which CTranslate2's own converter makes of the stock GPT-2 folder."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from hf_model.errors import UserError
from hf_model.formats import gpt2
from hf_model.formats.cards import write_card
from hf_model.formats.comparison import Difference, check_tokenizer_files, compare, compared_with, reference_logits
from hf_model.formats.example import TRY_EXAMPLE, USE_EXAMPLE, write_example
from hf_model.formats.target import (
    MissingEngineError,
    Options,
    check_plain_gpt2,
    engine_errors,
    require,
    write_tokenizer,
)
from hf_model.loading import FROM_PRETRAINED, Loaded, Source, dtype_name
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM

ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "relu", "silu", "swish")
# What rounded weights may change, as a share of the spread. Measured: 0.004 in float16, 0.02 in bfloat16 and int16,
# 0.06 in int8; and 0.2 to 2 for a wrong file with half of the heads.
ALLOWED = {"float16": 0.01, "bfloat16": 0.05, "int16": 0.05, "int8": 0.15}

TRY_IT = TRY_IT_RAW = TRY_EXAMPLE
EXAMPLE = """\
import sys
from pathlib import Path

import ctranslate2  # pip install ctranslate2 transformers
from transformers import AutoTokenizer

folder = str(Path(__file__).parent)
generator = ctranslate2.Generator(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

{{ encode }}
tokens = tokenizer.convert_ids_to_tokens(ids)
n_new = {{ block_size }} - len(tokens)
{% if ends -%}
how = {"end_token": {{ ends }}}
(result,) = generator.generate_batch([tokens], max_length=n_new, include_prompt_in_result=False, **how)
{%- else -%}
(result,) = generator.generate_batch([tokens], max_length=n_new, include_prompt_in_result=False)
{%- endif %}
print(tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True))
"""
PAST_CONTEXT = (
    "A prompt and its answer end at {block_size} tokens: past them CTranslate2 stops there with a RuntimeError. (The "
    "folder for transformers goes on with the last {block_size} tokens.) `max_length` counts the new tokens only: give "
    "it what the prompt leaves."
)
PADDING = (
    "The vocabulary has padding rows, whose tokens `<unused…>` were never trained. If you sample, exclude them by "
    "`suppress_sequences`."
)


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write CTranslate2's files, the tokenizer, an example program and the card.

    Raises:
        UserError: CTranslate2 is not installed, or does not take the model.
        OSError: the disk is full.
    """
    config = loaded.model.config
    check_supported(loaded.model)
    require(["ctranslate2"], "ctranslate2")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        stock, made = Path(scratch) / "stock", Path(scratch) / "made"
        stock.mkdir()
        gpt2.write(loaded, stock, options)
        name_padding_rows(stock, config.vocab_size)
        with FROM_PRETRAINED, engine_errors("CTranslate2 does not take the model", folder):
            run_converter(stock, made, options.quantization)
        name_special_tokens(made / "config.json")
        for file in sorted(made.iterdir()):
            file.rename(folder / file.name)
    write_tokenizer(loaded.tokenizer, folder)
    script = write_example(EXAMPLE, loaded, folder, options)
    notes = [PAST_CONTEXT.format(block_size=config.block_size)]
    if len(loaded.tokenizer) < config.vocab_size:
        notes.append(PADDING)
    kind = options.quantization
    is_exact = kind in (None, "float32", dtype_name(loaded.model.dtype))
    write_card(
        folder,
        loaded,
        options.card,
        what=f"to CTranslate2 ({kind or 'not quantized'})",
        library="ctranslate2",
        use=USE_EXAMPLE,
        script=script,
        notes=notes,
        quantized="" if is_exact else f"rounded to {kind}",
    )
    return []


def check_supported(model: CustomGPTForCausalLM) -> None:
    """Check what CTranslate2's GPT-2 does not read from a configuration.

    Raises:
        UserError: CTranslate2 does not know the model's activation or epsilon.
    """
    check_plain_gpt2(model.config, "CTranslate2's GPT-2", activations=ACTIVATIONS)
    if model.config.layer_norm_epsilon != 1e-5:
        raise UserError(f"CTranslate2's GPT-2 has an epsilon of 1e-5, this model {model.config.layer_norm_epsilon}")


def name_padding_rows(folder: Path, vocab_size: int) -> None:
    """Add a token for each padding row to a folder's tokenizer: the converter counts tokens, not rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = [f"<unused{index}>" for index in range(len(tokenizer), vocab_size)]
    if names:
        tokenizer.add_tokens(names)
        tokenizer.save_pretrained(folder)


def name_special_tokens(config: Path) -> None:
    """Name the special tokens that a vocabulary lacks: CTranslate2 loads no configuration without these names."""
    content = json.loads(config.read_text(encoding="utf-8"))
    for role, name in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
        content[role] = content.get(role) or name
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run_converter(stock: Path, output: Path, quantization: str | None) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(stock)).convert(str(output), quantization=quantization)


def verify(folder: Path, source: Source, options: Options) -> str:
    """Run the folder in CTranslate2, and compare its log-probabilities and its ids with the source's.

    The files are judged by a run in float32. A run in int8 rounds the activations too, and is then as far from the
    model as a run of wrong files would be: that difference is told, but not judged.

    Raises:
        MissingEngineError: CTranslate2 is not installed.
        UserError: something differs.
    """
    require(["ctranslate2"], "ctranslate2", MissingEngineError)
    model = source.load().model
    texts = check_tokenizer_files(folder, source)
    quantization = options.quantization or "float32"
    found = difference(folder, model, "float32")
    kind = next((kind for kind in ALLOWED if quantization.startswith(kind)), None)
    found.check(ALLOWED[kind] * found.spread if kind else found.rounding)
    words = f"by CTranslate2 in float32, {compared_with(source)}{found}"
    if quantization.startswith("int8"):
        words += f"; {int8_words(difference(folder, model, 'int8'))}"
    return f"{words}; {texts}"


def int8_words(found: Difference) -> str:
    share = found.largest / found.spread
    return (
        f"in int8, which rounds activations too, by up to {found.largest:.1e}, {share:.0%} of it: greedy answers that "
        "agree are no proof, so measure yours"
    )


def difference(folder: Path, model: CustomGPTForCausalLM, compute_type: str) -> Difference:
    """How far the folder's log-probabilities are from those of the model in float32."""
    from ctranslate2 import Generator

    ids, logits = reference_logits(model)
    with engine_errors("CTranslate2 does not run it"):
        generator = Generator(str(folder), compute_type=compute_type)
        log_probs = generator.forward_batch([ids[0].tolist()], return_log_probs=True)
    got = torch.from_numpy(np.array(log_probs)[0, -len(logits) :])
    return compare("the log-probabilities", logits.log_softmax(-1), got)
