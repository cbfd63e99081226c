"""A stock GPT-2 folder: loads as `GPT2LMHeadModel` wherever GPT-2 does, without custom code."""

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError
from hf_model.formats.cards import write_card
from hf_model.formats.target import (
    Options,
    blamed_on,
    check,
    check_written_tokenizer,
    difference,
    exact,
    in_float32,
    logits_of,
    n_compared,
    probe_ids,
    same_bits,
    save_weights,
)
from hf_model.loading import Loaded, Source, default_generation
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import save_tokenizer

TRANSPOSED = (
    ".c_attn.weight",
    ".c_proj.weight",
    ".c_fc.weight",
)  # Conv1D's (in, out), Linear's (out, in)

USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")

inputs = tokenizer({prompt}, return_tensors="pt")
output = model.generate(**inputs)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))
```"""
PAST_CONTEXT = (
    "A prompt and its answer end at {block_size} tokens: GPT-2 stops there with an IndexError or an assertion of the "
    "device, while the folder of custom code goes on with the last {block_size} tokens. `generation_config.json` ends "
    "`generate` at `max_length` {block_size}; whoever sets `max_new_tokens` keeps to it himself."
)


def write(loaded: Loaded, folder: Path, options: Options) -> list[str]:
    """Write the folder: configuration, weights, generation settings, tokenizer and card.

    Raises:
        OSError: the disk is full.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    stock = stock_model(model)
    stock.generation_config = stock_generation(model, loaded)
    save_weights(stock, folder, options.max_shard_size)
    save_tokenizer(tokenizer, folder)
    write_card(folder, loaded, options, "stock GPT-2, which needs no custom code", USE, PAST_CONTEXT)
    return []


def stock_config(config: CustomGPTConfig) -> GPT2Config:
    return GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
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
    """The state dict of `GPT2LMHeadModel`: projections transposed, biases of zero where the model has none."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        weights[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
        is_in_block = name.startswith(("transformer.h.", "transformer.ln_f."))
        if is_in_block and name.endswith(".weight") and not model.config.bias:
            weights[name.removesuffix("weight") + "bias"] = tensor.new_zeros(len(tensor))  # Linear's: (out, in)
    return weights


def stock_model(model: CustomGPTForCausalLM) -> GPT2LMHeadModel:
    """The same model as the library's GPT-2, to be saved; its buffers hold no values, so it cannot be run."""
    with torch.device("meta"):
        stock = GPT2LMHeadModel(stock_config(model.config))
    stock.load_state_dict(stock_weights(model), assign=True)
    stock.tie_weights()
    return stock


def stock_generation(model: CustomGPTForCausalLM, loaded: Loaded) -> GenerationConfig:
    """The model's own settings, ended at the context, which GPT-2 cannot pass; padding rows are never sampled."""
    generation = copy.deepcopy(model.generation_config)
    generation.max_new_tokens, generation.max_length = None, model.config.block_size
    if generation.suppress_tokens is None:
        generation.suppress_tokens = default_generation(loaded.tokenizer, model.config.vocab_size).suppress_tokens
    return generation


def verify(folder: Path, source: Source, options: Options) -> str:
    """Load the folder by the Auto classes, without custom code, and compare weights, logits and token ids.

    Raises:
        UserError: something differs.
    """
    loaded = source.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    with blamed_on("cannot be read back"):
        stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(stock, GPT2LMHeadModel) or stock.dtype != model.dtype:
        raise UserError(f"came back as {type(stock).__name__} in {stock.dtype}")
    texts_encoded = check_written_tokenizer(folder, tokenizer)
    written = stock.state_dict()
    expected = stock_weights(model)
    for name, tensor in expected.items():
        if name not in written or not same_bits(tensor, written[name]):
            raise UserError(f"{name} differs from {source.path}: the disk or the memory is faulty")

    ids, keep = probe_ids(model), n_compared(model)
    found = difference(logits_of(in_float32(model), ids, keep), logits_of(stock.float(), ids, keep))
    check(found, exact(found), "the logits")
    tensors = f"{len(expected)} tensors equal bit for bit{options.to_rounded()}"
    return f"{tensors}, {found.words('the logits')}, {texts_encoded}"


__all__ = ["stock_config", "stock_model", "verify", "write"]
