"""Convert a GPT checkpoint, or a converted folder, to what transformers or another engine reads, and check it."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_model_cli.files import check_file, check_model
from hf_model_cli.options import (
    FORMATS,
    GGUF_TYPES,
    HUB_NAME,
    QUANTIZATIONS,
    TRAINERS,
    Parser,
    add_model,
    named,
    shard_size,
    source_options,
    words,
)
from hf_model_cli.run import (
    OutputError,
    discard_output,
    is_terminal,
    named_steps,
    one_line,
    quick_imports,
    run_command,
    show,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LANGUAGE = "[a-z]{2,3}|code|multilingual"  # ISO 639, and two words of the Hub
WRITING = ("output_dir", "overwrite", "push_to_hub", "untie", "no_verify", "gguf_type", "quantization", "like")
CARD = ("model_name", "license", "language", "datasets", "base_model", "tags", "example_prompt")
MAX_LINE = 5000  # of a report, which may name a path. Names and values from a file stay on the line that has them
REPO = named(HUB_NAME.pattern, "openai-community/gpt2")


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_model(parser.add_argument_group("model"))
    add_output(parser.add_argument_group("output"))
    add_card(
        parser.add_argument_group("model card", "What the folder's README.md says beside what the checkpoint tells.")
    )
    add_inspection(parser.add_argument_group("what the model has learnt"))
    return parser


def add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output_dir",
        metavar="FOLDER",
        help="where to write (default: hf/ beside the checkpoint, or in its folder; FORMAT/ for another format; "
        "FOLDER-FORMAT/ beside a converted folder)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace a model that is in the output folder")
    group.add_argument(
        "--format", choices=FORMATS, default="transformers", help="which program reads it (default: %(default)s)"
    )
    group.add_argument(
        "--gguf_type", choices=GGUF_TYPES, help="with --format gguf: type of the matrices (default: f32)"
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="with --format ctranslate2: type of the weights (default: their dtype)",
    )
    group.add_argument(
        "--like",
        choices=TRAINERS,
        help="with --format checkpoint: which trainer reads it (default: original)",
    )
    group.add_argument(
        "--max_shard_size",
        type=shard_size,
        metavar="SIZE",
        default="5GB",
        help="size of the largest file of weights (default: %(default)s)",
    )
    group.add_argument(
        "--untie",
        action="store_true",
        help="keep head and embedding as two matrices though equal, for further training",
    )
    group.add_argument("--no_verify", action="store_true", help="do not compare the output with its source")
    group.add_argument(
        "--push_to_hub", type=REPO, metavar="REPO", help="upload the folder to this repository, private if new"
    )


def add_card(group: argparse._ArgumentGroup) -> None:
    several: dict[str, Any] = {"nargs": "+", "default": []}
    group.add_argument(
        "--model_name", type=words, metavar="NAME", help="its title (default: the name of the repository or the folder)"
    )
    group.add_argument("--license", type=named("[a-z0-9.-]+", "apache-2.0"), metavar="ID", help="such as apache-2.0")
    group.add_argument("--language", type=named(LANGUAGE, "en"), metavar="CODE", **several, help="such as en de")
    group.add_argument("--datasets", type=REPO, metavar="REPO", **several, help="data of the training, on the Hub")
    group.add_argument(
        "--base_model", type=REPO, metavar="REPO", help="the model that it was fine-tuned from, on the Hub"
    )
    group.add_argument("--tags", type=named(r"[\w.:/-]+", "instruct"), metavar="TAG", **several, help="tags on the Hub")
    group.add_argument(
        "--example_prompt",
        type=words,
        action="append",
        default=[],
        metavar="TEXT",
        help="a prompt to try; may be given several times",
    )


def add_inspection(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--inspect", action="store_true", help="describe the model and what it has learnt; write no folder"
    )
    group.add_argument("--json", action="store_true", help="with --inspect: print one JSON object, not lines")
    group.add_argument(
        "--training_data",
        metavar="FILE",
        help="data of the training, to measure the model by: JSON Lines with instruction, input and output; text; or "
        "nanoGPT's train.bin",
    )
    group.add_argument(
        "--report", metavar="FILE.html", type=Path, help="write a page that shows what the model has learnt"
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_inspection(parser, args)
    check_model(parser, args)
    for option, format in (("gguf_type", "gguf"), ("quantization", "ctranslate2"), ("like", "checkpoint")):
        if getattr(args, option) is not None and args.format != format:
            parser.error(f"argument --{option}: goes with --format {format}")
    if args.push_to_hub and args.format == "checkpoint":
        parser.error("argument --push_to_hub: a trainer's checkpoint is no model of the Hub")
    args.output_dir = Path(args.output_dir or default_output(Path(args.checkpoint_path), args.format))
    return args


def default_output(source: Path, format: str) -> Path:
    folder = "hf" if format == "transformers" else format
    source = source.absolute() if source.name in ("", "..") else source
    if source.is_dir():
        return source.with_name(f"{source.name}-{folder}") if (source / "config.json").exists() else source / folder
    return source.parent / folder


def check_inspection(parser: Parser, args: argparse.Namespace) -> None:
    """Check the options of --inspect, --training_data and --report."""
    if args.json and not args.inspect:
        parser.error("argument --json: goes with --inspect")
    if args.inspect and args.format != "transformers":
        parser.error("argument --format: not allowed with argument --inspect, which writes no folder")
    if args.inspect:
        for name in (*WRITING, *CARD):
            if getattr(args, name):
                parser.error(f"argument --{name}: not allowed with argument --inspect, which writes no folder")
    if args.training_data is not None:
        check_file(parser, "training_data", args.training_data)
    if args.report is not None:
        if args.report.is_dir():
            parser.error(f"argument --report: {args.report} is a folder; name the page, such as report.html")
        if not args.report.parent.is_dir():
            parser.error(f"argument --report: there is no folder {args.report.parent}")


def run(args: argparse.Namespace) -> None:
    with quick_imports():
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        from hf_model.conversion import convert, full_repo_name, push
        from hf_model.formats import Options, how_to_try
        from hf_model.formats.cards import About
    logging.set_verbosity_error()
    if not is_terminal(sys.stderr):
        logging.disable_progress_bar()
        disable_progress_bars()
    if args.inspect:
        look(args)
        return

    repo = full_repo_name(args.push_to_hub) if args.push_to_hub else None  # before the work, since it may fail
    tokenizers: list[PreTrainedTokenizerFast] = []
    about = About(
        model_name=args.model_name,
        license=args.license,
        language=tuple(args.language),
        datasets=tuple(args.datasets),
        base_model=args.base_model,
        tags=tuple(args.tags),
        example_prompts=tuple(args.example_prompt),
        repo=repo,
    )
    with named_steps() as on_step:
        folder = convert(
            args.checkpoint_path,
            args.tokenizer_path,
            args.output_dir,
            format=args.format,
            max_shard_size=args.max_shard_size,
            gguf_type=args.gguf_type or "f32",
            quantization=args.quantization,
            like=args.like or "original",
            overwrite=args.overwrite,
            verify=not args.no_verify,
            training_data=args.training_data,
            report_page=args.report,
            about=about,
            on_tokenizer=tokenizers.append,
            report=lambda line: say(one_line(line, MAX_LINE)),
            on_step=on_step,
            untie=args.untie,
            **source_options(args),
        )
    say("\nTry it:")
    for line in how_to_try(
        args.format,
        folder,
        tokenizers[0] if tokenizers else None,
        Options(gguf_type=args.gguf_type or "f32"),
        prompt=next(iter(args.example_prompt), ""),
        tokenizer_path=args.tokenizer_path,
        generate="python generate.py" if Path(sys.argv[0]).suffix == ".py" else "custom-gpt-generate",
    ):
        say(f"  {line}")
    if repo:
        say(f"\npushed        {push(folder, repo)}")


def look(args: argparse.Namespace) -> None:
    from hf_model.learnt.inspection import inspect
    from hf_model.learnt.page import check_page, write_page

    if args.report is not None:
        check_page(args.report)
    inspection, model, tokenizer = inspect(
        args.checkpoint_path,
        args.tokenizer_path,
        training_data=args.training_data,
        **source_options(args),
    )
    if args.report is not None:
        write_page(inspection, model, tokenizer, args.report)
    if args.json:
        show(json.dumps(inspection.as_dict(), indent=2, allow_nan=False))
        return
    for line in inspection.lines():
        show(one_line(line, MAX_LINE))
    if args.report is not None:
        show(one_line(f"report        {args.report}", MAX_LINE))


def say(line: str) -> None:
    try:
        show(line)
    except OutputError as error:
        if not isinstance(error.__cause__, BrokenPipeError):
            raise
        discard_output()  # `| head` has read enough, but the conversion goes on


def main() -> int:
    status = run_command(run, parse_arguments)
    if status == 130:
        print("interrupted", file=sys.stderr)
    return status
