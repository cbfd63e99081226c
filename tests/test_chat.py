"""The prompt line of `generate.py`: questions one after the other, options changed in place, Ctrl-C and Ctrl-D."""

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_model_cli import generate
from tests.tiny import EOS, ROOT, gpt, save_files

CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture
def talk(capitals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., list[str]]:
    """What the command answers to lines from a pipe."""

    def say(*lines: str) -> list[str]:
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        arguments = ["--checkpoint_path", str(capitals), "--interactive", "--quiet"]
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        status = generate.main()
        said, errors = capsys.readouterr()
        assert (status, errors) == (0, "")
        return said.splitlines()

    return say


def test_each_question_is_answered_on_its_own(talk: Callable[..., list[str]]) -> None:
    answers = talk(*(f"What is the capital of {x}?" if x else "" for x in ("France", "", "Peru", "France")))
    assert answers == ["Paris", "Lima", "Paris"]


def test_options_are_changed_in_place(talk: Callable[..., list[str]]) -> None:
    said = talk(
        *("/again", "/input Italy", "Name the capital of the country.", "/input Peru", "/again"),
        *("/temperature 0", "/temperature hot", "/temperature -1", "/top_k", "/seed 5", "/max_new_tokens 1", "/again"),
        *("/bananas", " /bananas", "/options"),
    )
    assert said[:9] == [
        "There is no question yet.",
        "input: Italy",
        "Rome",
        "input: Peru",
        "Lima",
        "(seed 1338)",
        "temperature: 0.0",
        "/temperature needs a number, such as /temperature 0.0",
        "/temperature must be at least 0, got -1",
    ]
    assert said[9:12] == ["/top_k needs a number, such as /top_k 50", "seed: 5", "max_new_tokens: 1"]
    assert "Lima".startswith(said[12]) and said[12] != "Lima"  # one token of it
    assert said[13] == "(seed 6)"
    assert said[14].startswith("There is no command /bananas; /help lists them.")
    assert not said[15].startswith("There is no")  # a question
    assert said[16:18] == ["max_new_tokens: 1", "temperature: 0.0"]


def test_the_help_names_every_command(talk: Callable[..., list[str]]) -> None:
    said = talk("/help")
    named = {line.split()[0] for line in said if line.startswith("  /")}
    assert {"/input", "/again", "/seed", "/temperature", "/top_k", "/max_new_tokens", "/options", "/help"} <= named


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
class TestTerminal:
    def test_without_a_prompt_there_is_a_prompt_line_that_ctrl_c_does_not_leave(self, tmp_path: Path) -> None:
        model = gpt()
        model.lm_head.weight.data[EOS] = 0  # greedy decoding never takes it: the answer has no end
        checkpoint, tokenizer = save_files(tmp_path, model)
        arguments = ["--checkpoint_path", str(checkpoint), "--tokenizer_path", str(tokenizer)]
        arguments += ["--temperature", "0", "--max_new_tokens", "1000000"]
        with Terminal([sys.executable, str(ROOT / "generate.py"), *arguments]) as terminal:
            terminal.expect(r"/help lists the commands\.\s+> ")
            terminal.type(CTRL_C)
            terminal.expect(r"\(Ctrl-D leaves\)\s+> ")
            terminal.type("Sing!\n")
            terminal.expect(r"Sing!\s+\S[^>]{20}")  # it has begun to answer
            terminal.type(CTRL_C)
            terminal.expect(r"\(Ctrl-D leaves\)\s+> ")
            terminal.type("/seed 3\n")
            terminal.expect(r"seed: 3\s+> ")
            terminal.type(CTRL_D)
            assert terminal.wait() == 0


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, command: list[str]):
        self.ours, theirs = os.openpty()
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=control_terminal
        )
        os.close(theirs)
        self.seen = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def type(self, text: str) -> None:
        time.sleep(0.2)  # a prompt is printed a moment before the line is read
        os.write(self.ours, text.encode())

    def expect(self, pattern: str) -> None:
        """Read until a pattern has come."""
        while not (found := re.search(pattern, self.seen)):
            self.seen += os.read(self.ours, 1000).decode("utf-8", "replace")
        self.seen = self.seen[found.end() :]

    def wait(self) -> int:
        return self.process.wait(timeout=60)


def control_terminal() -> None:
    """In the new process: its standard input is the terminal whose Ctrl-C it gets."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
