"""Long runs, odd prompts, odd terminals and broken models give text or one clear line, never a traceback.

RUNNING_TOKENS sets the length of the long run.
"""

import io
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate as command_line
from hf_model import generation, loading
from hf_model.errors import UserError
from hf_model.generation import Sampling, encode
from hf_model.tokenizer import format_prompt, read_tokenizer
from tests.reliability.files import save, weights
from tests.tiny import CHECKPOINT, EOS, ROOT, TOKENIZER

TOKENS = int(os.environ.get("RUNNING_TOKENS", "800"))
CPU = torch.device("cpu")
FILES = ["--checkpoint_path", str(CHECKPOINT), "--tokenizer_path", str(TOKENIZER)]
ENDLESS = ["--temperature", "100", "--top_k", "0", "--max_new_tokens", "1000000"]


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return loading.load(CHECKPOINT, TOKENIZER, device=CPU)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_memory_is_flat_past_the_end_of_the_context(loaded: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    memory: list[int] = []
    generated = generation.generate(
        model,
        tokenizer,
        encode(tokenizer, format_prompt("Go on")),
        Sampling(max_new_tokens=TOKENS, temperature=1),
        on_text=lambda piece: memory.append(resident_bytes()),
    )
    assert len(memory) > TOKENS / 2  # a character can take several tokens
    assert generated.texts[0].startswith("[BOS]Instruction: Go on Response:")
    settled = memory[len(memory) // 5 :]  # the first fifth fills the allocator's pools
    print(f"{TOKENS} tokens, context {model.config.block_size}: memory grew by {max(settled) - settled[0]:,} bytes")
    assert max(settled) - settled[0] < 2**20 + 200 * TOKENS  # the token ids and the text themselves


PROMPTS = {
    "control characters": "\x00\x01\x07\x08\x1b[2J\x7f\r\n\t",
    "unpaired surrogates": "a \ud800 b \udcff c",
    "right to left": "ما هي عاصمة فرنسا؟ \u202eabc\u202c",
    "emoji": "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇫🇷",
    "combining marks": "Z" + "\u0301" * 500,
    "a byte order mark": "\ufeffWhat?",
    "no characters": "\u200b\ufffe\uffff\U0010ffff",
    "Python's own escapes": "{} %s %(x)s \\u0041 {{prompt}}",
    "special tokens": "[BOS][EOS][PAD][UNK] Response: [EOS]",
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_any_prompt_gives_text(prompt: str, loaded: tuple) -> None:
    model, tokenizer = loaded
    content = format_prompt(prompt, prompt)
    generated = generation.generate(model, tokenizer, encode(tokenizer, content), Sampling(max_new_tokens=5))
    kept = content.encode("utf-8", "replace").decode()  # an unpaired surrogate is no character
    assert generated.texts[0].startswith(f"[BOS]{kept}")
    assert generated.new_tokens > 0


@pytest.mark.parametrize(
    "text", ["word " * 200_000, "a" * 10**6, "é" * 500_000], ids=["words", "one letter", "accents"]
)
def test_a_megabyte_of_text_is_cropped_to_the_context(text: str, loaded: tuple) -> None:
    model, tokenizer = loaded
    input_ids = encode(tokenizer, format_prompt(text))
    assert input_ids.shape[1] > 100 * model.config.block_size
    tail = input_ids[:, -model.config.block_size :]
    long, short = (
        generation.generate(model, tokenizer, ids, Sampling(max_new_tokens=3, temperature=0), response_only=True)
        for ids in (input_ids, tail)
    )
    assert long.texts == short.texts


class TestSpecialTokensInAPrompt:
    """The original reads "[EOS]" in a prompt as the special token. Here this needs --parse_special_tokens."""

    def test_are_text(self, loaded: tuple) -> None:
        _, tokenizer = loaded
        ids = encode(tokenizer, "[EOS] is text")[0].tolist()
        assert EOS not in ids
        assert tokenizer.decode(ids) == "[BOS][EOS] is text"

    def test_are_parsed_when_asked(self, loaded: tuple) -> None:
        _, tokenizer = loaded
        original = read_tokenizer(TOKENIZER).encode("[EOS] is text").ids[:-1]  # less the [EOS] of the template
        assert EOS in original
        assert encode(tokenizer, "[EOS] is text", parse_special_tokens=True)[0].tolist() == original

    def test_from_the_command_line(self, capsys: pytest.CaptureFixture) -> None:
        for flags in ([], ["--parse_special_tokens"]):
            status = call(*FILES, "--prompt", "[EOS]", "--max_new_tokens", "1", *flags)
            assert status == 0
        assert "[BOS]Instruction: [EOS] Response:" in capsys.readouterr().out


def call(*arguments: str) -> int:
    """Run generate.py in this process; return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate.py", *arguments])
        return command_line.main()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_a_terminal_of_any_encoding_gets_what_it_can_show(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert call(*FILES, "--prompt", "Où est 漢字 🙂 \udcff?", "--max_new_tokens", "20", "--temperature", "5") == 0
    shown = terminal.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    expected = "Où est 漢字 🙂 ?".encode(encoding, "replace").decode(encoding)
    assert expected.rstrip("?") in shown


def test_no_output_at_all_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    assert call(*FILES, "--prompt", "Hello", "--max_new_tokens", "2") == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", ["0", "0.8"], ids=["greedy", "sampled"])
def test_logits_that_are_not_numbers_end_in_an_error_that_says_so(
    value: float, temperature: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    state = weights(vocab_size=1024)
    state["transformer.ln_f.weight"][3] = value
    path = save(tmp_path / "ckpt.pt", {"model": state})
    arguments = ["--checkpoint_path", str(path), "--tokenizer_path", str(TOKENIZER), "--n_head", "4"]
    assert call(*arguments, "--prompt", "Hello", "--temperature", temperature) == 2
    assert "generate.py: error: the model's logits are NaN or infinite: its weights hold" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_too_little_memory_for_the_model_is_an_error_that_says_so(tmp_path: Path) -> None:
    state = weights(n_layer=1, n_embd=1024, vocab_size=1024, block_size=1024)
    path = save(tmp_path / "ckpt.pt", {"model": state})
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 16 * 2**20, hard))
    try:
        with pytest.raises(UserError, match=r"there is not enough memory to load the model: free some, or"):
            loading.load(path, TOKENIZER, device=CPU, n_head=4)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def start(*arguments: str, **how: object) -> subprocess.Popen:
    command = [sys.executable, "generate.py", *FILES, "--prompt", "Hello", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, **how)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "flags, n_texts",
    [([], 1), (["--no_stream"], 1), (["--num_return_sequences", "3"], 3)],
    ids=["streamed", "not streamed", "several"],
)
def test_an_interrupt_shows_what_there_is_and_exits_with_130(flags: list[str], n_texts: int) -> None:
    process = start(*ENDLESS, *flags, stdout=subprocess.PIPE)
    shown = b""
    while b"content" not in shown:
        shown += process.stdout.readline()
    if flags:
        with pytest.raises(subprocess.TimeoutExpired):  # nothing comes: some tokens are made in this second
            process.wait(1)
    else:
        shown += process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""
    assert (shown + rest).count(b"[BOS]Instruction: Hello Response:") == n_texts
    assert rest.endswith(b"\n")


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    process = start(*ENDLESS, stdout=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"device")
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk_is_an_error_that_says_so() -> None:
    with Path("/dev/full").open("w") as full:
        process = start("--max_new_tokens", "2", stdout=full)
        assert process.wait(timeout=60) == 2
    message = b"generate.py: error: the output cannot be written (No space left on device)\n"
    assert process.stderr.read() == message
