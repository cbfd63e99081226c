"""One GGUF file for llama.cpp and the programs built on it: weights, tokenizer, chat template."""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError, one_line
from hf_model.formats import ollama
from hf_model.formats.cards import code, write_card
from hf_model.formats.comparison import check_ids, compare, compared_with, reference_logits
from hf_model.formats.gguf_tokenizer import GgufTokenizer, to_gguf
from hf_model.formats.target import (
    TANH_GELU,
    MissingEngineError,
    Options,
    check_plain_gpt2,
    engine_errors,
    require,
    with_usual_scale,
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
# llama.cpp's GPT-2 always computes the tanh form of GELU.
GELU = ("gelu", "gelu_python", *TANH_GELU)
# Allowed difference, as a share of the spread. llama.cpp rounds activations too: to half precision in its GELU, to the
# matrices' type in products. Measured: 0.002, 0.004 and 0.1; and 0.2 to 2 for a wrong file with half of the heads.
ALLOWED = {"f32": 0.01, "f16": 0.02, "q8_0": 0.15}
GGUF_DTYPES = {torch.float32: "f32", torch.float16: "f16"}
# Texts that byte-level tokenizers split differently: spaces, contractions, numbers, scripts, emoji, control characters.
TORTURE = [
    *["", " ", "  ", "\n", "\n\n  \n", "\t tab", " leading", "trailing ", "a  b   c    d", "\u00a0\u2003\u3000x"],
    *["I'm you're he'll we've I'd can't DON'T 'twas ''s", "x'S x'T", "1234567890", "3.14e-10", "½ ² ٣ Ⅷ ௧", "\r\n"],
    *["日本語のテキスト。", "한국어 텍스트", "ไทย ภาษา", "हिन्दी में", "עברית", "e\u0301 cafe\u0301 café"],
    *["ﬁ ﬀ ŉ ß ẞ İ \u0131"],
    *["👩\u200d👩\u200d👧 🏳️\u200d🌈 🇫🇷", "\0\x01\x1f\x7f\x80", "\ufeffbom\ufffd", "\U0001d573\U0001d58a 𐍈 \U0010ffff"],
    *["if (a<=b) { return !c; } // {{x}}", "<|endoftext|>", "[UNK][PAD]x[EOS]y", "[BOS]x", "[EO S] [bos]", "a" * 300],
]

# `--ctx-size 0` is the context that the file names.
TRY_IT = """\
llama-server --model {file} --ctx-size 0 --jinja
ollama create {name} -f {modelfile} && ollama run {name} {prompt}"""
TRY_IT_RAW = """\
llama-server --model {file} --ctx-size 0
curl http://localhost:8080/v1/completions -H "Content-Type: application/json" -d {request}
ollama create {name} -f {modelfile} && ollama run {name} {prompt}"""
USE = """\
In this folder:

```console
$ llama-server --model {{ file }} --ctx-size 0{% if takes_instructions %} --jinja{% endif %}
$ ollama create my-model -f Modelfile && ollama run my-model
```

```python
from llama_cpp import Llama  # pip install llama-cpp-python

llama = Llama("{{ file }}", n_ctx=0)
{% if takes_instructions -%}
messages = [{"role": "user", "content": {{ prompt }}}]
print(llama.create_chat_completion(messages)["choices"][0]["message"]["content"])
{%- else -%}
print(llama({{ prompt }}, max_tokens={{ block_size }} // 2)["choices"][0]["text"])
{%- endif %}
```
{%- if can_be_quantized %}

For a smaller file with weights of about 4 bits (compare its answers with this one's):

```console
$ llama-quantize {{ file }} model-q4_k_m.gguf Q4_K_M
```
{%- endif %}"""
PAST_CONTEXT = (
    "A prompt and its answer must fit in {block_size} tokens, the number of learned positions: past them llama.cpp "
    "ends its process. (The folder for transformers goes on with the last {block_size} tokens.) llama.cpp rounds the "
    "context up to a multiple of 256: if {block_size} is no such multiple, `max_tokens` must limit the answer."
)
TWICE = (
    "llama.cpp puts {bos} in front of a text, as `tokenizer(text)` does. Do not begin a text with it yourself, or the "
    "model reads it twice."
)


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write `model-TYPE.gguf`, the Modelfile for Ollama and the card.

    Raises:
        UserError: the package `gguf` is not installed, or llama.cpp cannot express the model or its tokenizer.
        OSError: the disk is full.
    """
    model, file = loaded.model, file_name(options)
    check_supported(model, options.gguf_type)
    require(["gguf"], "gguf")
    tokenizer = to_gguf(loaded.tokenizer, model.config.vocab_size)
    with engine_errors("the package gguf cannot write the model", folder):
        write_file(folder / file, model, options.gguf_type, tokenizer, one_line(options.card.title))
    text = ollama.modelfile(file, model, loaded.tokenizer, tokenizer.adds_bos)
    (folder / ollama.FILE).write_text(text, encoding="utf-8")
    notes = [*tokenizer.notes, *gelu_notes(model)]
    bos = [TWICE.format(bos=code(loaded.tokenizer.bos_token))] if tokenizer.adds_bos else []
    write_card(
        folder,
        loaded,
        options.card,
        what=f"to GGUF ({options.gguf_type})",
        library="gguf",
        use=USE,
        notes=[PAST_CONTEXT.format(block_size=model.config.block_size), *bos, *notes],
        file=file,
        block_size=model.config.block_size,
        quantized=""
        if options.gguf_type in ("f32", GGUF_DTYPES.get(model.dtype))
        else f"rounded to {options.gguf_type}",
        can_be_quantized=options.gguf_type != "q8_0",
    )
    return [f"note: {note}" for note in notes]


def file_name(options: Options) -> str:
    return f"model-{options.gguf_type}.gguf"


def check_supported(model: CustomGPTForCausalLM, gguf_type: str) -> None:
    """Check that llama.cpp's GPT-2 can hold and compute this model.

    Raises:
        UserError: it does not know the activation, cannot pack the width, or the type cannot hold the values.
    """
    config = model.config
    check_plain_gpt2(config, "llama.cpp's GPT-2", activations=GELU)
    widths = (config.n_embd, config.n_inner or 4 * config.n_embd)
    if gguf_type == "q8_0" and (odd := [width for width in widths if width % 32]):
        raise UserError(f"q8_0 packs 32 values, and this model is {odd[0]} wide: use --gguf_type f16")
    if gguf_type == "f16":
        limit = torch.finfo(torch.float16).max
        for name, tensor in model.state_dict().items():
            if tensor.isfinite().all() and tensor.abs().max() > limit:
                raise UserError(f"{name} has values past float16's {limit:.0f}: use --gguf_type f32 or q8_0")


def gelu_notes(model: CustomGPTForCausalLM) -> list[str]:
    """For a model with the exact GELU: how much llama.cpp's GELU changes, measured."""
    if model.config.activation_function in TANH_GELU:
        return []
    exact, tanh = (reference_logits(model, activation)[1].log_softmax(-1) for activation in (None, "gelu_pytorch_tanh"))
    found = compare("log-probabilities", exact, tanh)
    return [
        "llama.cpp's GELU is the tanh form, and this model's is the exact one. By this alone, log-probabilities "
        f"differ by up to {found.largest:.1e} (their standard deviation is {found.spread:.2g})."
    ]


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor of the state dict.

    >>> gguf_name("transformer.h.3.attn.c_attn.weight")
    'blk.3.attn_qkv.weight'
    """
    module, _, kind = name.rpartition(".")
    if module.startswith("transformer.h."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def write_file(
    path: Path, model: CustomGPTForCausalLM, gguf_type: str, tokenizer: GgufTokenizer | None, name: str = "model"
) -> None:
    """Write the file. Without a tokenizer, llama.cpp takes ids only."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "gpt2")
    _add_sizes(writer, model.config, gguf_type, name)
    if tokenizer is None:
        writer.add_vocab_size(model.config.vocab_size)
        writer.add_tokenizer_model("none")
    else:
        _add_tokenizer(writer, tokenizer)
    for tensor_name, tensor in _tensors(model).items():
        values = tensor.float().numpy()
        # llama.cpp takes positions and vectors in float32 only, because it adds them to float32.
        is_matrix = tensor.ndim == 2 and "wpe" not in tensor_name
        _add_tensor(writer, gguf_name(tensor_name), values, gguf_type if is_matrix else "f32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    (file,) = writer.fout or []
    size = file.tell()
    writer.close()
    if path.stat().st_size != size:  # NumPy ignores the error of a last small write to a full disk
        raise OSError(f"{path.name} is incomplete")


def _add_sizes(writer: "GGUFWriter", config: CustomGPTConfig, gguf_type: str, name: str) -> None:
    from gguf import LlamaFileType

    file_types = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
    writer.add_name(name)
    writer.add_file_type(file_types[gguf_type])
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    if tokenizer.model == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(tokenizer.merges)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    for kind, token_id in tokenizer.special.items():
        getattr(writer, f"add_{kind}_token_id")(token_id)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: CustomGPTForCausalLM) -> dict[str, torch.Tensor]:
    """The state dict with a bias for each weight of the blocks. A tied head is left out: llama.cpp ties it itself."""
    tensors = dict(with_usual_scale(model).state_dict())
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
    """Run the file in llama.cpp, and compare its log-probabilities with the source's model with the tanh GELU.

    The ids of many texts are compared too.

    Raises:
        MissingEngineError: llama-cpp-python is not installed.
        UserError: something differs, or llama.cpp rejects the file.
    """
    require(["llama_cpp"], "gguf", MissingEngineError)
    loaded = source.load()
    activation = None if loaded.model.config.activation_function in TANH_GELU else "gelu_pytorch_tanh"
    ids, expected = reference_logits(loaded.model, activation)
    texts = [*probes(loaded.tokenizer), *([] if is_of_characters(loaded.tokenizer) else TORTURE)]
    logits, encoded = run_llama_cpp(folder / file_name(options), ids[0].tolist(), len(expected), texts)
    same_texts = check_ids(source.find_tokenizer(), texts, encoded)
    got = torch.from_numpy(logits).log_softmax(-1)
    found = compare("the log-probabilities", expected.log_softmax(-1), got)
    found.check(ALLOWED[options.gguf_type] * found.spread)
    return f"by llama.cpp, {compared_with(source)}{found}, {same_texts}"


def run_llama_cpp(path: Path, ids: list[int], n_last: int, texts: list[str]) -> tuple[np.ndarray, list[list[int]]]:
    """Logits of the last positions, of shape (n_last, V), and each text's ids.

    llama.cpp ends its own process when it rejects a file, so it runs in a child process.

    Raises:
        UserError: llama.cpp ended its process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch) / "request.json", Path(scratch) / "logits.npy"
        request.write_text(json.dumps({"path": str(path.absolute()), "ids": ids, "n_last": n_last, "texts": texts}))
        # The child runs the source of `answer_request` and nothing else: importing this package would take seconds.
        program = f"{inspect.getsource(answer_request)}\nanswer_request({str(request)!r}, {str(answer)!r})"
        command = [sys.executable, "-c", program]
        process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if process.returncode:
            lines = [
                line for line in process.stderr.splitlines() if re.search("error|assert|fail", line, re.IGNORECASE)
            ]
            reason = one_line(" ".join(lines[-2:]), 300)
            raise UserError(f"{path.name}: llama.cpp ended with status {process.returncode} ({reason})")
        return np.load(answer), json.loads(process.stdout.splitlines()[-1])


def answer_request(request_path: str, answer_path: str) -> None:
    """The child process of `run_llama_cpp`: it imports all that it uses."""
    import json
    from pathlib import Path

    import llama_cpp
    import numpy as np

    request = json.loads(Path(request_path).read_text())
    llama = llama_cpp.Llama(
        request["path"],
        n_ctx=len(request["ids"]),
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,  # otherwise keys and values are rounded to half precision
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    llama.eval(request["ids"])
    np.save(answer_path, llama.scores[: len(request["ids"])][-request["n_last"] :])
    print(json.dumps([llama.tokenize(text.encode(), add_bos=True, special=True) for text in request["texts"]]))
