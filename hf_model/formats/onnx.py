"""An ONNX folder by the library's own exporter: one graph with a key/value cache, of any batch and any length."""

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import Cache, DynamicCache
from transformers.utils import logging as library_logging

from hf_model.errors import UserError
from hf_model.formats.cards import write_card
from hf_model.formats.comparison import Difference, check_tokenizer_files, compare, compared_with, in_float32
from hf_model.formats.example import TRY_EXAMPLE, USE_EXAMPLE, write_example
from hf_model.formats.gpt2 import stock_config, stock_generation
from hf_model.formats.target import MissingEngineError, Options, engine_errors, require, write_tokenizer
from hf_model.loading import Loaded, Source
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FILE = "model.onnx"
# Sample sizes differ from each other and from 1, so that the exporter takes none of them for a constant.
SAMPLE_BATCH, SAMPLE_CACHED, SAMPLE_NEW = 2, 5, 3
QUIET = threading.Lock()  # two threads that hide messages at once would restore each other's settings
HALF_PRECISION = 0.02  # what float16 may change, as a share of the logits' spread

TRY_IT = TRY_IT_RAW = TRY_EXAMPLE
EXAMPLE = """\
import sys
from pathlib import Path

import numpy as np
import onnxruntime  # pip install onnxruntime transformers
from transformers import AutoTokenizer

folder = Path(__file__).parent
session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
tokenizer = AutoTokenizer.from_pretrained(str(folder))

{{ encode }}
# The cache begins empty: keys and values of each layer, of shape (1, heads, 0, size).
inputs = {put.name: put for put in session.get_inputs() if len(put.shape) == 4}
kind = np.float16 if any("float16" in put.type for put in inputs.values()) else np.float32
cache = {name: np.zeros((1, int(put.shape[1]), 0, int(put.shape[3])), kind) for name, put in inputs.items()}
answer, new = [], ids
{% if ends -%}
while len(ids) + len(answer) < {{ block_size }} and not {{ "{" ~ ends|join(", ") ~ "}" }} & set(answer):
{%- else -%}
while len(ids) + len(answer) < {{ block_size }} and tokenizer.eos_token_id not in answer:
{%- endif %}
    mask = np.ones((1, len(ids) + len(answer)), np.int64)
    logits, *states = session.run(None, {"input_ids": np.array([new]), "attention_mask": mask, **cache})
    cache = dict(zip(cache, states))
    new = [int(logits[0, -1].argmax())]
    answer += new
print(tokenizer.decode(answer, skip_special_tokens=True))
"""
PAST_CONTEXT = (
    "A prompt and its answer end at {block_size} tokens: past them onnxruntime stops there with an error (an index of "
    "the position embedding is out of bounds). (The folder for transformers goes on with the last {block_size} tokens.)"
)
NAMES = (
    "Inputs: `input_ids` (B, T), `attention_mask` (B, cached + T) with 0 for left padding, and for each layer the "
    "cached keys and values (B, heads, cached, size), at first with cached = 0. Outputs: logits (B, T, V), and the "
    "cache with the new tokens. `transformers.exporters` loads the folder too (`export.json`)."
)


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write the graph with its weights, configurations, tokenizer, an example program and the card.

    Raises:
        UserError: the packages are not installed, or the exporter does not take the model.
        OSError: the disk is full.
    """
    config = loaded.model.config
    if loaded.model.dtype not in (torch.float32, torch.float16):
        raise UserError("onnxruntime computes in float32 and float16 on a CPU: add --dtype float32 or --dtype float16")
    if config.block_size < SAMPLE_CACHED + SAMPLE_NEW:
        raise UserError(f"the exporter needs a context of {SAMPLE_CACHED + SAMPLE_NEW} tokens to trace the model")
    require(["onnx", "onnxscript"], "onnx")
    with quietly(), engine_errors("the library's ONNX exporter does not take the model", folder):
        export(loaded.model, folder)
    stock_config(config).save_pretrained(folder)  # plain GPT-2's, so that nobody is asked to trust code
    stock_generation(loaded).save_pretrained(folder)
    (folder / "configuration_custom_gpt.py").unlink(missing_ok=True)
    write_tokenizer(loaded.tokenizer, folder)
    script = write_example(EXAMPLE, loaded, folder, options)
    notes = [PAST_CONTEXT.format(block_size=config.block_size), NAMES]
    write_card(
        folder, loaded, options.card, what="to ONNX", library="onnx", use=USE_EXAMPLE, script=script, notes=notes
    )
    return []


def export(model: CustomGPTForCausalLM, folder: Path) -> None:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    B, cached, T = SAMPLE_BATCH, SAMPLE_CACHED, SAMPLE_NEW
    size = model.config.n_embd // model.config.n_head
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.n_layer):
        states = torch.zeros(B, model.config.n_head, cached, size, dtype=model.dtype)
        cache.update(states, states.clone(), layer)
    inputs: dict[str, torch.Tensor | Cache] = {
        "input_ids": torch.zeros(B, T, dtype=torch.long),
        "attention_mask": torch.ones(B, cached + T, dtype=torch.long),
        "past_key_values": cache,
    }
    OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True)).save_pretrained(folder)


@contextmanager
def quietly() -> Iterator[None]:
    """Hide the messages that the exporter and torch have for their own developers. Errors are raised all the same."""
    with QUIET, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        verbosity, disabled = library_logging.get_verbosity(), logging.root.manager.disable
        library_logging.set_verbosity_error()
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)
            library_logging.set_verbosity(verbosity)


def verify(folder: Path, source: Source, options: Options) -> str:
    """Run the graph in onnxruntime, and compare its logits with the model's: whole contexts, cache, batches, padding.

    Raises:
        MissingEngineError: onnxruntime is not installed.
        UserError: something differs.
    """
    require(["onnxruntime"], "onnx", MissingEngineError)
    import onnxruntime

    model = source.load().model
    texts = check_tokenizer_files(folder, source)
    with engine_errors("onnxruntime does not load it"):
        session = onnxruntime.InferenceSession(str(folder / FILE))
    reference = in_float32(model)
    T = model.config.block_size
    half = max(1, T // 2)
    # (rows, cached, new, padding)
    cases = [(1, 0, T, 0), (2, 0, half, half // 2), (3, half, T - half, 1), (1, T - 1, 1, 0)]
    results = [run_case(session, reference, model.dtype, *case) for case in cases if case[2]]
    worst = max(results, key=lambda found: found.largest)
    worst.check(worst.rounding if model.dtype == torch.float32 else HALF_PRECISION * worst.spread)
    found = replace(worst, n_positions=sum(result.n_positions for result in results))
    how = "by onnxruntime, with and without a cache, in batches of 1 to 3"
    return f"{how}, {compared_with(source)}{found}, {texts}"


@torch.inference_mode()
def run_case(
    session: "InferenceSession",
    reference: CustomGPTForCausalLM,
    dtype: torch.dtype,
    rows: int,
    cached: int,
    new: int,
    padding: int,
) -> Difference:
    """The difference over `new` tokens after `cached` ones, where the first row begins with `padding`."""
    config = reference.config
    ids = torch.randint(config.vocab_size, (rows, cached + new), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    expected = reference(ids, attention_mask=mask).logits  # (rows, cached + new, V)
    shape = (rows, config.n_head, 0, config.n_embd // config.n_head)
    kind = np.float16 if dtype == torch.float16 else np.float32
    states = [np.zeros(shape, kind)] * (2 * config.n_layer)
    names = [put.name for put in session.get_inputs()]
    with engine_errors("onnxruntime does not run the graph"):
        for start, end in [(0, cached), (cached, cached + new)] if cached else [(0, new)]:
            values = [ids[:, start:end].numpy(), mask[:, :end].numpy(), *states]
            logits, *states = session.run(None, dict(zip(names, values, strict=True)))
    first = max(cached, padding)  # the position from which all rows hold tokens
    got = torch.from_numpy(logits.astype(np.float32))[:, first - cached :]
    return compare("the logits", expected[:, first:].flatten(0, 1), got.flatten(0, 1))
