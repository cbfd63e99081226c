"""A stock GPT-2 folder, which `GPT2LMHeadModel` loads without custom code wherever GPT-2 loads."""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, GPT2Config, GPT2LMHeadModel

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError
from hf_model.folder import read_weights
from hf_model.formats.cards import GENERATE, write_card
from hf_model.formats.comparison import (
    check_tokenizer_files,
    compare,
    compared_with,
    equal_tensors,
    logits_of,
    reference_logits,
    same_bits,
)
from hf_model.formats.target import (
    Options,
    check_plain_gpt2,
    engine_errors,
    save_model,
    with_usual_scale,
    write_tokenizer,
)
from hf_model.loading import Loaded, Source
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import unused_ids

TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # Conv1D has (in, out), Linear (out, in)

TRY_IT = """\
pip install "transformers[serving]" && transformers serve {folder}"""
TRY_IT_RAW = f"""{TRY_IT}
curl http://localhost:8000/v1/completions -H "Content-Type: application/json" -d {{request}}"""
USE = f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({{{{ name }}}})
tokenizer = AutoTokenizer.from_pretrained({{{{ name }}}})

{GENERATE}
```"""
PAST_CONTEXT = (
    "A prompt and its answer end at {block_size} tokens: past them GPT-2 raises an IndexError, or an assertion on a "
    "GPU. (The folder for transformers goes on with the last {block_size} tokens.) `generation_config.json` stops "
    "`generate` at `max_length` {block_size}. If you set `max_new_tokens`, stay within that length."
)


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write configuration, weights, generation settings, tokenizer and card.

    Raises:
        UserError: GPT-2 cannot hold the model.
        OSError: the disk is full.
    """
    check_plain_gpt2(loaded.model.config, "stock GPT-2")
    stock = stock_model(loaded.model)
    stock.generation_config = stock_generation(loaded)
    save_model(stock, folder, options.max_shard_size)
    write_tokenizer(loaded.tokenizer, folder)
    notes = [PAST_CONTEXT.format(block_size=loaded.model.config.block_size)]
    what = "to stock GPT-2, which needs no custom code,"
    write_card(folder, loaded, options.card, what=what, library="transformers", use=USE, notes=notes)
    return []


def stock_config(config: CustomGPTConfig) -> GPT2Config:
    return GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.n_inner,
        activation_function=config.activation_function,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        resid_pdrop=config.dropout,
        layer_norm_epsilon=config.layer_norm_epsilon,
        initializer_range=config.initializer_range,
        use_cache=config.use_cache,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=config.dtype,
    )


def stock_weights(model: CustomGPTForCausalLM) -> dict[str, torch.Tensor]:
    """The state dict of `GPT2LMHeadModel`: projections transposed, and biases of zero where the model has none."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in with_usual_scale(model).state_dict().items():
        weights[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
        is_in_block = name.startswith(("transformer.h.", "transformer.ln_f."))
        if is_in_block and name.endswith(".weight") and not model.config.bias:
            weights[name.removesuffix("weight") + "bias"] = tensor.new_zeros(len(tensor))  # (out,)
    return weights


def stock_model(model: CustomGPTForCausalLM) -> GPT2LMHeadModel:
    """The library's GPT-2 with the model's weights."""
    return _with_weights(stock_config(model.config), stock_weights(model))


def _with_weights(config: GPT2Config, weights: dict[str, torch.Tensor]) -> GPT2LMHeadModel:
    """A GPT-2 in evaluation mode that uses these tensors.

    Not made by `from_pretrained`, which sets torch's default dtype for the other threads too.
    """
    with torch.device("meta"):
        stock = GPT2LMHeadModel(config)
    if config.tie_word_embeddings:
        weights = weights | {"lm_head.weight": weights["transformer.wte.weight"]}
    stock.load_state_dict(weights, assign=True)
    stock.tie_weights()
    return stock.eval()


def stock_generation(loaded: Loaded) -> GenerationConfig:
    """The model's own settings, but `generate` stops at the context, and never samples padding rows."""
    config = loaded.model.config
    generation = copy.deepcopy(loaded.model.generation_config)
    generation.max_new_tokens, generation.max_length = None, config.block_size
    if generation.suppress_tokens is None:
        generation.suppress_tokens = unused_ids(loaded.tokenizer, config.vocab_size) or None
    return generation


def verify(folder: Path, source: Source, options: Options) -> str:
    """Load the folder as the library's GPT-2, and compare weights, logits and token ids.

    Raises:
        UserError: something differs.
    """
    model = source.load().model
    with engine_errors("cannot be read back"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        stock = _with_weights(config, read_weights(folder))
    if (config.model_type, config.dtype, stock.dtype) != ("gpt2", model.dtype, model.dtype):
        raise UserError(f"was read back as {config.model_type} in {stock.dtype}")
    texts = check_tokenizer_files(folder, source)
    written, expected = stock.state_dict(), stock_weights(model)
    for name, tensor in expected.items():
        if name not in written or not same_bits(tensor, written[name]):
            raise UserError(f"{name} differs from {source.path}: the disk or the memory is faulty")
    ids, logits = reference_logits(model)
    found = compare("the logits", logits, logits_of(stock.float(), ids, len(logits)))
    found.check(found.rounding)
    return f"{compared_with(source)}{equal_tensors(len(expected), options.card.rounded)}, {found}, {texts}"
