"""Convert a GPT checkpoint, or a converted folder, to what transformers or another engine reads, and check it."""

import argparse
import json
import os
import re
import shlex
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_model_cli.common import (
    ACTIVATIONS,
    DEFAULT_CHECKPOINT,
    DTYPES,
    FORMATS,
    GGUF_TYPES,
    HUB_NAME,
    QUANTIZATIONS,
    SHARD_SIZE,
    TRAINERS,
    OutputError,
    Parser,
    add_vocabulary,
    check_checkpoint,
    check_file,
    mode_of,
    no_garbage_search,
    number,
    run_command,
    show,
    vocabulary_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LANGUAGE = "[a-z]{2,3}|code|multilingual"  # ISO 639, or what the Hub takes beside it
WRITING = ("output_dir", "overwrite", "push_to_hub", "no_verify", "gguf_type", "quantization", "like")
CARD = ("model_name", "license", "language", "datasets", "base_model", "tags", "example_prompt")
# How a format is tried; {ask} is what a server of raw text is asked with, since its chats would have no template.
TRY_IT = {
    "transformers": """\
  {command} --checkpoint_path {path} --prompt {prompt}
  pip install "transformers[serving]" && transformers serve {path} --trust-remote-code{ask}""",
    "gpt2": """\
  pip install "transformers[serving]" && transformers serve {path}{ask}""",
    "gguf": """\
  llama-server --model {path}/model-{type}.gguf --ctx-size 0{ask}""",
}
N_TOKENS = 20  # asked for; engines but transformers end with the context
PORTS = {"transformers": 8000, "gpt2": 8000, "gguf": 8080}
ASK = """
  curl http://localhost:{port}/v1/completions -H "Content-Type: application/json" -d {body}"""


def shard_size(text: str) -> str:
    if not re.fullmatch(SHARD_SIZE, text, re.ASCII | re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, got {text}")
    return text.upper()


def named(pattern: str, example: str) -> Callable[[str], str]:
    """An argparse type: a name of a certain form, as the Hub asks for it."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"must be a name such as {example}, got {text!r}")
        return text

    return parse


REPO = named(HUB_NAME.pattern, "openai-community/gpt2")


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--checkpoint_path",
        default=DEFAULT_CHECKPOINT,
        help="checkpoint (.pt), or a converted folder, fine-tuned or not (default: %(default)s)",
    )
    add_vocabulary(files, default="where the trainer put it, or the converted folder's own")
    files.add_argument(
        "--output_dir", help="default: hf/ beside the checkpoint, or FORMAT/; for a folder FOLDER-FORMAT/"
    )
    files.add_argument("--overwrite", action="store_true", help="replace the model that is in the output folder")
    files.add_argument(
        "--push_to_hub", type=REPO, metavar="REPO", help="upload the folder to this repository, private if new"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--format", choices=FORMATS, default="transformers", help="who is to read it (default: %(default)s)"
    )
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the file's own")
    model.add_argument("--max_shard_size", type=shard_size, default="5GB", help="default: %(default)s")
    model.add_argument("--n_head", type=number(int, 1), help="number of heads, where the checkpoint does not tell")
    model.add_argument("--activation", choices=ACTIVATIONS, help="exact or tanh GELU (default: what the file tells)")
    model.add_argument("--gguf_type", choices=GGUF_TYPES, help="of the matrices of a GGUF (default: f32)")
    model.add_argument("--quantization", choices=QUANTIZATIONS, help="by CTranslate2 (default: the weights' dtype)")
    model.add_argument("--like", choices=TRAINERS, help="whose checkpoint to write (default: original)")
    model.add_argument("--no_verify", action="store_true", help="do not compare the folder with its source")
    add_card(parser.add_argument_group("model card", "what the folder's README says; the rest is left to be filled in"))
    add_inspection(parser.add_argument_group("what it has learnt"))
    return parser


def add_card(group: argparse._ArgumentGroup) -> None:
    several: dict[str, Any] = {"nargs": "+", "default": []}
    group.add_argument(
        "--model_name", type=words, metavar="NAME", help="its title (default: the folder's name, or its project's)"
    )
    group.add_argument("--license", type=named("[a-z0-9.-]+", "apache-2.0"), metavar="ID", help="such as apache-2.0")
    group.add_argument("--language", type=named(LANGUAGE, "en"), metavar="CODE", **several, help="such as en de")
    group.add_argument("--datasets", type=REPO, metavar="REPO", **several, help="names on the Hub")
    group.add_argument("--base_model", type=REPO, metavar="REPO", help="what it was fine-tuned from, a name on the Hub")
    group.add_argument(
        "--tags", type=named(r"[\w.:/-]+", "instruct"), metavar="TAG", **several, help="more to find it by"
    )
    group.add_argument(
        "--example_prompt",
        type=words,
        action="append",
        default=[],
        metavar="TEXT",
        help="one to try; may be given several times",
    )


def words(text: str) -> str:
    """An argparse type: what a card can hold."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError("is not UTF-8")
    return text


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
    check_source(parser, args)
    for option, format in (("gguf_type", "gguf"), ("quantization", "ctranslate2"), ("like", "checkpoint")):
        if getattr(args, option) is not None and args.format != format:
            parser.error(f"argument --{option}: goes with --format {format}")
    if args.push_to_hub and args.format == "checkpoint":
        parser.error("argument --push_to_hub: a trainer's checkpoint is no model of the Hub")
    args.output_dir = Path(args.output_dir or default_output(Path(args.checkpoint_path), args.format))
    return args


def check_source(parser: Parser, args: argparse.Namespace) -> None:
    """Check that the source's files are there, and find what names its vocabulary."""
    path = Path(args.checkpoint_path)
    is_folder = stat.S_ISDIR(mode_of(parser, "checkpoint_path", path) or 0)
    if is_folder:
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            parser.error(
                f"argument --checkpoint_path: there is no file {path}, and the folder holds no model (no config.json)"
            )
    else:
        check_checkpoint(parser, args.checkpoint_path, "file ")
    args.vocabulary = vocabulary_of(parser, args, is_folder)


def default_output(source: Path, format: str) -> Path:
    folder = "hf" if format == "transformers" else format
    source = source.absolute() if source.name in ("", "..") else source
    return source.with_name(f"{source.name}-{folder}") if source.is_dir() else source.parent / folder


def check_inspection(parser: Parser, args: argparse.Namespace) -> None:
    """Check the arguments on what the model has learnt, and that nothing is asked to be written that would not be."""
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
    # Imported here, after the arguments are known to be right: these imports take seconds.
    with no_garbage_search():
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        from hf_model.conversion import convert, push
        from hf_model.formats.card_facts import About
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()
    if args.inspect:
        look(args)
        return

    tokenizers: list[PreTrainedTokenizerFast] = []
    folder = convert(
        args.checkpoint_path,
        args.vocabulary,
        args.output_dir,
        format=args.format,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        gguf_type=args.gguf_type or "f32",
        quantization=args.quantization,
        like=args.like or "original",
        n_head=args.n_head,
        activation=args.activation or "auto",
        characters_of=args.characters_of,
        raw=args.raw,
        overwrite=args.overwrite,
        verify=not args.no_verify,
        training_data=args.training_data,
        report_page=args.report,
        about=About(
            model_name=args.model_name,
            license=args.license,
            language=tuple(args.language),
            datasets=tuple(args.datasets),
            base_model=args.base_model,
            tags=tuple(args.tags),
            example_prompts=tuple(args.example_prompt),
            repo=args.push_to_hub,
        ),
        on_tokenizer=tokenizers.append,
        report=say,
    )
    if args.format in TRY_IT:
        say(f"\nTry it:\n{how_to_try(args, folder, *tokenizers)}")
    if args.push_to_hub:
        say(f"\npushed        {push(folder, args.push_to_hub)}")


def how_to_try(args: argparse.Namespace, folder: Path, tokenizer: "PreTrainedTokenizerFast") -> str:
    """Commands for the folder just written, for prompts of the model's own kind."""
    from hf_model.tokenizer import example_prompt, takes_instructions

    prompt = next(iter(args.example_prompt), example_prompt(tokenizer))
    if takes_instructions(tokenizer):
        ask = " --jinja" if args.format == "gguf" else ""
    else:
        body = json.dumps({"model": str(folder), "prompt": prompt, "max_tokens": N_TOKENS})
        ask = ASK.format(port=PORTS[args.format], body=shlex.quote(body))
    return TRY_IT[args.format].format(
        command="python generate.py" if Path(sys.argv[0]).suffix == ".py" else "custom-gpt-generate",
        path=shlex.quote(str(folder)),
        prompt=quoted(prompt),
        type=args.gguf_type or "f32",
        ask=ask,
    )


def quoted(prompt: str) -> str:
    """A prompt as a shell takes it."""
    if "\n" in prompt:
        return f"$'{prompt.encode('unicode_escape').decode()}'"
    return f'"{prompt}"' if re.fullmatch(r"[\w ,.?]+", prompt) else shlex.quote(prompt)


def look(args: argparse.Namespace) -> None:
    from hf_model.learnt.inspection import inspect
    from hf_model.learnt.page import check_page, write_page

    if args.report is not None:
        check_page(args.report)
    inspection, model, tokenizer = inspect(
        args.checkpoint_path,
        args.vocabulary,
        dtype=args.dtype,
        n_head=args.n_head,
        activation=args.activation or "auto",
        characters_of=args.characters_of,
        raw=args.raw,
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
