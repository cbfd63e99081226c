"""The library's other ways to decode, and its caches: the answers of plain greedy decoding, by another road."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation.continuous_batching.requests import RequestStatus

from hf_model.tokenizer import format_prompt

COUNTRIES = {"France": "Paris", "Bosnia and Herzegovina": "Sarajevo", "Peru": "Lima"}
SMALL = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # the default is sized for a GPU's memory


def prompt(tokenizer: PreTrainedTokenizerFast, country: str) -> torch.Tensor:
    return tokenizer(format_prompt("Name the capital of the country.", country), return_tensors="pt").input_ids


@pytest.fixture
def other(capitals: Path) -> PreTrainedModel:
    """A draft model that is right only now and then."""
    model = AutoModelForCausalLM.from_pretrained(capitals)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.6 * weight.std() * torch.randn_like(weight)
    return model


@pytest.mark.parametrize("country", COUNTRIES)
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 4},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": "other"},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=lambda how: next(iter(how.values())) if "cache_implementation" in how else next(iter(how)),
)
def test_the_answer_is_that_of_greedy_decoding(
    model: PreTrainedModel, other: PreTrainedModel, tokenizer, country: str, how: dict
) -> None:
    how = how | ({"assistant_model": other} if "assistant_model" in how else {})
    ids = prompt(tokenizer, country)
    output = model.generate(ids, do_sample=False, max_new_tokens=12, **how)
    assert tokenizer.decode(output[0, ids.shape[1] :]) == f" {COUNTRIES[country]}[EOS]"


@pytest.mark.parametrize("country", COUNTRIES)
def test_a_quantized_cache_keeps_the_answer(model: PreTrainedModel, tokenizer, country: str) -> None:
    pytest.importorskip("hqq", reason="hqq is not installed (the `ecosystem` extra)")
    ids = prompt(tokenizer, country)
    settings = {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "residual_length": 2, "q_group_size": 24}
    output = model.generate(
        ids, do_sample=False, max_new_tokens=12, cache_implementation="quantized", cache_config=settings
    )
    assert tokenizer.decode(output[0, ids.shape[1] :]) == f" {COUNTRIES[country]}[EOS]"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the library offloads a cache from a CUDA device only")
def test_an_offloaded_cache_keeps_the_answer(model: PreTrainedModel, tokenizer) -> None:
    ids = prompt(tokenizer, "France").cuda()
    output = model.cuda().generate(ids, do_sample=False, max_new_tokens=12, cache_implementation="offloaded")
    assert tokenizer.decode(output[0, ids.shape[1] :]) == " Paris[EOS]"


def test_continuous_batching_gives_every_request_its_answer(model: PreTrainedModel, tokenizer) -> None:
    prompts = [prompt(tokenizer, country)[0].tolist() for country in COUNTRIES]
    greedy = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id)
    outputs = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=SMALL)
    answers = {tuple(output.prompt_ids): tokenizer.decode(output.generated_tokens) for output in outputs.values()}
    assert [answers[tuple(ids)] for ids in prompts] == [f" {capital}[EOS]" for capital in COUNTRIES.values()]


def test_continuous_batching_ends_a_request_at_the_context_and_says_so(model: PreTrainedModel, tokenizer) -> None:
    ids = prompt(tokenizer, "France")[0].tolist()
    endless = GenerationConfig(do_sample=False, max_new_tokens=100, eos_token_id=-1)
    (output,) = model.generate_batch([ids], generation_config=endless, continuous_batching_config=SMALL).values()
    assert output.status == RequestStatus.FAILED
    assert output.error == "Position 64 is past the 64 learned positions (block_size)."
    assert len(output.generated_tokens) == 64 - len(ids) + 1  # what it had until then
