"""The lean forward of `generate` gives what the plain one gives, and gives way wherever it could not."""

import copy
import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LogitsProcessor

from hf_model import CustomGPTConfig, CustomGPTForCausalLM, decoding_custom_gpt
from hf_model.decoding_custom_gpt import (
    BFLOAT16_ROWS,
    MKL_ROWS_ON_INTEL,
    PACKED,
    Affine,
    LeanForward,
    fits_float16,
    weights_of,
)

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
def lean_prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the prompts that the lean forward takes."""
    lengths: list[int] = []
    take = LeanForward.take_prompt
    monkeypatch.setattr(
        LeanForward,
        "take_prompt",
        lambda self, ids, *args, **kwargs: (lengths.append(ids.shape[1]), take(self, ids, *args, **kwargs))[1],
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
        """What `generate` returns by plain steps, and by lean ones, from the same generator state."""
        return one_way(model, ids, plain=True, **kwargs), one_way(model, ids, plain=False, **kwargs)

    return generate


def prompts(rows: int = 1, length: int = 9) -> torch.Tensor:
    return torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(1))


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


def assert_bit_for_bit(lean: Any, plain: Any) -> None:
    assert torch.equal(lean.sequences, plain.sequences)
    assert all(torch.equal(one, other) for one, other in zip(lean.logits, plain.logits, strict=True))
    for one, other in zip(lean.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_cache_are_the_plain_steps_bit_for_bit_without_avx(
    both_ways, steps, bias, activation, dtype, no_avx
):
    model = model_of(bias=bias, activation_function=activation).to(dtype)
    plain, lean = both_ways(model, prompts(), max_new_tokens=40, do_sample=False)
    assert_bit_for_bit(lean, plain)
    assert len(steps) == 1


def assert_rounding_apart(lean: Any, plain: Any) -> None:
    """float32, which added up in another order."""
    assert torch.equal(lean.sequences, plain.sequences)
    for one, other in zip(lean.logits, plain.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.std()))


def matrices(model: CustomGPTForCausalLM) -> list[Affine]:
    weights = weights_of(model)
    blocks = [affine for block in weights.blocks for affine in block if affine.weight.ndim == 2]
    return [weights.lm_head, *blocks]


def test_they_are_without_the_libraries_too(both_ways, steps, no_onednn, no_mkl):
    assert_bit_for_bit(*both_ways(model_of(), prompts(), max_new_tokens=40, do_sample=False))
    assert steps == [1]


class TestFloat32:
    """Against the plain steps of the same model."""

    @pytest.fixture(autouse=True)
    def needs_the_products(self) -> None:
        if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")):
            pytest.skip("oneDNN's products are used on processors with AVX2")

    @pytest.fixture
    def two_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not torch.backends.mkl.is_available():
            pytest.skip("matrices are cut in parts for MKL")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    @pytest.fixture
    def amd(self, processor) -> None:
        processor(cpu_name="AMD EPYC")

    @pytest.fixture
    def intel(self, processor) -> None:
        processor(cpu_name="Intel Xeon")

    @pytest.mark.parametrize("bias", [True, False])
    def test_by_onednn_alone(self, both_ways, steps, lean_prompts, no_mkl, bias):
        model = model_of(bias=bias)
        assert weights_of(model).onednn
        assert all(affine.parts is None for affine in matrices(model))
        plain, lean = both_ways(model, prompts(), max_new_tokens=40, do_sample=False)
        assert_rounding_apart(lean, plain)
        assert torch.equal(lean.logits[0], plain.logits[0])  # of the prompt, which is not for oneDNN
        assert (steps, lean_prompts) == ([1], [9])

    @pytest.mark.parametrize("bias", [True, False])
    def test_by_mkl_in_parts_alone(self, both_ways, steps, lean_prompts, no_onednn, two_threads, amd, bias):
        model = model_of(bias=bias)
        assert {len(affine.parts) for affine in matrices(model)} == {2}
        plain, lean = both_ways(model, prompts(), max_new_tokens=40, do_sample=False)
        assert_rounding_apart(lean, plain)
        assert (steps, lean_prompts) == ([1], [9])

    def test_by_both(self, both_ways, steps, lean_prompts, two_threads, amd, monkeypatch):
        monkeypatch.setattr(decoding_custom_gpt, "SMALL", 4 * 64 * 64)
        model = model_of()
        plain, lean = both_ways(model, prompts(), max_new_tokens=40, do_sample=False)
        assert_rounding_apart(lean, plain)
        assert (steps, lean_prompts) == ([1], [9])
        in_parts = {id(affine.weight) for affine in matrices(model) if affine.mkl_rows == 1}
        block = model.transformer.h[0]
        assert {id(block.attn.c_attn.weight), id(block.attn.c_proj.weight), id(block.mlp.c_proj.weight)} <= in_parts
        assert not {id(block.mlp.c_fc.weight), id(model.lm_head.weight)} & in_parts

    @pytest.mark.parametrize("rows", [1, MKL_ROWS_ON_INTEL])
    def test_few_rows_on_intel_are_the_plain_steps_bit_for_bit(self, both_ways, steps, lean_prompts, intel, rows):
        if not torch.backends.mkl.is_available():
            pytest.skip("the plain products are MKL's")
        plain, lean = both_ways(model_of(), prompts(rows), max_new_tokens=40, do_sample=False)
        assert_bit_for_bit(lean, plain)
        assert (steps, lean_prompts) == ([1], [9])

    def test_by_a_pytorch_that_does_not_know_the_processor(self, both_ways, steps, lean_prompts, monkeypatch):
        monkeypatch.delattr(torch.cpu, "get_capabilities")
        plain, lean = both_ways(model_of(), prompts(), max_new_tokens=10, do_sample=False)
        assert_rounding_apart(lean, plain)
        assert (steps, lean_prompts) == ([1], [9])

    @pytest.mark.parametrize("small, matrices", [(0, 4), (4 * 64 * 64, 2), (4 * 64 * 64 + 1, 0)])
    def test_more_rows_on_intel_are_onednns_for_large_matrices(
        self, both_ways, steps, lean_prompts, intel, monkeypatch, small, matrices
    ):
        monkeypatch.setattr(decoding_custom_gpt, "SMALL", small)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            plain, lean = both_ways(model_of(), prompts(MKL_ROWS_ON_INTEL + 1), max_new_tokens=3, do_sample=False)
        assert_rounding_apart(lean, plain)
        assert (steps, lean_prompts) == ([1], [9])
        calls = {operator.key: operator.count for operator in profiler.key_averages()}
        assert calls["mkldnn::_linear_pointwise"] == 2 * (3 * matrices + 1)  # two steps, three layers and the head

    def test_what_the_threads_do_not_divide_goes_to_onednn_whole(self, two_threads, amd, monkeypatch):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        assert {affine.weight.shape[0] for affine in matrices(model_of()) if affine.parts is not None} == {3 * 64}

    def test_changed_weights_are_seen_by_the_next_call(self, both_ways, two_threads, amd):
        model = model_of()
        first, _ = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
        for name, weight in model.named_parameters():
            if "c_proj" in name:
                weight.data = -weight.data
        plain, lean = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
        assert_rounding_apart(lean, plain)
        assert not torch.equal(lean.sequences, first.sequences)

    def test_other_default_dtypes_do_not_matter(self, both_ways, lean_prompts):
        model = model_of()
        expected, _ = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
        torch.set_default_dtype(torch.float64)
        try:
            _, lean = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_rounding_apart(lean, expected)
        assert lean_prompts == [9, 9]

    def test_weights_laid_out_in_another_way(self, both_ways, steps, two_threads, amd):
        model = model_of()
        c_fc = model.transformer.h[1].mlp.c_fc
        c_fc.weight.data = c_fc.weight.data.t().contiguous().t()
        plain, lean = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
        assert_rounding_apart(lean, plain)
        assert steps == [1]

    @pytest.mark.parametrize("rows", [1, 3])
    def test_past_the_context_the_window_is_lean_too(self, both_ways, lean_prompts, rows):
        plain, lean = both_ways(model_of(), prompts(rows), max_new_tokens=CONTEXT, do_sample=False)
        assert_rounding_apart(lean, plain)
        assert lean_prompts == [9] + [CONTEXT] * 8

    def test_padded_rows(self, both_ways, steps, lean_prompts):
        ids = prompts(rows=3)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        plain, lean = both_ways(model_of(), ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
        assert_rounding_apart(lean, plain)
        assert (steps, lean_prompts) == ([1], [9])

    def test_the_cache_is_the_plain_steps(self, both_ways):
        plain, lean = both_ways(model_of(), prompts(), max_new_tokens=20, do_sample=False)
        for one, other in zip(lean.past_key_values.layers, plain.past_key_values.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-5 * float(other.keys.std()))
            torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-5 * float(other.values.std()))


def compare_with_float32(model: CustomGPTForCausalLM, ids: torch.Tensor, *, epsilons: float = 2, **options: Any) -> Any:
    """Generate, and compare with full forward passes of the plain float32 model with the same weights."""
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, **options}
    lean = model.generate(ids, return_dict_in_generate=True, output_logits=True, pad_token_id=1, **options)
    exact = copy.deepcopy(model).float()
    mask = torch.ones_like(lean.sequences)
    mask[:, : ids.shape[1]] = options["attention_mask"]
    # The prompt's keys and values, at least, were rounded on their way through the cache.
    tolerance = epsilons * torch.finfo(model.dtype).eps
    for end, logits in enumerate(lean.logits, start=ids.shape[1]):
        window = slice(max(0, end - CONTEXT), end)
        with torch.no_grad():
            expected = exact(lean.sequences[:, window], attention_mask=mask[:, window]).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * float(expected.std()))
    return lean


def exchange_weights(model: CustomGPTForCausalLM) -> None:
    """Put equal ones in their place, as an average of them in training; training goes on, and changes the old ones."""
    trained = list(model.parameters())
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
    for weight in trained:
        weight.data.neg_()


needs_fbgemm = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX")
    or torch.backends.quantized.engine not in ("x86", "fbgemm"),
    reason="FBGEMM needs AVX2",
)


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
class TestPacked:
    @pytest.fixture(autouse=True)
    def without_products_for_bfloat16(self, processor) -> None:
        processor(avx512_bf16=False)

    @pytest.fixture
    def compared(self, monkeypatch) -> list[int]:
        """One entry for each parameter that is compared with what was packed."""
        parameters: list[int] = []
        checksum = decoding_custom_gpt.checksum
        monkeypatch.setattr(decoding_custom_gpt, "checksum", lambda weight: (parameters.append(1), checksum(weight))[1])
        return parameters

    @pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_prompt_and_steps_are_those_of_float32(self, steps, lean_prompts, dtype, bias, activation):
        model = model_of(bias=bias, activation_function=activation).to(dtype)
        lean = compare_with_float32(model, prompts(), max_new_tokens=40)
        assert (steps, lean_prompts) == ([1], [9])
        assert {layer.keys.dtype for layer in lean.past_key_values.layers} == {dtype}
        assert lean.past_key_values.get_seq_length() == 9 + 39

    def test_past_the_context_the_window_is_lean_too(self, lean_prompts, dtype):
        compare_with_float32(model_of().to(dtype), prompts(), max_new_tokens=CONTEXT)
        assert lean_prompts == [9] + [CONTEXT] * 8

    def test_several_answers(self, steps, lean_prompts, dtype):
        torch.manual_seed(3)
        compare_with_float32(model_of().to(dtype), prompts(), max_new_tokens=20, do_sample=True, num_return_sequences=3)
        assert (steps, lean_prompts) == ([1], [9])

    def test_padded_rows(self, steps, lean_prompts, dtype):
        ids = prompts(rows=3)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        compare_with_float32(model_of().to(dtype), ids, attention_mask=mask, max_new_tokens=40)
        assert (steps, lean_prompts) == ([1], [9])

    @pytest.mark.parametrize("change", [torch.neg, lambda weight: weight.flip(0), lambda weight: weight.flip(1)])
    def test_changed_weights_are_seen_by_the_next_call(self, dtype, change):
        model = model_of().to(dtype)
        before = model.generate(prompts(), max_new_tokens=10, do_sample=False, pad_token_id=1)
        model.lm_head.weight.data.copy_(change(model.lm_head.weight.data).clone())
        after = compare_with_float32(model, prompts(), max_new_tokens=10)
        assert not torch.equal(after.sequences, before)

    def test_the_packed_weights_are_made_once_and_go_with_the_model(self, dtype):
        model = model_of().to(dtype)
        first = weights_of(model).lm_head.packed
        assert first is not None
        assert weights_of(model).lm_head.packed is first
        assert model in PACKED
        gone = weakref.ref(model)
        del model, first
        gc.collect()
        assert gone() is None

    def test_an_average_of_the_weights_that_takes_their_place_is_what_generates(self, one_way, dtype):
        model = model_of().to(dtype)
        expected = one_way(model, prompts(), plain=False, max_new_tokens=10, do_sample=False)
        exchange_weights(model)
        assert_bit_for_bit(one_way(model, prompts(), plain=False, max_new_tokens=10, do_sample=False), expected)

    def test_they_go_when_the_model_takes_another_dtype(self, dtype):
        model = model_of().to(dtype)
        model.generate(prompts(), max_new_tokens=3, pad_token_id=1)
        assert model in PACKED
        model.float().generate(prompts(), max_new_tokens=3, pad_token_id=1)
        assert model not in PACKED

    def test_embeddings_are_added_in_float32(self, dtype):
        model = model_of().to(dtype)
        model.transformer.wte.weight.data[:] = 1024  # which LayerNorm takes away again
        compare_with_float32(model, prompts(), max_new_tokens=10)

    def test_another_library_s_engine_leaves_all_to_the_plain_products(self, both_ways, steps, monkeypatch, dtype):
        others = set(torch.backends.quantized.supported_engines) - {"x86", "fbgemm", "none"}
        if not others:
            pytest.skip("this PyTorch was built with FBGEMM alone")
        monkeypatch.setattr(torch.backends.quantized, "engine", others.pop())
        model = model_of().to(dtype)
        assert_bit_for_bit(*both_ways(model, prompts(), max_new_tokens=10, do_sample=False))
        assert (steps, model in PACKED) == ([1], False)

    def test_a_call_compares_them_once(self, compared, dtype):
        model = model_of().to(dtype)
        for calls in (1, 2):
            model.generate(prompts(), max_new_tokens=CONTEXT, do_sample=False)
            assert len(compared) == calls * len(list(model.parameters()))

    def test_it_is_nearer_to_float32_than_the_plain_products(self, both_ways, dtype):
        model = model_of()
        exact = both_ways(model, prompts(), max_new_tokens=1)[0].logits[0]
        plain, lean = both_ways(model.to(dtype), prompts(), max_new_tokens=1)
        assert (lean.logits[0] - exact).norm() < (plain.logits[0] - exact).norm()

    @pytest.mark.parametrize("change", [65536.0, float("inf"), float("nan")], ids=str)
    def test_weights_that_float16_does_not_hold_are_left_to_the_plain_products(
        self, both_ways, steps, compared, dtype, change
    ):
        model = model_of().to(dtype)
        model.transformer.h[1].mlp.c_fc.weight.data[5, 5] = change
        plain, lean = both_ways(model, prompts(), max_new_tokens=CONTEXT, do_sample=False)
        for one, other in zip(lean.logits, plain.logits, strict=True):
            assert torch.equal(one.nan_to_num(nan=12345), other.nan_to_num(nan=12345))
        assert steps == [1]
        assert len(compared) == len(list(model.parameters()))
        assert weights_of(model).lm_head.packed is None


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
        (torch.bfloat16, 2**-14 - 2**-22, False),  # the next lower bfloat16
        (torch.bfloat16, 65280.0, True),
        (torch.bfloat16, 65536.0, False),
        (torch.bfloat16, float("inf"), False),
        (torch.bfloat16, float("nan"), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_float16_holds(dtype, largest, sign, fits):
    weight = torch.zeros(3, 4, dtype=dtype)
    weight[1, 2] = sign * largest
    assert math.isnan(largest) or abs(weight[1, 2].item()) == largest
    assert fits_float16(weight) == fits


@needs_fbgemm
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="bfloat16's own products are oneDNN's")
class TestBfloat16WithProductsOfItsOwn:
    @pytest.fixture(autouse=True)
    def with_products_for_bfloat16(self, processor) -> None:
        processor(avx512_bf16=True)

    def test_many_rows_are_the_plain_ones(self, both_ways, steps, lean_prompts):
        model = model_of().bfloat16()
        assert_bit_for_bit(*both_ways(model, prompts(BFLOAT16_ROWS), max_new_tokens=20, do_sample=False))
        assert (steps, lean_prompts) == ([1], [9])
        assert model not in PACKED

    def test_a_prompt_is_the_plain_one_and_the_steps_after_it_are_packed(self, both_ways, lean_prompts):
        model = model_of().bfloat16()
        compare_with_float32(model, prompts(), max_new_tokens=CONTEXT, epsilons=8)  # of bfloat16, many times
        assert lean_prompts == [9] + [CONTEXT] * 8
        plain, lean = both_ways(model, prompts(), max_new_tokens=2, do_sample=False)
        assert torch.equal(lean.logits[0], plain.logits[0])
        assert not torch.equal(lean.logits[1], plain.logits[1])

    def test_an_average_of_weights_that_float16_does_not_hold_takes_their_place(self, one_way):
        model = model_of().bfloat16()
        model.transformer.h[1].mlp.c_fc.weight.data[5, 5] = 65536
        expected = one_way(model, prompts(), plain=False, max_new_tokens=10, do_sample=False)
        exchange_weights(model)
        assert_bit_for_bit(one_way(model, prompts(), plain=False, max_new_tokens=10, do_sample=False), expected)

    def test_a_window_past_the_context_is_the_plain_one(self, one_way, lean_prompts):
        model = model_of().bfloat16()
        lean = one_way(model, prompts(), plain=False, max_new_tokens=CONTEXT, do_sample=False)
        assert lean_prompts == [9] + [CONTEXT] * 8
        plain = one_way(model, lean.sequences[:, :-1], plain=True, max_new_tokens=1, do_sample=False)
        assert torch.equal(lean.logits[-1], plain.logits[0])

    def test_changed_weights_are_seen_by_the_steps_after_a_prompt(self):
        model = model_of().bfloat16()
        before = model.generate(prompts(), max_new_tokens=10, do_sample=False, pad_token_id=1)
        model.lm_head.weight.data.neg_()
        after = compare_with_float32(model, prompts(), max_new_tokens=10, epsilons=8)
        assert not torch.equal(after.sequences, before)

    def test_without_onednn_a_prompt_is_packed_too(self, no_onednn):
        compare_with_float32(model_of().bfloat16(), prompts(), max_new_tokens=5)


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


@pytest.mark.parametrize(
    "options",
    [
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_anything_unusual_is_left_to_the_plain_forward(both_ways, steps, lean_prompts, options):
    plain, lean = both_ways(model_of(), prompts(), max_new_tokens=10, do_sample=False, **options)
    assert (steps, lean_prompts) == ([], [])
    assert torch.equal(lean.sequences, plain.sequences)
    for name in ("attentions", "hidden_states"):
        assert (getattr(lean, name) is not None) == (f"output_{name}" in options)
        for one, other in zip(getattr(lean, name) or (), getattr(plain, name) or (), strict=True):
            assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=str)
def test_other_ways_to_generate(both_ways, options):
    plain, lean = both_ways(model_of(), prompts(), max_new_tokens=10, do_sample=False, **options)
    assert_rounding_apart(lean, plain)


@pytest.mark.parametrize("name", ["scaling", "eps"])
@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.nn.Buffer])
def test_a_number_that_became_a_tensor_of_the_module_is_left_to_the_plain_forward(name, kind):
    model = model_of()
    block = model.transformer.h[1]
    module = block.attn if name == "scaling" else block.ln_1
    value = getattr(module, name)
    with torch.no_grad():
        assert decoding_custom_gpt.is_plain(model)
        delattr(module, name)
        setattr(module, name, kind(torch.tensor(value)))
        assert not decoding_custom_gpt.is_plain(model)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_prompt_of_one_token_with_an_empty_cache(one_way, dtype):
    model = model_of().to(dtype)
    plain, lean = (
        one_way(
            model, prompts(length=1), plain=plain, past_key_values=DynamicCache(), max_new_tokens=6, do_sample=False
        )
        for plain in (True, False)
    )
    assert torch.equal(lean.sequences, plain.sequences)


def test_dropout_that_is_left_on_alone_takes_effect(both_ways, steps):
    model = model_of(dropout=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    plain, lean = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
    assert torch.equal(lean.sequences, plain.sequences)
    assert not steps


def test_an_epsilon_changed_after_the_model_was_made_is_left_to_the_plain_step(both_ways, steps):
    model = model_of()
    model.transformer.ln_f.eps = 1.0
    plain, lean = both_ways(model, prompts(), max_new_tokens=10, do_sample=False)
    assert torch.equal(lean.sequences, plain.sequences)
    assert not steps


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
    _, lean = both_ways(model, prompts(length=5), max_new_tokens=8, do_sample=False, logits_processor=[callback])
    assert torch.equal(lean.sequences, alone.sequences)
    assert all(torch.equal(result, inner) for result in callback.results)


def test_a_copy_while_the_model_generates_is_refused_and_one_afterwards_works():
    model = model_of()
    callback = Callback(lambda: copy.deepcopy(model))
    with pytest.raises(TypeError, match="while it generates"):
        model.generate(prompts(), max_new_tokens=5, do_sample=False, logits_processor=[callback])
    expected = model.generate(prompts(), max_new_tokens=5, do_sample=False)
    assert torch.equal(copy.deepcopy(model).generate(prompts(), max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_threads_get_what_they_get_alone_and_leave_the_model_as_it_was(dtype):
    model = model_of().to(dtype)
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
