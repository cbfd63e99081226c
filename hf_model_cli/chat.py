"""A conversation: the model is loaded once. Each question is answered by itself, or after the turns before it.

The model's chat template decides. Most models of these trainers were fine-tuned on single turns.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_model.errors import UserError
from hf_model.tokenizer import Message, user_message
from hf_model_cli.answers import Answers, Question, count, json_line
from hf_model_cli.files import MOST_PROMPT_BYTES, decoded, read_prompt_file
from hf_model_cli.options import DISTRIBUTION, SAMPLING, SEED, escaped
from hf_model_cli.run import is_terminal, show

try:  # gives `input` editing and a history
    import readline
except ImportError:  # Windows
    readline = None  # type: ignore[assignment]

OPTIONS = {
    **{f"{name} {option.metavar}": option.help for name, option in SAMPLING.items()},
    "seed N": "the seed of the next answer",
    "stop TEXT": r"a text that ends an answer, such as \n; none: no text does",
    "input TEXT": "the text that the questions are about; none: no text",
}
COMMANDS = {
    "again": "answer the last question again, with another seed",
    "new": "begin again: forget what was said so far",
    "file PATH": "ask what a file says",
    "save PATH": "write the questions and answers to a new file, as JSON Lines",
    "options": "show all options",
    "help": "show this",
    "exit": "leave; so do /quit, /bye, the bare words exit and quit, and Ctrl-D",
}
HELP = """\
A line is a question. Ctrl-C stops an answer. A question of several lines stands between two \"\"\".
Commands:
{commands}
Options, set by a value and shown without one:
{options}"""
LEAVE = ("exit", "quit", "bye")
MOST_HISTORY = 1000  # lines


class Conversation:
    """The options that commands have set, and what was asked and answered."""

    def __init__(self, answers: Answers):
        self.answers = answers
        self.sampling, self.input_text = answers.sampling, answers.args.input_text
        self.prompt = ""  # the last question
        self.seed_was_used = False
        self.records: list[dict[str, str]] = []
        self.turns: list[tuple[Message, Message]] = []
        """The questions and answers that the model still sees; none if it answers each question by itself."""
        self.commands: dict[str, Callable[[str], str]] = {
            "again": self.again,
            "new": self.new,
            "file": self.ask_file,
            "save": self.save,
            "options": lambda _: "\n".join(f"{name}: {self.value_of(name)}" for name in names(OPTIONS)),
            "help": lambda _: HELP.format(commands=table(COMMANDS), options=table(OPTIONS)),
        }

    def take(self, text: str) -> None:
        """Answer a question or carry out a command.

        Raises:
            EOFError: the user wants to leave.
        """
        if text.removeprefix("/") in LEAVE and text != "bye":
            raise EOFError
        if text.startswith("/") and "\n" not in text:
            name, _, value = text[1:].partition(" ")
            if reply := self.command(name, value.strip()):
                show(reply, file=sys.stderr if self.answers.args.json else None)
        elif not self.answers.takes_instructions:
            self.ask(text or "\n")  # nanoGPT's own prompt is a newline
        elif text.strip():
            self.ask(text.strip())

    def command(self, name: str, value: str) -> str:
        """Carry out a command or set an option, and return what to print."""
        try:
            if name in self.commands:
                return self.commands[name](value)
            if name in names(OPTIONS):
                if value:
                    self.set(name, value)
                return f"{name}: {self.value_of(name)}"
        except argparse.ArgumentTypeError as error:
            return f"/{name} {error}"
        return f"There is no command /{name}; /help lists them. A question that begins with / needs a space in front."

    def value_of(self, name: str) -> Any:
        if name == "input":
            return self.input_text or "none"
        if name == "stop":
            return ", ".join(map(repr, self.sampling.stop)) or "none"
        return getattr(self.sampling, name)

    def set(self, name: str, value: str) -> None:
        """Set an option.

        Raises:
            argparse.ArgumentTypeError: the option cannot have this value.
        """
        if name == "input":
            if not self.answers.takes_instructions:
                raise argparse.ArgumentTypeError("has no place in a raw text, which this model's prompts are")
            if not self.answers.format.takes_input:
                raise argparse.ArgumentTypeError("has no place in this model's prompts: put the text into the question")
            self.input_text = "" if value == "none" else value
            return
        new: Any
        if name == "stop":
            new = () if value == "none" else (escaped(value),)
        else:
            try:
                new = (SEED if name == "seed" else SAMPLING[name].type)(value)
            except ValueError:
                raise argparse.ArgumentTypeError(f"needs a number, such as /{name} {self.value_of(name)}") from None
        self.sampling = replace(self.sampling, **{name: new})
        self.seed_was_used = self.seed_was_used and name != "seed"

    def new(self, _: str) -> str:
        if not self.answers.format.has_turns:
            return "Each question is answered by itself: there is nothing to forget."
        self.turns.clear()
        self.prompt = ""
        return "A new conversation."

    def again(self, _: str) -> str:
        if not self.prompt:
            return "There is no question yet."
        if self.turns and self.turns[-1][0]["content"] == self.prompt:
            self.turns.pop()
        if self.seed_was_used:
            self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % 2**64)
        self.ask(self.prompt)
        return f"(seed {self.sampling.seed})"

    def ask_file(self, path: str) -> str:
        text = read_prompt_file(path)
        self.ask(text.strip() if self.answers.takes_instructions else text)
        return ""

    def save(self, path: str) -> str:
        try:
            with Path(path).open("x", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(record)}\n" for record in self.records)
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{path}: {getattr(error, 'strerror', error)}") from None
        return f"saved: {path} ({count(len(self.records), 'answer')})"

    def question(self, prompt: str) -> Question:
        """The question after the turns before it. The oldest turns are left out if the others fill the context.

        Generation goes on past the context, so only a short answer needs to fit.

        Raises:
            UserError: as `Answers.question`.
        """
        context = self.answers.model.config.block_size
        room = min(self.sampling.max_new_tokens, max(16, context // 8))  # for the answer
        n_turns = len(self.turns)
        while self.turns and self.answers.length(prompt, self.input_text, self.messages()) + room > context:
            del self.turns[0]
        if n_left_out := n_turns - len(self.turns):
            oldest = "the oldest turn is" if n_left_out == 1 else f"the {n_left_out} oldest turns are"
            self.answers.warn(
                f"{count(n_turns, 'turn')}, the question and an answer of {count(room, 'token')} do not fit the "
                f"context of {context}: {oldest} left out"
            )
        return self.answers.question(prompt, self.input_text, self.messages())

    def messages(self) -> list[Message]:
        return [message for turn in self.turns for message in turn]

    def ask(self, prompt: str) -> None:
        """Print the answer to a question."""
        answers, self.prompt, self.seed_was_used = self.answers, prompt, True
        try:
            output = answers.answer_once(self.question(prompt), self.sampling, response_only=True)
        except UserError as error:  # an unknown character, or options that leave no token to draw
            show(json_line({"prompt": prompt, "error": str(error)}) if answers.args.json else f"error: {error}")
            return
        if answers.format.has_turns:
            answer = {"role": "assistant", "content": output.responses[0]}
            self.turns.append((user_message(prompt, self.input_text), answer))
        name = "instruction" if answers.takes_instructions else "prompt"
        record = {name: prompt, "input": self.input_text, "response": output.responses[0]}
        self.records.append({key: text for key, text in record.items() if text or key != "input"})
        if is_terminal(sys.stdout) and not (answers.args.quiet or answers.args.json):
            rate = output.new_tokens / output.seconds
            show(f"({count(output.new_tokens, 'token')}, {rate:.1f} tokens/s)", dim=True)


def converse(answers: Answers) -> None:
    """Read questions and commands from standard input until it ends. Ctrl-C ends an answer or a line, nothing else."""
    has_terminal = is_terminal(sys.stdin)
    conversation = Conversation(answers)
    answers.note("\nAsk; /help lists the commands.")
    with line_editing(keeps_history=not answers.args.no_history) if has_terminal else nullcontext():
        while True:
            try:
                conversation.take(next_text(input if has_terminal else piped_line))
            except KeyboardInterrupt:
                show("\n(Ctrl-D leaves)")
            except EOFError:
                break
    if has_terminal:
        show("")


def next_text(read: Callable[[str], str]) -> str:
    """The next line, or the lines between two \"\"\"."""
    line = read("> ")
    if not line.startswith('"""'):
        return line
    text = line.removeprefix('"""')
    while '"""' not in text:
        text += f"\n{read('... ')}"
    return text.partition('"""')[0].removeprefix("\n")


def piped_line(_: str) -> str:
    """The next line of a pipe or a file.

    Raises:
        EOFError: there is none.
        UserError: it is too long, or not UTF-8.
    """
    line = sys.stdin.buffer.readline(MOST_PROMPT_BYTES + 1)
    if not line:
        raise EOFError
    try:
        return decoded(line, "a line of standard input").rstrip("\r\n")
    except argparse.ArgumentTypeError as error:
        raise UserError(str(error)) from None


# The line editor of a terminal


@contextmanager
def line_editing(keeps_history: bool) -> Iterator[None]:
    """The Tab key completes commands, a pasted block is one question, and earlier lines are at hand."""
    if readline is None:
        yield
        return

    def complete(text: str, state: int) -> str | None:
        known = [f"/{name} " for name in names(COMMANDS | OPTIONS)] if text.startswith("/") else []
        return next(iter([command for command in known if command.startswith(text)][state:]), None)

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")
    path = history_path() if keeps_history else None
    if path is None:
        yield
        return
    with suppress(OSError):  # there is none yet, or it cannot be read
        readline.read_history_file(path)
    readline.set_history_length(MOST_HISTORY)
    n_read = readline.get_current_history_length()
    try:
        yield
    finally:
        with suppress(OSError):  # a history that cannot be kept is no reason to fail
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            # Appended, so that two conversations at the same time keep both of their lines.
            readline.append_history_file(readline.get_current_history_length() - n_read, path)


def history_path() -> Path | None:
    """Where the platform keeps such files; None without a home folder."""
    with suppress(RuntimeError):
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Application Support" / DISTRIBUTION / "history"
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / DISTRIBUTION / "history"
    return None


def names(table: dict[str, str]) -> list[str]:
    return [usage.split()[0] for usage in table]


def table(entries: dict[str, str]) -> str:
    return "\n".join(f"  /{usage:<22} {text}" for usage, text in entries.items())
