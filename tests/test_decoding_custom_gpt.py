"""The lean step of `generate` gives the plain step's bits, and gives way wherever it could not."""

import threading
from typing import Any

import pytest
import torch

from hf_model import CustomGPTConfig, CustomGPTForCausalLM
from hf_model.decoding_custom_gpt import LeanForward

CONTEXT = 64


def model_of(**config: Any) -> CustomGPTForCausalLM:
    torch.manual_seed(0)
    model = CustomGPTForCausalLM(
        CustomGPTConfig(n_layer=3, n_head=4, n_embd=64, vocab_size=500, block_size=CONTEXT, **config)
    ).eval()
    for parameter in model.parameters():  # far from the initial values, so that attention is not uniform
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each cache that the lean step takes over."""
    taken: list[int] = []
    adopt = LeanForward.adopt
    monkeypatch.setattr(LeanForward, "adopt", lambda self, cache: (taken.append(1), adopt(self, cache))[1])
    return taken


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch):
    def generate(model: CustomGPTForCausalLM, ids: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
        """What `generate` returns by plain steps, and by lean ones, from the same generator state."""
        outputs = []
        for plain in ("1", ""):
            monkeypatch.setenv("CUSTOM_GPT_PLAIN_DECODE", plain)
            torch.manual_seed(3)
            outputs.append(
                model.generate(ids, return_dict_in_generate=True, output_logits=True, pad_token_id=1, **kwargs)
            )
        return outputs[0], outputs[1]

    return generate


def prompts(rows: int = 1, length: int = 9) -> torch.Tensor:
    return torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_cache_are_the_plain_steps_bit_for_bit(both_ways, steps, bias, activation, dtype):
    model = model_of(bias=bias, activation_function=activation).to(dtype)
    plain, lean = both_ways(model, prompts(), max_new_tokens=40, do_sample=False)
    assert torch.equal(lean.sequences, plain.sequences)
    assert all(torch.equal(one, other) for one, other in zip(lean.logits, plain.logits, strict=True))
    for one, other in zip(lean.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    assert len(steps) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 40, "do_sample": True, "top_k": 20, "repetition_penalty": 1.3},
        {"max_new_tokens": 100, "do_sample": True},  # past the context
        {"max_new_tokens": 20, "do_sample": True, "num_return_sequences": 3},
    ],
)
def test_sampled_tokens_are_the_plain_steps(both_ways, steps, options):
    plain, lean = both_ways(model_of(), prompts(), **options)
    assert torch.equal(lean.sequences, plain.sequences)
    assert steps


def test_padded_rows_get_the_plain_steps_tokens(both_ways, steps):
    ids = prompts(rows=3)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    plain, lean = both_ways(model_of(), ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    assert torch.equal(lean.sequences, plain.sequences)
    assert all(torch.equal(one, other) for one, other in zip(lean.logits, plain.logits, strict=True))
    assert steps


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
)
def test_anything_unusual_is_left_to_the_plain_step(both_ways, steps, options):
    plain, lean = both_ways(model_of(), prompts(), max_new_tokens=10, do_sample=False, **options)
    assert torch.equal(lean.sequences, plain.sequences)
    assert not steps


def test_a_model_with_a_hook_is_left_to_the_plain_step(steps):
    model = model_of()
    calls: list[int] = []
    model.transformer.h[0].register_forward_hook(lambda *args: calls.append(1))
    model.generate(prompts(), max_new_tokens=5, do_sample=False)
    assert (len(calls), steps) == (5, [])


def test_changed_weights_are_seen_by_the_next_call(both_ways):
    model = model_of()
    first, _ = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
    model.lm_head.weight.data = -model.lm_head.weight.data
    plain, lean = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
    assert torch.equal(lean.sequences, plain.sequences)
    assert not torch.equal(lean.sequences, first.sequences)


def test_generation_goes_on_from_a_returned_cache():
    model = model_of()
    half = model.generate(prompts(), max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(half.sequences, past_key_values=half.past_key_values, max_new_tokens=10, do_sample=False)
    assert torch.equal(rest, model.generate(prompts(), max_new_tokens=20, do_sample=False))


def test_going_on_past_the_context_with_new_ids_alone_is_a_clear_error():
    model = model_of()
    half = model.generate(prompts(), max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    ids = half.sequences
    with pytest.raises(ValueError, match="past the 64 learned positions"):
        model.generate(
            ids[:, -1:],
            attention_mask=torch.ones_like(ids),
            past_key_values=half.past_key_values,
            max_new_tokens=CONTEXT,
            do_sample=False,
        )


def test_embeddings_given_with_their_ids_are_counted_once(both_ways):
    model = model_of()
    ids = prompts(length=40)
    embeds = model.get_input_embeddings()(ids)
    alone, _ = both_ways(model, ids, max_new_tokens=40, do_sample=False)
    model.generation_config.pad_token_id = 1
    both = model.generate(ids, inputs_embeds=embeds, max_new_tokens=40, do_sample=False)
    assert torch.equal(both[0, -40:], alone.sequences[0, -40:])


def test_threads_get_what_they_get_alone_and_leave_the_model_as_it_was():
    model = model_of()
    alone = [model.generate(prompts(length=5 + i), max_new_tokens=20, do_sample=False) for i in range(4)]
    together: dict[int, torch.Tensor] = {}

    def run(i: int) -> None:
        together[i] = model.generate(prompts(length=5 + i), max_new_tokens=20, do_sample=False)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[i], alone[i]) for i in range(4))
    assert not {"forward", "prepare_inputs_for_generation"} & vars(model).keys()
