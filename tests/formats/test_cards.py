"""The card of a converted model says what it is and how its prompt looks. (That its code runs: test_remote_code.)"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import convert_checkpoint
from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.conversion import convert
from hf_model.formats.cards import About, place_of, title_of
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model_cli.convert import parse_arguments
from tests import relatives
from tests import templates as chat
from tests.tiny import CHECKPOINT, TOKENIZER, gpt, save_files, save_tokenizer


@pytest.fixture
def card(capitals: Path) -> str:
    return (capitals / "README.md").read_text(encoding="utf-8")


def test_says_what_the_model_is(card: str) -> None:
    assert "3 layers, 3 heads, 96 wide, context 64, vocabulary 1024" in " ".join(card.split())


def test_shows_the_prompt(card: str) -> None:
    assert "\n[BOS]Instruction: {instruction} Response:\n" in card
    assert "\n[BOS]Instruction: {instruction} Input: {input} Response:\n" in card
    assert "Response: Paris[EOS]" in card


def test_says_that_a_format_of_single_turns_leaves_the_others_out(card: str, tmp_path: Path) -> None:
    assert "\nOne question at a time: earlier turns and a system message are left out.\n" in card
    tokenizer = chat.save_tokenizer(tmp_path / "tokenizer.json", *chat.CHATML_LIKE)
    checkpoint = chat.save_speaker(tmp_path, tokenizer, "\nParis<|im_end|>")
    assert "One question" not in card_of(convert(checkpoint, tokenizer, tmp_path / "hf", chat_template="chatml")).text


@pytest.mark.parametrize("options", [{"norm_first": False}, {"final_norm": False}, {"head_bias": True}, {}], ids=str)
def test_names_the_gpt2_folder_only_where_one_can_be_made(options: dict, capitals: Path, tmp_path: Path) -> None:
    model = CustomGPTForCausalLM(CustomGPTConfig.from_pretrained(capitals, **options))
    model.save_pretrained(tmp_path / "own")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(capitals / name, tmp_path / "own")
    text = card_of(convert(tmp_path / "own", None, tmp_path / "hf")).text
    assert "The model's code needs transformers 5.4 or later." in text
    assert ("--format gpt2" in text) == (options == {})


def test_is_read_by_the_hub_as_a_text_generation_model(card: str) -> None:
    header = yaml.safe_load(card.split("---\n", 2)[1])
    assert (header["library_name"], header["pipeline_tag"]) == ("transformers", "text-generation")


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def loads(card: ModelCard) -> set[str]:
    """What the card's code gives to `from_pretrained`."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {call.args[0].value for call in calls if getattr(call.func, "attr", "") == "from_pretrained"}  # type: ignore


class TestOptions:
    ABOUT = About(
        model_name="Capitals of the world",
        license="mit",
        language=("en", "fr"),
        datasets=("someone/capitals", "someone/continents"),
        base_model="someone/base",
        tags=("instruct",),
        example_prompts=('Say "hello".', "On which continent is Peru?"),
    )

    @pytest.mark.parametrize("format", ["transformers", "gpt2", "checkpoint"])
    def test_are_in_the_header_as_the_hub_names_them(self, format: str, tmp_path: Path) -> None:
        data = card_of(convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", format=format, about=self.ABOUT)).data
        assert (data.license, data.language, data.base_model) == ("mit", ["en", "fr"], "someone/base")
        assert data.datasets == ["someone/capitals", "someone/continents"]
        assert data.pipeline_tag == "text-generation"
        assert {"custom_gpt", "instruct"} <= set(data.tags)

    def test_examples_are_the_widget_s_and_the_code_s(self, tmp_path: Path) -> None:
        card = card_of(convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", about=self.ABOUT))
        asked = [entry["messages"][0]["content"] for entry in card.data.widget]
        assert asked == list(self.ABOUT.example_prompts)
        assert f'"content": {json.dumps(asked[0])}' in card.text
        assert "# Capitals of the world" in card.text.splitlines()

    def test_a_model_of_raw_text_has_a_text_for_an_example(self, tmp_path: Path) -> None:
        path = relatives.save_nanogpt(tmp_path, relatives.nano_character_model())
        folder = convert(path, relatives.save_meta(tmp_path / "meta.pkl"), tmp_path / "hf")
        (example,) = card_of(folder).data.widget
        assert example.keys() == {"text"}

    def test_nothing_is_claimed_that_nobody_said(self, tmp_path: Path) -> None:
        header = card_of(convert(CHECKPOINT, TOKENIZER, tmp_path / "hf")).data.to_dict()
        assert not header.keys() & {"license", "language", "datasets", "base_model"}

    def test_reach_the_card_from_the_command_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = ("--checkpoint_path", CHECKPOINT, "--tokenizer_path", TOKENIZER, "--output_dir", tmp_path / "hf")
        card = ("--license", "apache-2.0", "--language", "en", "code", "--datasets", "a/b", "c", "--base_model", "a/d")
        words = (*card, "--tags", "x", "y", "--model_name")
        monkeypatch.setattr(
            sys, "argv", ["convert_checkpoint.py", *map(str, files), *words, "N", "--example_prompt", "P"]
        )
        assert convert_checkpoint.main() == 0
        data = card_of(tmp_path / "hf").data
        assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en", "code"], ["a/b", "c"])
        assert (data.base_model, data.tags[1:]) == ("a/d", ["x", "y"])
        assert data.widget == [{"messages": [{"role": "user", "content": "P"}]}]

    @pytest.mark.parametrize(
        "words",
        [("--license", "My License"), ("--language", "English"), ("--datasets", "a/b/c"), ("--base_model", "/x")],
    )
    def test_that_the_hub_would_refuse_are_refused(
        self, words: tuple, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "--checkpoint_path", str(CHECKPOINT), *words])
        with pytest.raises(SystemExit, match="2"):
            convert_checkpoint.main()
        assert f"argument {words[0]}: must be a name such as" in capsys.readouterr().err


class TestWhatTheCheckpointTells:
    def test_its_data_base_and_progress_are_in_the_card(self, tmp_path: Path) -> None:
        path = relatives.save_nanogpt(tmp_path, relatives.nano_character_model())
        content = torch.load(path, weights_only=True)
        config = content["config"] | {"dataset": "my_poems", "init_from": "gpt2-medium"}
        torch.save(content | {"config": config, "iter_num": 4321}, path)
        card = card_of(convert(path, relatives.save_meta(tmp_path / "meta.pkl"), tmp_path / "hf"))
        assert card.data.base_model == "openai-community/gpt2-medium"
        assert "my_poems" in section(card, "Training data")
        assert "iter_num 4321" in section(card, "Evaluation")

    def test_what_nobody_knows_is_left_as_a_marked_place(self, capitals: Path) -> None:
        for name in ("Training data", "Evaluation", "Limits"):
            assert section(card_of(capitals), name).endswith("[More Information Needed]")

    def test_the_diagnosis_is_in_it_without_the_place_of_the_data(self, tmp_path: Path) -> None:
        (tmp_path / "private").mkdir()
        data = tmp_path / "private" / "data.jsonl"
        data.write_text('{"instruction": "What is the capital of France?", "output": "Paris"}\n' * 3)
        learnt = section(
            card_of(convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", training_data=data)), "What it has learnt"
        )
        assert "healthy: does not repeat itself (0%)" in learnt
        assert "exact answers 3 of 3" in learnt
        assert "data.jsonl" in learnt and "private" not in learnt


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"## {title}\n")[1].split("\n## ")[0].strip()


class TestName:
    def test_of_the_default_folder_is_that_of_the_project(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "poet" / "out" / "finetune"
        place.mkdir(parents=True)
        (place / "ckpt.pt").symlink_to(CHECKPOINT)
        monkeypatch.chdir(tmp_path / "poet")
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "--tokenizer_path", str(TOKENIZER)])
        assert convert_checkpoint.main() == 0
        card = card_of(Path("out/finetune/hf"))
        assert card.text.strip().startswith("# poet-finetune\n")
        assert loads(card) == {"./out/finetune/hf"}
        (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
        assert process.stdout.strip() == "Paris", process.stderr

    @pytest.mark.parametrize(
        ("folder", "source", "title"),
        [
            ("capitals-hf", "out/ckpt.pt", "capitals-hf"),
            ("out/hf", "nanoGPT/out-shakespeare-char/ckpt.pt", "shakespeare-char"),
            ("out/gguf", "nanoGPT/out/ckpt.pt", "nanoGPT"),
            ("log/hf", "build-nanogpt/log/model_19072.pt", "build-nanogpt"),
            ("hf-gguf", "poet/out/pretrain/hf", "poet-pretrain"),
        ],
    )
    def test_is_the_folder_s_or_that_of_the_checkpoint_s_place(
        self, folder: str, source: str, title: str, tmp_path: Path
    ) -> None:
        assert title_of(tmp_path / folder, tmp_path / source) == title

    def test_a_folder_elsewhere_is_called_without_its_path(self, tmp_path: Path) -> None:
        assert place_of(tmp_path / "capitals") == "./capitals"
        assert place_of(tmp_path / "poet" / "hf") == "./poet/hf"

    @pytest.mark.parametrize("format", ["transformers", "gpt2"])
    def test_on_the_hub_is_that_of_the_repository(self, format: str, tmp_path: Path) -> None:
        about = About(repo="someone/capitals-of-the-world")
        card = card_of(convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", format=format, about=about))
        assert loads(card) == {"someone/capitals-of-the-world"}
        assert "# capitals-of-the-world" in card.text.splitlines()

    @pytest.mark.parametrize("words", ["", " \n", "caf\udce9"])
    @pytest.mark.parametrize("option", ["--model_name", "--example_prompt"])
    def test_and_an_example_are_words_that_a_card_can_hold(
        self, option: str, words: str, capsys: pytest.CaptureFixture
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            parse_arguments([option, words])
        assert f"argument {option}: " in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["hf", "my-model", "a b"])
    def test_on_the_disk_is_never_one_on_the_hub(self, name: str, tmp_path: Path) -> None:
        for folder in (tmp_path / name, Path(name), Path("out") / name):
            assert place_of(folder).startswith("./")

    def test_cannot_break_the_card(self, tmp_path: Path) -> None:
        folder = convert(
            CHECKPOINT, TOKENIZER, tmp_path / 'a "quoted" {{ name }}\n---', about=About(model_name="{{ 7*7 }}\n---")
        )
        card = card_of(folder)
        assert card.data.library_name == "transformers"
        assert loads(card) == {f"./{folder.name}"}
        assert "49" not in card.text.splitlines()[0]


HOSTILE = "x`\n# Heading\n<script>alert(1)</script>\x1b[31m**bold** [link](http://a)"


class TestTextsFromFilesAreQuoted:
    """Nothing that a file holds makes a heading, an element of HTML or an escape sequence of a terminal."""

    @staticmethod
    def assert_plain(card: ModelCard) -> None:
        outside_code = re.sub(r"^```.*?^```", "", card.text, flags=re.DOTALL | re.MULTILINE)
        outside_code = re.sub(r"\\.", "", outside_code)
        outside_code = re.sub(r"(`+)(?!`).*?[^`]\1(?!`)", "", outside_code)
        assert "<script" not in outside_code
        assert "# Heading" not in card.text.splitlines()
        assert "](http://a" not in outside_code
        assert "\x1b" not in card.content

    def test_a_token(self, tmp_path: Path) -> None:
        files = save_files(tmp_path, gpt())
        content = files[1].read_text(encoding="utf-8").replace("[BOS]", "start")
        files[1].write_text(content.replace("[EOS]", json.dumps(HOSTILE)[1:-1]), encoding="utf-8")
        card = card_of(convert(*files, tmp_path / "hf", raw=True))
        assert "A text ends at" in card.text
        self.assert_plain(card)

    def test_a_chat_template(self, tmp_path: Path) -> None:
        template = tmp_path / "template.jinja"
        template.write_text("\x1b[31m### Question:\n{{ messages[-1].content }}\x9b\n\u202e### Answer:\n", "utf-8")
        card = card_of(convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", chat_template=template))
        assert r"\x1b[31m### Question:" + "\n{instruction}" in card.text
        assert not set("\x1b\x9b\u202e") & set(card.content)

    def test_the_name_of_the_data(self, tmp_path: Path) -> None:
        path = relatives.save_nanogpt(tmp_path, relatives.nano_character_model())
        content = torch.load(path, weights_only=True)
        torch.save(content | {"config": content["config"] | {"dataset": HOSTILE}}, path)
        card = card_of(convert(path, relatives.save_meta(tmp_path / "meta.pkl"), tmp_path / "hf"))
        assert "names its data" in card.text
        self.assert_plain(card)

    def test_the_name_of_the_folder_and_the_prompt(self, tmp_path: Path) -> None:
        about = About(example_prompts=(HOSTILE,))
        folder = convert(CHECKPOINT, TOKENIZER, tmp_path / HOSTILE.replace("/", "-"), about=about)
        card = card_of(folder)
        self.assert_plain(card)
        assert loads(card) == {f"./{folder.name}"}

    def test_the_training_data_s_own_name(self, tmp_path: Path) -> None:
        data = tmp_path / f"{HOSTILE.replace('/', '-')}.jsonl"
        data.write_text('{"instruction": "What is the capital of France?", "output": "Paris"}\n' * 3)
        self.assert_plain(card_of(convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", training_data=data)))


class TestClaims:
    """A card claims what was compared: the file; and the loss on the user's data, where there are any."""

    def test_the_file_alone_is_said_to_be_that(self, capitals: Path) -> None:
        assert "compares its result with the checkpoint file, not with" in section(card_of(capitals), "Evaluation")

    def test_of_a_folder_too(self, capitals: Path, tmp_path: Path) -> None:
        card = card_of(convert(capitals, None, tmp_path / "out", format="gpt2"))
        assert "with the source folder, not with" in section(card, "Evaluation")

    @pytest.mark.parametrize("module", [False, True], ids=["a file", "a model in memory"])
    def test_files_that_were_not_compared_are_said_to_be_that(self, module: bool, tmp_path: Path) -> None:
        source = gpt() if module else save_files(tmp_path, gpt())[0]
        tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
        options = {"verify": False} if module else {"verify": False, "dtype": "float16"}
        card = section(card_of(convert(source, tokenizer, tmp_path / "hf", **options)), "Evaluation")
        assert "were not compared with their source" in card
        assert "compares its result" not in card and "were then compared" not in card
        assert ("those of its own trainer's code: " in card) == module

    def test_the_user_s_own_logits_are_said_to_be_older_than_a_rounding(self, tmp_path: Path) -> None:
        lines: list[str] = []
        tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
        folder = convert(gpt(), tokenizer, tmp_path / "hf", dtype="bfloat16", report=lines.append)
        words = "before its weights were rounded from float32 to bfloat16"
        assert any(line.startswith("verified      your model's own logits") and words in line for line in lines)
        assert words in section(card_of(folder), "Evaluation")

    def test_the_loss_on_data_is_added(self, tmp_path: Path) -> None:
        data = tmp_path / "data.jsonl"
        data.write_text('{"instruction": "What is the capital of France?", "output": "Paris"}\n' * 3)
        card = card_of(convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", training_data=data))
        assert re.search(r"The loss on `data\.jsonl`.* is \d+\.\d{3}\.", section(card, "Evaluation"))

    @pytest.mark.parametrize(
        ("format", "how", "rounded"),
        [
            ("gguf", {"gguf_type": "f32"}, ""),
            ("gguf", {"gguf_type": "f16", "dtype": "float16"}, "rounded from float32 to float16"),
            ("gguf", {"gguf_type": "q8_0"}, "rounded to q8_0"),
            ("ctranslate2", {"quantization": "float32"}, ""),
            ("ctranslate2", {"quantization": "int8"}, "rounded to int8"),
        ],
        ids=str,
    )
    def test_weights_that_a_format_rounds_are_not_called_unchanged(
        self, format: str, how: dict, rounded: str, capitals: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip(format, reason=f"{format} is not installed (the `{format}` extra)")
        card = card_of(convert(capitals, None, tmp_path / "out", format=format, verify=False, **how)).text
        assert ("without changing a weight." in card) == (not rounded)
        assert f"with its weights {rounded}." in card or not rounded
