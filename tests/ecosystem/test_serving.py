"""A real `transformers serve` process on loopback, asked by the `openai` client and by `transformers chat`."""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from examples.serving.process import running
from hf_model.tokenizer import format_prompt
from tests.tiny import CHECKPOINT, ROOT, TOKENIZER

openai = pytest.importorskip("openai", reason="the openai client is not installed (the `ecosystem` extra)")
pytest.importorskip("fastapi", reason="transformers[serving] is not installed (the `ecosystem` extra)")

# The folder's own code serves: the command starts where this repository cannot be imported.
TRANSFORMERS = [sys.executable, "-m", "transformers.cli.transformers"]
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
START_SECONDS = 180


@pytest.fixture(scope="module")
def suggested(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the converter says to serve its folder with, behind the folder."""
    folder = tmp_path_factory.mktemp("suggested") / "hf"
    command = [sys.executable, str(ROOT / "convert_checkpoint.py"), "--output_dir", str(folder)]
    command += ["--checkpoint_path", str(CHECKPOINT), "--tokenizer_path", str(TOKENIZER)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, serves, arguments = said.partition(f"transformers serve {folder} ")
    assert serves
    return shlex.split(arguments)


@pytest.fixture(scope="module")
def url(capitals: Path, suggested: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [*TRANSFORMERS, "serve", str(capitals), *suggested, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    try:
        with running(command, address, folder / "log", START_SECONDS, cwd=folder):
            yield f"{address}/v1"
    except RuntimeError as error:
        pytest.fail(f"{error}\n{(folder / 'log').read_text()}")


@pytest.fixture(scope="module")
def client(url: str) -> "openai.OpenAI":
    return openai.OpenAI(base_url=url, api_key="none")


def n_tokens(tokenizer: PreTrainedTokenizerFast, content: str) -> int:
    return len(tokenizer(content).input_ids)


def test_a_chat_is_answered_in_the_format_of_fine_tuning(client, capitals: Path, tokenizer) -> None:
    completion = client.chat.completions.create(model=str(capitals), messages=MESSAGES, temperature=0)
    assert completion.choices[0].message.content.strip() == "Paris"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.prompt_tokens == n_tokens(tokenizer, format_prompt(QUESTION))


def test_a_chat_is_streamed_piece_by_piece(client, capitals: Path) -> None:
    stream = client.chat.completions.create(model=str(capitals), messages=MESSAGES, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(piece or "" for piece in pieces).strip() == "Paris"


def test_a_completion_continues_the_prompt_after_one_bos(client, capitals: Path, tokenizer) -> None:
    prompt = format_prompt("Name the capital of the country.", "France")
    completion = client.completions.create(model=str(capitals), prompt=prompt, temperature=0)
    assert completion.choices[0].text.strip() == "Paris"
    assert completion.usage.prompt_tokens == n_tokens(tokenizer, prompt)


def test_a_completion_is_streamed_piece_by_piece(client, capitals: Path) -> None:
    stream = client.completions.create(model=str(capitals), prompt=format_prompt(QUESTION), temperature=0, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces).strip() == "Paris"


def test_max_tokens_ends_an_answer(client, capitals: Path) -> None:
    completion = client.chat.completions.create(model=str(capitals), messages=MESSAGES, temperature=0, max_tokens=2)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 2


def test_the_last_question_of_a_conversation_is_answered_alone(client, capitals: Path) -> None:
    turns = [{"role": "user", "content": "What is the capital of Italy?"}, {"role": "assistant", "content": "Rome"}] * 8
    messages = [{"role": "system", "content": "You are a helpful assistant."}, *turns, *MESSAGES]
    completion = client.chat.completions.create(model=str(capitals), messages=messages, temperature=0)
    assert completion.choices[0].message.content.strip() == "Paris"
    assert completion.usage.prompt_tokens < 20


def test_a_question_past_the_context_is_answered(client, capitals: Path) -> None:
    messages = [{"role": "user", "content": " ".join([QUESTION] * 12)}]
    completion = client.chat.completions.create(model=str(capitals), messages=messages, temperature=0, max_tokens=20)
    assert completion.usage.prompt_tokens > 64
    assert completion.usage.completion_tokens >= 1  # it need not make sense


def test_transformers_chat_talks_to_it(url: str, capitals: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}  # offline, it calls nobody
    command = [*TRANSFORMERS, "chat", str(capitals), url, "do_sample=False", "max_new_tokens=20"]
    chat = subprocess.run(
        command, cwd=tmp_path, env=environment, input=f"{QUESTION}\n!exit\n", capture_output=True, text=True
    )
    assert chat.returncode == 0, chat.stderr
    assert "Paris" in chat.stdout
