"""`torch.compile` and `torch.export` of the converted example."""

import shutil

import pytest
import torch
from transformers import CompileConfig, PreTrainedModel, StaticCache

from hf_model.tokenizer import format_prompt

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler on the CPU"
)
QUESTION = format_prompt("What is the capital of France?")


@needs_compiler
def test_decoding_with_a_static_cache_compiles_to_one_graph(model: PreTrainedModel, tokenizer) -> None:
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    expected = model(ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)  # raises where the graph breaks
    cache = StaticCache(config=model.config, max_cache_len=model.config.block_size)
    model(ids[:, :4], past_key_values=cache)
    with torch.no_grad():
        for position in range(4, ids.shape[1]):
            # The first step compiles, and the others must not.
            with torch.compiler.set_stance("default" if position == 4 else "fail_on_recompile"):
                step = compiled(
                    ids[:, position : position + 1],
                    position_ids=torch.tensor([[position]]),
                    past_key_values=cache,
                )
            torch.testing.assert_close(step.logits[:, -1], expected[:, position])


@needs_compiler
def test_compiled_generation_gives_the_same_tokens(model: PreTrainedModel, tokenizer) -> None:
    inputs = tokenizer(QUESTION, return_tensors="pt")
    greedy = {"do_sample": False, "max_new_tokens": 6, "cache_implementation": "static"}
    expected = model.generate(**inputs, **greedy, disable_compile=True)
    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # the library compiles by itself on accelerators only
    assert torch.equal(model.generate(**inputs, **greedy, compile_config=compile_config), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_an_exported_model_gives_the_same_logits_at_every_length(model: PreTrainedModel) -> None:
    ids = torch.randint(4, model.config.vocab_size, (2, 9))
    length = torch.export.Dim("length", max=model.config.block_size)
    exported = torch.export.export(
        model,
        (),
        kwargs={"input_ids": ids, "use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
    ).module()
    for n_tokens in (9, 2, model.config.block_size):
        ids = torch.randint(4, model.config.vocab_size, (2, n_tokens))
        torch.testing.assert_close(exported(input_ids=ids, use_cache=False).logits, model(ids).logits)
