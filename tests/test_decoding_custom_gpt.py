"""The lean step of `generate` gives what the plain model gives, and gives way wherever it could not."""

import copy
import functools
import gc
import math
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LogitsProcessor
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_model import CustomGPTConfig, CustomGPTForCausalLM, decoding_custom_gpt
from hf_model.decoding_custom_gpt import PACKED, GrowingCache, GrowingLayer, LeanStep, packed
from hf_model.modeling_custom_gpt import is_plain

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
def lean(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of each row every lean step took."""
    lengths: list[int] = []
    step = LeanStep.__call__
    monkeypatch.setattr(
        LeanStep, "__call__", lambda self, ids, *args: (lengths.append(ids.shape[1]), step(self, ids, *args))[1]
    )
    return lengths


@pytest.fixture
def one_way(monkeypatch: pytest.MonkeyPatch):
    def generate(model: CustomGPTForCausalLM, ids: torch.Tensor, *, plain: bool, **kwargs: Any) -> Any:
        monkeypatch.setenv("CUSTOM_GPT_PLAIN_DECODE", "1" if plain else "")
        torch.manual_seed(3)
        return model.generate(ids, return_dict_in_generate=True, output_logits=True, pad_token_id=1, **kwargs)

    return generate


@pytest.fixture
def both_ways(one_way):
    def generate(model: CustomGPTForCausalLM, ids: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
        """What `generate` returns by the lean step, and by the plain model, from the same generator state."""
        return one_way(model, ids, plain=False, **kwargs), one_way(model, ids, plain=True, **kwargs)

    return generate


def prompts(rows: int = 1, length: int = 9) -> torch.Tensor:
    return torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(1))


def padded(rows: int = 3) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(prompts(rows))
    mask[0, :4] = 0
    return {"attention_mask": mask}


@pytest.fixture
def no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


@pytest.fixture
def no_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)


@pytest.fixture
def no_avx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch):
    """Makes this processor another one, as far as `torch.cpu.get_capabilities` tells."""
    return lambda **capabilities: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


def assert_bit_for_bit(one: Any, other: Any) -> None:
    assert torch.equal(one.sequences, other.sequences)
    assert all(map(torch.equal, one.logits, other.logits))
    for layer, other_layer in zip(one.past_key_values.layers, other.past_key_values.layers, strict=True):
        assert torch.equal(layer.keys, other_layer.keys)
        assert torch.equal(layer.values, other_layer.values)


def assert_rounding_apart(one: Any, other: Any) -> None:
    """float32, which added up in another order."""
    assert torch.equal(one.sequences, other.sequences)
    for logits, expected in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.std()))


def calls(run: Callable[[], Any]) -> dict[str, int]:
    """How often each operator runs."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return {operator.key: operator.count for operator in profiler.key_averages()}


class TestFloat32:
    """Against the plain steps of the same model."""

    @pytest.fixture
    def needs_the_products(self) -> None:
        if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")):
            pytest.skip("oneDNN's products are used on processors with AVX2")
        if not torch.backends.mkl.is_available():
            pytest.skip("matrices are cut in parts for MKL")

    @pytest.fixture
    def amd(self, processor, needs_the_products, monkeypatch) -> None:
        processor(cpu_name="AMD EPYC")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    @pytest.fixture
    def intel(self, processor, needs_the_products, monkeypatch) -> None:
        processor(cpu_name="Intel Xeon")
        monkeypatch.setattr(decoding_custom_gpt, "SMALL", 4 * 64 * 64)

    @pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("libraries", ["no_avx", "no_onednn and no_mkl"])
    def test_logits_and_cache_are_the_plain_steps_bit_for_bit_without_the_libraries(
        self, both_ways, lean, request, bias, activation, libraries
    ):
        for fixture in libraries.split(" and "):
            request.getfixturevalue(fixture)
        model = model_of(bias=bias, activation_function=activation)
        assert_bit_for_bit(*both_ways(model, prompts(), max_new_tokens=40, do_sample=False))
        assert lean == [9] + 39 * [1]

    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("bias", [True, False])
    def test_on_amd(self, both_ways, lean, amd, bias, rows):
        assert_rounding_apart(*both_ways(model_of(bias=bias), prompts(rows), max_new_tokens=40, do_sample=False))
        assert lean == [9] + 39 * [1]

    def test_on_amd_one_row_is_a_product_for_each_thread_and_more_are_onednns(self, one_way, amd):
        one = calls(lambda: one_way(model_of(), prompts(), plain=False, max_new_tokens=3))
        assert one["aten::bmm"] == 3 * (3 * 4 + 1)  # a prompt and two steps of three layers and the head
        assert "mkldnn::_linear_pointwise" not in one
        more = calls(lambda: one_way(model_of(), prompts(2), plain=False, max_new_tokens=3))
        assert more["mkldnn::_linear_pointwise"] == 2 * (3 * 4 + 1)

    @pytest.mark.parametrize("bias", [True, False])
    def test_by_onednn_alone(self, both_ways, lean, needs_the_products, no_mkl, bias):
        one, other = both_ways(model_of(bias=bias), prompts(), max_new_tokens=40, do_sample=False)
        assert_rounding_apart(one, other)
        assert torch.equal(one.logits[0], other.logits[0])  # of the prompt, which is not for oneDNN
        assert lean == [9] + 39 * [1]

    @pytest.mark.parametrize("rows", [1, 3])
    def test_few_rows_on_intel_are_the_plain_steps_bit_for_bit(self, both_ways, lean, intel, rows):
        assert_bit_for_bit(*both_ways(model_of(), prompts(rows), max_new_tokens=40, do_sample=False))
        assert lean == [9] + 39 * [1]

    @pytest.mark.parametrize("small, matrices", [(0, 4), (4 * 64 * 64, 2), (4 * 64 * 64 + 1, 0)])
    def test_more_rows_on_intel_are_onednns_for_large_matrices(self, both_ways, intel, monkeypatch, small, matrices):
        monkeypatch.setattr(decoding_custom_gpt, "SMALL", small)
        results = []
        counts = calls(lambda: results.extend(both_ways(model_of(), prompts(4), max_new_tokens=3, do_sample=False)))
        assert_rounding_apart(*results)
        head = int(500 * 64 >= small)
        assert counts.get("mkldnn::_linear_pointwise", 0) == 2 * (3 * matrices + head)

    def test_by_a_pytorch_that_does_not_know_the_processor(self, both_ways, lean, monkeypatch):
        monkeypatch.delattr(torch.cpu, "get_capabilities")
        assert_rounding_apart(*both_ways(model_of(), prompts(), max_new_tokens=10, do_sample=False))
        assert lean == [9] + 9 * [1]

    def test_what_the_threads_do_not_divide(self, both_ways, lean, amd, monkeypatch):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        assert_rounding_apart(*both_ways(model_of(), prompts(), max_new_tokens=10, do_sample=False))
        assert lean == [9] + 9 * [1]

    def test_weights_laid_out_in_another_way(self, both_ways, lean, amd):
        model = model_of()
        c_fc = model.transformer.h[1].mlp.c_fc
        c_fc.weight.data = c_fc.weight.data.t().contiguous().t()
        assert_rounding_apart(*both_ways(model, prompts(), max_new_tokens=10, do_sample=False))
        assert lean == [9] + 9 * [1]

    def test_other_default_dtypes_do_not_matter(self, both_ways, lean):
        model = model_of()
        _, expected = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
        torch.set_default_dtype(torch.float64)
        try:
            one, _ = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_rounding_apart(one, expected)
        assert lean == 2 * ([9] + 9 * [1])

    @pytest.mark.parametrize("rows", [1, 3])
    def test_past_the_context_the_window_is_lean_too(self, both_ways, lean, rows):
        options = padded() if rows == 3 else {}
        assert_rounding_apart(*both_ways(model_of(), prompts(rows), max_new_tokens=CONTEXT, do_sample=False, **options))
        assert lean == [9] + (CONTEXT - 9) * [1] + 8 * [CONTEXT]

    def test_padded_rows(self, both_ways, lean):
        assert_rounding_apart(*both_ways(model_of(), prompts(3), max_new_tokens=40, do_sample=False, **padded()))
        assert lean == [9] + 39 * [1]

    def test_the_cache_is_the_plain_steps(self, both_ways):
        one, other = both_ways(model_of(), prompts(), max_new_tokens=20, do_sample=False)
        for layer, expected in zip(one.past_key_values.layers, other.past_key_values.layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys, rtol=0, atol=1e-5 * float(expected.keys.std()))
            torch.testing.assert_close(layer.values, expected.values, rtol=0, atol=1e-5 * float(expected.values.std()))


def test_float64_is_float64_throughout(both_ways, lean):
    one, other = both_ways(model_of().double(), prompts(), max_new_tokens=10, do_sample=False)
    assert torch.equal(one.sequences, other.sequences)
    assert one.past_key_values.layers[0].keys.dtype == torch.float64
    torch.testing.assert_close(one.past_key_values.layers[2].keys, other.past_key_values.layers[2].keys)
    assert lean == [9] + 9 * [1]


def compare_with_float32(model: CustomGPTForCausalLM, ids: torch.Tensor, *, epsilons: int = 2, **options: Any) -> Any:
    """Generate, and compare with full forward passes of the plain float32 model with the same weights."""
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, **options}
    output = model.generate(ids, return_dict_in_generate=True, output_logits=True, pad_token_id=1, **options)
    exact = copy.deepcopy(model).float()
    mask = torch.ones_like(output.sequences)
    mask[:, : ids.shape[1]] = options["attention_mask"]
    tolerance = epsilons * torch.finfo(model.dtype).eps
    for end, logits in enumerate(output.logits, start=ids.shape[1]):
        window = slice(max(0, end - CONTEXT), end)
        with torch.no_grad():
            expected = exact(output.sequences[:, window], attention_mask=mask[:, window]).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * float(expected.std()))
    return output


needs_fbgemm = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX")
    or torch.backends.quantized.engine not in ("x86", "fbgemm"),
    reason="FBGEMM needs AVX2",
)


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
class TestHalfPrecision:
    @pytest.fixture(autouse=True)
    def without_products_for_bfloat16(self, processor) -> None:
        processor(avx512_bf16=False)

    @pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_prompt_and_steps_are_those_of_float32(self, lean, dtype, bias, activation):
        output = compare_with_float32(
            model_of(bias=bias, activation_function=activation).to(dtype),
            prompts(),
            max_new_tokens=40,
        )
        assert lean == [9] + 39 * [1]
        assert {layer.keys.dtype for layer in output.past_key_values.layers} == {dtype}
        assert output.past_key_values.get_seq_length() == 9 + 39

    def test_past_the_context_the_window_is_lean_too(self, lean, dtype):
        compare_with_float32(model_of().to(dtype), prompts(), max_new_tokens=CONTEXT)
        assert lean == [9] + (CONTEXT - 9) * [1] + 8 * [CONTEXT]

    def test_several_answers(self, lean, dtype):
        torch.manual_seed(3)
        compare_with_float32(model_of().to(dtype), prompts(), max_new_tokens=20, do_sample=True, num_return_sequences=3)
        assert lean == [9] + 19 * [1]

    def test_padded_rows(self, lean, dtype):
        compare_with_float32(model_of().to(dtype), prompts(3), max_new_tokens=40, **padded())
        assert lean == [9] + 39 * [1]

    @pytest.mark.parametrize("rows", [1, 2])
    def test_nothing_is_rounded_but_the_weights(self, one_way, dtype, rows):
        model = model_of().to(dtype)
        tokens = {"max_new_tokens": 2, "do_sample": False}
        logits = one_way(model, prompts(rows), plain=False, **tokens).logits
        exact = one_way(model.float(), prompts(rows), plain=True, **tokens).logits
        for one, expected in zip(logits, exact, strict=True):
            torch.testing.assert_close(one, expected, rtol=0, atol=1e-5 * float(expected.std()))

    @pytest.mark.parametrize("change", [torch.neg, lambda weight: weight.flip(0), lambda weight: weight.flip(1)])
    def test_changed_weights_are_seen_by_the_next_call(self, dtype, change):
        model = model_of().to(dtype)
        before = model.generate(prompts(), max_new_tokens=10, do_sample=False, pad_token_id=1)
        model.lm_head.weight.data.copy_(change(model.lm_head.weight.data).clone())
        after = compare_with_float32(model, prompts(), max_new_tokens=10)
        assert not torch.equal(after.sequences, before)

    def test_the_packed_weights_are_made_once_and_go_with_the_model(self, dtype):
        model = model_of().to(dtype)
        (first,) = packed([model.lm_head]).values()
        assert first is not None
        assert packed([model.lm_head])[model.lm_head] is first
        gone = weakref.ref(model.lm_head)
        del model, first
        gc.collect()
        assert gone() is None and not any(layer.out_features == 500 for layer in PACKED)

    def test_the_packed_weights_go_when_the_model_takes_another_dtype(self, dtype):
        model = model_of().to(dtype)
        model.generate(prompts(), max_new_tokens=3)
        assert model.lm_head in PACKED
        model.float().generate(prompts(), max_new_tokens=3)
        assert model.lm_head not in PACKED

    def test_embeddings_are_added_in_float32(self, dtype):
        model = model_of().to(dtype)
        model.transformer.wte.weight.data[:] = 1024  # which LayerNorm takes away again
        compare_with_float32(model, prompts(), max_new_tokens=10)

    @pytest.mark.parametrize("missing", ["engine", "operator", "order"])
    def test_without_fbgemm_the_products_are_pytorchs_own(self, one_way, lean, monkeypatch, dtype, missing):
        model = model_of().to(dtype)
        if missing == "engine":
            monkeypatch.setattr(torch.backends.quantized.__class__, "engine", "qnnpack", raising=False)
        elif missing == "operator":
            monkeypatch.setattr(torch.ops, "quantized", object())
        else:
            model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()
        assert packed([model.lm_head]) == {model.lm_head: None}
        # PyTorch's own products round what they take and give.
        compare_with_float32(model, prompts(), max_new_tokens=10, epsilons=8)
        assert lean == [9] + 9 * [1]

    @pytest.mark.parametrize("change", [65536.0, float("inf"), float("nan")], ids=str)
    def test_a_matrix_that_float16_does_not_hold_is_left_to_the_plain_product(self, both_ways, dtype, change):
        model = model_of().to(dtype)
        model.transformer.h[1].mlp.c_fc.weight.data[5, 5] = change
        assert packed([model.transformer.h[1].mlp.c_fc]) == {model.transformer.h[1].mlp.c_fc: None}
        one, other = both_ways(model, prompts(), max_new_tokens=3, do_sample=False)
        for logits, expected in zip(one.logits, other.logits, strict=True):
            assert torch.equal(logits.isnan(), expected.isnan())

    def test_it_is_nearer_to_float32_than_the_plain_model(self, both_ways, one_way, dtype):
        model = model_of().to(dtype)
        tokens = {"max_new_tokens": 12, "do_sample": False}
        one, other = both_ways(model, prompts(), **tokens)
        exact = one_way(model.float(), prompts(), plain=True, **tokens)
        assert torch.equal(one.sequences, exact.sequences)
        distance = [
            sum(float((a - b).norm()) for a, b in zip(x.logits, exact.logits, strict=True)) for x in (one, other)
        ]
        assert distance[0] < distance[1]

    def test_generation_goes_on_from_a_returned_cache(self, lean, dtype):
        model = model_of().to(dtype)
        half = model.generate(prompts(), max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
        rest = model.generate(half.sequences, past_key_values=half.past_key_values, max_new_tokens=10, do_sample=False)
        assert torch.equal(rest, model.generate(prompts(), max_new_tokens=20, do_sample=False))
        with torch.no_grad():  # and so does the plain model
            model(rest[:, -1:], past_key_values=half.past_key_values)
        assert half.past_key_values.layers[0].values.dtype == dtype


@needs_fbgemm
@pytest.mark.parametrize(
    "dtype, largest, fits",
    [
        (torch.float16, 0.0, True),
        (torch.float16, 2**-24, True),
        (torch.float16, 65504.0, True),
        (torch.float16, float("inf"), False),
        (torch.float16, float("nan"), False),
        (torch.bfloat16, 0.0, True),
        (torch.bfloat16, 2**-14, True),
        (torch.bfloat16, 1.0078125 * 2**-18, False),  # between two of float16's steps of 2^-24
        (torch.bfloat16, 65280.0, True),
        (torch.bfloat16, 65536.0, False),
        (torch.bfloat16, float("inf"), False),
        (torch.bfloat16, float("nan"), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_float16_holds(dtype, largest, sign, fits):
    layer = torch.nn.Linear(4, 3, bias=False, dtype=dtype)
    layer.weight.data[:] = 0
    layer.weight.data[1, 2] = sign * largest
    assert math.isnan(largest) or abs(layer.weight[1, 2].item()) == largest
    assert (packed([layer])[layer] is not None) == fits


def test_many_rows_of_bfloat16_are_bfloat16s_own_where_the_processor_has_them(one_way, processor):
    model = model_of().bfloat16()
    processor(avx512_bf16=True)
    own = one_way(model, prompts(), plain=False, max_new_tokens=1).logits[0]
    processor(avx512_bf16=False)
    assert not torch.equal(one_way(model, prompts(), plain=False, max_new_tokens=1).logits[0], own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("change", [torch.neg, lambda weight: weight.flip(0), lambda weight: weight.flip(1)])
def test_changed_weights_are_seen_by_the_next_call(one_way, dtype, change):
    model = model_of().to(dtype)
    before = one_way(model, prompts(), plain=False, max_new_tokens=40, do_sample=False)
    for linear in (model.lm_head, model.transformer.h[1].mlp.c_fc):
        linear.weight.data.copy_(change(linear.weight.data).clone())
    after = one_way(model, prompts(), plain=False, max_new_tokens=40, do_sample=False)
    fresh = one_way(copy.deepcopy(model), prompts(), plain=False, max_new_tokens=40, do_sample=False)
    assert_bit_for_bit(after, fresh)
    assert not torch.equal(after.sequences, before.sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_average_of_the_weights_that_takes_their_place_is_what_generates(one_way, dtype):
    model = model_of().to(dtype)
    expected = one_way(model, prompts(), plain=False, max_new_tokens=10, do_sample=False)
    trained = list(model.parameters())
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
    for weight in trained:
        weight.data.neg_()
    assert_bit_for_bit(one_way(model, prompts(), plain=False, max_new_tokens=10, do_sample=False), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 40, "do_sample": True, "top_k": 20, "repetition_penalty": 1.3},
        {"max_new_tokens": 100, "do_sample": True},  # past the context
        {"max_new_tokens": 20, "do_sample": True, "num_return_sequences": 3},
        {"max_new_tokens": 40, "do_sample": False, "num_beams": 3},
        {"max_new_tokens": CONTEXT, "do_sample": False, "num_beams": 3},
        {"max_new_tokens": 20, "do_sample": False, "prefill_chunk_size": 4},
        {"max_new_tokens": 40, "do_sample": False, "prompt_lookup_num_tokens": 3},
        {"max_new_tokens": 40, "do_sample": False, "prompt_lookup_num_tokens": 3, "suppress_tokens": [7]},
        {"max_new_tokens": 40, "do_sample": True, "prompt_lookup_num_tokens": 3, "temperature": 0.8, "top_k": 50},
    ],
    ids=str,
)
def test_the_tokens_and_logits_are_the_plain_steps(both_ways, lean, options):
    assert_rounding_apart(*both_ways(model_of(), prompts(), **options))
    assert lean


def test_an_assistant_s_tokens_are_checked_by_lean_steps(both_ways, lean):
    model, draft = model_of(), model_of()
    for weight in draft.parameters():
        weight.data += 0.03 * torch.randn_like(weight)
    plain, assisted = (
        both_ways(model, prompts(), max_new_tokens=30, do_sample=False, **options)[0]
        for options in ({}, {"assistant_model": draft})
    )
    assert_rounding_apart(assisted, plain)
    assert set(lean) - {1, 9}  # several candidates at once


@pytest.mark.parametrize(
    "options",
    [
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_anything_unusual_is_left_to_the_plain_forward(both_ways, lean, options):
    one, other = both_ways(model_of(), prompts(), max_new_tokens=10, do_sample=False, **options)
    assert lean == []
    assert torch.equal(one.sequences, other.sequences)
    for name in ("attentions", "hidden_states"):
        assert (getattr(one, name) is not None) == (f"output_{name}" in options)
        for step, expected in zip(getattr(one, name) or (), getattr(other, name) or (), strict=True):
            assert all(map(torch.equal, step, expected))


@pytest.mark.parametrize("name", ["scaling", "eps"])
@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.nn.Buffer])
def test_a_number_that_became_a_tensor_of_the_module_is_left_to_the_plain_forward(name, kind):
    model = model_of()
    block = model.transformer.h[1]
    module = block.attn if name == "scaling" else block.ln_1
    value = getattr(module, name)
    with torch.no_grad():
        assert is_plain(model)
        delattr(module, name)
        setattr(module, name, kind(torch.tensor(value)))
        assert not is_plain(model)


class AddOne(torch.nn.Module):
    """As an adapter has it in place of a module."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1


def hook(model: CustomGPTForCausalLM) -> None:
    model.transformer.h[0].register_forward_hook(lambda module, inputs, output: output + 1)


def adapter(model: CustomGPTForCausalLM) -> None:
    model.transformer.h[1].mlp.c_fc = AddOne(model.transformer.h[1].mlp.c_fc)


def epsilon(model: CustomGPTForCausalLM) -> None:
    model.transformer.ln_f.eps = 1.0


def dropout(model: CustomGPTForCausalLM) -> None:
    model.transformer.h[0].mlp.dropout.p = 0.5
    model.transformer.h[0].mlp.dropout.train()


def another_forward(model: CustomGPTForCausalLM) -> None:
    forward = model.transformer.h[0].mlp.forward
    model.transformer.h[0].mlp.forward = lambda x: forward(x) + 1


def eager(model: CustomGPTForCausalLM) -> None:
    model.set_attn_implementation("eager")


def recorded(model: CustomGPTForCausalLM) -> None:
    model.config.output_hidden_states = True


def sees_all(model: CustomGPTForCausalLM) -> None:
    for block in model.transformer.h:
        block.attn.is_causal = False


def sees_all_by_its_configuration(model: CustomGPTForCausalLM) -> None:
    model.config.is_causal = False


def another_function_within_the_activation(model: CustomGPTForCausalLM) -> None:
    model.transformer.h[0].mlp.act.act = torch.tanh


def heads_of_another_width(model: CustomGPTForCausalLM) -> None:
    model.transformer.h[0].attn.head_dim = 32


def sparse_weights(model: CustomGPTForCausalLM) -> None:
    c_fc = model.transformer.h[0].mlp.c_fc
    few = c_fc.weight.detach() * (c_fc.weight.detach().abs() > 0.05)
    c_fc.weight = torch.nn.Parameter(few.to_sparse_csr(), requires_grad=False)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(
    "change",
    [
        hook,
        adapter,
        epsilon,
        dropout,
        another_forward,
        eager,
        recorded,
        sees_all,
        sees_all_by_its_configuration,
        another_function_within_the_activation,
        heads_of_another_width,
        sparse_weights,
    ],
)
def test_a_model_with_something_unusual_is_left_to_the_plain_forward(both_ways, lean, change):
    model = model_of()
    before, _ = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
    lean.clear()
    change(model)
    one, other = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
    assert lean == []
    assert_bit_for_bit(one, other)
    if change not in (eager, recorded):
        assert not torch.equal(one.logits[0], before.logits[0])


def test_fewer_layers_than_the_configuration_says_are_left_to_the_plain_forward(lean):
    model = model_of()
    model.transformer.h = model.transformer.h[:2]
    assert model.generate(prompts(), max_new_tokens=3, do_sample=False).shape == (1, 12)
    assert lean == []


def test_embeddings_that_are_bounded_are_left_to_the_plain_forward(lean):
    model = model_of()
    model.transformer.wte.max_norm = 0.1
    model.generate(prompts(), max_new_tokens=3)
    assert lean == []


def test_a_class_with_another_forward_is_left_to_the_plain_forward(lean, monkeypatch):
    model = model_of()
    monkeypatch.setattr(type(model.transformer.h[0].mlp), "forward", lambda self, x: self.c_proj(self.c_fc(x)))
    model.generate(prompts(), max_new_tokens=3)
    assert lean == []


def test_a_class_whose_forward_is_wrapped_is_left_to_the_plain_forward(lean, monkeypatch):
    model = model_of()
    for module_class in (torch.nn.Linear, type(model.transformer.h[0].mlp)):
        written = module_class.forward
        with monkeypatch.context() as patch:
            patch.setattr(module_class, "forward", functools.wraps(written)(lambda self, x, f=written: 2 * f(self, x)))
            model.generate(prompts(), max_new_tokens=3)
        assert lean == []
    model.generate(prompts(), max_new_tokens=3)
    assert lean


def test_blocks_in_another_order_leave_a_cache_that_is_theirs():
    model = model_of()
    blocks = model.transformer.h
    blocks[0], blocks[1] = blocks[1], blocks[0]
    output = model.generate(prompts(), max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    with torch.no_grad():
        last = model(output.sequences[:, -1:], past_key_values=output.past_key_values).logits[:, -1]
        torch.testing.assert_close(last, model(output.sequences).logits[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("hidden", [slice(-2, None), slice(3, 5), slice(None)], ids=["right", "middle", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_mask_hides_sees_and_is_seen_as_in_the_plain_steps(both_ways, lean, dtype, hidden):
    mask = torch.ones_like(prompts(3))
    mask[0, hidden] = 0
    model = model_of().to(dtype)
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert_rounding_apart(*both_ways(model, prompts(3), **how))
    assert lean


def test_a_mask_is_made_where_the_model_is_whatever_the_default_device():
    model = model_of()
    expected = model.generate(prompts(3), max_new_tokens=5, do_sample=False, **padded())
    ids, mask = prompts(3), padded()
    with torch.device("meta"):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, **mask), expected)


@pytest.mark.parametrize(
    "functions", [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS], ids=["attention", "mask"]
)
def test_another_function_under_the_same_name_is_left_to_the_plain_forward(lean, monkeypatch, functions):
    stock = functions["sdpa"]
    monkeypatch.setitem(functions, "sdpa", lambda *args, **options: stock(*args, **options))
    model_of().generate(prompts(), max_new_tokens=3)
    assert lean == []


def test_a_cache_under_autocast_has_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        output = model_of().generate(prompts(), max_new_tokens=3, return_dict_in_generate=True)
    assert output.past_key_values.layers[0].keys.dtype == torch.bfloat16


def test_autocast_and_gradients_are_left_to_the_plain_forward(lean):
    model = model_of()
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(prompts(), max_new_tokens=3)
    cache = model.generate(prompts(), max_new_tokens=3, return_dict_in_generate=True).past_key_values
    lean.clear()
    model.generate.__wrapped__.__wrapped__(model, prompts(), max_new_tokens=3)  # without no_grad
    model(prompts()[:, :1], past_key_values=cache).logits.sum().backward()
    assert lean == []
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_generation_goes_on_from_a_returned_cache(lean, dtype):
    model = model_of().to(dtype)
    half = model.generate(prompts(), max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(half.sequences, past_key_values=half.past_key_values, max_new_tokens=10, do_sample=False)
    assert torch.equal(rest, model.generate(prompts(), max_new_tokens=20, do_sample=False))
    assert lean == [9] + 9 * [1] + 10 * [1] + [9] + 19 * [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("length", [1, 9])
def test_a_cache_of_the_caller_is_filled_and_used_again(lean, dtype, length):
    model, cache = model_of().to(dtype), DynamicCache()
    ids = model.generate(prompts(length=length), past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert cache.get_seq_length() == length + 5
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
    both = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(both, model.generate(prompts(length=length), max_new_tokens=12, do_sample=False))
    assert len(lean) == 6 + 6 + 12


def test_a_generation_that_breaks_off_leaves_the_callers_cache_usable():
    model, cache = model_of().half(), DynamicCache()

    def interrupt() -> None:
        if cache.get_seq_length() == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(prompts(), past_key_values=cache, max_new_tokens=9, logits_processor=[Callback(interrupt)])
    assert cache.layers[0].keys.dtype == torch.float16
    with torch.no_grad():
        model(prompts()[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 13


def test_a_returned_cache_is_the_librarys_own_and_writes_over_nothing():
    model, cache = model_of(), DynamicCache()
    output = model.generate(
        prompts(), past_key_values=cache, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    for own in (cache, output.past_key_values):
        assert type(own) is DynamicCache and {type(layer) for layer in own.layers} == {DynamicLayer}
    with torch.no_grad():
        model(prompts()[:, :1], past_key_values=cache)
        seen = cache.layers[0].keys
        kept = seen.clone()
        cache.crop(-1)
        model(prompts()[:, 1:2], past_key_values=cache)
    assert torch.equal(seen, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_processor_may_look_ahead_with_gradients(dtype):
    model, cache = model_of().to(dtype), DynamicCache()

    def look_ahead() -> None:
        with torch.enable_grad():
            model(prompts()[:, :1], past_key_values=cache)
        cache.crop(-1)

    how = {"max_new_tokens": 5, "do_sample": False}
    looked = model.generate(prompts(), past_key_values=cache, logits_processor=[Callback(look_ahead)], **how)
    assert torch.equal(looked, model.generate(prompts(), **how))


def test_a_returned_cache_is_for_the_model_as_it_is_then(lean):
    model = model_of()
    half = model.generate(prompts(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    lean.clear()
    model.lm_head.weight.data.neg_()
    with torch.no_grad():
        logits = model(half.sequences[:, -1:], past_key_values=half.past_key_values).logits[:, -1]
        expected = model(half.sequences).logits[:, -1]
    torch.testing.assert_close(logits, expected)
    assert lean == []


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


class Callback(LogitsProcessor):
    def __init__(self, function: Callable[[], Any]):
        self.function, self.results = function, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.results.append(self.function())
        return scores


def test_a_generation_within_a_generation_goes_on_from_its_own_cache(both_ways):
    model = model_of()

    def nested() -> torch.Tensor:
        half = model.generate(prompts(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        assert half.past_key_values.get_seq_length() == 9 + 4
        return model.generate(half.sequences, past_key_values=half.past_key_values, max_new_tokens=5, do_sample=False)

    alone, _ = both_ways(model, prompts(length=5), max_new_tokens=8, do_sample=False)
    inner, callback = nested(), Callback(nested)
    outer, _ = both_ways(model, prompts(length=5), max_new_tokens=8, do_sample=False, logits_processor=[callback])
    assert torch.equal(outer.sequences, alone.sequences)
    assert all(torch.equal(result, inner) for result in callback.results)


def test_a_model_is_copied_and_pickled_while_it_generates_and_afterwards():
    model, copies = model_of(), []
    callback = Callback(lambda: copies.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model))]))
    model.generate(prompts(), max_new_tokens=2, do_sample=False, logits_processor=[callback])
    expected = model.generate(prompts(), max_new_tokens=5, do_sample=False)
    for other in [*copies, copy.deepcopy(model)]:
        assert torch.equal(other.generate(prompts(), max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_threads_get_what_they_get_alone_and_leave_the_model_as_it_was(dtype):
    model = model_of().to(dtype)
    before = dict(vars(model))
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
    assert vars(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_keeps_the_weights_after_a_generation(dtype):
    model = model_of().to(dtype)
    gc.disable()
    try:
        output = model.generate(prompts(), max_new_tokens=3, return_dict_in_generate=True)
        weights = [weakref.ref(weight) for weight in model.parameters()]
        del model
        gc.collect()
        assert output.past_key_values.get_seq_length() == 11
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


class TestGrowingLayer:
    """Beside the library's own layer, which concatenates."""

    @pytest.fixture(autouse=True)
    def no_grad(self):
        with torch.no_grad():
            yield

    @staticmethod
    def states(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4)

    def both(self, rows: int = 2, tokens: int = 5) -> tuple[DynamicCache, DynamicCache]:
        growing = GrowingCache(DynamicCache(), n_layer=3, step=None)
        growing.layers[1:] = []
        pair = growing, DynamicCache()
        self.add(pair, rows, tokens)
        return pair

    def add(self, pair: tuple[DynamicCache, DynamicCache], rows: int, tokens: int) -> None:
        keys, values = self.states(rows, tokens)
        for one, other in zip(*(cache.update(keys, values, 0) for cache in pair), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize(
        "change, rows",
        [
            (lambda cache: cache.crop(-3), 2),
            (lambda cache: cache.crop(-5), 2),
            (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), 2),
            (lambda cache: cache.batch_repeat_interleave(3), 6),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), 1),
            (lambda cache: cache.batch_select_indices(slice(1)), 1),
            (lambda cache: cache.reset(), 3),
        ],
        ids=["crop", "crop all", "reorder", "repeat", "select", "select a slice", "reset"],
    )
    def test_it_is_the_librarys_after_every_change_and_as_it_goes_on(self, change, rows):
        pair = self.both()
        for cache in pair:
            change(cache)
        assert pair[0].get_seq_length() == pair[1].get_seq_length()
        for tokens in (1, 1, 70, 1):
            self.add(pair, rows, tokens)

    def test_a_token_is_written_where_there_is_room_and_nothing_is_copied(self):
        pair = self.both()
        place = pair[0].layers[0].keys.data_ptr()
        for _ in range(20):
            self.add(pair, 2, 1)
        pair[0].crop(-4), pair[1].crop(-4)
        self.add(pair, 2, 1)
        assert pair[0].layers[0].keys.data_ptr() == place

    def test_room_is_made_ever_more_seldom(self):
        pair = self.both(1, 1)
        places = set()
        for _ in range(500):
            self.add(pair, 1, 1)
            places.add(pair[0].layers[0].room)
        assert len(places) < 12

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), lambda cache: copy.copy(cache)]
    )
    def test_a_copy_and_its_original_do_not_see_each_others_tokens(self, copied):
        pair = self.both()
        other = copied(pair[0])
        other.layers = [copy.copy(layer) for layer in other.layers]  # which a shallow copy of the cache shares
        kept = other.layers[0].keys.clone()
        for cache in pair:
            cache.crop(-2)
        self.add(pair, 2, 3)
        assert torch.equal(other.layers[0].keys, kept)
        other.update(*self.states(2, 1), 0)
        self.add(pair, 2, 1)

    def test_keys_that_somebody_has_put_in_place_are_kept(self):
        pair = self.both()
        for cache in pair:
            cache.layers[0].keys = cache.layers[0].keys * 2
        self.add(pair, 2, 1)

    def test_tokens_of_inference_mode_are_gone_on_from_outside(self):
        with torch.inference_mode():
            pair = self.both()
        self.add(pair, 2, 1)
        with torch.inference_mode():
            self.add(pair, 2, 1)
        self.add(pair, 2, 1)

    def test_a_token_for_more_rows_than_there_are_is_the_library_s_error(self):
        for cache in self.both(rows=1):
            with pytest.raises(RuntimeError):
                cache.update(*self.states(3, 1), 0)
        for cache in self.both(rows=1):
            with pytest.raises(RuntimeError):
                cache.update(*self.states(3, 100), 0)

    def test_gradients_flow_through_it(self):
        pair = self.both()
        with torch.enable_grad():
            keys, values = (states.requires_grad_() for states in self.states(2, 1))
            sum(states.sum() for states in pair[0].update(keys, values, 0)).backward()
        assert keys.grad is not None and values.grad is not None

    def test_float32_tokens_after_those_of_half_precision_keep_their_precision(self):
        layer = GrowingLayer()
        half, more = self.states(1, 2), self.states(1, 1)
        layer.update(*(states.half() for states in half))
        keys, _ = layer.update(*more)
        assert torch.equal(keys, torch.cat([half[0].half().float(), more[0]], dim=2))
        assert layer.update(*(states.half() for states in more))[0].dtype == torch.float16
