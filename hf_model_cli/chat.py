"""A prompt line: the model is loaded once, and each question answered on its own, as these models were fine-tuned."""

import argparse
import io
import sys
from dataclasses import replace
from typing import Any

from hf_model.errors import UserError
from hf_model_cli.answers import Answers
from hf_model_cli.files import MOST_PROMPT_BYTES
from hf_model_cli.options import SAMPLING, SEED
from hf_model_cli.run import is_terminal, show

try:  # gives `input` its history and editing
    import readline
except ImportError:  # Windows
    readline = None  # type: ignore[assignment]

HELP = {
    "input TEXT": "the text that the questions are about; without a TEXT, none",
    "again": "the last question again, with the next seed",
    "seed N": "the seed",
    **{f"{name} {option.metavar}": option.help for name, option in SAMPLING.items()},
    "options": "what is set now",
    "help": "this",
}
COMMANDS = [usage.split()[0] for usage in HELP]


class Conversation:
    """What was asked, and the options that commands have set."""

    def __init__(self, answers: Answers):
        self.answers = answers
        self.sampling, self.input_text, self.prompt = answers.sampling, answers.args.input_text, ""

    def take(self, line: str) -> None:
        """Answer a question or carry out a command."""
        if line.startswith("/"):
            name, _, value = line[1:].partition(" ")
            show(self.command(name, value.strip()))
        elif line.strip() or (line and not self.answers.takes_instructions):
            self.prompt = line.strip() if self.answers.takes_instructions else line
            self.answer()

    def command(self, name: str, value: str) -> str:
        """Carry out a command, and return what to print."""
        if name in SAMPLING or name == "seed":
            return self.set(name, value)
        if name == "input" and value and not self.answers.takes_instructions:
            return "This model's prompts are raw text, which has no place for an input."
        if name == "input":
            self.input_text = value
            return f"input: {value or 'none'}"
        if name == "again" and self.prompt:
            self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % 2**64)
            self.answer()
            return f"(seed {self.sampling.seed})"
        if name == "again":
            return "There is no question yet."
        if name == "options":
            lines = [f"{name}: {getattr(self.sampling, name)!r}" for name in (*SAMPLING, "seed", "stop")]
            return "\n".join([*lines, f"input: {self.input_text!r}"])
        if name == "help":
            commands = "\n".join(f"  /{usage:<22} {text}" for usage, text in HELP.items())
            return f"A line is a question. Ctrl-C stops an answer, Ctrl-D leaves. Commands:\n{commands}"
        return f"There is no command /{name}; /help lists them. A question that begins with / needs a space in front."

    def set(self, name: str, value: str) -> str:
        try:
            number: Any = (SEED if name == "seed" else SAMPLING[name].type)(value)
        except argparse.ArgumentTypeError as error:
            return f"/{name} {error}"
        except ValueError:
            return f"/{name} needs a number, such as /{name} {getattr(self.sampling, name)}"
        self.sampling = replace(self.sampling, **{name: number})
        return f"{name}: {number}"

    def answer(self) -> None:
        try:
            question = self.answers.question(self.prompt, self.input_text)
            self.answers.answer_once(question, self.sampling, response_only=True)
        except UserError as error:  # a character that the model does not know, options that leave nothing to draw from
            show(f"error: {error}")


def converse(answers: Answers) -> None:
    """Read questions and commands from standard input until it ends. Ctrl-C ends an answer or a line, nothing else."""
    has_terminal = is_terminal(sys.stdin)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as Python decodes an argument
    if readline is not None and has_terminal:
        prepare_readline()
    answers.note("\nAsk; /help lists the commands.")
    conversation = Conversation(answers)
    while True:
        try:
            conversation.take(input("> ") if has_terminal else next_line())
        except KeyboardInterrupt:
            show("\n(Ctrl-D leaves)")
        except EOFError:
            if has_terminal:
                show("")
            return


def next_line() -> str:
    """The next line of a pipe or a file.

    Raises:
        EOFError: there is none.
        UserError: it is too long.
    """
    line = sys.stdin.readline(MOST_PROMPT_BYTES + 1)
    if not line:
        raise EOFError
    if len(line) > MOST_PROMPT_BYTES:
        raise UserError(f"standard input: a line is more than {MOST_PROMPT_BYTES // 2**20} Mi characters long")
    return line.removesuffix("\n")


def prepare_readline() -> None:
    """The tabulator completes commands."""

    def complete(text: str, state: int) -> str | None:
        matches = [f"/{name} " for name in COMMANDS if f"/{name}".startswith(text)] if text.startswith("/") else []
        return matches[state] if state < len(matches) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
