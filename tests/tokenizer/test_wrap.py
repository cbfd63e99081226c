"""The converted tokenizer encodes what the original's does, marks its ends as told, and survives saving and loading."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_model.errors import UserError
from hf_model.tokenizer import ModelInfo, convert_tokenizer, find_tokenizer, read_tokenizer, save_tokenizer
from tests import relatives
from tests.tiny import BOS, EOS, PAD, TOKENIZER
from tests.tiny import save_tokenizer as save_tiny_tokenizer

TEXTS = [
    "",
    "Instruction: What is the capital of France? Response:",
    "  leading, double  and trailing spaces ",
    "new\nlines\r\nand\ttabs",
    "it's 12345 o'clock, we'll go",
    "Ünïcödé e\u0301 漢字 العربية עברית हिन्दी",
    "🙂👨‍👩‍👧 \u00a0\u200b\ufffd",
    "def f(x):\n    return x**2 # <|endoftext|> <s>",
    "[BOS]Instruction: all [UNK] and [PAD] of them Response: yes[EOS]",
    "[bos] [ EOS ] [EO",
]


@pytest.fixture(scope="module")
def original() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(convert_tokenizer(TOKENIZER, model_max_length=64), folder)
    return folder


@pytest.fixture(params=["converted", "saved and loaded"], scope="module")
def tokenizer(request: pytest.FixtureRequest, saved: Path) -> PreTrainedTokenizerFast:
    if request.param == "converted":
        return convert_tokenizer(TOKENIZER, model_max_length=64)
    return AutoTokenizer.from_pretrained(saved)


class TestEncoding:
    @pytest.mark.parametrize("text", TEXTS)
    def test_is_the_original_s_without_its_end_token(
        self, text: str, tokenizer: PreTrainedTokenizerFast, original: Tokenizer
    ) -> None:
        ids = original.encode(text).ids
        assert ids[-1] == EOS
        assert tokenizer(text).input_ids == ids[:-1]

    @pytest.mark.parametrize("text", TEXTS)
    def test_without_special_tokens_is_the_original_s(
        self, text: str, tokenizer: PreTrainedTokenizerFast, original: Tokenizer
    ) -> None:
        ids = original.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False).input_ids == ids

    @pytest.mark.parametrize("text", TEXTS)
    def test_decoding_gives_the_text_back(self, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
        assert tokenizer.decode(tokenizer(text).input_ids) == "[BOS]" + text

    def test_asked_for_the_end_token_it_is_the_original_s(self, saved: Path, original: Tokenizer) -> None:
        with_end = AutoTokenizer.from_pretrained(saved, add_eos_token=True)
        for text in TEXTS:
            assert with_end(text).input_ids == original.encode(text).ids


class TestSettings:
    def test_special_tokens_have_the_original_s_ids(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("[UNK]", 0)
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", PAD)
        assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("[BOS]", BOS)
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("[EOS]", EOS)

    def test_special_tokens_can_be_left_out_of_the_text(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert tokenizer.decode(tokenizer(" Paris[EOS][PAD]").input_ids, skip_special_tokens=True) == " Paris"

    def test_batches_are_padded_on_the_left(self, tokenizer: PreTrainedTokenizerFast) -> None:
        batch = tokenizer(["Paris", "Paris is the capital of France"], padding=True)
        short, long = batch.input_ids
        n_pads = len(long) - len(tokenizer("Paris").input_ids)
        assert n_pads > 0
        assert short == [PAD] * n_pads + tokenizer("Paris").input_ids
        assert batch.attention_mask == [[0] * n_pads + [1] * (len(long) - n_pads), [1] * len(long)]

    def test_the_longest_input_is_the_context(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert tokenizer.model_max_length == 64

    def test_the_model_gets_no_token_types(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert set(tokenizer("Paris")) == {"input_ids", "attention_mask"}


class TestOtherFiles:
    @pytest.fixture
    def edited(self, tmp_path: Path) -> Callable[..., Path]:
        """Write the tiny tokenizer with its JSON changed by a function."""

        def edit(change: Callable[[dict], object]) -> Path:
            path = save_tiny_tokenizer(tmp_path / "tokenizer.json")
            content = json.loads(path.read_text(encoding="utf-8"))
            change(content)
            path.write_text(json.dumps(content), encoding="utf-8")
            return path

        return edit

    @staticmethod
    def rename(old: str, new: str) -> Callable[[dict], None]:
        """Give a special token another name, where it is defined and where the post-processor uses it."""

        def change(content: dict) -> None:
            content["model"]["vocab"][new] = content["model"]["vocab"].pop(old)
            for token in content["added_tokens"]:
                token["content"] = token["content"].replace(old, new)
            content["post_processor"] = None

        return change

    def test_without_a_padding_token_the_end_token_serves(self, edited: Callable) -> None:
        tokenizer = convert_tokenizer(edited(self.rename("[PAD]", "[MASK]")), model_max_length=16)
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[EOS]", EOS)

    def test_without_an_unknown_token_there_is_none(self, edited: Callable) -> None:
        tokenizer = convert_tokenizer(edited(self.rename("[UNK]", "<unk>")), model_max_length=16)
        assert tokenizer.unk_token is None

    def test_without_a_template_the_begin_token_still_comes_first(self, edited: Callable) -> None:
        path = edited(lambda content: content.update(post_processor=None))
        ids = convert_tokenizer(path, model_max_length=16)("the cat").input_ids
        assert ids == [BOS, *Tokenizer.from_file(str(path)).encode("the cat").ids]

    @pytest.mark.parametrize("text", ["", "not JSON", "[]", '"text"', "{}", '{"model": null}'])
    def test_a_file_that_is_no_tokenizer_is_refused(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"tokenizer\.json: is not the JSON of a `tokenizers` tokenizer"):
            read_tokenizer(tmp_path / "tokenizer.json")

    def test_a_binary_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x80")
        with pytest.raises(UserError, match=r"tokenizer\.json: is not the JSON of a `tokenizers`"):
            read_tokenizer(tmp_path / "tokenizer.json")

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"tokenizer\.json: there is no such file"):
            read_tokenizer(tmp_path / "tokenizer.json")

    def test_a_pipe_does_not_keep_it_waiting(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "tokenizer.json")
        with pytest.raises(UserError, match=r"^[^:]*tokenizer\.json: is not a regular file$"):
            read_tokenizer(tmp_path / "tokenizer.json")


class Signal(BaseException):
    """As the command line raises one for SIGTERM."""


def test_a_signal_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise Signal

    relatives.save_gpt2_pair(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupted)
    monkeypatch.setattr("hf_model.tokenizer.gpt2_files.ByteLevelBPETokenizer", interrupted)
    monkeypatch.setattr("subprocess.run", interrupted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for source in (TOKENIZER, tmp_path / "vocab.json", "gpt2"):
        with pytest.raises(Signal):
            find_tokenizer(source, ModelInfo(tmp_path / "ckpt.pt", 1024, 16))
