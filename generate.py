"""Generate text from a prompt with a GPT checkpoint, or with the folder that convert_checkpoint.py made of it."""

import argparse
import gc
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hf_model.generation import Sampling
    from hf_model.modeling_custom_gpt import CustomGPTForCausalLM

DEFAULT_CHECKPOINT = "out/finetune/ckpt.pt"
DEFAULT_TOKENIZER = "data/tokenizer/custom_gpt_tokenizer.json"
MOST_ANSWERS = 10**6  # at a time; past these, sizes would overflow in torch
MOST_TOKENS = 10**9


class OutputError(Exception):
    """Standard output or standard error cannot be written; its cause is the system's error."""


def show(text: str, end: str = "\n", file: TextIO | None = None) -> None:
    try:
        print(text, end=end, file=file, flush=True)
    except OSError as error:
        raise OutputError from error


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage of twenty arguments in front."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(
    convert: Callable[[str], float], minimum: float, *, exclusive: bool = False, maximum: float = float("inf")
) -> Callable[[str], float]:
    """An argparse type: a number in a range, `minimum` left out if `exclusive`."""

    def parse(text: str) -> float:
        value = convert(text)
        if not (minimum < value if exclusive else minimum <= value) or not value <= maximum or value == float("inf"):
            low = f"{'above' if exclusive else 'at least'} {minimum}"
            high = f" and at most {maximum}" if maximum < float("inf") else ""
            raise argparse.ArgumentTypeError(f"must be {low}{high}, got {text}")
        return value

    parse.__name__ = convert.__name__  # argparse names it in its own messages
    return parse


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--checkpoint_path",
        default=DEFAULT_CHECKPOINT,
        help="checkpoint (.pt) or converted folder (default: %(default)s)",
    )
    files.add_argument(
        "--tokenizer_path", help=f"tokenizer JSON (default: {DEFAULT_TOKENIZER}, or the converted folder's own)"
    )
    files.add_argument("--n_head", type=number(int, 1), help="number of heads, where the checkpoint does not tell")
    files.add_argument("--activation", choices=("gelu", "gelu_new"), help="exact or tanh GELU (default: gelu)")

    prompt = parser.add_argument_group("prompt")
    source = prompt.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the instruction or question")
    source.add_argument(
        "--prompts_file", type=Path, help="JSON Lines of records with an instruction and perhaps an input"
    )
    prompt.add_argument("--input_text", default="", help="text that the instruction is about")
    prompt.add_argument(
        "--parse_special_tokens", action="store_true", help='read "[EOS]" in the prompt as the token, not as text'
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max_new_tokens",
        type=number(int, 1, maximum=MOST_TOKENS),
        default=150,
        help="longest answer, in tokens (default: %(default)s)",
    )
    sampling.add_argument(
        "--temperature", type=number(float, 0), default=0.8, help="randomness; 0 is greedy (default: %(default)s)"
    )
    sampling.add_argument(
        "--top_k", type=number(int, 0), default=50, help="sample from the k likeliest; 0 is all (default: %(default)s)"
    )
    sampling.add_argument(
        "--top_p",
        type=number(float, 0, exclusive=True, maximum=1),
        default=1.0,
        help="sample from this much probability (default: %(default)s)",
    )
    sampling.add_argument(
        "--repetition_penalty",
        type=number(float, 0, exclusive=True),
        default=1.0,
        help="above 1 discourages repetition (default: %(default)s)",
    )
    sampling.add_argument(
        "--num_return_sequences",
        type=number(int, 1, maximum=MOST_ANSWERS),
        default=1,
        help="how many answers (default: %(default)s)",
    )
    sampling.add_argument(
        "--seed",
        type=number(int, -(2**63), maximum=2**64 - 1),
        default=1337,
        help="makes a run repeatable (default: %(default)s)",
    )

    batch = parser.add_argument_group("many prompts (with --prompts_file)")
    batch.add_argument("--output_file", type=Path, help="JSON Lines of the same records, each with its response")
    batch.add_argument(
        "--batch_size",
        type=number(int, 1, maximum=MOST_ANSWERS),
        default=16,
        help="records at a time (default: %(default)s)",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--device", help="such as cuda, cuda:1, mps or cpu (default: the best there is)")
    run.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="of the weights (default: the checkpoint's)",
    )
    run.add_argument("--no_stream", action="store_true", help="print the text when it is complete")
    run.add_argument("--response_only", action="store_true", help="print the answer alone; the rest goes to stderr")

    args = parser.parse_args(argv)
    if args.prompts_file is None and not args.prompt.strip():
        parser.error("argument --prompt: must not be empty")
    if (args.prompts_file is None) != (args.output_file is None):
        parser.error("arguments --prompts_file and --output_file: go together")
    if args.prompts_file is not None and not args.prompts_file.is_file():
        parser.error(f"argument --prompts_file: there is no file {args.prompts_file}")
    if args.output_file is not None and args.output_file.exists():
        parser.error(f"argument --output_file: {args.output_file} exists already")
    if args.output_file is not None and not args.output_file.parent.is_dir():
        parser.error(f"argument --output_file: there is no folder {args.output_file.parent}")
    if args.prompts_file is not None and args.input_text:
        parser.error("argument --input_text: with --prompts_file each record has its own input")
    if args.prompts_file is not None and args.num_return_sequences > 1:
        parser.error("argument --num_return_sequences: --prompts_file gives each record one response")
    if not Path(args.checkpoint_path).exists():
        parser.error(f"argument --checkpoint_path: there is no {args.checkpoint_path}")
    if Path(args.checkpoint_path).is_dir() and (args.n_head or args.activation):
        parser.error("arguments --n_head and --activation: are for a .pt file; a folder's config.json tells")
    if args.tokenizer_path is None and not Path(args.checkpoint_path).is_dir():
        args.tokenizer_path = DEFAULT_TOKENIZER
    if args.tokenizer_path is not None and not Path(args.tokenizer_path).is_file():
        parser.error(f"argument --tokenizer_path: there is no file {args.tokenizer_path}")
    return args


@contextmanager
def no_garbage_search() -> Iterator[None]:
    """For imports: of their time, a quarter goes into looking through what they make, which all stays; more at exit."""
    is_first, was_enabled = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
        if is_first:
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def run(args: argparse.Namespace) -> None:
    # Imported here, after the arguments are known to be right: these imports take seconds.
    with no_garbage_search():
        from transformers.utils import logging

        from hf_model import generation
        from hf_model.conversion import describe_architecture, describe_parameters
    logging.set_verbosity_error()  # the library's reminders about lengths and flags are answered in the README
    logging.disable_progress_bar()

    def note(line: str = "") -> None:
        show(line, file=sys.stderr if args.response_only else sys.stdout)

    device = generation.pick_device(args.device)
    note(f"device      {device}")
    note(f"checkpoint  {args.checkpoint_path}")
    note(f"tokenizer   {args.tokenizer_path or args.checkpoint_path}")
    model, tokenizer = generation.load(
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
    from hf_model.prompt import format_prompt

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
    args = parse_arguments()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows a "?" rather than a traceback
    try:
        run(args)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        print(
            f"generate.py: error: {error.name} is not installed for {sys.executable}: see the README", file=sys.stderr
        )
        return 2
    except OutputError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error.__cause__, BrokenPipeError):  # `| head`: whoever read this has seen enough
            return 0
        reason = getattr(error.__cause__, "strerror", None) or error.__cause__
        print(f"generate.py: error: the output cannot be written ({reason})", file=sys.stderr)
        return 2
    except Exception as error:
        from hf_model.errors import UserError, one_line

        if not isinstance(error, UserError | OSError):
            raise
        print(f"generate.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
