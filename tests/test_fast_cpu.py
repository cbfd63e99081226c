"""The form of a model for a CPU gives what the plain model and the plain-PyTorch reference give."""

import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hf_model import CustomGPTForCausalLM, load
from hf_model.fast_cpu import FastCache, fast_on_cpu
from tests.tiny import CHECKPOINT, PAD, TOKENIZER, gpt, twin

CONTEXT = 48
SHAPES = {
    "biases": {},
    "no biases": {"bias": False},
    "tied": {"tied": True},
    "tanh GELU": {"activation": "gelu_new"},
    "odd sizes": {"n_head": 3, "n_embd": 39, "vocab_size": 301},
}
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20, "repetition_penalty": 1.3},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams past the context": {"num_beams": 3, "max_new_tokens": CONTEXT},
    "past the context": {"max_new_tokens": CONTEXT},
    "prompt in chunks": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}
HALF = [torch.float16, torch.bfloat16]


def plain_model(**shape: Any) -> CustomGPTForCausalLM:
    model = twin(gpt(**{"block_size": CONTEXT, **shape}))
    model.generation_config.update(eos_token_id=None, pad_token_id=PAD, max_new_tokens=30)
    return model


def prompts(rows: int = 1, length: int = 9) -> torch.Tensor:
    return torch.randint(4, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def padded(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = prompts(rows)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"inputs": ids, "attention_mask": mask}


def generated(model: CustomGPTForCausalLM, inputs: torch.Tensor, **how: Any) -> Any:
    torch.manual_seed(3)
    how = {"do_sample": False, "attention_mask": torch.ones_like(inputs), **how}
    return model.generate(inputs, return_dict_in_generate=True, output_logits=True, **how)


def assert_the_same(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    """The same tokens, and logits as near as a part of their spread."""
    assert torch.equal(one.sequences, other.sequences)
    for logits, expected in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * float(expected.std()))


class TestFloat32:
    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_tokens_and_logits_are_the_plain_model_s(self, shape: dict, rows: int) -> None:
        model = plain_model(**shape)
        assert_the_same(generated(fast_on_cpu(model), prompts(rows)), generated(model, prompts(rows)))

    @pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
    def test_every_way_to_decode_gives_the_plain_model_s(self, how: dict) -> None:
        model = plain_model()
        assert_the_same(generated(fast_on_cpu(model), prompts(), **how), generated(model, prompts(), **how))

    @pytest.mark.parametrize("how", [WAYS["greedy"], WAYS["beams"], WAYS["past the context"]])
    def test_left_padded_rows_are_the_plain_model_s(self, how: dict) -> None:
        model = plain_model()
        assert_the_same(generated(fast_on_cpu(model), **padded(), **how), generated(model, **padded(), **how))

    @pytest.mark.parametrize("shape", [SHAPES["biases"], SHAPES["odd sizes"]])
    def test_logits_are_those_of_the_plain_pytorch_reference(self, shape: dict) -> None:
        reference = gpt(**{"block_size": CONTEXT, **shape})
        model = fast_on_cpu(twin(reference))
        output = generated(model, prompts(), max_new_tokens=CONTEXT, eos_token_id=None, pad_token_id=PAD)
        for end, logits in enumerate(output.logits, start=9):
            with torch.no_grad():
                expected = reference(output.sequences[:, max(0, end - CONTEXT) : end])[0][:, -1]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.std()))

    @pytest.mark.parametrize("threads", [2, 3])
    def test_the_number_of_threads_does_not_matter(self, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        model = plain_model()
        assert_the_same(generated(fast_on_cpu(model), prompts()), generated(model, prompts()))


@pytest.mark.parametrize("dtype", HALF)
class TestHalfPrecision:
    @classmethod
    def compare(cls, model: CustomGPTForCausalLM, inputs: torch.Tensor, epsilons: float, **how: Any) -> None:
        cls.compare_with_float32(fast_on_cpu(model), inputs, epsilons, **how)

    @staticmethod
    def compare_with_float32(model: Any, inputs: torch.Tensor, epsilons: float = 16, **how: Any) -> None:
        """Hold each step's logits against a full forward pass of the plain model with the same weights in float32."""
        output = generated(model, inputs, **how)
        exact = copy.deepcopy(model.plain()).float()
        mask = torch.ones_like(output.sequences)
        mask[:, : inputs.shape[1]] = how.get("attention_mask", torch.ones_like(inputs[:1]))
        tolerance = epsilons * torch.finfo(model.dtype).eps
        for end, logits in enumerate(output.logits, start=inputs.shape[1]):
            window = slice(max(0, end - CONTEXT), end)
            with torch.no_grad():
                expected = exact(output.sequences[:, window], attention_mask=mask[:, window]).logits[:, -1]
            torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance * float(expected.std()))

    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_logits_are_those_of_float32(self, dtype: torch.dtype, shape: dict, rows: int) -> None:
        # A prompt in bfloat16 is multiplied in bfloat16 where the processor can. All else is float32.
        epsilons = 0.02 if dtype == torch.float16 else 8
        self.compare(plain_model(**shape).to(dtype), prompts(rows), epsilons)

    @pytest.mark.parametrize("way", ["padded", "sampled", "several answers", "past the context", "prompt in chunks"])
    def test_other_ways_to_decode_are_near_float32(self, dtype: torch.dtype, way: str) -> None:
        how = padded() if way == "padded" else {"inputs": prompts(), **WAYS[way]}
        self.compare(plain_model().to(dtype), epsilons=16, **how)

    def test_a_training_step_changes_what_it_generates(self, dtype: torch.dtype) -> None:
        fast = fast_on_cpu(plain_model().to(dtype)).train()
        fast(input_ids=prompts(), labels=prompts()).loss.backward()
        torch.optim.SGD(fast.parameters(), lr=0.5).step()
        self.compare_with_float32(fast.eval(), prompts())
        self.compare_with_float32(fast_on_cpu(fast), prompts())

    def test_it_is_made_fast_again_after_a_change(self, dtype: torch.dtype) -> None:
        fast = fast_on_cpu(plain_model().to(dtype))
        with torch.no_grad():
            fast.lm_head.weight.mul_(-1)
        self.compare_with_float32(fast_on_cpu(fast), prompts())

    def test_in_float64_it_is_the_plain_model(self, dtype: torch.dtype) -> None:
        model = plain_model().to(dtype)
        assert_the_same(generated(fast_on_cpu(model).double(), prompts(2)), generated(model.double(), prompts(2)))

    @pytest.mark.parametrize("weight", [65536.0, float("inf"), float("nan")], ids=str)
    def test_weights_that_float16_does_not_hold_are_multiplied_as_they_are(
        self, dtype: torch.dtype, weight: float
    ) -> None:
        model = plain_model().to(dtype)
        model.transformer.h[1].mlp.c_fc.weight.data[5, 5] = weight
        fast, plain = (generated(x, prompts(), max_new_tokens=2).logits for x in (fast_on_cpu(model), model))
        for logits, expected in zip(fast, plain, strict=True):
            assert torch.equal(logits.isnan(), expected.isnan())
            assert logits.isnan().any() == (weight != 65536 or dtype == torch.float16)


class TestWhatTheStepDoesNotCompute:
    def test_a_forward_without_its_own_cache_is_the_plain_model_s_bit_for_bit(self) -> None:
        model, ids = plain_model(), prompts(2)
        fast = fast_on_cpu(model)
        with torch.no_grad():
            assert torch.equal(fast(ids).logits, model(ids).logits)
            embeds = model.get_input_embeddings()(ids)
            assert torch.equal(fast(inputs_embeds=embeds).logits, model(inputs_embeds=embeds).logits)
            cache = DynamicCache()
            fast(input_ids=ids, past_key_values=cache)
            step = fast(input_ids=ids[:, :1], past_key_values=cache)
        assert type(step.past_key_values) is DynamicCache
        assert fast(ids, labels=ids).loss == model(ids, labels=ids).loss

    def test_gradients_flow_through_it_and_its_cache(self) -> None:
        fast = fast_on_cpu(plain_model())
        cache = generated(fast, prompts(), max_new_tokens=3).past_key_values
        position = torch.tensor([[cache.get_seq_length()]])
        inputs = {"input_ids": prompts()[:, :1], "position_ids": position, "return_dict": True}
        fast(**inputs, past_key_values=cache).logits.sum().backward()
        assert all(weight.grad is not None for weight in fast.transformer.h.parameters())

    @pytest.mark.parametrize("name", ["attentions", "hidden_states"])
    def test_attentions_and_hidden_states_are_the_plain_model_s(self, name: str) -> None:
        model = plain_model()
        model.set_attn_implementation("eager")
        one, other = (generated(x, prompts(), **{f"output_{name}": True}) for x in (fast_on_cpu(model), model))
        for step, expected in zip(getattr(one, name), getattr(other, name), strict=True):
            assert all(map(torch.equal, step, expected))

    def test_a_prompt_of_embeddings_gives_the_plain_model_s_tokens(self) -> None:
        model = plain_model()
        how = {"inputs_embeds": model.get_input_embeddings()(prompts()), "max_new_tokens": CONTEXT, "do_sample": False}
        assert torch.equal(fast_on_cpu(model).generate(**how), model.generate(**how))

    def test_a_cache_of_the_caller_is_filled(self) -> None:
        model, cache = plain_model(), DynamicCache()
        output = generated(fast_on_cpu(model), prompts(), past_key_values=cache)
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        assert_the_same(output, generated(model, prompts()))

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.train(),
            lambda model: model.double(),
            lambda model: model.lm_head.half(),
            lambda model: model.to("meta"),
            lambda model: setattr(model.config, "quantization_config", {"quant_method": "other"}),
        ],
        ids=["training", "float64", "two dtypes", "another device", "quantised"],
    )
    def test_a_model_that_has_no_fast_form_is_returned(self, change: Any) -> None:
        model = plain_model()
        change(model)
        assert fast_on_cpu(model) is model

    def test_a_fast_model_in_float64_is_that_model(self) -> None:
        model = plain_model()
        assert_the_same(generated(fast_on_cpu(model).double(), prompts(2)), generated(model, prompts(2)))


class TestItsCache:
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize("copied", [lambda cache: cache, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_generation_goes_on_from_it_and_from_a_copy(self, dtype: torch.dtype, copied: Any) -> None:
        model = fast_on_cpu(plain_model().to(dtype))
        half = generated(model, prompts(), max_new_tokens=10)
        rest = generated(model, half.sequences, past_key_values=copied(half.past_key_values), max_new_tokens=10)
        assert torch.equal(rest.sequences, generated(model, prompts(), max_new_tokens=20).sequences)

    def test_the_plain_model_goes_on_from_it(self) -> None:
        model = plain_model().half()
        cache = generated(fast_on_cpu(model), prompts(), max_new_tokens=3).past_key_values
        assert isinstance(cache, FastCache)
        with torch.no_grad():
            logits = model(prompts()[:, :1], past_key_values=cache).logits
        assert logits.dtype == torch.float16 and cache.get_seq_length() == 9 + 3

    def test_another_model_computes_with_its_own_weights(self) -> None:
        one, other = fast_on_cpu(plain_model()), plain_model()
        with torch.no_grad():
            for weight in other.transformer.wte.parameters():
                weight += 1
            cache = generated(one, prompts(), max_new_tokens=1).past_key_values
            inputs = {"input_ids": prompts()[:, :1], "position_ids": torch.tensor([[9]]), "return_dict": True}
            expected = other(**inputs, past_key_values=copy.deepcopy(cache)).logits
            assert torch.equal(fast_on_cpu(other)(**inputs, past_key_values=cache).logits, expected)


class TestTheModel:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_threads_get_what_they_get_alone(self, dtype: torch.dtype) -> None:
        model = fast_on_cpu(plain_model().to(dtype))
        alone = [generated(model, prompts(length=5 + i)).sequences for i in range(4)]
        together: dict[int, torch.Tensor] = {}

        def run(i: int) -> None:
            together[i] = generated(model, prompts(length=5 + i)).sequences

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(together[i], alone[i]) for i in range(4))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_a_copy_generates_the_same(self, dtype: torch.dtype, copied: Any) -> None:
        model = fast_on_cpu(plain_model().to(dtype))
        assert torch.equal(generated(copied(model), prompts()).sequences, generated(model, prompts()).sequences)

    def test_the_plain_model_is_left_as_it_was_and_shares_its_weights(self) -> None:
        model = plain_model(tied=True)
        fast = fast_on_cpu(model)
        assert type(model) is CustomGPTForCausalLM and fast.lm_head.weight is fast.transformer.wte.weight
        for one, other in zip(fast.parameters(), model.parameters(), strict=True):
            assert one.data_ptr() == other.data_ptr()
        model.lm_head.weight.data.neg_()
        assert_the_same(generated(fast, prompts()), generated(model, prompts()))
        assert_the_same(generated(fast.plain(), prompts()), generated(model, prompts()), 0)

    def test_it_saves_an_ordinary_folder(self, tmp_path: Path) -> None:
        model = plain_model()
        fast_on_cpu(model).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == ["CustomGPTForCausalLM"]
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_custom_gpt.CustomGPTForCausalLM"
        code = {path.name for path in tmp_path.glob("*.py")}
        assert code == {"configuration_custom_gpt.py", "modeling_custom_gpt.py"}
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(prompts()).logits, model(prompts()).logits)

    def test_load_gives_it(self, capitals: Path) -> None:
        for paths in ((capitals,), (CHECKPOINT, TOKENIZER)):
            model, _ = load(*paths, device="cpu")
            assert isinstance(model, CustomGPTForCausalLM)
            assert isinstance(generated(model, prompts(), max_new_tokens=2).past_key_values, FastCache)
