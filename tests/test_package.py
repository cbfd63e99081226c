"""What an installation has: commands, a Python face that reads well, and an import that costs only the model's."""

import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_model
from hf_model import UserError
from tests.tiny import CHECKPOINT, ROOT, TOKENIZER


def run(*command: str, cwd: Path) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=cwd, timeout=300, check=True).stdout


class TestCommands:
    @pytest.mark.parametrize("name", ["custom-gpt-convert", "custom-gpt-generate"])
    def test_an_installation_has_the_scripts_under_names_of_their_own(self, name: str, tmp_path: Path) -> None:
        command = Path(sys.executable).with_name(name)
        if not command.exists():
            pytest.skip("this project is not installed into this environment")
        assert run(str(command), "--help", cwd=tmp_path).startswith(f"usage: {name} ")

    def test_they_suggest_each_other(self, tmp_path: Path) -> None:
        command = Path(sys.executable).with_name("custom-gpt-convert")
        if not command.exists():
            pytest.skip("this project is not installed into this environment")
        files = ("--checkpoint_path", str(CHECKPOINT), "--tokenizer_path", str(TOKENIZER))
        assert "\n  custom-gpt-generate --checkpoint_path ./hf " in run(
            str(command), *files, "--output_dir", "hf", cwd=tmp_path
        )

    def test_the_package_says_what_there_is(self) -> None:
        said = run(sys.executable, "-m", "hf_model", cwd=ROOT)
        assert "custom-gpt-convert" in said and "custom-gpt-generate" in said
        assert hf_model.__version__ in run(sys.executable, "-m", "hf_model", "--version", cwd=ROOT)


class TestPythonFace:
    def test_does_what_the_commands_do(self, tmp_path: Path) -> None:
        from hf_model import Sampling, convert, encode, format_prompt, generate, load

        folder = convert(CHECKPOINT, TOKENIZER, tmp_path / "hf")
        for source in ((folder,), (CHECKPOINT, TOKENIZER)):
            model, tokenizer = load(*source, device="cpu")
            prompt = encode(tokenizer, format_prompt("What is the capital of France?"))
            output = generate(model, tokenizer, prompt, Sampling(temperature=0), response_only=True)
            assert output.texts == ["Paris"]

    @pytest.mark.parametrize("name", hf_model.__all__)
    def test_every_name_is_there_and_documented(self, name: str) -> None:
        assert getattr(hf_model, name).__doc__

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"dtype": "nope"}, "dtype='nope' is none of auto, float32, float16, bfloat16, float64"),
            ({"dtype": "int8"}, "dtype='int8' is none of auto"),
            ({"activation": "rely"}, "activation='rely' is none of auto, gelu, gelu_new, gelu_pytorch_tanh, relu"),
            ({"format": "nope"}, "format='nope' is none of transformers, gpt2, gguf"),
            ({"format": "gguf", "gguf_type": "zz"}, "gguf_type='zz' is none of f32, f16, q8_0"),
            ({"format": "checkpoint", "like": "zz"}, "like='zz' is none of original, nanogpt"),
            ({"max_shard_size": "x"}, "max_shard_size='x' is not a size such as 500MB or 5GB"),
        ],
        ids=str,
    )
    def test_a_name_that_means_nothing_is_refused_in_one_line(self, wrong: dict, message: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=message):
            hf_model.convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", **wrong)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0), ("min_p", 2)),
            *(("repetition_penalty", 0), ("max_new_tokens", 0), ("num_beams", -2), ("num_return_sequences", 0)),
            *(("stop", "ab"), ("stop", ("",))),
        ],
    )
    def test_a_way_to_sample_that_is_out_of_range_is_refused(self, name: str, value: object) -> None:
        with pytest.raises(UserError, match=f"^{name}={re.escape(repr(value))} must be "):
            hf_model.Sampling(**{name: value})

    def test_paths_may_be_texts_and_a_batch_has_records(self, tmp_path: Path, capitals: Path) -> None:
        (tmp_path / "questions.jsonl").write_text('{"instruction": "What is the capital of France?"}\n')
        records, output = hf_model.read_records(f"{tmp_path}/questions.jsonl"), f"{tmp_path}/answers.jsonl"
        model, tokenizer = hf_model.load(str(capitals), device="cpu", dtype=torch.float64)
        with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
            hf_model.answer_file(model, tokenizer, records, output, 0, hf_model.Sampling())
        hf_model.answer_file(model, tokenizer, records, output, 1, hf_model.Sampling(temperature=0))
        assert json.loads(Path(output).read_text())["response"] == "Paris"
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_path_where_nothing_is_is_said_to_be_that(self) -> None:
        with pytest.raises(UserError, match="no-such-folder: there is no such file"):
            hf_model.load("no-such-folder")

    def test_its_help_shows_the_functions(self) -> None:
        text = pydoc.plain(pydoc.render_doc(hf_model))
        assert all(f" {name}(" in text for name in ("convert", "load", "generate", "encode", "format_prompt"))

    def test_dir_lists_what_is_documented(self) -> None:
        assert set(dir(hf_model)) == set(hf_model.__all__)
        assert {"convert", "load", "generate"} <= set(dir(hf_model))


def test_the_default_device_is_the_best_one(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    monkeypatch.setattr(hf_model.CustomGPTForCausalLM, "to", lambda self, device: moved.append(device) or self)
    monkeypatch.setattr("hf_model.loading.pick_device", lambda name: torch.device("cpu") if name is None else name)
    hf_model.load(CHECKPOINT, TOKENIZER)
    assert moved == [torch.device("cpu")]
