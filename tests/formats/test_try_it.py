"""The commands that try a folder: one at least for each format, and a shell reads back what they were given."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hf_model.conversion import convert
from hf_model.formats import FORMATS, how_to_try
from hf_model.formats.target import Options
from hf_model.tokenizer import convert_tokenizer
from tests import relatives
from tests.tiny import TOKENIZER

ENGINES = {"ctranslate2": ["ctranslate2"], "onnx": ["onnx", "onnxscript", "onnxruntime"]}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return convert_tokenizer(TOKENIZER, 64)


@pytest.mark.parametrize("format", FORMATS)
def test_a_shell_reads_back_the_path_and_the_prompt(format: str, tokenizer: PreTrainedTokenizerFast) -> None:
    folder, prompt = "it's $(touch x) & `more`", 'say "hi"\n> x; $HOME'
    words = shlex.split("\n".join(how_to_try(format, folder, tokenizer, prompt=prompt)))
    assert any(word.startswith(f"./{folder}") for word in words)
    assert not {"$(touch", "x;", "&", "$HOME"} & set(words)


@pytest.mark.parametrize("format", FORMATS)
def test_a_relative_path_is_no_name_on_the_hub(format: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for line in how_to_try(format, "out/hf", tokenizer):
        assert "./out/hf" in line
        assert not any(word.startswith("out/hf") for word in shlex.split(line))


def test_the_file_of_a_gguf_is_that_of_its_type(tokenizer: PreTrainedTokenizerFast) -> None:
    lines = how_to_try("gguf", "out", tokenizer, Options(gguf_type="q8_0"))
    assert lines[0] == "llama-server --model ./out/model-q8_0.gguf --ctx-size 0 --jinja"


def test_a_server_of_raw_text_is_asked_for_a_completion(tmp_path: Path) -> None:
    path = relatives.save_nanogpt(tmp_path, relatives.nano_character_model())
    tokenizers: list = []
    convert(path, relatives.save_meta(tmp_path / "meta.pkl"), tmp_path / "hf", on_tokenizer=tokenizers.append)
    for format in ("transformers", "gpt2", "gguf"):
        lines = how_to_try(format, tmp_path / "hf", *tokenizers)
        assert any("/v1/completions" in line for line in lines)
        assert not any("--jinja" in line for line in lines)


@pytest.mark.parametrize("format", ENGINES)
def test_the_example_program_answers(format: str, capitals: Path, tmp_path: Path) -> None:
    for package in ENGINES[format]:
        pytest.importorskip(package, reason=f"{package} is not installed (the `{format}` extra)")
    folder = convert(capitals, None, tmp_path / "out", format=format, verify=False)
    program, card = ((folder / name).read_text(encoding="utf-8") for name in ("example.py", "README.md"))
    assert program.strip() in card
    (command,) = how_to_try(format, folder, convert_tokenizer(TOKENIZER, 64), prompt="What is the capital of Italy?")
    arguments = [sys.executable, *shlex.split(command)[1:]]
    process = subprocess.run(arguments, cwd="/", capture_output=True, encoding="utf-8")
    assert process.stdout.strip() == "Rome", process.stderr
