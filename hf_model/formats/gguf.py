"""One GGUF file for llama.cpp and the programs built on it: weights, vocabulary, chat template."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError, one_line
from hf_model.formats.cards import write_card
from hf_model.formats.gguf_vocabulary import Vocabulary, express
from hf_model.formats.target import (
    TANH_GELU,
    MissingEngineError,
    Options,
    check,
    check_ids,
    difference,
    encode,
    in_float32,
    logits_of,
    missing,
    n_compared,
    probe_ids,
    require,
)
from hf_model.loading import Loaded, Source
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import is_of_characters, probes

if TYPE_CHECKING:
    from gguf import GGUFWriter

NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# llama.cpp's GPT-2 computes the tanh form of GELU, whatever a file says.
GELU = ("gelu", "gelu_python", *TANH_GELU)
# What is allowed, of the spread. llama.cpp rounds activations too: to half precision in its GELU, to the matrices' type
# in products. Measured: 0.002, 0.004 and 0.1; with half of the heads, 0.2 to 2.
ALLOWED = {"f32": 0.01, "f16": 0.02, "q8_0": 0.15}
# Texts on which byte-level tokenizers part: spaces, contractions, scripts, combining marks, emoji, control characters.
TORTURE = [
    *[
        "",
        " ",
        "  ",
        "\n",
        "\n\n  \n",
        "\t tab",
        " leading",
        "trailing ",
        "a  b   c    d",
        "\r\n",
        "\u00a0\u2003\u3000x",
    ],
    *["I'm you're he'll we've I'd can't DON'T 'twas ''s", "x'S x'T", "1234567890", "3.14e-10", "½ ² ٣ Ⅷ ௧"],
    *[
        "日本語のテキスト。",
        "한국어 텍스트",
        "ไทย ภาษา",
        "हिन्दी में",
        "עברית",
        "e\u0301 cafe\u0301 café",
        "ﬁ ﬀ ŉ ß ẞ İ \u0131",
    ],
    *[
        "👩\u200d👩\u200d👧 🏳️\u200d🌈 🇫🇷",
        "\u0000\u0001\u001f\u007f\u0080",
        "\ufeffbom\ufffd",
        "\U0001d573\U0001d58a 𐍈 \U0010ffff",
    ],
    *["if (a<=b) { return !c; } // {{x}}", "<|endoftext|>", "[UNK][PAD]x[EOS]y", "[BOS]x", "[EO S] [bos]", "a" * 300],
]

USE = """\
```console
$ llama-server --model {file} --ctx-size {block_size} --jinja
```

```python
from llama_cpp import Llama  # pip install llama-cpp-python

llama = Llama("{file}", n_ctx={block_size})
messages = [{{"role": "user", "content": "What is the capital of France?"}}]
print(llama.create_chat_completion(messages)["choices"][0]["message"]["content"])
```"""
USE_RAW = """\
```python
from llama_cpp import Llama  # pip install llama-cpp-python

llama = Llama("{file}", n_ctx={block_size})
print(llama({prompt}, max_tokens={block_size} // 2)["choices"][0]["text"])
```"""
PAST_CONTEXT = (
    "A prompt and its answer must fit in {block_size} tokens: the learned positions end there. llama.cpp does not go "
    "on with the last tokens, as the folder for transformers does. It ends its process past the positions, and it "
    "rounds `n_ctx` up to a multiple of 256: where {block_size} is none, `max_tokens` must hold the answer back."
)
TWICE = (
    "llama.cpp puts `{bos}` in front of a text by itself, as `tokenizer(text)` does: a text that begins with it gets a "
    "second one. Leave it out (the chat interface does)."
)


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write `model-TYPE.gguf` and its card.

    Raises:
        UserError: the package `gguf` is not installed, or llama.cpp cannot express the model or its tokenizer.
    """
    require(["gguf"], "gguf")
    model, tokenizer = loaded.model, loaded.tokenizer
    check_expressible(model, options.gguf_type)
    vocabulary = express(tokenizer, model.config.vocab_size)
    write_file(folder / file_name(options), model, options.gguf_type, vocabulary, options.card.title)
    notes = [*vocabulary.notes, gelu_note(model)]
    bos = TWICE.replace("{bos}", tokenizer.bos_token) if vocabulary.adds_bos else ""
    use = (USE if vocabulary.chat_template else USE_RAW).replace("{file}", file_name(options))
    library = "gguf"
    write_card(folder, loaded, options, f"GGUF ({options.gguf_type})", use, PAST_CONTEXT, bos, *notes, library=library)
    return [f"note: {note}" for note in notes if note]


def file_name(options: Options) -> str:
    return f"model-{options.gguf_type}.gguf"


def check_expressible(model: CustomGPTForCausalLM, gguf_type: str) -> None:
    """Check that llama.cpp's GPT-2 is this model.

    Raises:
        UserError: it has another activation, a width that the type cannot pack, or values that it cannot hold.
    """
    config = model.config
    if config.activation_function not in GELU:
        raise UserError(
            f"llama.cpp's GPT-2 has a GELU only, and this model's activation is {config.activation_function}"
        )
    if gguf_type == "q8_0" and config.n_embd % 32:
        raise UserError(f"q8_0 packs 32 values, and this model is {config.n_embd} wide: use --gguf_type f16")
    if gguf_type == "f16":
        limit = torch.finfo(torch.float16).max
        for name, tensor in model.state_dict().items():
            if tensor.isfinite().all() and tensor.abs().max() > limit:
                raise UserError(f"{name} has values past float16's {limit:.0f}: use --gguf_type f32 or q8_0")


def gelu_note(model: CustomGPTForCausalLM) -> str:
    """What llama.cpp's GELU makes of a model with the exact one, measured; "" for a model with the tanh form."""
    if model.config.activation_function in TANH_GELU:
        return ""
    ids, keep = probe_ids(model), n_compared(model)
    erf, tanh = (logits_of(in_float32(model, act), ids, keep) for act in (None, "gelu_pytorch_tanh"))
    found = difference(erf.log_softmax(-1), tanh.log_softmax(-1))
    return (
        "llama.cpp's GELU is the tanh form, and this model's the exact one: for that alone, log-probabilities differ "
        f"by up to {found.largest:.1e} (their standard deviation is {found.spread:.2g})"
    )


def gguf_name(name: str) -> str:
    """The name of a tensor of the state dict in GGUF.

    >>> gguf_name("transformer.h.3.attn.c_attn.weight")
    'blk.3.attn_qkv.weight'
    """
    module, _, kind = name.rpartition(".")
    if module.startswith("transformer.h."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def write_file(
    path: Path, model: CustomGPTForCausalLM, gguf_type: str, vocabulary: Vocabulary | None, name: str = "model"
) -> None:
    """Write the file; without a vocabulary, llama.cpp takes ids alone."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "gpt2")
    _add_sizes(writer, model.config, gguf_type, name)
    if vocabulary is None:
        writer.add_vocab_size(model.config.vocab_size)
        writer.add_tokenizer_model("none")
    else:
        _add_vocabulary(writer, vocabulary)
    for tensor_name, tensor in _tensors(model).items():
        values = tensor.float().numpy()
        # Positions and vectors are added to what is float32: llama.cpp takes them as such only.
        is_matrix = tensor.ndim == 2 and "wpe" not in tensor_name
        _add_tensor(writer, gguf_name(tensor_name), values, gguf_type if is_matrix else "f32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: "GGUFWriter", config: CustomGPTConfig, gguf_type: str, name: str) -> None:
    from gguf import LlamaFileType

    file_types = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
    writer.add_name(name)
    writer.add_file_type(file_types[gguf_type])
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _add_vocabulary(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.model == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(vocabulary.merges)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    adders: dict[str, Any] = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for kind, token_id in vocabulary.special.items():
        adders[kind](token_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _tensors(model: CustomGPTForCausalLM) -> dict[str, torch.Tensor]:
    """The state dict with a bias for everything in the blocks; a tied head is left out, and llama.cpp ties it."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, tensor in list(tensors.items()):
        if name.startswith(("transformer.h.", "transformer.ln_f.")):
            tensors.setdefault(name.replace(".weight", ".bias"), tensor.new_zeros(len(tensor)))
    return tensors


def _add_tensor(writer: "GGUFWriter", name: str, values: np.ndarray, gguf_type: str) -> None:
    from gguf import GGMLQuantizationType, quants

    if gguf_type == "f32":
        writer.add_tensor(name, values)
        return
    kind = GGMLQuantizationType[gguf_type.upper()]
    writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)


def verify(folder: Path, source: Source, options: Options) -> str:
    """Run the file in llama.cpp, and compare log-probabilities with the model of the tanh GELU, and ids of many texts.

    Raises:
        MissingEngineError: llama-cpp-python is not installed.
        UserError: something differs, or llama.cpp does not take the file.
    """
    if absent := missing(["llama_cpp"], "gguf"):
        raise MissingEngineError(absent)
    loaded = source.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    activation = None if model.config.activation_function in TANH_GELU else "gelu_pytorch_tanh"
    ids, keep = probe_ids(model), n_compared(model)
    expected = logits_of(in_float32(model, activation), ids, keep).log_softmax(-1)
    texts = [*probes(tokenizer), *([] if is_of_characters(tokenizer) else TORTURE)]
    logits, encoded = run_llama_cpp(folder / file_name(options), ids[0].tolist(), keep, texts)
    for text, got in zip(texts, encoded, strict=True):
        check_ids(text, encode(tokenizer, text), got)
    found = difference(expected, torch.from_numpy(logits).log_softmax(-1))
    check(found, ALLOWED[options.gguf_type] * found.spread, "the log-probabilities")
    return f"by llama.cpp: {found.words('the log-probabilities')}, {len(texts)} texts encoded the same"


def run_llama_cpp(path: Path, ids: list[int], keep: int, texts: list[str]) -> tuple[np.ndarray, list[list[int]]]:
    """Logits of the last `keep` positions, of shape (keep, V), and each text's ids.

    In a process of its own: llama.cpp answers what it does not like by ending the process.

    Raises:
        UserError: it did.
    """
    program = Path(__file__).with_name("run_llama_cpp.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch) / "request.json", Path(scratch) / "logits.npy"
        request.write_text(json.dumps({"path": str(path.absolute()), "ids": ids, "keep": keep, "texts": texts}))
        # Not as a script: this folder would come first in its path, with a gguf.py that is not the package.
        command = [sys.executable, "-c", program, str(request), str(answer)]
        process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if process.returncode:
            lines = [
                line for line in process.stderr.splitlines() if re.search("error|assert|fail", line, re.IGNORECASE)
            ]
            raise UserError(
                f"{path.name}: llama.cpp ended with status {process.returncode} ({one_line(' '.join(lines[-2:]), 300)})"
            )
        return np.load(answer), json.loads(process.stdout.splitlines()[-1])
