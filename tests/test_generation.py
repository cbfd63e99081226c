"""What generate.py stands on: sampling options and text that appears as it is generated."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from examples.plain_gpt import save_checkpoint
from hf_model.errors import UserError
from hf_model.generation import (
    Generation,
    ResponseStream,
    Sampling,
    TokenStream,
    encode,
    encode_end,
    encode_prompt,
    generate,
)
from hf_model.loading import load
from hf_model.tokenizer import convert_tokenizer
from tests.reliability.files import bounded
from tests.tiny import BOS, EOS, PAD, TOKENIZER, gpt, save_tokenizer, twin

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The example's."""
    return convert_tokenizer(TOKENIZER, model_max_length=64)


class TestVeryLongPrompts:
    """The model sees their last tokens. To find these, the whole text is not encoded."""

    @pytest.mark.parametrize(
        "text",
        [
            "The cat sat on the mat. " * 30_000,
            "a" * 500_000,  # one word
            " " * 500_000,
            "漢字" * 200_000,
            "x" * 400_000 + " " + "y" * 100,
        ],
        ids=["sentences", "a word", "spaces", "characters of several bytes", "a word at the cut"],
    )
    def test_the_last_tokens_are_those_of_the_whole_text(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        whole = encode_prompt(tokenizer, text)
        end, is_whole = encode_end(tokenizer, text, block_size=64)
        assert torch.equal(end[:, -64:], whole[:, -64:])
        assert is_whole or end.shape[1] < whole.shape[1]

    def test_a_text_of_few_long_tokens_is_encoded_as_far_as_the_context_needs(self, tmp_path: Path) -> None:
        file = ByteLevelBPETokenizer()
        file.train_from_iterator(["a" * 4096], vocab_size=400, show_progress=False)
        file.save(str(tmp_path / "tokenizer.json"))
        tokenizer = convert_tokenizer(tmp_path / "tokenizer.json", model_max_length=8192)
        text = ("a" * 2048 + " ") * 3000  # 6 million characters in some thousand tokens
        end, _ = encode_end(tokenizer, text, block_size=1024)
        assert torch.equal(end[:, -1024:], encode_prompt(tokenizer, text)[:, -1024:])

    def test_thirty_megabytes_take_little_memory(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with bounded(seconds=10, mebibytes=300):
            _, is_whole = encode_end(tokenizer, "The cat sat. " * 2_400_000, block_size=64)
        assert not is_whole


class TestSampling:
    def test_the_defaults_are_the_original_script_s(self) -> None:
        assert Sampling().kwargs() == {
            "do_sample": True,
            "max_new_tokens": 150,
            "temperature": 0.8,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "num_return_sequences": 1,
        }

    def test_temperature_0_is_greedy(self) -> None:
        how = Sampling(temperature=0, top_k=5).kwargs()
        assert (how["do_sample"], how["temperature"], how["top_k"], how["top_p"]) == (False, None, None, None)

    def test_the_library_s_own_processors_are_asked_for_by_their_names(self) -> None:
        how = Sampling(min_p=0.1, num_beams=3).kwargs()
        assert (how["min_p"], how["num_beams"]) == (0.1, 3)


class TestEncode:
    def test_special_tokens_that_a_user_types_are_text(self, tokenizer: PreTrainedTokenizerFast) -> None:
        ids = encode(tokenizer, "the [EOS] of it").tolist()[0]
        assert ids[0] == BOS
        assert EOS not in ids
        assert tokenizer.decode(ids) == "[BOS]the [EOS] of it"

    def test_they_are_tokens_where_that_is_asked_for(self, tokenizer: PreTrainedTokenizerFast) -> None:
        ids = encode(tokenizer, "the [EOS] of it", parse_special_tokens=True).tolist()[0]
        assert ids == tokenizer("the [EOS] of it").input_ids
        assert EOS in ids


class TestTokenStream:
    @staticmethod
    def streamed(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str, prompt_text: bool) -> list[str]:
        """The pieces that come of a response when its tokens arrive one by one."""
        pieces: list[str] = []
        stream = TokenStream(tokenizer, pieces.append, prompt_text=prompt_text)
        stream.put(tokenizer(prompt, return_tensors="pt").input_ids)
        for token_id in tokenizer(response, add_special_tokens=False).input_ids:
            stream.put(torch.tensor([token_id]))
        stream.end()
        return pieces

    def test_characters_of_several_tokens_come_whole(self, tokenizer: PreTrainedTokenizerFast) -> None:
        response = " 漢字 🙂 Ünï[EOS]"
        assert len(tokenizer("漢字", add_special_tokens=False).input_ids) > 2
        pieces = self.streamed(tokenizer, "Response:", response, prompt_text=True)
        assert "".join(pieces) == "[BOS]Response: 漢字 🙂 Ünï[EOS]"
        assert {"漢", "字", "🙂"} <= {piece.strip() for piece in pieces}

    def test_the_bare_response_starts_without_its_space(self, tokenizer: PreTrainedTokenizerFast) -> None:
        pieces = self.streamed(tokenizer, "Response:", " The  capital is Paris[EOS]", prompt_text=False)
        assert len(pieces) > 3
        assert "".join(pieces) == "The  capital is Paris"

    def test_a_character_that_is_never_finished_is_shown_at_the_end(self, tokenizer: PreTrainedTokenizerFast) -> None:
        pieces: list[str] = []
        stream = TokenStream(tokenizer, pieces.append, prompt_text=True)
        stream.put(torch.tensor([[BOS]]))
        stream.put(torch.tensor([tokenizer("漢", add_special_tokens=False).input_ids[0]]))
        assert pieces == ["[BOS]"]
        stream.end()
        assert pieces == ["[BOS]", "\ufffd"]

    @pytest.mark.parametrize("response_only", [False, True])
    def test_the_pieces_add_up_to_the_text_of_any_bytes(self, response_only: bool, tmp_path: Path) -> None:
        tokenizer = convert_tokenizer(save_tokenizer(tmp_path / "tokenizer.json"), model_max_length=16)
        model = twin(gpt())  # draws bytes at random, few of which are characters
        for seed in range(5):
            pieces: list[str] = []
            sampling = Sampling(max_new_tokens=40, temperature=3.0, top_k=0, seed=seed)
            prompt = encode(tokenizer, "Instruction: the cat Response:")
            output = generate(model, tokenizer, prompt, sampling, response_only=response_only, on_text=pieces.append)
            assert "\ufffd" in output.texts[0]
            assert len(pieces) > 5
            assert "".join(pieces) == output.texts[0]


class TestStop:
    """What a stream gives until a stop string is there, whose beginning it holds back."""

    @pytest.mark.parametrize(
        "pieces, shown",
        [
            (["ab", "END", "cd"], ["ab"]),
            (["abE", "N", "Dcd"], ["ab"]),
            (["abE", "x"], ["ab", "Ex"]),
            (["E", "N"], ["EN"]),  # at the end it was no stop string
            (["EE", "ND"], ["E"]),
            (["a STOPEND"], ["a "]),
        ],
    )
    def test_is_never_shown(self, pieces: list[str], shown: list[str]) -> None:
        given: list[str] = []
        stream = ResponseStream(given.append, Sampling(stop=("END", "STOP")))
        for piece in pieces:
            stream.add(piece)
        stream.add("", is_last=True)
        assert given == shown


class TestStopCriterion:
    def test_a_stop_string_of_characters_ends_an_answer(self, tmp_path: Path) -> None:
        stoi = {character: i for i, character in enumerate("\nab")}
        (tmp_path / "meta.pkl").write_bytes(
            pickle.dumps({"vocab_size": 3, "stoi": stoi, "itos": dict(enumerate("\nab"))})
        )
        save_checkpoint(tmp_path / "ckpt.pt", gpt(vocab_size=3, tied=True), iter_num=1)
        model, of_characters = load(tmp_path / "ckpt.pt", tmp_path / "meta.pkl", device="cpu")
        sampling = Sampling(temperature=1, max_new_tokens=200, num_return_sequences=4, stop=("ab", "ba"))
        for how in (sampling, replace(sampling, num_beams=4)):
            output = generate(model, of_characters, encode(of_characters, "a"), how, response_only=True)
            assert all("ab" not in text and "ba" not in text for text in output.texts)
            for ids, reason in zip(output.ids, output.finish_reasons, strict=True):
                ended = of_characters.decode(ids).endswith(("ab", "ba"))
                assert (reason == "stop") == ended and (ended or len(ids) == 200)

    def test_a_stop_string_that_begins_in_the_prompt_ends_nothing(self, capitals: Path) -> None:
        model, tokenizer = load(capitals, device="cpu")
        prompt = encode(tokenizer, "Instruction: What is the capital of France? Response: Par")
        how = Sampling(temperature=0, max_new_tokens=5, stop=("ris",))
        output = generate(model, tokenizer, prompt, how, response_only=True)
        assert output.responses == ["is"]
        assert tokenizer.decode(output.ids[0]) == "is[EOS]"


class TestGenerate:
    @pytest.fixture
    def answers(self, tmp_path: Path) -> Callable[..., Generation]:
        """Generations of a model that draws [EOS] now and then."""
        tokenizer = convert_tokenizer(save_tokenizer(tmp_path / "tokenizer.json"), model_max_length=16)
        model = twin(gpt())
        model.generation_config.eos_token_id = EOS
        model.generation_config.pad_token_id = PAD
        model.lm_head.weight.data.mul_(0.2)
        prompt = encode(tokenizer, "the cat")

        def generated(sampling: Sampling, **how) -> Generation:
            return generate(model, tokenizer, prompt, sampling, **how)

        return generated

    def test_the_seed_makes_a_run_repeatable(self, answers: Callable[..., Generation]) -> None:
        first, again, other = (answers(Sampling(max_new_tokens=12, seed=seed)).texts for seed in (1, 1, 2))
        assert first == again != other

    def test_several_sequences_end_each_at_its_own_end_token(self, answers: Callable[..., Generation]) -> None:
        pieces: list[str] = []
        sampling = Sampling(max_new_tokens=60, top_k=0, temperature=2.0, num_return_sequences=30)
        output = answers(sampling, on_text=pieces.append)
        assert len(output.texts) == 30
        ended = [text for text in output.texts if "[EOS]" in text]
        assert 0 < len(ended) < 30
        assert all(text.startswith("[BOS]the cat") for text in output.texts)
        assert all(text.index("[EOS]") == len(text) - len("[EOS]") for text in ended)
        assert pieces == []

    def test_new_tokens_count_those_up_to_the_end_tokens(self, capitals: Path) -> None:
        model, tokenizer = load(capitals, None, device=CPU)
        prompt = encode(tokenizer, "Instruction: What is the capital of France? Response:")
        output = generate(model, tokenizer, prompt, Sampling(num_return_sequences=2), response_only=True)
        assert output.texts == ["Paris", "Paris"]
        assert output.new_tokens == 2 * len(tokenizer(" Paris[EOS]", add_special_tokens=False).input_ids)
        assert output.seconds > 0

    def test_the_whole_text_has_the_prompt_and_the_special_tokens(self, capitals: Path) -> None:
        model, tokenizer = load(capitals, None, device=CPU)
        prompt = encode(tokenizer, "Instruction: What is the capital of France? Response:")
        output = generate(model, tokenizer, prompt, Sampling(temperature=0))
        assert output.texts == ["[BOS]Instruction: What is the capital of France? Response: Paris[EOS]"]

    def test_logits_that_are_not_numbers_are_an_error(self, tmp_path: Path) -> None:
        tokenizer = convert_tokenizer(save_tokenizer(tmp_path / "tokenizer.json"), model_max_length=16)
        model = twin(gpt())
        model.transformer.ln_f.weight.data[0] = float("nan")
        for temperature in (0, 0.8):
            with pytest.raises(UserError, match="the model's logits are NaN or infinite: its weights hold such values"):
                generate(model, tokenizer, encode(tokenizer, "the cat"), Sampling(temperature=temperature))

    @pytest.mark.parametrize("extreme", [{"temperature": 1e-300}, {"repetition_penalty": 1e-300}], ids=str)
    def test_options_that_leave_nothing_to_draw_from_are_an_error(
        self, extreme: dict, answers: Callable[..., Generation]
    ) -> None:
        with pytest.raises(UserError, match="--temperature or --repetition_penalty is too near to 0"):
            answers(Sampling(**extreme))

    def test_more_beams_than_tokens_are_an_error(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "ckpt.pt", gpt(vocab_size=1), 0)
        (tmp_path / "input.txt").write_text("aaa")
        model, tokenizer = load(tmp_path / "ckpt.pt", characters_of=tmp_path / "input.txt", device=CPU)
        with pytest.raises(UserError, match="--num_beams is larger than the number of tokens"):
            generate(model, tokenizer, encode(tokenizer, "a"), Sampling(num_beams=5, num_return_sequences=5))

    def test_a_stop_string_that_is_no_text_stops_nothing(self, answers: Callable[..., Generation]) -> None:
        how = {"max_new_tokens": 8, "temperature": 0}
        assert answers(Sampling(stop=("\udce9",), **how)).texts == answers(Sampling(**how)).texts

    def test_interrupted_it_has_given_all_the_text_that_there_is(self, tokenizer: PreTrainedTokenizerFast) -> None:
        first_byte = tokenizer("漢", add_special_tokens=False, return_tensors="pt").input_ids[0, :1]

        class Interrupted:
            device = CPU

            def generate(self, input_ids: torch.Tensor, streamer: TokenStream, **how) -> None:
                streamer.put(input_ids)
                streamer.put(first_byte)
                raise KeyboardInterrupt

        pieces: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            generate(Interrupted(), tokenizer, encode(tokenizer, "the"), Sampling(), on_text=pieces.append)
        assert "".join(pieces) == "[BOS]the\ufffd"
