"""Convert a GPT checkpoint and its vocabulary to a Hugging Face folder, and check it against its source."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from hf_model_cli.common import (
    ACTIVATIONS,
    DEFAULT_CHECKPOINT,
    DTYPES,
    Parser,
    add_vocabulary,
    check_checkpoint,
    no_garbage_search,
    number,
    run_command,
    vocabulary_of,
)


def shard_size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?([KMGT]B)?", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, got {text}")
    return text.upper()


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint_path", default=DEFAULT_CHECKPOINT, help="default: %(default)s")
    add_vocabulary(files, default="where the trainer put it")
    files.add_argument("--output_dir", help="default: hf/ beside the checkpoint")
    files.add_argument("--overwrite", action="store_true", help="replace the model that is in the output folder")
    files.add_argument("--push_to_hub", metavar="REPO", help="upload the folder to this repository, private if new")

    model = parser.add_argument_group("model")
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the file's own")
    model.add_argument("--max_shard_size", type=shard_size, default="5GB", help="default: %(default)s")
    model.add_argument("--n_head", type=number(int, 1), help="number of heads, where the checkpoint does not tell")
    model.add_argument("--activation", choices=ACTIVATIONS, help="exact or tanh GELU (default: what the file tells)")
    model.add_argument("--no_verify", action="store_true", help="do not compare the folder with its source")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_checkpoint(parser, args.checkpoint_path, "file ")
    args.vocabulary = vocabulary_of(parser, args)
    args.output_dir = Path(args.output_dir or Path(args.checkpoint_path).parent / "hf")
    return args


def run(args: argparse.Namespace) -> None:
    # Imported here, after the arguments are known to be right: these imports take seconds.
    with no_garbage_search():
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        from hf_model.conversion import convert, push
        from hf_model.loading import load_tokenizer
        from hf_model.vocabulary import example_prompt
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()

    folder = convert(
        args.checkpoint_path,
        args.vocabulary,
        args.output_dir,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        n_head=args.n_head,
        activation=args.activation or "auto",
        characters_of=args.characters_of,
        raw=args.raw,
        overwrite=args.overwrite,
        verify=not args.no_verify,
        report=say,
    )
    path, prompt = shlex.quote(str(folder)), example_prompt(load_tokenizer(folder))
    command = "python generate.py" if Path(sys.argv[0]).suffix == ".py" else "custom-gpt-generate"
    say(f"\nTry it:\n  {command} --checkpoint_path {path} --prompt {quoted(prompt)}")
    say(f'  pip install "transformers[serving]" && transformers serve {path} --trust-remote-code')
    if args.push_to_hub:
        say(f"\npushed        {push(folder, args.push_to_hub)}")


def quoted(prompt: str) -> str:
    """A prompt as a shell takes it."""
    if "\n" in prompt:
        return f"$'{prompt.encode('unicode_escape').decode()}'"
    return f'"{prompt}"' if re.fullmatch(r"[\w ,.?]+", prompt) else shlex.quote(prompt)


def say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # `| head`: that nobody reads on is no reason to stop converting
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    status = run_command(run, parse_arguments())
    if status == 130:
        print("interrupted", file=sys.stderr)
    return status
