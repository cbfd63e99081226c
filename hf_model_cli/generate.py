"""Generate text from a prompt with a GPT checkpoint, or with the folder that convert_checkpoint.py made of it."""

import argparse
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hf_model_cli.common import (
    ACTIVATIONS,
    DEFAULT_CHECKPOINT,
    DEFAULT_TOKENIZER,
    DTYPES,
    Parser,
    check_file,
    mode_of,
    no_garbage_search,
    number,
    run_command,
    show,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hf_model.generation import Sampling
    from hf_model.modeling_custom_gpt import CustomGPTForCausalLM

MOST_ANSWERS = 10**6  # at a time; past these, sizes would overflow in torch
MOST_TOKENS = 10**9


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_files(parser.add_argument_group("files"))
    add_prompt(parser.add_argument_group("prompt"))
    add_sampling(parser.add_argument_group("sampling"))
    add_batch(parser.add_argument_group("many prompts (with --prompts_file)"))
    add_run(parser.add_argument_group("run"))
    return parser


def add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint_path",
        default=DEFAULT_CHECKPOINT,
        help="checkpoint (.pt) or converted folder (default: %(default)s)",
    )
    group.add_argument(
        "--tokenizer_path", help=f"tokenizer JSON (default: {DEFAULT_TOKENIZER}, or the converted folder's own)"
    )
    group.add_argument("--n_head", type=number(int, 1), help="number of heads, where the checkpoint does not tell")
    group.add_argument("--activation", choices=ACTIVATIONS, help="exact or tanh GELU (default: gelu)")


def add_prompt(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", help="the instruction or question")
    group.add_argument(
        "--prompts_file", type=Path, help="JSON Lines of records with an instruction and perhaps an input"
    )
    group.add_argument("--input_text", default="", help="text that the instruction is about")
    group.add_argument(
        "--parse_special_tokens", action="store_true", help='read "[EOS]" in the prompt as the token, not as text'
    )


def add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max_new_tokens",
        type=number(int, 1, maximum=MOST_TOKENS),
        default=150,
        help="longest answer, in tokens (default: %(default)s)",
    )
    group.add_argument(
        "--temperature", type=number(float, 0), default=0.8, help="randomness; 0 is greedy (default: %(default)s)"
    )
    group.add_argument(
        "--top_k", type=number(int, 0), default=50, help="sample from the k likeliest; 0 is all (default: %(default)s)"
    )
    group.add_argument(
        "--top_p",
        type=number(float, 0, exclusive=True, maximum=1),
        default=1.0,
        help="sample from this much probability (default: %(default)s)",
    )
    group.add_argument(
        "--repetition_penalty",
        type=number(float, 0, exclusive=True),
        default=1.0,
        help="above 1 discourages repetition (default: %(default)s)",
    )
    group.add_argument(
        "--num_return_sequences",
        type=number(int, 1, maximum=MOST_ANSWERS),
        default=1,
        help="how many answers (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=number(int, -(2**63), maximum=2**64 - 1),
        default=1337,
        help="makes a run repeatable (default: %(default)s)",
    )


def add_batch(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output_file", type=Path, help="JSON Lines of the same records, each with its response")
    group.add_argument(
        "--batch_size",
        type=number(int, 1, maximum=MOST_ANSWERS),
        default=16,
        help="records at a time (default: %(default)s)",
    )


def add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", help="such as cuda, cuda:1, mps or cpu (default: the best there is)")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
    group.add_argument("--no_stream", action="store_true", help="print the text when it is complete")
    group.add_argument("--response_only", action="store_true", help="print the answer alone; the rest goes to stderr")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.prompts_file is None:
        check_prompt(parser, args)
    else:
        check_batch(parser, args)
    check_model(parser, args)
    return args


def check_prompt(parser: Parser, args: argparse.Namespace) -> None:
    if args.prompt is None:
        parser.error("one of the arguments --prompt and --prompts_file is required")
    if not args.prompt.strip():
        parser.error("argument --prompt: must not be empty")
    if args.output_file is not None:
        parser.error("arguments --prompts_file and --output_file: go together")


def check_batch(parser: Parser, args: argparse.Namespace) -> None:
    if args.prompt is not None:
        parser.error("argument --prompt: not allowed with argument --prompts_file")
    if args.output_file is None:
        parser.error("arguments --prompts_file and --output_file: go together")
    check_file(parser, "prompts_file", args.prompts_file)
    if mode_of(parser, "output_file", args.output_file) is not None:
        parser.error(f"argument --output_file: {args.output_file} exists already")
    if not args.output_file.parent.is_dir():
        parser.error(f"argument --output_file: there is no folder {args.output_file.parent}")
    if args.input_text:
        parser.error("argument --input_text: with --prompts_file each record has its own input")
    if args.num_return_sequences > 1:
        parser.error("argument --num_return_sequences: --prompts_file gives each record one response")


def check_model(parser: Parser, args: argparse.Namespace) -> None:
    """Check that the model's files are there, and fill in the tokenizer's default."""
    mode = mode_of(parser, "checkpoint_path", args.checkpoint_path)
    if mode is None:
        parser.error(f"argument --checkpoint_path: there is no {args.checkpoint_path}")
    is_folder = stat.S_ISDIR(mode)
    if is_folder and (args.n_head or args.activation):
        parser.error("arguments --n_head and --activation: are for a .pt file; a folder's config.json tells")
    if args.tokenizer_path is None and not is_folder:
        args.tokenizer_path = DEFAULT_TOKENIZER
    if args.tokenizer_path is not None:
        check_file(parser, "tokenizer_path", args.tokenizer_path)


def run(args: argparse.Namespace) -> None:
    # Imported here, after the arguments are known to be right: these imports take seconds.
    with no_garbage_search():
        from transformers.utils import logging

        from hf_model import generation, loading
        from hf_model.description import describe_architecture, describe_parameters
    logging.set_verbosity_error()  # the library's reminders about lengths and flags are answered in the README
    logging.disable_progress_bar()

    def note(line: str = "") -> None:
        show(line, file=sys.stderr if args.response_only else sys.stdout)

    device = loading.pick_device(args.device)
    note(f"device      {device}")
    note(f"checkpoint  {args.checkpoint_path}")
    note(f"tokenizer   {args.tokenizer_path or args.checkpoint_path}")
    model, tokenizer = loading.load(
        args.checkpoint_path,
        args.tokenizer_path,
        device=device,
        dtype=args.dtype,
        n_head=args.n_head,
        activation=args.activation or "gelu",
    )
    note(f"model       {describe_architecture(model.config)}")
    note(f"parameters  {describe_parameters(model)}")
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "num_return_sequences", "seed")
    sampling = generation.Sampling(**{name: getattr(args, name) for name in names})
    answer = answer_prompt if args.prompts_file is None else answer_records
    answer(args, model, tokenizer, sampling, note)


def answer_prompt(
    args: argparse.Namespace,
    model: "CustomGPTForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    sampling: "Sampling",
    note: Callable[[str], None],
) -> None:
    from hf_model.generation import encode, generate
    from hf_model.vocabulary import format_prompt

    content = format_prompt(args.prompt, args.input_text)
    note(f"content     {content}\n")
    streams = args.num_return_sequences == 1 and not args.no_stream
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        if streams:
            show(piece, end="")

    try:
        output = generate(
            model,
            tokenizer,
            encode(tokenizer, content, args.parse_special_tokens),
            sampling,
            response_only=args.response_only,
            on_text=take,
        )
    except KeyboardInterrupt:
        show("" if streams else "".join(pieces))
        raise
    show("\n".join([""] if streams else output.texts))
    note(f"\n{output.new_tokens} tokens in {output.seconds:.2f} s, {output.new_tokens / output.seconds:.1f} tokens/s")


def answer_records(
    args: argparse.Namespace,
    model: "CustomGPTForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    sampling: "Sampling",
    note: Callable[[str], None],
) -> None:
    from hf_model.batch import answer_file, read_records

    records = read_records(args.prompts_file)
    start = time.perf_counter()
    answered = answer_file(
        model,
        tokenizer,
        records,
        args.output_file,
        args.batch_size,
        sampling,
        parse_special_tokens=args.parse_special_tokens,
    )
    seconds = time.perf_counter() - start
    note(f"written     {args.output_file} ({len(records)} records, {answered} of them answered now)")
    note(f"\n{answered} records in {seconds:.2f} s, {answered / seconds:.1f} records/s")


def main() -> int:
    return run_command(run, parse_arguments)
