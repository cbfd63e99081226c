"""The stock `generate` draws the tokens that the original's sampling loop draws under the same generator state."""

import pytest
import torch
from tokenizers import Tokenizer

from examples.plain_gpt import GPT, GPTConfig
from hf_model import CustomGPTForCausalLM, generation, loading
from tests.tiny import BOS, CHECKPOINT, EOS, PAD, SIZES, TOKENIZER, gpt, twin


def generated(model: GPT | CustomGPTForCausalLM, prompt: torch.Tensor, seed: int, **how) -> list[int]:
    """The original's arguments for either model: temperature, top_k, repetition_penalty, max_new_tokens, eos_id."""
    torch.manual_seed(seed)
    if isinstance(model, CustomGPTForCausalLM):
        how |= {"eos_token_id": how.pop("eos_id", None), "pad_token_id": PAD}
        how |= {"do_sample": True} if how["temperature"] else {"do_sample": False, "temperature": None}
    return model.generate(prompt, **how)[0].tolist()


def prompt_of(length: int) -> torch.Tensor:
    return torch.cat([torch.tensor([[BOS]]), torch.randint(4, SIZES["vocab_size"], (1, length - 1))], dim=1)


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.15, 1.5])
@pytest.mark.parametrize("top_k", [0, 1, 10, 50, 1000])
@pytest.mark.parametrize("temperature", [0.2, 0.8, 1.5])
def test_samples_the_same_tokens(temperature: float, top_k: int, repetition_penalty: float) -> None:
    original = gpt()
    model = twin(original)
    how = {"temperature": temperature, "top_k": top_k, "repetition_penalty": repetition_penalty, "max_new_tokens": 12}
    for seed in (0, 1, 1337):
        prompt = prompt_of(4)
        assert generated(model, prompt, seed, **how) == generated(original, prompt, seed, **how)


@pytest.mark.parametrize("shape", [{"bias": False}, {"tied": True}, {"activation": "gelu_new"}], ids=str)
def test_samples_the_same_tokens_in_other_shapes(shape: dict) -> None:
    original = gpt(**shape)
    how = {"temperature": 0.8, "top_k": 50, "max_new_tokens": 12}
    prompt = prompt_of(4)
    assert generated(twin(original), prompt, 1, **how) == generated(original, prompt, 1, **how)


@pytest.mark.parametrize("length", [5, 16, 40], ids=["a short prompt", "a full one", "one longer than the context"])
@pytest.mark.parametrize("temperature", [0, 0.8, 1.5])
def test_takes_the_same_tokens_past_the_context(temperature: float, length: int) -> None:
    original = gpt()
    model = twin(original)
    how = {"temperature": temperature, "top_k": 10, "max_new_tokens": 30}
    for seed in (0, 1, 1337):
        prompt = prompt_of(length)
        assert generated(model, prompt, seed, **how) == generated(original, prompt, seed, **how)


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.5])
def test_greedy_decoding_takes_the_same_tokens(repetition_penalty: float) -> None:
    original = gpt()
    how = {"temperature": 0, "repetition_penalty": repetition_penalty, "max_new_tokens": 12}
    prompt = prompt_of(4)
    assert generated(twin(original), prompt, 0, **how) == generated(original, prompt, 0, **how)


def test_stops_after_the_end_token_where_the_original_does() -> None:
    original = gpt()
    prompt = prompt_of(4)
    how = {"temperature": 1.0, "top_k": 10, "max_new_tokens": 12}
    free = generated(original, prompt, 0, **how)
    how["eos_id"] = free[9]
    stopped = generated(original, prompt, 0, **how)
    assert len(stopped) < len(free)
    assert generated(twin(original), prompt, 0, **how) == stopped


@pytest.mark.parametrize("question", ["What is the capital of France?", "Tell me a story.", "[EOS]" * 30])
def test_generate_py_s_own_path_says_what_the_original_says_on_the_example(question: str) -> None:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    original = GPT(GPTConfig(**checkpoint["model_args"])).eval()
    original.load_state_dict(checkpoint["model_state_dict"])
    original_tokenizer = Tokenizer.from_file(str(TOKENIZER))
    content = f"Instruction: {question} Response:"
    ids = original_tokenizer.encode(content).ids[:-1]  # less its [EOS]
    torch.manual_seed(7)
    expected = original.generate(torch.tensor([ids]), 80, temperature=1.5, top_k=50, eos_id=EOS)[0].tolist()

    model, tokenizer = loading.load(CHECKPOINT, TOKENIZER, device=torch.device("cpu"))
    output = generation.generate(
        model,
        tokenizer,
        generation.encode(tokenizer, content, parse_special_tokens=True),
        generation.Sampling(max_new_tokens=80, temperature=1.5, seed=7),
    )
    assert output.texts == [original_tokenizer.decode(expected, skip_special_tokens=False)]
    assert output.new_tokens == len(expected) - len(ids)
