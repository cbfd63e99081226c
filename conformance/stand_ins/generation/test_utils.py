"""Stand-in: what `generate` must do with a model."""

from collections.abc import Iterator

import torch
from parameterized import parameterized
from transformers import PreTrainedModel, StaticCache, set_seed


class GenerationTesterMixin:
    new_tokens = 5

    def _models(self) -> Iterator[tuple[PreTrainedModel, torch.Tensor]]:
        """Each model that can generate, and a prompt of shape (2, T)."""
        for model_class in self.all_generative_model_classes:
            set_seed(0)
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).eval()
            model.generation_config.eos_token_id = None  # so that every output has its full length
            yield model, inputs["input_ids"][:2]

    def _greedy(self, model: PreTrainedModel, input_ids: torch.Tensor | None = None, **kwargs) -> list[list[int]]:
        kwargs = {"do_sample": False, "max_new_tokens": self.new_tokens, **kwargs}
        return model.generate(input_ids, **kwargs).tolist()

    @parameterized.expand([(True,), (False,)])
    def test_greedy_generate_equals_a_loop_of_forward_passes(self, use_cache: bool) -> None:
        for model, prompt in self._models():
            expected = prompt
            for _ in range(self.new_tokens):
                next_token = model(expected, use_cache=False).logits[:, -1:].argmax(-1)
                expected = torch.cat([expected, next_token], dim=1)
            self.assertEqual(self._greedy(model, prompt, use_cache=use_cache), expected.tolist())

    def test_eager_matches_sdpa_generate(self) -> None:
        for model, prompt in self._models():
            expected = self._greedy(model, prompt)
            model.set_attn_implementation("eager")
            self.assertEqual(self._greedy(model, prompt), expected)

    def test_left_padding_compatibility(self) -> None:
        for model, prompt in self._models():
            padding = torch.full((2, 3), model.config.pad_token_id)
            padded = torch.cat([padding, prompt], dim=1)
            mask = torch.cat([torch.zeros_like(padding), torch.ones_like(prompt)], dim=1)
            output = self._greedy(model, padded, attention_mask=mask)
            self.assertEqual([row[3:] for row in output], self._greedy(model, prompt))

    def test_sample_generate_is_reproducible(self) -> None:
        for model, prompt in self._models():
            samples = []
            for seed in (1, 1, 2):
                set_seed(seed)
                samples.append(model.generate(prompt, do_sample=True, max_new_tokens=20).tolist())
            self.assertEqual(samples[0], samples[1])
            self.assertNotEqual(samples[0], samples[2])

    def test_beam_search_scores_are_those_of_the_model(self) -> None:
        for model, prompt in self._models():
            output = model.generate(
                prompt,
                num_beams=4,
                num_return_sequences=4,
                length_penalty=0.0,
                do_sample=False,
                max_new_tokens=self.new_tokens,
                output_scores=True,
                return_dict_in_generate=True,
            )
            self.assertEqual(len(output.sequences.unique(dim=0)), 8)  # 4 different ones for each of two prompts
            log_probabilities = model(output.sequences).logits[:, :-1].log_softmax(-1)
            of_tokens = log_probabilities.gather(-1, output.sequences[:, 1:, None])[:, -self.new_tokens :, 0]
            torch.testing.assert_close(output.sequences_scores, of_tokens.sum(-1))

    def test_generate_with_static_cache(self) -> None:
        for model, prompt in self._models():
            output = self._greedy(model, prompt, cache_implementation="static")
            self.assertEqual(output, self._greedy(model, prompt))

    def test_assisted_decoding_matches_greedy_search(self) -> None:
        for model, prompt in self._models():
            set_seed(1)
            another = type(model)(model.config).eval()
            for assistant in (model, another):
                output = self._greedy(model, prompt[:1], assistant_model=assistant)
                self.assertEqual(output, self._greedy(model, prompt[:1]))

    def test_prompt_lookup_decoding_matches_greedy_search(self) -> None:
        for model, prompt in self._models():
            prompt = prompt[:1].repeat(1, 3)
            output = self._greedy(model, prompt, prompt_lookup_num_tokens=2)
            self.assertEqual(output, self._greedy(model, prompt))

    def test_generate_from_inputs_embeds(self) -> None:
        for model, prompt in self._models():
            output = self._greedy(model, inputs_embeds=model.get_input_embeddings()(prompt))
            self.assertEqual(output, [row[prompt.shape[1] :] for row in self._greedy(model, prompt)])

    def test_generate_continue_from_past_key_values(self) -> None:
        for model, prompt in self._models():
            first = model.generate(prompt, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
            output = self._greedy(
                model,
                first.sequences,
                past_key_values=first.past_key_values,
                max_new_tokens=self.new_tokens - 2,
            )
            self.assertEqual(output, self._greedy(model, prompt))

    def test_generate_outputs(self) -> None:
        for model, prompt in self._models():
            model.set_attn_implementation("eager")
            names = ("logits", "scores", "hidden_states", "attentions")
            output = model.generate(
                prompt,
                do_sample=False,
                max_new_tokens=self.new_tokens,
                return_dict_in_generate=True,
                **{f"output_{name}": True for name in names},
            )
            for name in names:
                self.assertEqual(len(output[name]), self.new_tokens)
            vocab_size, n_layer = model.config.vocab_size, model.config.num_hidden_layers
            self.assertEqual(output.logits[0].shape, (2, vocab_size))
            self.assertEqual(len(output.hidden_states[0]), n_layer + 1)
            self.assertEqual(len(output.attentions[0]), n_layer)

    def test_generate_compile_model_forward_fullgraph(self) -> None:
        for model, prompt in self._models():
            expected = self._greedy(model, prompt)
            torch.compiler.reset()
            model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
            cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + self.new_tokens)
            self.assertEqual(self._greedy(model, prompt, past_key_values=cache), expected)
