"""Reads the model files of llm.c: a header of 256 int32 values, then GPT-2's tensors in one dtype, little-endian.

Source of the format: `write_model` in llm.c's train_gpt2.py. The embedding has rows of padding, and is the head too.
"""

import struct
import sys
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch

from hf_model.errors import UserError
from hf_model.trainers.architecture import Architecture
from hf_model.trainers.archive import Entry, map_file

MAGIC, HEADER_BYTES = 20240326, 1024
TOKENIZER = 20240328
DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by the version of the format
OTHERS = {20240520: "training data", 20240327: "debugging output", TOKENIZER: "a tokenizer"}
MAX_LAYERS = 10_000
LAYERED = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)


def is_model(head: bytes) -> bool:
    """Whether a file begins as llm.c's models do.

    Raises:
        UserError: it is another kind of llm.c's files.
    """
    magic = int.from_bytes(head[:4], "little")
    if magic in OTHERS:
        raise UserError(f"is {OTHERS[magic]} of llm.c, not a model")
    return magic == MAGIC


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The sizes, and the tensors under nanoGPT's names, mapped from the file.

    Raises:
        UserError: the version is unknown, or the file has another size than its header says.
    """
    with path.open("rb") as file:
        content = map_file(file)
    if len(content) < HEADER_BYTES:
        raise UserError("is damaged or was not written to its end")
    _, version, block_size, vocab_size, n_layer, n_head, n_embd, rows = struct.unpack("<8i", content[:32])
    if (dtype := DTYPES.get(version)) is None:
        raise UserError(f"is a model of llm.c in version {version}; versions {', '.join(map(str, DTYPES))} are read")
    if min(block_size, n_layer, n_head, n_embd, vocab_size) < 1 or vocab_size > rows or n_layer > MAX_LAYERS:
        raise UserError("is damaged: its header has impossible sizes")
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size, "vocab_size": rows}
    shapes = Architecture(**sizes, bias=True, dropout=0.0, tie_word_embeddings=True).shapes()
    blocks = [f"transformer.h.{layer}.{name}" for name in LAYERED for layer in range(n_layer)]
    names = [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        *blocks,
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    ]
    counts = [prod(shapes[name]) for name in names]
    if len(content) != HEADER_BYTES + sum(counts) * dtype.itemsize:
        raise UserError(
            f"is damaged or was not written to its end: it has {len(content):,} bytes, and its header says "
            f"{HEADER_BYTES + sum(counts) * dtype.itemsize:,}"
        )
    values = torch.frombuffer(Entry(content, HEADER_BYTES, len(content) - HEADER_BYTES).buffer(), dtype=dtype)
    if sys.byteorder == "big":
        values = values.clone()
        values.untyped_storage().byteswap(dtype)
    stops = accumulate(counts)
    tensors = {
        name: values[stop - count : stop].view(shapes[name])
        for name, count, stop in zip(names, counts, stops, strict=True)
    }
    # Rows of padding have no part in llm.c's softmax.
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:vocab_size]
    return sizes | {"vocab_size": vocab_size}, tensors
