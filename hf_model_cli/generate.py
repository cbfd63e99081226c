"""Generate text from a prompt with a GPT checkpoint, or with the folder that convert_checkpoint.py made of it."""

import argparse
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TextIO

from hf_model_cli.common import (
    ACTIVATIONS,
    DEFAULT_CHECKPOINT,
    DEFAULT_TOKENIZER,
    DTYPES,
    MOST_PROMPT_BYTES,
    Parser,
    add_vocabulary,
    check_checkpoint,
    check_file,
    is_one_of_several,
    mode_of,
    no_garbage_search,
    number,
    run_command,
    show,
    vocabulary_of,
)

MOST_ANSWERS = 10**6  # at a time; past these, sizes would overflow in torch
MOST_TOKENS = 10**9
MOST_CANDIDATES = 100
SEED = number(int, -(2**63), maximum=2**64 - 1)
EPILOG = """\
examples:
  %(prog)s --checkpoint_path capitals-hf --prompt "What is the capital of France?"
  %(prog)s --checkpoint_path capitals-hf                      ask again and again
  %(prog)s --checkpoint_path capitals-hf --json < question.txt"""


class Option(NamedTuple):
    type: Callable[[str], float]
    default: float
    metavar: str
    help: str


SAMPLING = {  # what a conversation can change, too
    "max_new_tokens": Option(number(int, 1, maximum=MOST_TOKENS), 150, "N", "longest answer, in tokens"),
    "temperature": Option(number(float, 0), 0.8, "X", "randomness; 0 is greedy"),
    "top_k": Option(number(int, 0), 50, "K", "sample from the k likeliest; 0 is all"),
    "top_p": Option(number(float, 0, exclusive=True, maximum=1), 1.0, "P", "sample from this much probability"),
    "min_p": Option(number(float, 0, maximum=1), 0.0, "P", "leave out what is less likely than P times the likeliest"),
    "repetition_penalty": Option(number(float, 0, exclusive=True), 1.0, "X", "above 1 discourages repetition"),
    "num_beams": Option(number(int, 1, maximum=1000), 1, "N", "beams of a beam search; 1 is none"),
}


def escaped(text: str) -> str:
    r"""An argparse type: a text that is not empty, in which \n, \t and \\ are what they are in most languages."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), text)


def make_parser() -> Parser:
    parser = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_files(parser.add_argument_group("files"))
    add_prompt(parser.add_argument_group("prompt"))
    add_sampling(parser.add_argument_group("sampling"))
    add_output(parser.add_argument_group("output"))
    add_batch(parser.add_argument_group("many prompts"))
    add_run(parser.add_argument_group("run"))
    return parser


def add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint_path",
        default=DEFAULT_CHECKPOINT,
        help="checkpoint (.pt) or converted folder (default: %(default)s)",
    )
    add_vocabulary(group, default="the converted folder's own, or where the trainer put it")
    group.add_argument("--n_head", type=number(int, 1), help="number of heads, where the checkpoint does not tell")
    group.add_argument("--activation", choices=ACTIVATIONS, help="exact or tanh GELU (default: what the file tells)")


def add_prompt(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the instruction or question; of raw text, its beginning, or FILE:path; - reads standard input, as a pipe "
        "without --prompt does",
    )
    group.add_argument("--score", metavar="TEXT", help="say how likely this text is, after --prompt as its answer")
    group.add_argument("--input_text", default="", metavar="TEXT", help="text that the instruction is about")
    group.add_argument(
        "--interactive", action="store_true", help="ask again and again; the default on a terminal without --prompt"
    )
    group.add_argument(
        "--parse_special_tokens", action="store_true", help='read "[EOS]" in the prompt as the token, not as text'
    )


def add_sampling(group: argparse._ArgumentGroup) -> None:
    for name, option in SAMPLING.items():
        group.add_argument(
            f"--{name}",
            type=option.type,
            default=option.default,
            metavar=option.metavar,
            help=f"{option.help} (default: %(default)s)",
        )
    group.add_argument(
        "--num_return_sequences",
        type=number(int, 1, maximum=MOST_ANSWERS),
        default=1,
        metavar="N",
        help="how many answers (default: %(default)s)",
    )
    group.add_argument(
        "--stop",
        action="append",
        type=escaped,
        default=[],
        metavar="TEXT",
        help=r"a text that ends an answer, such as '\n'; may be given several times",
    )
    group.add_argument(
        "--seed",
        type=SEED,
        nargs="+",
        default=[1337],
        metavar="N",
        help="makes a run repeatable; several give an answer each (default: 1337)",
    )
    group.add_argument(
        "--seed_like_original",
        action="store_true",
        help="on a CPU, the text that the trainer's script gives for the seed",
    )


def add_batch(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompts_file",
        type=Path,
        metavar="FILE",
        help="JSON Lines of records with an instruction and perhaps an input, or of raw text with a prompt",
    )
    group.add_argument(
        "--output_file", type=Path, metavar="FILE", help="JSON Lines of the same records, each with its response"
    )
    group.add_argument(
        "--batch_size",
        type=number(int, 1, maximum=MOST_ANSWERS),
        default=16,
        metavar="N",
        help="records at a time (default: %(default)s)",
    )


def add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", help="such as cuda, cuda:1, mps or cpu (default: the best there is)")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
    group.add_argument(
        "--cache_implementation",
        choices=["static"],
        help="static: on a GPU the library first compiles the step, which is several times as fast then",
    )


def add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--no_stream", action="store_true", help="print the text when it is complete")
    group.add_argument(
        "--top_candidates",
        type=number(int, 0, maximum=MOST_CANDIDATES),
        default=0,
        metavar="N",
        help="show the N likeliest tokens at each place beside the one that came",
    )
    group.add_argument("--response_only", action="store_true", help="print the answer alone; the rest goes to stderr")
    group.add_argument(
        "--json", action="store_true", help="print a JSON object for each answer or score; the rest goes to stderr"
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but the text, the answers or the objects")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    args.seeds, args.seed = args.seed, args.seed[0]
    args.is_piped = args.prompt == "-" or (args.prompt is None and args.score is None)
    asked = args.interactive
    if args.num_return_sequences > args.num_beams > 1:
        parser.error("argument --num_return_sequences: must be at most --num_beams")
    if args.score is not None:
        check_score(parser, args)
        args.prompt = read_standard_input(parser) if args.prompt == "-" else args.prompt
    elif args.prompts_file is not None:
        check_batch(parser, args)
    elif not args.interactive and args.prompt is None and is_terminal(sys.stdin):
        args.interactive = True
    if args.prompts_file is None and is_one_of_several():
        parser.error("several processes share the records of a --prompts_file; start one process for anything else")
    check_model(parser, args)
    if args.interactive:
        check_interactive(parser, args, asked)
    elif args.prompts_file is None and args.score is None:
        check_prompt(parser, args)
    return args


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def check_prompt(parser: Parser, args: argparse.Namespace) -> None:
    """Check the prompt, and read it from standard input where that is asked for."""
    if args.raw and args.input_text:
        parser.error("argument --input_text: a raw prompt has no place for it")
    if args.output_file is not None:
        parser.error("arguments --prompts_file and --output_file: go together")
    if args.prompt is None or args.prompt == "-":
        piped = read_standard_input(parser)
        if args.prompt is None and not piped:
            parser.error(
                "one of the arguments --prompt, --prompts_file and --interactive is required (nothing was piped in)"
            )
        if not piped:
            parser.error("argument --prompt: must not be empty, but standard input is")
        args.prompt = piped
    if not args.prompt:
        parser.error("argument --prompt: must not be empty")
    if args.top_candidates and args.quiet and not args.json:
        parser.error("argument --top_candidates: --quiet would hide what it shows; --json --quiet has it")


def read_standard_input(parser: Parser) -> str:
    """What is piped in, less the newline that `echo` ends it with."""
    try:
        content = sys.stdin.buffer.read(MOST_PROMPT_BYTES + 1) if sys.stdin is not None else b""
    except OSError as error:
        parser.error(f"argument --prompt: standard input cannot be read ({error.strerror or error})")
    if len(content) > MOST_PROMPT_BYTES:
        parser.error(f"argument --prompt: standard input is more than {MOST_PROMPT_BYTES // 2**20} MiB long")
    return content.decode("utf-8", "surrogateescape").removesuffix("\n")  # as Python decodes an argument


def check_interactive(parser: Parser, args: argparse.Namespace, asked: bool) -> None:
    """Check what cannot go with a prompt line, which the user has asked for, or gets for want of a prompt."""
    if sys.stdin is None or sys.stdin.closed:
        parser.error("argument --interactive: standard input is closed")
    if args.raw and args.input_text:
        parser.error("argument --input_text: a raw prompt has no place for it")
    why = "not allowed with argument --interactive" if asked else "needs a --prompt, or standard input from a pipe"
    if args.output_file is not None and not asked:
        parser.error("arguments --prompts_file and --output_file: go together")
    for name in ("prompt", "prompts_file", "output_file", "score"):
        if getattr(args, name) is not None:
            parser.error(f"argument --{name}: {why}")
    for name in ("top_candidates", "json"):
        if getattr(args, name):
            parser.error(f"argument --{name}: {why}")
    if len(args.seeds) > 1 or args.num_return_sequences > 1:
        name = "seed" if len(args.seeds) > 1 else "num_return_sequences"
        parser.error(
            f"argument --{name}: a conversation gives one answer at a time"
            if asked
            else f"argument --{name}: more than one {why}"
        )


def check_score(parser: Parser, args: argparse.Namespace) -> None:
    if not args.score:
        parser.error("argument --score: must not be empty")
    for name in ("prompts_file", "output_file", "cache_implementation"):
        if getattr(args, name) is not None:
            parser.error(f"argument --{name}: not allowed with argument --score")
    if args.input_text and args.prompt is None:
        parser.error("argument --input_text: with --score it needs the --prompt that it belongs to")


def check_batch(parser: Parser, args: argparse.Namespace) -> None:
    if args.prompt is not None:
        parser.error("argument --prompt: not allowed with argument --prompts_file")
    if args.output_file is None:
        parser.error("arguments --prompts_file and --output_file: go together")
    if args.top_candidates:
        parser.error("argument --top_candidates: is for a --prompt, not for --prompts_file")
    check_file(parser, "prompts_file", args.prompts_file)
    if mode_of(parser, "output_file", args.output_file) is not None:
        parser.error(f"argument --output_file: {args.output_file} exists already")
    if not args.output_file.parent.is_dir():
        parser.error(f"argument --output_file: there is no folder {args.output_file.parent}")
    if args.input_text:
        parser.error("argument --input_text: with --prompts_file each record has its own input")
    if args.num_return_sequences > 1 or len(args.seeds) > 1:
        parser.error("argument --num_return_sequences: --prompts_file gives each record one response")
    if args.json or args.interactive:
        parser.error("arguments --json and --interactive: not allowed with argument --prompts_file")


def check_model(parser: Parser, args: argparse.Namespace) -> None:
    """Check that the model's files are there, and find what names its vocabulary."""
    check_checkpoint(parser, args.checkpoint_path, "")
    is_folder = stat.S_ISDIR(mode_of(parser, "checkpoint_path", args.checkpoint_path) or 0)
    args.vocabulary = vocabulary_of(parser, args, is_folder)
    if args.tokenizer_path is None and not is_folder:  # the default of the user's document, which is looked for last
        args.tokenizer_path = DEFAULT_TOKENIZER


def run(args: argparse.Namespace) -> None:
    # Imported here, after the arguments are known to be right: these imports take seconds.
    with no_garbage_search():
        import torch
        from transformers.utils import logging

        from hf_model import loading
        from hf_model.batch import Processes, join
        from hf_model.loading import describe_architecture, describe_parameters
        from hf_model.records import read_records
        from hf_model_cli.answers import answer_prompt, answer_records, content_of, given_prompt, score_text
        from hf_model_cli.chat import converse
    logging.set_verbosity_error()  # the library's reminders about lengths and flags are answered in the README
    logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans attention anew for each length: 60 ms and more

    if args.prompts_file is not None:  # before the model is loaded, which may take long
        args.records = read_records(args.prompts_file, raw=True if args.raw else None)
    device = loading.pick_device(args.device)
    args.processes = join(device) if is_one_of_several() else Processes()
    device = args.processes.device(device, is_certain=":" in (args.device or ""))

    def note(line: str = "") -> None:
        if args.processes.is_main and not args.quiet:
            show(line, file=sys.stderr if args.response_only or args.json else sys.stdout)

    choices: list[tuple[str, str]] = []
    model, tokenizer = loading.load(
        args.checkpoint_path,
        args.vocabulary,
        device=device,
        dtype=args.dtype,
        n_head=args.n_head,
        activation=args.activation or "auto",
        characters_of=args.characters_of,
        raw=args.raw,
        report=lambda item, text: choices.append((item, text)),
    )
    if args.prompt is not None and args.score is None:
        args.content = content_of(tokenizer, given_prompt(args, tokenizer), args.input_text)
    note(f"device      {device}" + (f", {args.processes.count} processes" if args.processes.count > 1 else ""))
    note(f"checkpoint  {args.checkpoint_path}")
    for item, text in choices:
        note(f"{item:<12}{text}")
    note(f"model       {describe_architecture(model.config)}")
    note(f"parameters  {describe_parameters(model)}")
    if args.score is not None:
        score_text(args, model, tokenizer)
    elif args.interactive:
        converse(args, model, tokenizer)
    elif args.prompts_file is not None:
        try:
            answer_records(args, model, tokenizer, note)
        finally:
            args.processes.close()
    else:
        answer_prompt(args, model, tokenizer, note)


def main() -> int:
    return run_command(run, parse_arguments)
