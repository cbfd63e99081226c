"""A prompt line: the model is loaded once, and each question answered on its own, as these models were fine-tuned."""

import argparse
import io
import sys

from transformers import PreTrainedTokenizerFast

from hf_model.errors import UserError
from hf_model.generation import encode, generate
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import takes_instructions
from hf_model_cli.answers import content_of, sampling_of
from hf_model_cli.common import MOST_PROMPT_BYTES, show
from hf_model_cli.generate import SAMPLING, SEED

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
    """What is asked on the prompt line; `args` are the command line's, and are changed by commands."""

    def __init__(self, args: argparse.Namespace, model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast):
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.question = ""

    def take(self, line: str) -> None:
        """Answer a question or carry out a command."""
        if line.startswith("/"):
            name, _, value = line[1:].partition(" ")
            show(self.command(name, value.strip()))
        elif line.strip() or (line and not takes_instructions(self.tokenizer)):
            self.question = line.strip() if takes_instructions(self.tokenizer) else line
            self.answer()

    def command(self, name: str, value: str) -> str:
        """Carry out a command, and return what is to be said."""
        if name in SAMPLING or name == "seed":
            return self.set(name, value)
        if name == "input" and value and not takes_instructions(self.tokenizer):
            return "This model's prompts are raw text, which has no place for an input."
        if name == "input":
            self.args.input_text = value
            return f"input: {value or 'none'}"
        if name == "again" and self.question:
            self.args.seed = (self.args.seed + 1) % 2**64
            self.answer()
            return f"(seed {self.args.seed})"
        if name == "again":
            return "There is no question yet."
        if name == "options":
            names = (*SAMPLING, "seed", "input_text", "stop")
            return "\n".join(f"{name}: {getattr(self.args, name)!r}" for name in names)
        if name == "help":
            commands = "\n".join(f"  /{usage:<22} {text}" for usage, text in HELP.items())
            return f"A line is a question. Ctrl-C stops an answer, Ctrl-D leaves. Commands:\n{commands}"
        return f"There is no command /{name}; /help lists them. A question that begins with / needs a space in front."

    def set(self, name: str, value: str) -> str:
        try:
            setattr(self.args, name, (SEED if name == "seed" else SAMPLING[name].type)(value))
        except argparse.ArgumentTypeError as error:
            return f"/{name} {error}"
        except ValueError:
            return f"/{name} needs a number, such as /{name} {getattr(self.args, name)}"
        return f"{name}: {getattr(self.args, name)}"

    def answer(self) -> None:
        streams = self.args.num_beams == 1 and not self.args.no_stream
        try:
            content = content_of(self.tokenizer, self.question, self.args.input_text)
            output = generate(
                self.model,
                self.tokenizer,
                encode(self.tokenizer, content, self.args.parse_special_tokens),
                sampling_of(self.args, self.args.seed),
                response_only=True,
                on_text=lambda piece: show(piece, end="") if streams else None,
            )
            show("" if streams else output.texts[0])
        except UserError as error:  # a character that the model does not know, options that nothing can be drawn with
            show(f"error: {error}")


def converse(args: argparse.Namespace, model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Read questions and commands from standard input until it ends. Ctrl-C ends an answer or a line, nothing else."""
    is_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as Python decodes an argument
    if readline is not None and is_terminal:
        prepare_readline()
    if not args.quiet:
        show("\nAsk; /help lists the commands.")
    conversation = Conversation(args, model, tokenizer)
    while True:
        try:
            conversation.take(input("> ") if is_terminal else next_line())
        except KeyboardInterrupt:
            show("\n(Ctrl-D leaves)")
        except EOFError:
            if is_terminal:
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
