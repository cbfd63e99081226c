"""`python -m hf_model`: which commands there are."""

import shlex
import sys

from hf_model import __version__

COMMANDS = {
    "convert": ("custom-gpt-convert", "convert_checkpoint.py"),
    "generate": ("custom-gpt-generate", "generate.py"),
}
USAGE = """\
A GPT trained in plain PyTorch (nanoGPT and its relatives) as a Hugging Face model. There are two commands:

  custom-gpt-convert --help     write a Hugging Face folder from a checkpoint and its tokenizer
  custom-gpt-generate --help    generate text with a checkpoint or a converted folder

In a clone: python convert_checkpoint.py, python generate.py
In Python: import hf_model; help(hf_model.convert)"""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(f"custom-gpt-hf {__version__}")
        return 0
    word, *others = arguments
    if word in COMMANDS:
        command, script = COMMANDS[word]
        message = (
            f"the command is {shlex.join([command, *others])}; in a clone, {shlex.join(['python', script, *others])}"
        )
    else:
        message = f"there is no command {word!r}; the commands are custom-gpt-convert and custom-gpt-generate"
    print(f"python -m hf_model: error: {message}", file=sys.stderr)
    return 2


sys.exit(main(sys.argv[1:]))
