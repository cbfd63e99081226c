"""A chosen prompt format in the files of other engines: each asks the same prompt and ends where the format ends."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hf_model.conversion import convert
from tests.templates import CHATML_LIKE, save_speaker, save_tokenizer

QUESTION = {"role": "user", "content": "Where is it?"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose model says Paris in ChatML, and would go on after it."""
    folder = tmp_path_factory.mktemp("chatml")
    tokenizer = save_tokenizer(folder / "tokenizer.json", *CHATML_LIKE)
    checkpoint = save_speaker(folder, tokenizer, "\nParis<|im_end|>\n")
    return convert(checkpoint, tokenizer, folder / "hf", chat_template="chatml")


def test_llama_cpp_reads_it_from_the_file(source: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (the `gguf` extra)")
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the `gguf` extra)")
    path = convert(source, None, tmp_path / "out", format="gguf") / "model-f32.gguf"
    fields = gguf.GGUFReader(path).fields
    assert "<|im_start|>" in fields["tokenizer.chat_template"].contents()
    ends = [fields[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("eos", "eot")]
    assert ends == [CHATML_LIKE.index("<|endoftext|>"), CHATML_LIKE.index("<|im_end|>")]
    llama = llama_cpp.Llama(str(path), n_ctx=0, verbose=False)
    turns = [QUESTION, {"role": "assistant", "content": "Here."}, QUESTION]
    completion = llama.create_chat_completion(turns, temperature=0, max_tokens=20)
    (choice,) = completion["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Paris", "stop")
    prompt = AutoTokenizer.from_pretrained(source).apply_chat_template(turns, add_generation_prompt=True).input_ids
    assert llama.input_ids[: len(prompt)].tolist() == prompt
    assert completion["usage"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize("format, engine", [("ctranslate2", "ctranslate2"), ("onnx", "onnxruntime")])
def test_the_example_program_asks_in_it_and_ends(format: str, engine: str, source: Path, tmp_path: Path) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed (an extra)")
    folder = convert(source, None, tmp_path / "out", format=format)
    command = [sys.executable, str(folder / "example.py"), QUESTION["content"]]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"Paris\n"
