"""A folder or a tokenizer from a stranger asks for nothing but its own model, and leads nowhere else."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from hf_model import loading
from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError
from hf_model.folder import load_tokenizer
from hf_model.tokenizer import ModelInfo, find_tokenizer, read_tokenizer
from hf_model.tokenizer import save_tokenizer as write_tokenizer
from tests.reliability.files import bounded
from tests.tiny import TOKENIZER

CPU = torch.device("cpu")


@pytest.fixture
def folder(capitals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(capitals, tmp_path / "hf")


def say(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def load(folder: Path) -> tuple:
    with bounded(seconds=30):
        return loading.load(folder, None, device=CPU)


class TestConfiguration:
    @pytest.mark.parametrize(
        "said",
        [
            {"is_encoder_decoder": True},
            {"num_labels": 10**8},
            {"transformers_weights": "../elsewhere.safetensors"},
            {"pruned_heads": {"0": [0]}, "is_decoder": False, "chunk_size_feed_forward": 10**9},
            {"temperature": "hot", "max_length": -1},
            {"_name_or_path": "/etc", "torchscript": True, "output_attentions": True},
        ],
        ids=lambda said: next(iter(said)),
    )
    def test_what_the_model_has_no_use_for_is_named_and_ignored(self, said: dict, folder: Path) -> None:
        say(folder, "config.json", **said)
        with pytest.warns(UserWarning, match=rf'config\.json .*"{next(iter(said))}".*: ignored'):
            model, tokenizer = load(folder)
        assert model.generate(tokenizer("the", return_tensors="pt").input_ids, max_new_tokens=2).shape[1] == 4

    @pytest.mark.parametrize(
        "said",
        [
            {"id2label": {str(i): "x" for i in range(20_000)}},
            {"id2label": 10**8},
            {"n_layer": "three"},
            {"n_head": None},
            {"n_embd": 1e30},
            {"dtype": "eval"},
            {"dtype": "float8_e4m3fn"},
            {"vocab_size": 10**18},
            {"layer_norm_epsilon": "x"},
            {"activation_function": "exec"},
            {"model_type": ["custom_gpt"]},
        ],
        ids=str,
    )
    def test_a_value_that_cannot_be_is_refused(self, said: dict, folder: Path) -> None:
        say(folder, "config.json", **said)
        with pytest.raises(UserError, match=f"^{folder}: "):
            load(folder)

    @pytest.mark.parametrize(
        "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
    )
    @pytest.mark.parametrize(
        "content", ["[" * 10**5, "[]", "null", '{"a": 1e999}', '{"a": NaN}', "\xff", '{"n_layer": ']
    )
    def test_what_is_no_object_is_refused(self, name: str, content: str, folder: Path) -> None:
        (folder / name).write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=rf"cannot be loaded \({name} |/{name}: is not the JSON"):
            load(folder)


class TestGeneration:
    @pytest.mark.parametrize(
        "said",
        [
            {"temperature": "hot"},
            {"temperature": -1},
            {"temperature": True},
            {"top_k": -5},
            {"top_k": 1.5},
            {"top_p": 2},
            {"repetition_penalty": 0},
            {"max_new_tokens": 0},
            {"max_new_tokens": "many"},
            {"eos_token_id": "[EOS]"},
            {"eos_token_id": [3, None]},
            {"pad_token_id": -1},
            {"bos_token_id": {}},
            {"suppress_tokens": "all"},
            {"do_sample": "yes"},
        ],
        ids=str,
    )
    def test_a_value_that_cannot_be_is_named(self, said: dict, folder: Path) -> None:
        say(folder, "generation_config.json", **said)
        with pytest.raises(UserError, match=rf"generation_config\.json says {next(iter(said))}"):
            load(folder)

    @pytest.mark.parametrize(
        "said",
        [
            {"num_beams": 10**6},
            {"cache_implementation": "offloaded"},
            {"stop_strings": ["a"]},
            {"custom_generate": "evil"},
            {"watermarking_config": {}, "penalty_alpha": 0.6},
            {"max_length": "x"},
            {"num_return_sequences": 10**9},
            {"assistant_early_exit": 1, "bad_words_ids": [[]]},
        ],
        ids=lambda said: next(iter(said)),
    )
    def test_what_this_project_does_not_write_is_named_and_ignored(self, said: dict, folder: Path) -> None:
        say(folder, "generation_config.json", **said)
        with pytest.warns(UserWarning, match=rf'generation_config\.json .*"{next(iter(said))}".*: ignored'):
            model, tokenizer = load(folder)
        assert model.generate(tokenizer("the", return_tensors="pt").input_ids, max_new_tokens=2).shape == (1, 4)

    def test_the_folder_s_defaults_are_kept(self, folder: Path) -> None:
        say(folder, "generation_config.json", temperature=0.25, top_k=7)
        model, _ = load(folder)
        assert (model.generation_config.temperature, model.generation_config.top_k) == (0.25, 7)

    @pytest.mark.parametrize("said", [{"temperature": 0}, {"temperature": 0.0, "top_p": 0}, {"top_p": 0.0}], ids=str)
    @pytest.mark.parametrize("do_sample", [False, None])
    def test_settings_of_0_without_sampling_are_greedy(self, do_sample: bool | None, said: dict, folder: Path) -> None:
        say(folder, "generation_config.json", do_sample=do_sample, **said)
        model, _ = load(folder)
        assert not model.generation_config.do_sample
        assert all(getattr(model.generation_config, name) != 0 for name in said)

    def test_without_a_file_the_ids_are_those_of_the_configuration(self, folder: Path) -> None:
        (folder / "generation_config.json").unlink()
        assert load(folder)[0].generation_config.eos_token_id == 3


class TestTokenizerConfiguration:
    @pytest.mark.parametrize(
        "said",
        [
            {"model_max_length": "x"},
            {"model_max_length": [1]},
            {"model_max_length": -1},
            {"chat_template": [{"name": "../../../evil", "template": "T"}, {"name": "default", "template": "x"}]},
            {"chat_template": [{"name": "x" * 1000, "template": "T"}]},
            {"chat_template": {"a": 1}},
            {"chat_template": 7},
            {"added_tokens_decoder": {"x": {"content": "y"}}},
            {"added_tokens_decoder": {"5": "y"}},
            {"extra_special_tokens": 1},
            {"additional_special_tokens": [[]]},
            {"padding_side": "up"},
            {"truncation_side": ["left"]},
            {"clean_up_tokenization_spaces": "yes"},
            {"tokenizer_class": ["GPT2Tokenizer"]},
            {"bos_token": ["[BOS]"]},
            {"bos_token": "b" * 10**6},
            {"model_input_names": 3},
        ],
        ids=lambda said: str(said)[:60],
    )
    def test_an_impossible_value_is_an_error_that_names_the_folder(self, said: dict, folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        say(folder, "tokenizer_config.json", **said)
        with pytest.raises(UserError, match=rf"^{folder}: "):
            load(folder)

    @pytest.mark.parametrize(
        "said",
        [
            {"vocab": {"a": 0}},
            {"post_processor": "x"},
            {"init_inputs": ["x"]},
            {"tokenizer_padding": {"length": 10**9}},
            {"save_pretrained": 1},
            {"tokenizer_file": "/etc/passwd"},
            {"a_setting_of_a_later_version": {"a": 1}},
        ],
        ids=lambda said: next(iter(said)),
    )
    @pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
    def test_an_unknown_field_is_named_and_ignored(self, name: str, said: dict, folder: Path) -> None:
        before = load(folder)[1]
        say(folder, name, **said)
        with pytest.warns(UserWarning, match=rf'{name} .*"{next(iter(said))}".*: ignored'):
            _, tokenizer = load(folder)
        assert tokenizer("Hello").input_ids == before("Hello").input_ids
        assert not hasattr(tokenizer, "a_setting_of_a_later_version")

    @pytest.mark.parametrize(
        "said",
        [
            {"model_max_length": int(1e30)},
            {"bos_token": {"__type": "AddedToken", "content": "[BOS]", "lstrip": False, "normalized": False}},
            {"added_tokens_decoder": {"2": {"content": "[BOS]", "special": True, "single_word": False}}},
            {"additional_special_tokens": [], "extra_special_tokens": ["[PAD]"], "image_token": "[UNK]"},
            {"chat_template": [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]},
            {"clean_up_tokenization_spaces": None, "vocab_file": None, "stride": 0, "max_length": 64},
            {"a_switch_of_a_later_version": True, "a_number": 3},
        ],
        ids=lambda said: next(iter(said)),
    )
    def test_what_the_library_writes_is_read(self, said: dict, folder: Path) -> None:
        say(folder, "tokenizer_config.json", **said)
        load(folder)


class TestPlaces:
    @pytest.mark.parametrize("is_pipe", [False, True], ids=["link", "pipe"])
    def test_nor_is_one_among_the_templates(self, is_pipe: bool, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        template = folder / "additional_chat_templates" / "x.jinja"
        template.parent.mkdir()
        os.mkfifo(template) if is_pipe else template.symlink_to(tmp_path / "secret")
        with pytest.raises(UserError, match=r"x\.jinja is (a link that leads out of the folder|not a regular file)"):
            load(folder)

    def test_a_few_templates_are_read(self, folder: Path) -> None:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")
        assert load(folder)[1].chat_template["tool_use"] == "x"

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
    def test_a_link_out_of_the_folder_is_not_followed(self, name: str, folder: Path, tmp_path: Path) -> None:
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is a link that leads out of the folder"):
            load(folder)

    def test_a_snapshot_of_the_hub_s_cache_is_read(self, folder: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--me--hf" / "snapshots" / "0"
        blobs = tmp_path / "models--me--hf" / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for file in folder.iterdir():
            file.rename(blobs / file.name)
            (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
        load(snapshot)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
    def test_a_pipe_does_not_keep_it_waiting(self, name: str, folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match=f"{name}.* is not a regular file"):
            load(folder)

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "evil.bin", 7, ""])
    def test_the_weights_index_names_files_of_the_folder(self, name: object, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_file(weights, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
        say(folder, "model.safetensors.index.json", weight_map=dict.fromkeys(weights, name))
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json names"):
            load(folder)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_a_pointer_of_git_lfs_is_called_that(self, name: str, folder: Path) -> None:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(UserError, match=f"{name}:? is a git-lfs pointer, .*git lfs pull"):
            load(folder)

    def test_an_adapter_s_other_model_is_not_loaded(self, folder: Path) -> None:
        say(folder, "adapter_config.json", base_model_name_or_path="/elsewhere", peft_type="LORA")
        with pytest.raises(UserError, match="holds a PEFT adapter"):
            load(folder)


MILLION = "a" * 10**6
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def sequence(parts: list, key: str = "normalizers") -> dict:
    return {"type": "Sequence", key: parts}


def replace(text: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def replace_regex(expression: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": expression}, "content": content}


def split(expression: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def word_pieces(letter: str, max_input_chars_per_word: int) -> dict:
    """A model whose time for a word of this letter grows with the cube of its length."""
    vocabulary = {"[UNK]": 0, letter: 1, f"##{letter}": 2}
    return json.loads(
        Tokenizer(
            models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=max_input_chars_per_word)
        ).to_str()
    )["model"]


HOSTILE: dict[str, Callable[[dict], object]] = {
    "a normalizer that multiplies": lambda t: t.update(normalizer=replace("a", MILLION)),
    "a normalizer that multiplies a rare letter": lambda t: t.update(normalizer=replace("ж", "ж" * 999)),
    "a chain that doubles": lambda t: t.update(normalizer=sequence([replace("a", "aa")] * 12)),
    "a chain that doubles a rare letter": lambda t: t.update(normalizer=sequence([replace("ж", "жж")] * 12)),
    "a normalizer that puts a text in front": lambda t: t.update(normalizer={"type": "Prepend", "prepend": MILLION}),
    "a pattern that backtracks": lambda t: t.update(pre_tokenizer=split("(a+)+$")),
    "a pattern that backtracks, of rare letters": lambda t: t.update(pre_tokenizer=split("((жф)+)+$")),
    "a pattern that backtracks, of an escape": lambda t: t.update(pre_tokenizer=split(r"(\x7a+)+$")),
    "a pattern that backtracks, in a normalizer": lambda t: t.update(normalizer=replace_regex(r"(\w*)*x", "")),
    "a chain of pre-tokenizers that backtrack": lambda t: t.update(
        pre_tokenizer=sequence([BYTES, split(r"(\w+)+$")], "pretokenizers")
    ),
    "an empty pattern": lambda t: t.update(normalizer=replace("", "x")),
    "a template that repeats the text": lambda t: t["post_processor"].update(
        single=[{"Sequence": {"id": "A", "type_id": 0}}] * 10**5
    ),
    "a template of many tokens": lambda t: t["post_processor"]["special_tokens"]["[BOS]"].update(ids=[2] * 10**6),
    "a decoder that multiplies": lambda t: t.update(decoder=replace("a", MILLION)),
    "padding to a billion": lambda t: t.update(
        padding={
            "strategy": {"Fixed": 10**9},
            "direction": "Left",
            "pad_to_multiple_of": None,
            **{"pad_id": 1, "pad_type_id": 0, "pad_token": "x"},
        }
    ),
    "a token of a megabyte": lambda t: t["added_tokens"][0].update(content=MILLION),
    "an id of billions": lambda t: t["model"]["vocab"].update({"жжж": 2**32 - 1}),
    "byte-level again and again": lambda t: t.update(normalizer=sequence([{"type": "ByteLevel"}] * 15)),
    "byte-level again and again, before the model": lambda t: t.update(
        pre_tokenizer=sequence([BYTES] * 15, "pretokenizers")
    ),
    **{
        f"a letter wherever {pattern} matches": lambda t, pattern=pattern: t.update(
            normalizer=sequence([replace_regex(pattern, "a")] * 15)
        )
        for pattern in (r"\B", r"\b", "^", r"\G", r"\K")
    },
    "a long text in the place of none": lambda t: t.update(normalizer=replace_regex(r"\B", "a" * 200)),
    "texts in front": lambda t: t.update(normalizer=sequence([{"type": "Prepend", "prepend": "▁" * 8}] * 15)),
    "bytes, not characters": lambda t: t.update(normalizer=sequence([replace("a", "🙂"), replace("🙂", "a" * 8)] * 7)),
    "decoders of no suffix": lambda t: t.update(
        decoder=sequence([{"type": "BPEDecoder", "suffix": ""}] * 15, "decoders")
    ),
    "words that take the cube of their length": lambda t: t.update(model=word_pieces("a", 10**5), normalizer=None),
    "added tokens that a normalizer multiplies": lambda t: t.update(
        normalizer=replace("a", "a" * 199),
        added_tokens=t["added_tokens"]
        + [{**t["added_tokens"][0], "id": 10**5, "content": "a" * 990, "normalized": True}] * 99,
    ),
    "a type that is none": lambda t: t.update(normalizer={"type": ["NFC"]}),
    "a template of numbers": lambda t: t["post_processor"].update(single=[{"Sequence": 7}]),
    "ids that are none": lambda t: t["post_processor"]["special_tokens"]["[BOS]"].update(ids=7),
    "a damaged part of SentencePiece": lambda t: t.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "no part": lambda t: t.update(normalizer=[1]),
    "a model that is none": lambda t: t.update(model={"type": "BPE"}),
}
# What looks alarming, but does little to any text.
HARMLESS: dict[str, Callable[[dict], object]] = {
    "a long chain": lambda t: t.update(normalizer=sequence([{"type": "NFC"}] * 30)),
    "chains in chains": lambda t: t.update(normalizer=chain(50)),
    "a pattern of repetitions": lambda t: t.update(pre_tokenizer=split("a{1,1000}{1,1000}")),
    "a letter at the end of a text": lambda t: t.update(normalizer=sequence([replace_regex("$", "a")] * 15)),
    "byte-level four times": lambda t: t.update(
        normalizer=sequence([{"type": "ByteLevel"}] * 2), pre_tokenizer=sequence([BYTES] * 2, "pretokenizers")
    ),
    "a chain of decoders": lambda t: t.update(decoder=sequence([BYTES] * 15, "decoders")),
    "pieces that repeat each other": lambda t: t.update(
        truncation={"direction": "Right", "max_length": 10**4, "strategy": "LongestFirst", "stride": 10**4 - 1}
    ),
}


def chain(depth: int) -> dict:
    return sequence([chain(depth - 1)]) if depth else {"type": "NFC"}


def save_spoilt(path: Path, spoil: Callable[[dict], object]) -> Path:
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    spoil(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def no_trial_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, in which no tokenizer has passed its trial."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_a_tokenizer_that_would_take_time_or_memory_is_refused(spoil: Callable, tmp_path: Path) -> None:
    path = save_spoilt(tmp_path / "tokenizer.json", spoil)
    with bounded(seconds=60), pytest.raises(UserError, match=r"tokenizer\.json: (cannot be used|is not the JSON)"):
        read_tokenizer(path)


@pytest.mark.parametrize("name", ["a decoder that multiplies", "a pattern that backtracks", "a model that is none"])
def test_nor_is_one_read_in_a_folder(name: str, folder: Path) -> None:
    save_spoilt(folder / "tokenizer.json", HOSTILE[name])
    with bounded(seconds=60), pytest.raises(UserError, match=r"tokenizer\.json: (cannot be used|is not the JSON)"):
        load(folder)


def test_what_was_seen_is_said(tmp_path: Path) -> None:
    path = save_spoilt(tmp_path / "tokenizer.json", HOSTILE["a pattern that backtracks"])
    with pytest.raises(UserError, match=r"encoding 20,002 bytes of one letter crashes the library .*retry-limit"):
        read_tokenizer(path)


@pytest.mark.parametrize("spoil", HARMLESS.values(), ids=HARMLESS)
def test_a_tokenizer_is_not_refused_for_its_looks(spoil: Callable, tmp_path: Path, no_trial_before: Path) -> None:
    tokenizer = read_tokenizer(save_spoilt(tmp_path / "tokenizer.json", spoil))
    tokenizer.no_truncation()
    assert len(tokenizer.encode("é" * 1000).ids) < 10**5


class TestTrial:
    def test_is_not_held_twice(self, no_trial_before: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = folder / "tokenizer.json"
        read_tokenizer(path)
        monkeypatch.setattr("subprocess.run", None)
        read_tokenizer(path)

    def test_is_not_held_for_a_folder_that_this_project_wrote(
        self, no_trial_before: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokenizer = find_tokenizer(TOKENIZER, ModelInfo(tmp_path / "ckpt.pt", 1024, 16)).tokenizer
        monkeypatch.setattr("subprocess.run", None)
        write_tokenizer(tokenizer, tmp_path / "hf")
        assert load_tokenizer(tmp_path / "hf", CustomGPTConfig())("the").input_ids == tokenizer("the").input_ids

    def test_is_held_for_a_folder_that_says_that_it_is_ours(self, no_trial_before: Path, folder: Path) -> None:
        path = save_spoilt(folder / "tokenizer.json", HOSTILE["a decoder that multiplies"])
        manifest = json.loads((folder / ".manifest.json").read_text(encoding="utf-8"))
        assert "tokenizer.json" in str(manifest)
        old = hashlib.sha256((TOKENIZER.parent / "tokenizer.json").read_bytes()).hexdigest()
        text = json.dumps(manifest).replace(old, hashlib.sha256(path.read_bytes()).hexdigest())
        (folder / ".manifest.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="cannot be used"):
            load(folder)

    def test_needs_no_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "cache").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert read_tokenizer(TOKENIZER).encode("the").ids

    def test_starts_anew_when_the_cache_is_full(self, no_trial_before: Path) -> None:
        cache = no_trial_before / "custom-gpt-hf" / "tokenizers"
        cache.parent.mkdir(parents=True)
        cache.write_text("0" * 2**21)
        read_tokenizer(TOKENIZER)
        assert cache.stat().st_size < 100

    @pytest.mark.parametrize("name, value", [("executable", None), ("executable", ""), ("frozen", True)])
    def test_starts_nothing_where_there_is_no_python(
        self, name: str, value: object, no_trial_before: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, name, value, raising=False)
        with pytest.raises(UserError, match="cannot start Python"):
            read_tokenizer(TOKENIZER)

    def test_leaves_standard_error_alone(self, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
        path = save_spoilt(tmp_path / "tokenizer.json", HOSTILE["a pattern that backtracks"])
        with ThreadPoolExecutor(4) as pool:
            refusals = [pool.submit(read_tokenizer, path) for _ in range(4)]
        assert all(isinstance(refusal.exception(), UserError) for refusal in refusals)
        os.write(2, b"still there")
        assert capfd.readouterr().err == "still there"


def test_a_folder_of_this_project_says_nothing_new(capitals: Path, recwarn: pytest.WarningsRecorder) -> None:
    load(capitals)
    assert not [warning for warning in recwarn if "ignored" in str(warning.message)]
