"""Convert a GPT checkpoint and its tokenizer JSON to a Hugging Face folder, and check it against its source."""

import argparse
import json
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
    Parser,
    check_file,
    no_garbage_search,
    number,
    run_command,
    show,
)


def shard_size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?([KMGT]B)?", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, got {text}")
    return text.upper()


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint_path", default=DEFAULT_CHECKPOINT, help="default: %(default)s")
    files.add_argument("--tokenizer_path", help=f"default: {DEFAULT_TOKENIZER}; with --inspect of a folder: its own")
    files.add_argument("--output_dir", help="default: hf/ beside the checkpoint")
    files.add_argument("--overwrite", action="store_true", help="replace the model that is in the output folder")
    files.add_argument("--push_to_hub", metavar="REPO", help="upload the folder to this repository, private if new")

    model = parser.add_argument_group("model")
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the file's own")
    model.add_argument("--max_shard_size", type=shard_size, default="5GB", help="default: %(default)s")
    model.add_argument("--n_head", type=number(int, 1), help="number of heads, where the checkpoint does not tell")
    model.add_argument("--activation", choices=ACTIVATIONS, help="exact (default) or tanh GELU")
    model.add_argument("--no_verify", action="store_true", help="do not compare the folder with its source")
    add_inspection(parser.add_argument_group("what it has learnt"))
    return parser


def add_inspection(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--inspect",
        action="store_true",
        help="say all there is to say of a checkpoint (.pt) or a folder; write nothing",
    )
    group.add_argument("--json", action="store_true", help="with --inspect: one JSON object instead of lines")
    group.add_argument(
        "--training_data",
        metavar="FILE",
        help="what it was trained on, to measure by: JSON Lines of instruction, input and output; or text",
    )
    group.add_argument("--report", metavar="FILE.html", type=Path, help="write a page that shows what it has learnt")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_inspection(parser, args)
    if args.tokenizer_path is None and not (args.inspect and Path(args.checkpoint_path).is_dir()):
        args.tokenizer_path = DEFAULT_TOKENIZER
    if not (args.inspect and Path(args.checkpoint_path).is_dir()):
        check_file(parser, "checkpoint_path", args.checkpoint_path)
    if args.tokenizer_path is not None:
        check_file(parser, "tokenizer_path", args.tokenizer_path)
    args.output_dir = Path(args.output_dir or Path(args.checkpoint_path).parent / "hf")
    return args


def check_inspection(parser: Parser, args: argparse.Namespace) -> None:
    """Check the arguments on what the model has learnt, and that nothing is asked to be written that would not be."""
    if args.json and not args.inspect:
        parser.error("argument --json: goes with --inspect")
    if args.inspect:
        for name in ("output_dir", "overwrite", "push_to_hub", "no_verify"):
            if getattr(args, name):
                parser.error(f"argument --{name}: not allowed with argument --inspect, which writes no folder")
        if Path(args.checkpoint_path).is_dir() and (args.n_head or args.activation):
            parser.error("arguments --n_head and --activation: are for a .pt file; a folder's config.json tells")
    if args.training_data is not None:
        check_file(parser, "training_data", args.training_data)
    if args.report is not None:
        if args.report.is_dir():
            parser.error(f"argument --report: {args.report} is a folder; name the page, such as report.html")
        if not args.report.parent.is_dir():
            parser.error(f"argument --report: there is no folder {args.report.parent}")


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
    if args.inspect:
        look(args)
        return

    folder = convert(
        args.checkpoint_path,
        args.tokenizer_path,
        args.output_dir,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        n_head=args.n_head,
        activation=args.activation or "gelu",
        overwrite=args.overwrite,
        verify=not args.no_verify,
        training_data=args.training_data,
        report_page=args.report,
        report=say,
    )
    path = shlex.quote(str(folder))
    say(f'\nTry it:\n  python generate.py --checkpoint_path {path} --prompt "What is the capital of France?"')
    say(f'  pip install "transformers[serving]" && transformers serve {path} --trust-remote-code')
    if args.push_to_hub:
        say(f"\npushed        {push(folder, args.push_to_hub)}")


def look(args: argparse.Namespace) -> None:
    from hf_model.inspection import inspect
    from hf_model.report import write_page

    inspection, model, tokenizer = inspect(
        args.checkpoint_path,
        args.tokenizer_path,
        dtype=args.dtype,
        n_head=args.n_head,
        activation=args.activation or "gelu",
        training_data=args.training_data,
    )
    if args.report is not None:
        write_page(inspection, model, tokenizer, args.report)
    if args.json:
        show(json.dumps(inspection.as_dict(), indent=2, allow_nan=False))
        return
    for line in inspection.lines():
        show(line)
    if args.report is not None:
        show(f"report        {args.report}")


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
