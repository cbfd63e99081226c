"""Generate text from a prompt with a GPT checkpoint, or with the folder that convert_checkpoint.py made of it."""

import argparse
import os
import sys
from pathlib import Path

from hf_model_cli.files import FROM_FILE, check_file, check_model, mode_of, read_prompt, read_prompt_file
from hf_model_cli.options import MOST_ANSWERS, SAMPLING, SEED, Parser, add_model, escaped, number, source_options
from hf_model_cli.run import is_terminal, one_line, quick_imports, run_command, show

MOST_CANDIDATES = 100
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
EPILOG = """\
examples:
  %(prog)s --checkpoint_path capitals-hf --prompt "What is the capital of France?"
  %(prog)s --checkpoint_path capitals-hf                      a conversation
  %(prog)s --checkpoint_path capitals-hf --json < question.txt"""


def make_parser() -> Parser:
    parser = Parser(description=__doc__, epilog=EPILOG)
    add_model(parser.add_argument_group("model"))
    add_prompt(parser.add_argument_group("prompt"))
    add_sampling(parser.add_argument_group("sampling"))
    add_output(parser.add_argument_group("output"))
    add_batch(parser.add_argument_group("many prompts"))
    add_device(parser.add_argument_group("device"))
    return parser


def add_prompt(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the instruction, or the beginning of a raw text; FILE:path reads it from a file, and - from standard "
        "input, as does a pipe without --prompt",
    )
    group.add_argument("--input_text", default="", metavar="TEXT", help="the text that the instruction is about")
    group.add_argument(
        "--interactive",
        action="store_true",
        help="a conversation, one prompt a line; a terminal without --prompt starts one too",
    )
    group.add_argument(
        "--no_history", action="store_true", help="do not keep the lines of this conversation for the next one"
    )
    group.add_argument(
        "--score", metavar="TEXT", help="print how likely this text is, as the answer to --prompt or by itself"
    )
    group.add_argument(
        "--parse_special_tokens",
        action="store_true",
        help='read "[EOS]" in an instruction as the special token, as the original does, not as text',
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
        "--stop",
        action="append",
        type=escaped,
        default=[],
        metavar="TEXT",
        help=r"a text that ends the answer, such as '\n'; may be given several times",
    )
    group.add_argument(
        "--num_return_sequences",
        type=number(int, 1, maximum=MOST_ANSWERS),
        default=1,
        metavar="N",
        help="number of answers for each seed (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=SEED,
        nargs="+",
        default=[1337],
        metavar="N",
        help="the same seed gives the same answer; several seeds give several answers (default: 1337)",
    )
    group.add_argument(
        "--seed_like_original",
        action="store_true",
        help="on a CPU, give the text that the trainer's own script gives for this seed",
    )


def add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--response_only", action="store_true", help="print the bare answer; all else goes to standard error"
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object for each answer or score; all else goes to standard error",
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but the answers")
    group.add_argument(
        "--no_stream", action="store_true", help="print the text when it is complete, not while it is generated"
    )
    group.add_argument(
        "--top_candidates",
        type=number(int, 0, maximum=MOST_CANDIDATES),
        default=0,
        metavar="N",
        help="show the N likeliest tokens at each place of the answer (default: %(default)s)",
    )


def add_batch(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompts_file",
        type=Path,
        metavar="FILE",
        help='JSON Lines: records with an "instruction" and perhaps an "input", or with a raw "prompt"; - reads a pipe',
    )
    group.add_argument(
        "--output_file",
        type=Path,
        metavar="FILE",
        help='where to write the records, each with its "response"; an interrupted run goes on where it stopped',
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the output of an earlier run, and discard unfinished answers made with other options",
    )
    group.add_argument(
        "--batch_size",
        type=number(int, 1, maximum=MOST_ANSWERS),
        default=16,
        metavar="N",
        help="number of records at a time (default: %(default)s)",
    )


def add_device(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", metavar="NAME", help="such as cuda, cuda:1, mps or cpu (default: the best there is)")
    group.add_argument(
        "--cache_implementation",
        choices=["static"],
        help="on a GPU, compile each step: a slow start, then several times as fast",
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked against each other, with the prompt read from where it is."""
    parser = make_parser()
    args = parser.parse_args(argv)
    asked = args.interactive  # on a terminal, a conversation is the default
    if args.prompt is None and args.score is None and args.prompts_file is None and is_terminal(sys.stdin):
        args.interactive = True
    if args.num_return_sequences > args.num_beams > 1:
        parser.error("argument --num_return_sequences: must be at most --num_beams")
    if args.score is not None:
        check_score(parser, args)
    elif args.prompts_file is not None:
        check_batch(parser, args)
    if args.prompts_file is None and is_one_of_several():
        parser.error(
            "several processes share the records of a --prompts_file; start one process for anything else "
            f"(WORLD_SIZE={os.environ['WORLD_SIZE']} says that there are several: unset it if there are not)"
        )
    check_model(parser, args)
    if args.score is None and args.prompts_file is None:
        check_prompt(parser, args)
        if args.interactive:
            check_interactive(parser, args, asked)
    if not args.interactive and args.prompts_file is None:
        read_prompts(parser, args)
    return args


def check_prompt(parser: Parser, args: argparse.Namespace) -> None:
    if args.raw and args.input_text:
        parser.error("argument --input_text: a raw prompt has no place for it")
    if args.output_file is not None or args.overwrite:
        name = "output_file" if args.output_file is not None else "overwrite"
        parser.error(f"arguments --prompts_file and --{name}: go together")
    if args.top_candidates and args.quiet and not args.json:
        parser.error("argument --top_candidates: --quiet would hide what it shows; --json --quiet has it")


def check_interactive(parser: Parser, args: argparse.Namespace, asked: bool) -> None:
    """Refuse what a conversation has no use for, in words for a user who asked for one or who just gave no prompt."""
    if sys.stdin is None or sys.stdin.closed:
        parser.error("argument --interactive: standard input is closed")
    why = "not allowed with argument --interactive" if asked else "needs a --prompt, or standard input from a pipe"
    for name in ("prompt", "top_candidates"):
        if getattr(args, name):
            parser.error(f"argument --{name}: {why}")
    if args.json and is_terminal(sys.stdin):
        parser.error("argument --json: needs a --prompt, or standard input from a pipe")
    for name in ("seed", "num_return_sequences"):
        if len(args.seed) > 1 if name == "seed" else args.num_return_sequences > 1:
            reason = "a conversation gives one answer at a time" if asked else f"more than one {why}"
            parser.error(f"argument --{name}: {reason}")


def check_score(parser: Parser, args: argparse.Namespace) -> None:
    if not args.score:
        parser.error("argument --score: must not be empty")
    for name in ("prompts_file", "output_file", "cache_implementation"):
        if getattr(args, name) is not None:
            parser.error(f"argument --{name}: not allowed with argument --score")
    if args.interactive:
        parser.error("argument --score: not allowed with argument --interactive")
    if args.input_text and args.prompt is None:
        parser.error("argument --input_text: with --score it needs the --prompt that it belongs to")


def check_batch(parser: Parser, args: argparse.Namespace) -> None:
    if args.prompt is not None:
        parser.error("argument --prompt: not allowed with argument --prompts_file")
    if args.output_file is None:
        parser.error("arguments --prompts_file and --output_file: go together")
    if args.top_candidates:
        parser.error("argument --top_candidates: is for a --prompt, not for --prompts_file")
    if args.prompts_file == Path("-"):
        args.prompts_file = Path("/dev/stdin")
    check_file(parser, "prompts_file", args.prompts_file)
    mode_of(parser, "output_file", args.output_file)  # an error if it cannot be reached
    if not args.output_file.parent.is_dir():
        parser.error(f"argument --output_file: there is no folder {args.output_file.parent}")
    if args.input_text:
        parser.error("argument --input_text: with --prompts_file each record has its own input")
    if args.num_return_sequences > 1 or len(args.seed) > 1:
        parser.error("argument --num_return_sequences: --prompts_file gives each record one response")
    if args.json or args.interactive:
        parser.error("arguments --json and --interactive: not allowed with argument --prompts_file")


def read_prompts(parser: Parser, args: argparse.Namespace) -> None:
    """Read the prompt from standard input or from the file that it names."""
    is_piped = args.prompt == "-" or (args.prompt is None and args.score is None)
    try:
        if is_piped:
            piped = read_prompt(None).removesuffix("\n")  # `echo` ends its output with one
            if args.prompt is None and not piped:
                parser.error(
                    "one of the arguments --prompt, --prompts_file and --interactive is required (nothing was piped in)"
                )
            args.prompt = piped
        elif args.prompt is not None and args.prompt.startswith(FROM_FILE):
            args.prompt = read_prompt_file(args.prompt.removeprefix(FROM_FILE))
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --prompt: {error}")
    if args.prompt == "" and args.score is None:
        parser.error(f"argument --prompt: must not be empty{', but standard input is' if is_piped else ''}")


def is_one_of_several() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process beside others.

    An earlier job can leave some of the variables behind. A launcher sets all of them.
    """
    return all(os.environ.get(name) for name in LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def run(args: argparse.Namespace) -> None:
    with quick_imports():
        import torch
        from transformers.utils import logging

        from hf_model.descriptions import describe_architecture, describe_parameters
        from hf_model.devices import pick_device
        from hf_model.errors import UserError
        from hf_model.loading import load
        from hf_model.processes import Processes, join
        from hf_model.records import is_complete, read_records
        from hf_model_cli.answers import Answers
        from hf_model_cli.chat import converse
    logging.set_verbosity_error()  # the library's advice about its own options does not apply here
    logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans attention again for each length: 60 ms and more

    # Read before the model is loaded, which may take long. Whether the records are raw is known only after that.
    records = None if args.prompts_file is None else read_records(args.prompts_file, raw=True if args.raw else None)
    device = pick_device(args.device)
    processes = join(device, lambda line: show(line, file=sys.stderr)) if is_one_of_several() else Processes()
    device = processes.device(device, is_certain=":" in (args.device or ""))

    def note(line: str = "") -> None:
        if processes.is_main and not args.quiet:
            show(line, file=sys.stderr if args.response_only or args.json else sys.stdout)

    if records is not None and is_complete(args.output_file, records, args.overwrite):
        note(f"{args.output_file} holds the answers to these records already (--overwrite makes new ones)")
        return

    choices: list[tuple[str, str]] = []
    model, tokenizer = load(
        args.checkpoint_path,
        args.tokenizer_path,
        device=device,
        report=lambda item, text: choices.append((item, text)),
        **source_options(args),
    )
    answers = Answers(args, model, tokenizer, note)
    if processes.is_main:
        answers.warn_of_unknown_tokens()
    if args.input_text and not answers.takes_instructions:
        raise UserError("argument --input_text: this model's prompts are raw text, which has no place for it")
    if args.input_text and not answers.format.takes_input:
        raise UserError("argument --input_text: the model's chat template has no place for it: put it into the prompt")
    try:
        question = (
            None if args.prompt is None or args.score is not None else answers.question(args.prompt, args.input_text)
        )
    except UserError as error:
        raise UserError(f"argument --prompt: {error}") from None
    note(f"device      {device}" + (f", {processes.count} processes" if processes.count > 1 else ""))
    note(f"checkpoint  {one_line(args.checkpoint_path)}")
    for item, text in choices:
        note(f"{item:<12}{one_line(text)}")
    note(f"model       {describe_architecture(model.config)}")
    note(f"parameters  {describe_parameters(model)}")
    if args.score is not None:
        answers.score(args.score)
    elif records is not None:
        try:
            answers.answer_records(records, processes)
        finally:
            processes.close()
    elif question is not None:
        answers.answer(question)
    else:
        converse(answers)


def main() -> int:
    return run_command(run, parse_arguments)
