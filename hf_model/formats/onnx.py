"""An ONNX folder by the library's own exporter: one graph with a key/value cache, of any batch and any length."""

import contextlib
import io
import logging
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
from hf_model.formats.gpt2 import stock_config, stock_generation
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
    missing,
    require,
)
from hf_model.loading import Loaded, Source
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import save_tokenizer

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FILE = "model.onnx"
# Sizes that are told apart from each other and from 1, so that the exporter takes none of them for a constant.
SAMPLE_BATCH, SAMPLE_CACHED, SAMPLE_NEW = 2, 5, 3

USE = """\
```python
import numpy as np
import onnxruntime  # pip install onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("{name}/model.onnx")
tokenizer = AutoTokenizer.from_pretrained("{name}")

shapes = {{i.name: [int(s) if str(s).isdigit() else None for s in i.shape] for i in session.get_inputs()}}
cache = {{name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items() if len(shape) == 4}}
ids = tokenizer({prompt}).input_ids
new = ids
while len(ids) < {block_size} and ids[-1] != tokenizer.eos_token_id:
    feed = {{"input_ids": np.array([new]), "attention_mask": np.ones((1, len(ids)), np.int64), **cache}}
    logits, *states = session.run(None, feed)
    cache = dict(zip(cache, states))
    new = [int(logits[0, -1].argmax())]
    ids = ids + new
print(tokenizer.decode(ids, skip_special_tokens=True))
```"""
PAST_CONTEXT = (
    "A prompt and its answer end at {block_size} tokens: onnxruntime stops there with an error (an index of the "
    "position embedding is out of bounds), while the folder for transformers goes on with the last {block_size} tokens."
)
NAMES = (
    "Inputs: `input_ids` (B, T), `attention_mask` (B, cached + T) with 0 for left padding, and for each layer the "
    "cached keys and values (B, heads, cached, size), of cached length 0 at first. Outputs: logits (B, T, V), and the "
    "cache with the new tokens. `transformers.exporters` loads the folder too (`export.json`)."
)


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write the graph, its weights, configurations, tokenizer and card.

    Raises:
        UserError: the packages are not installed, or the exporter does not take the model.
    """
    require(["onnx", "onnxscript"], "onnx")
    if loaded.model.dtype not in (torch.float32, torch.float16):
        raise UserError("onnxruntime computes in float32 and float16 on a CPU: add --dtype float32 or --dtype float16")
    if loaded.model.config.block_size < SAMPLE_CACHED + SAMPLE_NEW:
        raise UserError(f"the exporter needs a context of {SAMPLE_CACHED + SAMPLE_NEW} tokens to trace the model")
    with quietly(), blamed_on("the library's ONNX exporter does not take the model"):
        export(loaded.model, folder)
    stock_config(loaded.model.config).save_pretrained(folder)  # plain GPT-2's, which asks nobody to trust code
    stock_generation(loaded.model, loaded).save_pretrained(folder)
    (folder / "configuration_custom_gpt.py").unlink(missing_ok=True)
    save_tokenizer(loaded.tokenizer, folder)
    write_card(folder, loaded, options, "ONNX", USE, PAST_CONTEXT, NAMES, library="onnx")
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
    """Without what the exporter and torch have to say to their own developers; an error is raised all the same."""
    verbosity = library_logging.get_verbosity()
    library_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        library_logging.set_verbosity(verbosity)


def verify(folder: Path, source: Source, options: Options) -> str:
    """Run the graph in onnxruntime and compare logits with the model: whole contexts, with a cache, batches, padding.

    Raises:
        MissingEngineError: onnxruntime is not installed.
        UserError: something differs.
    """
    if absent := missing(["onnxruntime"], "onnx"):
        raise MissingEngineError(absent)
    import onnxruntime

    loaded = source.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    texts_encoded = check_written_tokenizer(folder, tokenizer)
    with blamed_on("onnxruntime does not load it"):
        session = onnxruntime.InferenceSession(str(folder / FILE))
    reference = in_float32(model)
    T = model.config.block_size
    half = max(1, T // 2)
    cases = [(1, 0, T, 0), (2, 0, half, half // 2), (3, half, T - half, 1), (1, T - 1, 1, 0)]
    results = [run_case(session, model, reference, *case) for case in cases if case[2]]
    worst = max(results, key=lambda found: found.largest)
    allowed = exact(worst) if model.dtype == torch.float32 else 0.02 * worst.spread
    check(worst, allowed, "the logits")
    everywhere = replace(worst, n_positions=sum(found.n_positions for found in results))
    words = everywhere.words("the logits")
    return f"by onnxruntime, with and without a cache, in batches of 1 to 3: {words}, {texts_encoded}"


@torch.inference_mode()
def run_case(
    session: "InferenceSession",
    model: CustomGPTForCausalLM,
    reference: CustomGPTForCausalLM,
    rows: int,
    cached: int,
    new: int,
    padding: int,
) -> Difference:
    """The difference of rows of `new` tokens behind `cached` ones, the first row with so much padding on the left."""
    ids = torch.randint(model.config.vocab_size, (rows, cached + new), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    expected = reference(ids, attention_mask=mask).logits  # (rows, cached + new, V)
    shape = (rows, model.config.n_head, 0, model.config.n_embd // model.config.n_head)
    kind = np.float16 if model.dtype == torch.float16 else np.float32
    states = [np.zeros(shape, kind)] * (2 * model.config.n_layer)
    first = max(cached, padding)
    parts = [(0, cached), (cached, cached + new)] if cached else [(0, new)]
    with blamed_on("onnxruntime does not run the graph"):
        for start, end in parts:
            names = [put.name for put in session.get_inputs()]
            values = [ids[:, start:end].numpy(), mask[:, :end].numpy(), *states]
            logits, *states = session.run(None, dict(zip(names, values, strict=True)))
    got = torch.from_numpy(logits.astype(np.float32))
    seen = slice(first - cached, None)
    return difference(expected[:, first:].flatten(0, 1), got[:, seen].flatten(0, 1))
