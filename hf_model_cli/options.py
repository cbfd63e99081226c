"""The options of the commands: the parser, the types of values, and the options that both commands have.

This module imports nothing but the standard library: `import hf_model` takes seconds, and a mistyped option is
answered at once. So its tables repeat names of the package. Keep both in sync; a test compares them.
"""

import argparse
import difflib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from hf_model_cli.run import one_line

DISTRIBUTION = "custom-gpt-hf"
DEFAULT_CHECKPOINT = "out/finetune/ckpt.pt"
CHECKPOINT_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
DEFAULT_TOKENIZER = "data/tokenizer/custom_gpt_tokenizer.json"

# The package's names.
DTYPES = ("auto", "float32", "float16", "bfloat16")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu", "relu2", "leaky_relu", "mish")
CHAT_TEMPLATES = ("alpaca", "chatml")
FORMATS = ("transformers", "gpt2", "gguf", "ctranslate2", "onnx", "checkpoint")
GGUF_TYPES = ("f32", "f16", "q8_0")
QUANTIZATIONS = ("int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32")
TRAINERS = ("original", "nanogpt")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SHARD_SIZE = r"[1-9]\d{0,5}(\.\d{1,6})?[KMGT]B"

# What other programs call an option of ours. A parser suggests the first one that it has.
SYNONYMS = {
    "start": ("prompt",),
    "num_samples": ("num_return_sequences",),
    "n_predict": ("max_new_tokens",),
    "max_tokens": ("max_new_tokens",),
    "max_length": ("max_new_tokens",),
    "out_dir": ("output_dir", "checkpoint_path"),
    "out": ("output_dir", "output_file"),
    "outfile": ("output_dir", "output_file"),
    "outtype": ("gguf_type",),
    "upload": ("push_to_hub",),
}


# Types of values, as argparse has them


def number(
    convert: Callable[[str], float], minimum: float, *, exclusive: bool = False, maximum: float = float("inf")
) -> Callable[[str], float]:
    """The type of a number in a range, `minimum` left out if `exclusive`."""

    def parse(text: str) -> float:
        value = convert(text)
        if not (minimum < value if exclusive else minimum <= value) or not value <= maximum or value == float("inf"):
            low = f"{'above' if exclusive else 'at least'} {minimum}"
            high = f" and at most {maximum}" if maximum < float("inf") else ""
            raise argparse.ArgumentTypeError(f"must be {low}{high}, got {text}")
        return value

    parse.__name__ = convert.__name__  # argparse's own messages contain it
    return parse


def named(pattern: str, example: str) -> Callable[[str], str]:
    """The type of a name that matches a pattern."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"must be a name such as {example}, got {text!r}")
        return text

    return parse


def escaped(text: str) -> str:
    r"""The type of a text that is not empty, in which \n, \t and \\ stand for a newline, a tab and a backslash."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), text)


def words(text: str) -> str:
    """The type of a text for a model card."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError("is not UTF-8")
    return text


def shard_size(text: str) -> str:
    if not re.fullmatch(SHARD_SIZE, text, re.ASCII | re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, got {text}")
    return text.upper()


# Shared options


class Option(NamedTuple):
    type: Callable[[str], float]
    default: float
    metavar: str
    help: str


SEED = number(int, -(2**63), maximum=2**64 - 1)
MOST_ANSWERS = 10**6  # larger sizes would overflow in torch
MOST_TOKENS = 10**9
SAMPLING = {  # a conversation can change these
    "max_new_tokens": Option(number(int, 1, maximum=MOST_TOKENS), 150, "N", "longest answer, in tokens"),
    "temperature": Option(number(float, 0), 0.8, "X", "randomness; 0 always takes the likeliest token"),
    "top_k": Option(number(int, 0), 50, "K", "sample from the K likeliest tokens; 0 means from all"),
    "top_p": Option(
        number(float, 0, exclusive=True, maximum=1),
        1.0,
        "P",
        "sample from the likeliest tokens whose probabilities add up to P",
    ),
    "min_p": Option(
        number(float, 0, maximum=1), 0.0, "P", "leave out tokens less likely than P times the likeliest one"
    ),
    "repetition_penalty": Option(number(float, 0, exclusive=True), 1.0, "X", "above 1: repeat less"),
    "num_beams": Option(number(int, 1, maximum=1000), 1, "N", "beams of a beam search; 1 means no beam search"),
}


def add_model(group: argparse._ArgumentGroup) -> None:
    """The options that say which model to take and how to read it."""
    group.add_argument(
        "--checkpoint_path",
        metavar="PATH",
        default=DEFAULT_CHECKPOINT,
        help="a trainer's checkpoint (.pt), or a converted folder; the option's name may be left out "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--tokenizer_path",
        metavar="PATH",
        help="a tokenizer's file (JSON, meta.pkl, vocab.json, encoder.json, vocab.txt, .model, tiktoken's ranks), its "
        "folder, or the name gpt2 "
        f"(default: the folder's own; for a checkpoint, where its trainer keeps it, such as {DEFAULT_TOKENIZER})",
    )
    group.add_argument(
        "--characters_of",
        metavar="FILE",
        help="the training text of a character-level model, instead of a tokenizer",
    )
    group.add_argument(
        "--raw", action="store_true", help="prompts are raw text, although the tokenizer has [BOS] and [EOS]"
    )
    group.add_argument(
        "--instructions", action="store_true", help="prompts are instructions, whatever the special tokens are called"
    )
    group.add_argument(
        "--chat_template",
        metavar="NAME",
        help="what the prompts look like: alpaca, chatml, or a file of Jinja (default: what the tokenizer has)",
    )
    for role, what in (("bos", "stands in front of a text"), ("eos", "ends an answer"), ("pad", "fills up a batch")):
        group.add_argument(f"--{role}_token", metavar="TOKEN", help=f"the token that {what} (default: the tokenizer's)")
    group.add_argument(
        "--n_head", metavar="N", type=number(int, 1), help="number of attention heads, if the checkpoint lacks it"
    )
    group.add_argument(
        "--model",
        metavar="FILE.py:NAME",
        help="your own class or function that makes the checkpoint's model; this runs your file",
    )
    group.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        help="gelu is exact, gelu_new and gelu_pytorch_tanh are its tanh form (default: what the checkpoint tells)",
    )
    group.add_argument(
        "--ignore_model_args",
        metavar="NAME",
        nargs="+",
        default=[],
        help="options in the checkpoint's model_args that are not known here, to convert without them",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: that of the file)"
    )


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `hf_model.load`, `convert` and `inspect` that say how to read a model."""
    roles = ("bos_token", "eos_token", "pad_token")
    prompts = ("raw", "instructions", "chat_template")
    names = ("dtype", "n_head", "characters_of", *prompts, *roles, "ignore_model_args", "model")
    return {"activation": args.activation or "auto", **{name: getattr(args, name) for name in names}}


# The parser


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the option that was probably meant."""

    def __init__(self, **how: Any):
        # No abbreviations: `--model` would silently be `--model_name`.
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **how)
        self.add_argument("--version", action=Version, nargs=0, help="show the versions and exit")

    def error(self, message: str) -> NoReturn:
        """One line; argparse would print the usage of all options in front."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        if "_ARGCOMPLETE" in os.environ:  # a shell asks how the line could go on
            import argcomplete

            argcomplete.autocomplete(self)
        known, unknown = self.parse_known_args(args, namespace)
        if len(unknown) == 1 and known.checkpoint_path == DEFAULT_CHECKPOINT and is_model(unknown[0]):
            known.checkpoint_path = unknown[0]
        elif option := next((word for word in unknown if word.startswith("-")), None):
            self.error(f"there is no option {option.partition('=')[0]}{self._advice(option)}")
        elif unknown:
            advice = (
                "a text of more than one word needs quotes, each value its option in front; a model's folder must exist"
            )
            self.error(f"unrecognized arguments: {' '.join(unknown)} ({advice})")
        return known

    def _advice(self, word: str) -> str:
        """The option that was probably meant by an unknown one; "" if none is near."""
        name = re.sub("-(?=.)", "_", word.lstrip("-").partition("=")[0]).lower()
        names = [option.removeprefix("--") for option in self._option_string_actions]
        likely = [
            *(synonym for synonym in SYNONYMS.get(name, ()) if synonym in names),
            *(longer for longer in names if name and longer.startswith(name)),
            *difflib.get_close_matches(name, names, n=1),
        ]
        return f"; did you mean --{likely[0]}?" if likely else ""


def is_model(word: str) -> bool:
    """Whether a word without an option looks like a path, or like the name of a model on the Hub."""
    is_path = word.endswith((*CHECKPOINT_ENDINGS, os.sep)) or os.path.exists(word)  # noqa: PTH110 (a Path's raises for long names)
    return not word.startswith("-") and (is_path or ("/" in word and HUB_NAME.fullmatch(word) is not None))


class Version(argparse.Action):
    """Show the version of this project and of the libraries that decide how it behaves."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            own = importlib.metadata.version(DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError:  # a clone that was not installed
            from hf_model import __version__ as own
        libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
        print(f"{DISTRIBUTION} {own} ({libraries}, Python {sys.version.split()[0]})")
        parser.exit()
