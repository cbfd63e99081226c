"""Generate text from a prompt with a GPT checkpoint, or with the folder that convert_checkpoint.py made of it."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

DEFAULT_CHECKPOINT = "out/finetune/ckpt.pt"
DEFAULT_TOKENIZER = "data/tokenizer/custom_gpt_tokenizer.json"


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint_path", default=DEFAULT_CHECKPOINT, help="checkpoint (.pt) or converted folder")
    files.add_argument(
        "--tokenizer_path", help=f"tokenizer JSON (default: {DEFAULT_TOKENIZER}, or the converted folder's own)"
    )
    files.add_argument("--n_head", type=number(int, 1), help="number of heads, where the checkpoint does not tell")
    files.add_argument("--activation", choices=("gelu", "gelu_new"), default="gelu", help="exact or tanh GELU")

    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--prompt", required=True, help="the instruction or question")
    prompt.add_argument("--input_text", default="", help="text that the instruction is about")
    prompt.add_argument(
        "--parse_special_tokens", action="store_true", help='read "[EOS]" in the prompt as the token, not as text'
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max_new_tokens", type=number(int, 1), default=150, help="longest answer, in tokens")
    sampling.add_argument("--temperature", type=number(float, 0), default=0.8, help="randomness; 0 is greedy")
    sampling.add_argument("--top_k", type=number(int, 0), default=50, help="sample from the k likeliest; 0 is all")
    sampling.add_argument(
        "--top_p",
        type=number(float, 0, exclusive=True, maximum=1),
        default=1.0,
        help="sample from this much probability",
    )
    sampling.add_argument(
        "--repetition_penalty",
        type=number(float, 0, exclusive=True),
        default=1.0,
        help="above 1 discourages repetition",
    )
    sampling.add_argument("--num_return_sequences", type=number(int, 1), default=1, help="how many answers")
    sampling.add_argument("--seed", type=int, default=1337, help="makes a run repeatable")

    run = parser.add_argument_group("run")
    run.add_argument("--device", help="such as cuda, cuda:1, mps or cpu (default: the best there is)")
    run.add_argument(
        "--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="of the weights"
    )
    run.add_argument("--no_stream", action="store_true", help="print the text when it is complete")
    run.add_argument("--response_only", action="store_true", help="print the answer alone; the rest goes to stderr")

    args = parser.parse_args(argv)
    if not args.prompt.strip():
        parser.error("argument --prompt: must not be empty")
    if not Path(args.checkpoint_path).exists():
        parser.error(f"argument --checkpoint_path: there is no {args.checkpoint_path}")
    if args.tokenizer_path is None and not Path(args.checkpoint_path).is_dir():
        args.tokenizer_path = DEFAULT_TOKENIZER
    if args.tokenizer_path is not None and not Path(args.tokenizer_path).is_file():
        parser.error(f"argument --tokenizer_path: there is no file {args.tokenizer_path}")
    return args


def run(args: argparse.Namespace) -> None:
    # Imported here, after the arguments are known to be right: these imports take seconds.
    from transformers.utils import logging

    from hf_model import generation
    from hf_model.conversion import describe_architecture, describe_parameters
    from hf_model.prompt import format_prompt

    logging.set_verbosity_error()  # the library's reminders about lengths and flags are answered in the README
    logging.disable_progress_bar()

    def note(line: str = "") -> None:
        print(line, file=sys.stderr if args.response_only else sys.stdout, flush=True)

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
        activation=args.activation,
    )
    note(f"model       {describe_architecture(model.config)}")
    note(f"parameters  {describe_parameters(model)}")
    content = format_prompt(args.prompt, args.input_text)
    note(f"content     {content}")
    note()

    pieces: list[str] = []
    streams = args.num_return_sequences == 1 and not args.no_stream

    def show(piece: str) -> None:
        pieces.append(piece)
        if streams:
            print(piece, end="", flush=True)

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "num_return_sequences", "seed")
    try:
        output = generation.generate(
            model,
            tokenizer,
            generation.encode(tokenizer, content, args.parse_special_tokens),
            generation.Sampling(**{name: getattr(args, name) for name in names}),
            response_only=args.response_only,
            on_text=show,
        )
    except KeyboardInterrupt:
        print("" if streams else "".join(pieces))
        raise
    print("\n".join([""] if streams else output.texts))
    note()
    note(f"{output.new_tokens} tokens in {output.seconds:.2f} s, {output.new_tokens / output.seconds:.1f} tokens/s")


def main() -> int:
    args = parse_arguments()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows a "?" rather than a traceback
    try:
        run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`: whoever read this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        from hf_model.errors import UserError

        if not isinstance(error, UserError):
            raise
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
