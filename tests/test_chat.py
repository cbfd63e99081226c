"""The prompt line of `generate.py`: questions one after the other, options changed in place, Ctrl-C and Ctrl-D."""

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_model_cli import generate
from tests import relatives
from tests.tiny import EOS, ROOT, gpt, save_files

CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture
def talk(capitals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., list[str]]:
    """What the command answers to lines from a pipe."""

    def say(*lines: str, options: tuple[str, ...] = ()) -> list[str]:
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        arguments = ["--checkpoint_path", str(capitals), "--interactive", "--quiet", *options]
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
        *("/temperature 0", "/temperature hot", "/temperature -1", "/max_new_tokens 1", "/again"),
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
    assert said[9] == "max_new_tokens: 1"
    assert "Lima".startswith(said[10]) and said[10] != "Lima"  # one token of it
    assert said[11] == "(seed 1339)"
    assert said[12].startswith("There is no command /bananas; /help lists them.")
    assert not said[13].startswith("There is no")  # a question
    assert said[14:16] == ["max_new_tokens: 1", "temperature: 0.0"]


def test_an_option_without_a_value_shows_it(talk: Callable[..., list[str]]) -> None:
    said = talk(
        "/top_k", "/stop", r"/stop a\n", "/stop", "/stop none", "/input", "/input Peru", "/input", "/input none"
    )
    assert said[:5] == ["top_k: 50", "stop: none", r"stop: 'a\n'", r"stop: 'a\n'", "stop: none"]
    assert said[5:] == ["input: none", "input: Peru", "input: Peru", "input: none"]


def test_a_seed_that_was_set_is_used_before_the_next_one(talk: Callable[..., list[str]]) -> None:
    said = talk("What is the capital of Peru?", "/seed 5", "/again", "/again", "/again")
    assert said == ["Lima", "seed: 5", "Lima", "(seed 5)", "Lima", "(seed 6)", "Lima", "(seed 7)"]


@pytest.mark.parametrize("word", ["exit", "quit", "/exit", "/quit", "/bye"])
def test_words_that_leave(word: str, talk: Callable[..., list[str]]) -> None:
    assert talk("What is the capital of Peru?", word, "What is the capital of France?") == ["Lima"]


def test_lines_between_quotes_are_one_question(talk: Callable[..., list[str]]) -> None:
    assert talk('"""What is the capital', 'of Peru?"""', '"""', "What is the capital of France?", '"""') == [
        "Lima",
        "Paris",
    ]


def test_a_question_from_a_file_and_the_conversation_to_one(talk: Callable[..., list[str]], tmp_path: Path) -> None:
    question, saved = tmp_path / "question.txt", tmp_path / "saved.jsonl"
    question.write_text("What is the capital of Peru?\n")
    files = (
        f"/file {question}",
        "/input Italy",
        "Name the capital of the country.",
        f"/save {saved}",
        f"/save {saved}",
    )
    said = talk(*files, f"/file {tmp_path / 'no.txt'}")
    assert said[:4] == ["Lima", "input: Italy", "Rome", f"saved: {saved} (2 answers)"]
    assert "File exists" in said[4] and "No such file" in said[5]
    assert [json.loads(line) for line in saved.read_text().splitlines()] == [
        {"instruction": "What is the capital of Peru?", "response": "Lima"},
        {"instruction": "Name the capital of the country.", "input": "Italy", "response": "Rome"},
    ]


def test_lines_in_are_json_out(talk: Callable[..., list[str]]) -> None:
    said = talk("What is the capital of Peru?", "What is the capital of France?", options=("--json",))
    assert [json.loads(line)["response"] for line in said] == ["Lima", "Paris"]


def test_a_line_that_is_not_utf_8_is_an_error(
    capitals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is the capital of Peru?\ncaf\xe9\n")))
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint_path", str(capitals), "--interactive", "--quiet"])
    assert generate.main() == 2
    said, errors = capsys.readouterr()
    assert said == "Lima\n"
    assert "is not UTF-8 text (byte 0xe9 in position 3)" in errors and errors.count("\n") == 1


def test_an_empty_line_of_raw_text_is_a_newline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = relatives.save_nanogpt(tmp_path, relatives.nano_character_model())
    meta = relatives.save_meta(tmp_path / "meta.pkl")
    arguments = ["--checkpoint_path", str(checkpoint), "--tokenizer_path", str(meta), "--quiet", "--device", "cpu"]
    arguments += ["--max_new_tokens", "9"]
    answers = []
    for also, typed in ((["--interactive"], b"\n"), (["--response_only"], b"\n\n")):  # a pipe loses one newline
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments, *also])
        assert generate.main() == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_the_help_names_every_command(talk: Callable[..., list[str]]) -> None:
    named = {line.split()[0] for line in talk("/help") if line.startswith("  /")}
    commands = {"/again", "/file", "/save", "/options", "/help", "/exit"}
    options = {"/input", "/seed", "/stop", "/temperature", "/top_k", "/max_new_tokens"}
    assert commands | options <= named


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
class TestTerminal:
    @pytest.fixture
    def files(self, tmp_path: Path) -> list[str]:
        """Options for a model whose answers have no end."""
        model = gpt()
        model.lm_head.weight.data[EOS] = 0  # greedy decoding never takes it
        checkpoint, tokenizer = save_files(tmp_path, model)
        return ["--checkpoint_path", str(checkpoint), "--tokenizer_path", str(tokenizer), "--temperature", "0"]

    def test_without_a_prompt_there_is_a_prompt_line_that_ctrl_c_does_not_leave(
        self, files: list[str], tmp_path: Path
    ) -> None:
        with Terminal([*files, "--max_new_tokens", "1000000"], tmp_path) as terminal:
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

    @pytest.mark.parametrize("keeps", [True, False])
    def test_a_pasted_block_is_one_question_and_lines_are_kept_for_the_next_conversation(
        self, keeps: bool, files: list[str], tmp_path: Path
    ) -> None:
        pytest.importorskip("readline")
        options = [*files, "--max_new_tokens", "3", *([] if keeps else ["--no_history"])]
        with Terminal(options, tmp_path, TERM="xterm", NO_COLOR="1") as terminal:
            terminal.expect(r"commands\.\s+> ")
            terminal.type("/top_k\n")
            terminal.expect(r"top_k: 50\s+> ")
            terminal.type("\x1b[200~Sing\nmore!\x1b[201~\n")
            terminal.expect(r"\(3 tokens, [\d.]+ tokens/s\)\s+> ")  # one answer
            assert "\x1b[2m" not in terminal.raw
            terminal.type(f"/save {tmp_path / 'saved'}\n")
            terminal.expect(r"\(1 answer\)\s+> ")
            terminal.type(CTRL_D)
            assert terminal.wait() == 0
        assert json.loads((tmp_path / "saved").read_text())["instruction"] == "Sing\nmore!"
        history = list((tmp_path / "state").rglob("history"))
        assert len(history) == keeps
        if keeps:
            assert history[0].read_text().startswith("/top_k\nSing\n")
            assert history[0].stat().st_mode & 0o077 == 0

    def test_the_speed_is_dim_where_colours_are_wanted(self, files: list[str], tmp_path: Path) -> None:
        with Terminal([*files, "--max_new_tokens", "3", "--no_history"], tmp_path, TERM="xterm") as terminal:
            terminal.expect(r"commands\.\s+> ")
            terminal.type("Sing!\n")
            terminal.expect(r"tokens/s\)\s+> ")
            assert "\x1b[2m(3 tokens" in terminal.raw


class Terminal:
    """generate.py on a pseudo-terminal."""

    def __init__(self, arguments: list[str], state: Path, **environment: str):
        self.ours, theirs = os.openpty()
        inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "generate.py"), *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=control_terminal,
            env=inherited | {"XDG_STATE_HOME": str(state / "state"), "HOME": str(state / "state")} | environment,
        )
        os.close(theirs)
        self.raw = self.seen = ""

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
        """Read until a pattern has come; escape sequences do not count."""
        while not (found := re.search(pattern, self.seen)):
            assert select.select([self.ours], [], [], 120)[0], f"{pattern!r} did not come: {self.raw[-1000:]!r}"
            text = os.read(self.ours, 10_000).decode("utf-8", "replace")
            self.raw += text
            self.seen += re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", text)
        self.seen = self.seen[found.end() :]

    def wait(self) -> int:
        return self.process.wait(timeout=60)


def control_terminal() -> None:
    """In the new process: its standard input is the terminal whose Ctrl-C it gets."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
