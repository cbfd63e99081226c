"""The model against the plain-PyTorch reference, and everything that transformers expects of a model."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache, pipeline
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from hf_model import CustomGPTConfig, CustomGPTForCausalLM
from tests.tiny import PAD, SIZES, gpt, twin

SHAPES = {
    "tiny": {},
    "one layer, one head": {"n_layer": 1, "n_head": 1, "n_embd": 8},
    "odd sizes": {"n_layer": 3, "n_head": 3, "n_embd": 39, "block_size": 23, "vocab_size": 101},
    "wider": {"n_head": 8, "n_embd": 256, "block_size": 128, "vocab_size": 1000},
    "no biases": {"bias": False},
    "tied head": {"tied": True},
    "tied head, no biases": {"tied": True, "bias": False},
    "tanh GELU": {"activation": "gelu_new"},
}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(4, SIZES["vocab_size"], shape)  # no special ones


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    length = max(len(row) for row in rows)
    padded = torch.stack([F.pad(row, (length - len(row), 0), value=PAD) for row in rows])
    return {"input_ids": padded, "attention_mask": (padded != PAD).long()}


class TestAgainstTheOriginal:
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_logits_equal_the_original_bit_for_bit(self, shape: dict) -> None:
        original = gpt(**shape)
        model = twin(original)
        for length in (1, 7, original.config.block_size):
            ids = torch.randint(original.config.vocab_size, (3, length))
            assert torch.equal(model(ids).logits, original(ids)[0])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_logits_in_half_precision_equal_the_original_bit_for_bit(self, dtype: torch.dtype) -> None:
        original = gpt()
        ids = tokens(2, 16)
        assert torch.equal(twin(original).to(dtype)(ids).logits, original.to(dtype)(ids)[0])

    def test_training_with_dropout_gives_the_gradients_of_the_original_bit_for_bit(self) -> None:
        original = gpt(dropout=0.2)
        model = twin(original)
        ids = tokens(2, 16)
        torch.manual_seed(1)
        original.train()(ids)[0].square().mean().backward()
        torch.manual_seed(1)
        model.train()(ids, use_cache=False).logits.square().mean().backward()  # as Trainer does: no copies for a cache
        gradients = {name: weight.grad for name, weight in original.named_parameters()}
        assert all(gradient.any() for gradient in gradients.values())
        for name, weight in model.named_parameters():
            assert torch.equal(weight.grad, gradients[name]), name

    @pytest.mark.parametrize("shape", [SHAPES["tiny"], SHAPES["tied head, no biases"]])
    def test_state_dict_has_the_original_names(self, shape: dict) -> None:
        original = gpt(**shape)
        assert list(twin(original).state_dict()) == list(original.state_dict())


class TestCache:
    @pytest.mark.parametrize("steps", [[1] * 16, [5, 1, 7, 3]], ids=["token by token", "in chunks"])
    def test_cached_decoding_agrees_with_one_full_pass(self, steps: list[int]) -> None:
        model = twin(gpt())
        ids = tokens(2, 16)
        cache = DynamicCache(config=model.config)
        logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits)

    @pytest.mark.parametrize("cache", ["static", "dynamic"])
    def test_every_cache_generates_what_none_does(self, cache: str) -> None:
        model = twin(gpt())
        batch = left_padded([tokens(4), tokens(7)])
        how = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}  # past the context of 16
        expected = model.generate(**batch, **how, use_cache=False)
        assert torch.equal(model.generate(**batch, **how, cache_implementation=cache), expected)

    @pytest.mark.parametrize("new, length", [(3, 6), (10**9, 16)], ids=["within", "past the context"])
    def test_a_static_cache_is_no_longer_than_the_context(self, new: int, length: int) -> None:
        output = twin(gpt()).generate(
            tokens(1, 4),
            max_new_tokens=new,
            do_sample=False,
            stopping_criteria=[lambda ids, scores: torch.full((1,), ids.shape[1] >= 7)],
            cache_implementation="static",
            return_dict_in_generate=True,
        )
        assert output.past_key_values.layers[0].max_cache_len == length

    def test_a_forward_with_a_static_cache_is_one_graph(self) -> None:
        model, ids = twin(gpt()), tokens(2, 9)
        cache = StaticCache(config=model.config, max_cache_len=12)
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        with torch.no_grad():
            logits = [compiled(chunk, past_key_values=cache).logits for chunk in ids.split([5, 1, 2, 1], dim=1)]
            torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits)

    def test_a_model_with_a_static_cache_is_exported_for_other_runtimes(self) -> None:
        model, ids = twin(gpt()), tokens(1, 4)
        model.generation_config.cache_implementation = "static"
        exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=12, device="cpu")
        program = exportable.export(input_ids=ids[:, :1], cache_position=torch.tensor([0])).module()
        logits = [program(input_ids=ids[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(4)]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits)

    def test_no_cache_is_returned_where_none_is_wanted(self) -> None:
        assert twin(gpt())(tokens(1, 4), use_cache=False).past_key_values is None


class TestPadding:
    def test_left_padded_rows_have_the_logits_that_they_have_alone(self) -> None:
        model = twin(gpt())
        rows = [tokens(3), tokens(10), tokens(16)]
        logits = model(**left_padded(rows)).logits
        for row, row_logits in zip(rows, logits, strict=True):
            torch.testing.assert_close(row_logits[-len(row) :], model(row[None]).logits[0])

    @pytest.mark.parametrize("lengths", [(3, 10), (9, 30), (20, 30)], ids=["short", "one too long", "both too long"])
    def test_left_padded_rows_generate_what_they_generate_alone(self, lengths: tuple[int, int]) -> None:
        model = twin(gpt())
        rows = [tokens(length) for length in lengths]

        def generated(batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            """20 tokens, past the context of 16, of shape (B, 20), and the logits that they have, (B, 20, V)."""
            how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
            output = model.generate(**left_padded(batch), **how, return_dict_in_generate=True, output_logits=True)
            return output.sequences[:, -20:], torch.stack(output.logits, dim=1)

        together = generated(rows)
        for row, ids, logits in zip(rows, *together, strict=True):
            (ids_alone,), (logits_alone,) = generated([row])
            assert torch.equal(ids, ids_alone)
            torch.testing.assert_close(logits, logits_alone)


class TestPastTheContext:
    def test_a_forward_pass_that_is_too_long_says_so(self) -> None:
        with pytest.raises(ValueError, match=r"17 tokens are more than the context of 16 \(block_size\)"):
            twin(gpt())(tokens(1, 17))

    def test_a_cached_forward_pass_that_is_too_long_says_so(self) -> None:
        model = twin(gpt())
        cache = model(tokens(1, 16)).past_key_values
        with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
            model(tokens(1, 1), past_key_values=cache)

    def test_position_ids_past_the_context_say_so(self) -> None:
        with pytest.raises(ValueError, match="Position 16 is past the 16 learned positions"):
            twin(gpt())(tokens(1, 2), position_ids=torch.tensor([[15, 16]]))

    def test_beam_search_scores_are_those_of_the_original_in_its_window(self) -> None:
        original = gpt()
        prompt = tokens(1, 5)
        output = twin(original).generate(
            prompt,
            num_beams=3,
            num_return_sequences=3,
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
            log_probs = [
                original(sequence[None, max(0, end - 16) : end])[0][0, -1].log_softmax(dim=-1)[sequence[end]].item()
                for end in range(5, 25)
            ]
            assert score.item() == pytest.approx(sum(log_probs) / len(log_probs), rel=1e-4)

    def test_generation_from_embeddings_goes_on_as_from_tokens(self) -> None:
        model = twin(gpt())
        ids = tokens(1, 5)
        how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
        generated = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **how)
        assert torch.equal(generated, model.generate(ids, **how)[:, 5:])

    def test_assisted_generation_is_greedy_within_the_context_and_says_where_it_ends(self) -> None:
        model = twin(gpt())
        ids = tokens(1, 5)
        how = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
        assisted = model.generate(ids, max_new_tokens=8, prompt_lookup_num_tokens=2, **how)
        assert torch.equal(assisted, model.generate(ids, max_new_tokens=8, **how))
        with pytest.raises(ValueError, match="Assisted generation ends with the context of 16 tokens"):
            model.generate(ids, max_new_tokens=20, prompt_lookup_num_tokens=2, **how)


class TestLength:
    """Of a model whose folder says `max_new_tokens`, as every converted folder does."""

    @pytest.fixture
    def model(self) -> CustomGPTForCausalLM:
        model = twin(gpt())
        model.generation_config = GenerationConfig(max_new_tokens=30, pad_token_id=PAD)
        return model

    @pytest.mark.parametrize("how", [{"max_length": 9}, {"generation_config": GenerationConfig(max_length=9)}], ids=str)
    def test_the_caller_s_max_length_holds(self, model: CustomGPTForCausalLM, how: dict) -> None:
        assert model.generate(tokens(1, 4), **how).shape == (1, 9)

    @pytest.mark.parametrize("own", [{}, {"max_length": 9}, {"max_new_tokens": 7}], ids=str)
    def test_the_arguments_go_before_the_caller_s_configuration(self, model: CustomGPTForCausalLM, own: dict) -> None:
        config = GenerationConfig(**own)
        assert model.generate(tokens(1, 4), generation_config=config, max_length=12).shape == (1, 12)
        assert model.generate(tokens(1, 4), generation_config=config, max_new_tokens=5).shape == (1, 9)

    def test_of_two_limits_of_the_caller_the_new_tokens_count_as_in_the_library(
        self, model: CustomGPTForCausalLM
    ) -> None:
        assert model.generate(tokens(1, 4), max_length=9, max_new_tokens=7).shape == (1, 11)

    @pytest.mark.parametrize("how", [{}, {"generation_config": GenerationConfig(do_sample=True)}], ids=str)
    def test_without_a_limit_of_the_caller_the_folder_s_holds(self, model: CustomGPTForCausalLM, how: dict) -> None:
        assert model.generate(tokens(1, 4), **how).shape == (1, 34)

    def test_a_pipeline_s_max_length_holds(self, capitals: Path) -> None:
        ask = pipeline("text-generation", str(capitals), max_length=20, eos_token_id=None, return_tensors=True)
        assert len(ask("Sing!")[0]["generated_token_ids"]) == 20
        assert len(ask("Sing!", max_length=12)[0]["generated_token_ids"]) == 12


class TestForward:
    def test_embeddings_serve_as_tokens_do(self) -> None:
        model = twin(gpt())
        ids = tokens(2, 9)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)

    def test_tokens_and_embeddings_together_or_neither_are_refused(self) -> None:
        model = twin(gpt())
        ids = tokens(1, 3)
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(ids, inputs_embeds=model.get_input_embeddings()(ids))
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model()

    def test_position_ids_choose_the_positions(self) -> None:
        model = twin(gpt())
        ids = tokens(1, 4)
        shifted = model.transformer.wpe.weight[5:9] - model.transformer.wpe.weight[0:4]
        expected = model(inputs_embeds=model.get_input_embeddings()(ids) + shifted).logits
        torch.testing.assert_close(model(ids, position_ids=torch.tensor([[5, 6, 7, 8]])).logits, expected)

    def test_loss_is_the_cross_entropy_of_the_next_token(self) -> None:
        model = twin(gpt())
        ids = tokens(2, 6)
        labels = ids.clone()
        labels[0, :3] = -100
        output = model(ids, labels=labels)
        log_probs = output.logits.double().log_softmax(dim=-1)
        counted = [(0, 3), (0, 4), (0, 5), *((1, position) for position in range(1, 6))]
        by_hand = -sum(log_probs[row, position - 1, ids[row, position]] for row, position in counted) / len(counted)
        assert output.loss.item() == pytest.approx(by_hand.item(), rel=1e-6)

    def test_logits_to_keep_are_the_same_logits(self) -> None:
        model = twin(gpt())
        ids = tokens(2, 9)
        logits = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])

    def test_hidden_states_go_from_the_embeddings_to_the_head(self) -> None:
        model = twin(gpt())
        ids = tokens(2, 9)
        output = model(ids, output_hidden_states=True)
        embeddings = model.transformer.wte(ids) + model.transformer.wpe.weight[:9]
        assert len(output.hidden_states) == 1 + SIZES["n_layer"]
        assert torch.equal(output.hidden_states[0], embeddings)
        assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)

    def test_attentions_are_causal_shares_that_sum_to_one(self) -> None:
        model = twin(gpt())
        model.set_attn_implementation("eager")
        attentions = model(tokens(2, 9), output_attentions=True).attentions
        assert len(attentions) == SIZES["n_layer"]
        for weights in attentions:
            assert weights.shape == (2, SIZES["n_head"], 9, 9)
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, SIZES["n_head"], 9))
            assert not weights.triu(diagonal=1).any()

    def test_eager_attention_agrees_with_sdpa(self) -> None:
        model = twin(gpt())
        batch = left_padded([tokens(4), tokens(12)])
        fused = model(**batch).logits
        model.set_attn_implementation("eager")
        seen = batch["attention_mask"].bool()
        torch.testing.assert_close(model(**batch).logits[seen], fused[seen])

    def test_the_base_model_gives_the_states_before_the_head(self) -> None:
        model = twin(gpt())
        ids = tokens(2, 9)
        assert torch.equal(model.lm_head(model.transformer(ids).last_hidden_state), model(ids).logits)


class TestTraining:
    def test_gradient_checkpointing_changes_no_gradient(self) -> None:
        model = twin(gpt(dropout=0.2)).train()
        ids = tokens(2, 9)
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.23
                (enable or model.gradient_checkpointing_enable)()
            model.zero_grad()
            torch.manual_seed(1)
            model(ids, labels=ids, use_cache=False).loss.backward()
            gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        assert model.transformer.h[0].gradient_checkpointing
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, gradients[1][name]), name

    def test_initial_weights_have_the_documented_spread(self) -> None:
        model = CustomGPTForCausalLM(CustomGPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=256, vocab_size=512))
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                assert not weight.any(), name
            elif ".ln_" in name:
                assert (weight == 1).all(), name
            else:
                documented = 0.02 / math.sqrt(2 * 2) if name.endswith("c_proj.weight") else 0.02
                assert weight.std().item() == pytest.approx(documented, rel=0.03), name
                assert abs(weight.mean().item()) < documented / 25, name


class TestEmbeddings:
    @pytest.mark.parametrize("tied", [False, True])
    def test_resizing_keeps_the_old_tokens_logits(self, tied: bool) -> None:
        model = twin(gpt(tied=tied))
        ids = tokens(1, 9)
        before = model(ids).logits
        model.resize_token_embeddings(SIZES["vocab_size"] + 8)
        assert model.config.vocab_size == SIZES["vocab_size"] + 8
        assert (model.lm_head.weight is model.transformer.wte.weight) == tied
        after = model(ids).logits
        assert after.shape[-1] == SIZES["vocab_size"] + 8
        torch.testing.assert_close(after[..., : SIZES["vocab_size"]], before)

    @pytest.mark.parametrize(
        "size, multiple, suppressed",
        [(301, 64, range(301, 320)), (301, None, ()), (320, None, ()), (330, 8, range(330, 336))],
    )
    def test_after_resizing_the_ids_of_padding_rows_are_suppressed_and_no_others(
        self, size: int, multiple: int | None, suppressed: Sequence[int]
    ) -> None:
        model = twin(gpt(vocab_size=320))
        model.generation_config.suppress_tokens = list(range(300, 320))
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
        assert (model.generation_config.suppress_tokens or []) == list(suppressed)

    @pytest.mark.parametrize("tied", [False, True])
    def test_a_saved_model_loads_as_it_was(self, tied: bool, tmp_path: Path) -> None:
        model = twin(gpt(tied=tied))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
        ids = tokens(2, 9)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
