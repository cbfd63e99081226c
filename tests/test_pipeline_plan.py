"""The pipeline plan, followed as an engine like vLLM does: each stage keeps its modules, an identity is in the others'
place, and hidden states go from stage to stage as input embeddings."""

import copy

import torch
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from hf_model import CustomGPTConfig, CustomGPTForCausalLM


def test_two_stages_give_the_logits_of_the_whole_model() -> None:
    torch.manual_seed(0)
    config = CustomGPTConfig(vocab_size=97, block_size=32, n_layer=3, n_head=4, n_embd=32)
    model = CustomGPTForCausalLM(config).eval()
    input_ids = torch.randint(97, (2, 30))

    names = list(config.base_model_pp_plan)
    before, after = names[: names.index("h")], names[names.index("h") + 1 :]
    first, last = copy.deepcopy(model.transformer), copy.deepcopy(model)
    for stage, absent, absent_blocks in ((first, after, [2]), (last.transformer, before, [0, 1])):
        for name in absent:
            setattr(stage, name, PipelineIdentityLayer())
        for index in absent_blocks:
            stage.h[index] = PipelineIdentityLayer()

    hidden_states = first(input_ids).last_hidden_state
    assert torch.equal(last(inputs_embeds=hidden_states).logits, model(input_ids).logits)


def test_the_plan_names_every_part_of_the_model_in_the_order_of_the_data() -> None:
    config = CustomGPTConfig(vocab_size=97, block_size=32, n_layer=1, n_head=4, n_embd=32)
    model = CustomGPTForCausalLM(config)
    assert list(config.base_model_pp_plan) == [name for name, _ in model.transformer.named_children()]
    assert set(model.pp_plan) == {f"transformer.{name}" for name in config.base_model_pp_plan} | {"lm_head"}
