"""The GGUF file: llama.cpp gives the reference's log-probabilities and the tokenizer's ids, and answers a chat."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_model.conversion import convert
from hf_model.errors import UserError
from hf_model.formats.gguf_tokenizer import to_gguf
from hf_model.output_dir import MANIFEST
from tests.formats.conftest import Exported
from tests.tiny import SIZES, gpt

gguf = pytest.importorskip("gguf", reason="gguf is not installed (the `gguf` extra)")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the `gguf` extra)")

# Of an engine that rounds activations to half precision in its GELU, for log-probabilities that spread by about 0.6.
ALLOWED = {"f32": 5e-3, "f16": 1e-2, "q8_0": 1e-1}


def run(path: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of llama.cpp, of shape (T, V)."""
    llama = llama_cpp.Llama(str(path), n_ctx=len(ids), logits_all=True, verbose=False)
    llama.eval(ids)
    return torch.from_numpy(llama.scores[: len(ids)].copy()).log_softmax(-1)


@pytest.mark.parametrize("gguf_type", ALLOWED)
def test_gives_the_log_probabilities_of_the_plain_reference(shape: dict, gguf_type: str, export: Exported) -> None:
    folder, lines = export("gguf", shape, gguf_type=gguf_type)
    assert {path.name for path in folder.iterdir()} == {f"model-{gguf_type}.gguf", "Modelfile", "README.md", MANIFEST}
    ids = torch.randint(shape.get("vocab_size", 300), (1, SIZES["block_size"]))
    torch.manual_seed(0)
    expected = gpt(**shape)(ids)[0][0].log_softmax(-1)
    got = run(folder / f"model-{gguf_type}.gguf", ids[0].tolist())
    assert (expected - got).abs().max() < ALLOWED[gguf_type]
    said = "\n".join(lines)
    assert "verified      by llama.cpp, compared with the file: the log-probabilities of 16 positions differ" in said
    assert ("llama.cpp's GELU is the tanh form" in said) == (shape.get("activation") != "gelu_new")


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16], ids=str)
def test_takes_half_precision_from_a_folder(weights: torch.dtype, export: Exported) -> None:
    export("gguf", {}, weights=weights, from_folder=True, gguf_type="f16")


@pytest.fixture(scope="module")
def example(capitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(capitals, None, tmp_path_factory.mktemp("gguf") / "out", format="gguf") / "model-f32.gguf"


class TestTheExample:
    @pytest.mark.parametrize("n_turns", [1, 3])
    def test_answers_a_chat_by_its_own_template(self, n_turns: int, example: Path, capitals: Path) -> None:
        """The ids that it is asked with and the log-probabilities of what it says are those of transformers."""
        italy = [{"role": "user", "content": "What is the capital of Italy?"}, {"role": "assistant", "content": "Rome"}]
        messages = [*italy * (n_turns - 1), {"role": "user", "content": "What is the capital of France?"}]
        llama = llama_cpp.Llama(str(example), n_ctx=64, logits_all=True, verbose=False)
        completion = llama.create_chat_completion(messages, temperature=0, logprobs=True, top_logprobs=1)
        (choice,) = completion["choices"]
        assert (choice["message"]["content"].strip(), choice["finish_reason"]) == ("Paris", "stop")

        model, tokenizer = AutoModelForCausalLM.from_pretrained(capitals), AutoTokenizer.from_pretrained(capitals)
        inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
        n_prompt = inputs.input_ids.shape[1]
        assert completion["usage"]["prompt_tokens"] == n_prompt == 12  # one [BOS]
        assert llama.input_ids[:n_prompt].tolist() == inputs.input_ids[0].tolist()
        said = choice["logprobs"]["content"]
        ids = model.generate(**inputs, do_sample=False)[:, : n_prompt + len(said)]
        assert "".join(token["token"] for token in said) == tokenizer.decode(ids[0, n_prompt:]) == " Paris"
        log_probs = model(ids).logits[0, n_prompt - 1 : -1].log_softmax(-1).gather(1, ids[0, n_prompt:, None])[:, 0]
        got = torch.tensor([token["logprob"] for token in said])
        torch.testing.assert_close(got, log_probs, rtol=0, atol=ALLOWED["f32"])

    @pytest.mark.parametrize(
        "text",
        ["", "  two  spaces ", "I'll 東京 🙂 e\u0301", "[BOS]Instruction: a [EOS] b[PAD]", "x" * 200, "\r\n\t\x00"],
    )
    def test_encodes_as_the_tokenizer_does(self, text: str, example: Path, capitals: Path) -> None:
        llama, tokenizer = (
            llama_cpp.Llama(str(example), vocab_only=True, verbose=False),
            AutoTokenizer.from_pretrained(capitals),
        )
        assert llama.tokenize(text.encode(), special=True) == tokenizer(text).input_ids
        typed = tokenizer(text, split_special_tokens=True).input_ids  # a user's "[EOS]" is text
        assert llama.tokenize(text.encode(), special=False) == typed


def wrapped(model: models.Model, **how: object) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    for name, part in how.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_level(**how: object) -> PreTrainedTokenizerFast:
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    how = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()} | how
    return wrapped(models.BPE(alphabet, []), **how)


CHARACTERS = sorted(set("\n !'\\\"&abcdefghijklmnopqrstuvwxyz.é漢🙂"))


def characters() -> PreTrainedTokenizerFast:
    return wrapped(models.BPE({char: index for index, char in enumerate(CHARACTERS)}, []), decoder=decoders.Fuse())


class TestVocabularies:
    def file(self, tokenizer: PreTrainedTokenizerFast, path: Path) -> Path:
        from hf_model.formats.gguf import write_file
        from tests.tiny import twin

        model = twin(gpt(vocab_size=len(tokenizer) + 3))
        write_file(path, model, "f32", to_gguf(tokenizer, len(tokenizer) + 3))
        return path

    def test_of_single_characters(self, tmp_path: Path) -> None:
        llama = llama_cpp.Llama(str(self.file(characters(), tmp_path / "c.gguf")), vocab_only=True, verbose=False)
        for text in ("a cat.\n\n 'quoted' \\ \"é漢🙂\"", "", " ", "&&"):
            ids = llama.tokenize(text.encode(), special=True)
            assert ids == [CHARACTERS.index(char) for char in text]
            assert llama.detokenize(ids).decode() == text
        assert (llama.token_bos(), llama.token_eos()) == (-1, -1)

    def test_of_bytes_without_special_tokens_end_at_a_padding_row(self, tmp_path: Path) -> None:
        tokenizer = byte_level()
        llama = llama_cpp.Llama(str(self.file(tokenizer, tmp_path / "b.gguf")), vocab_only=True, verbose=False)
        assert llama.tokenize("a é 🙂".encode(), special=True) == tokenizer("a é 🙂").input_ids
        assert llama.token_eos() == len(tokenizer)

    def test_without_an_end_and_without_padding_are_noted(self) -> None:
        assert "--ignore-eos" in " ".join(to_gguf(byte_level(), 256).notes)

    def test_with_one_token_for_beginning_and_end(self) -> None:
        """As GPT-2's."""
        tokenizer = byte_level()
        tokenizer.add_special_tokens({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
        vocabulary = to_gguf(tokenizer, 300)
        assert (vocabulary.special["bos"], vocabulary.special["eos"]) == (256, 256)
        assert not vocabulary.adds_bos

    @pytest.mark.parametrize(
        "tokenizer, message",
        [
            (lambda: byte_level(normalizer=normalizers.NFC()), "no normalizer for this tokenizer's NFC"),
            (
                lambda: byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
                "splits and spaces a text",
            ),
            (lambda: wrapped(models.WordLevel({"a": 0}, unk_token="a")), "no WordLevel tokenizer"),
            (lambda: wrapped(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])), "no BPE of characters"),
        ],
        ids=["normalizer", "prefix space", "words", "BPE of characters"],
    )
    def test_that_llama_cpp_does_not_have_are_refused(self, tokenizer: Callable, message: str) -> None:
        with pytest.raises(UserError, match=message):
            to_gguf(tokenizer(), 300)


@pytest.mark.parametrize("gguf_type", ALLOWED)
def test_a_wrong_number_of_heads_is_noticed(gguf_type: str, refuses: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gguf.GGUFWriter.add_head_count
    monkeypatch.setattr(gguf.GGUFWriter, "add_head_count", lambda self, count: right(self, count // 2))
    assert "the files do not hold this model" in refuses("gguf", {}, gguf_type=gguf_type)


def test_refuses_a_width_that_q8_0_cannot_pack(refuses: Callable) -> None:
    assert "packs 32 values, and this model is 48 wide" in refuses("gguf", {"n_embd": 48}, gguf_type="q8_0")


def test_says_what_is_missing(refuses: Callable, export: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_model.formats import target

    absent = {"llama_cpp"}
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None if name in absent else object())
    _, lines = export("gguf", {})
    assert lines[-1] == f'not verified  llama_cpp not installed for {sys.executable}: pip install "custom-gpt-hf[gguf]"'
    absent.add("gguf")
    with pytest.raises(UserError, match=r'gguf not installed .* pip install "custom-gpt-hf\[gguf\]"'):
        export("gguf", {}, overwrite=True)
