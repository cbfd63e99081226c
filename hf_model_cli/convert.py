"""Convert a GPT checkpoint and its tokenizer JSON to a Hugging Face folder, and check it against its source."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from hf_model_cli.common import (
    ACTIVATIONS,
    DEFAULT_CHECKPOINT,
    DEFAULT_TOKENIZER,
    DTYPES,
    OutputError,
    Parser,
    check_file,
    no_garbage_search,
    number,
    run_command,
    show,
)


def shard_size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,5}(\.\d{1,6})?[KMGT]B", text, re.ASCII | re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, got {text}")
    return text.upper()


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint_path", default=DEFAULT_CHECKPOINT, help="default: %(default)s")
    files.add_argument("--tokenizer_path", default=DEFAULT_TOKENIZER, help="default: %(default)s")
    files.add_argument("--output_dir", help="default: hf/ beside the checkpoint")
    files.add_argument("--overwrite", action="store_true", help="replace the model that is in the output folder")
    files.add_argument("--push_to_hub", metavar="REPO", help="upload the folder to this repository, private if new")

    model = parser.add_argument_group("model")
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the file's own")
    model.add_argument("--max_shard_size", type=shard_size, default="5GB", help="default: %(default)s")
    model.add_argument("--n_head", type=number(int, 1), help="number of heads, where the checkpoint does not tell")
    model.add_argument("--activation", choices=ACTIVATIONS, default="gelu", help="exact (default) or tanh GELU")
    model.add_argument("--no_verify", action="store_true", help="do not compare the folder with its source")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_file(parser, "checkpoint_path", args.checkpoint_path)
    check_file(parser, "tokenizer_path", args.tokenizer_path)
    args.output_dir = Path(args.output_dir or Path(args.checkpoint_path).parent / "hf")
    return args


def run(args: argparse.Namespace) -> None:
    # Imported here, after the arguments are known to be right: these imports take seconds.
    with no_garbage_search():
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        from hf_model.conversion import convert, push
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()

    folder = convert(
        args.checkpoint_path,
        args.tokenizer_path,
        args.output_dir,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        n_head=args.n_head,
        activation=args.activation,
        overwrite=args.overwrite,
        verify=not args.no_verify,
        report=say,
    )
    path = shlex.quote(str(folder))
    is_clone = Path(sys.argv[0]).suffix == ".py"
    command = "python generate.py" if is_clone else "custom-gpt-generate"
    say(f'\nTry it:\n  {command} --checkpoint_path {path} --prompt "What is the capital of France?"')
    say(f'  pip install "transformers[serving]" && transformers serve {path} --trust-remote-code')
    if args.push_to_hub:
        say(f"\npushed        {push(folder, args.push_to_hub)}")


def say(line: str) -> None:
    try:
        show(line)
    except OutputError as error:
        if not isinstance(error.__cause__, BrokenPipeError):
            raise
        # `| head`: that nobody reads on is no reason to stop converting
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    status = run_command(run, parse_arguments)
    if status == 130:
        print("interrupted", file=sys.stderr)
    return status
