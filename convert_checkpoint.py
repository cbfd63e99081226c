"""Convert a GPT checkpoint and its tokenizer JSON to a Hugging Face folder, and check it against its source."""

import argparse
import gc
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage of a dozen arguments in front."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def shard_size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?([KMGT]B)?", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, got {text}")
    return text.upper()


def heads(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint_path", default="out/finetune/ckpt.pt", help="default: %(default)s")
    parser.add_argument(
        "--tokenizer_path", default="data/tokenizer/custom_gpt_tokenizer.json", help="default: %(default)s"
    )
    parser.add_argument("--output_dir", help="default: hf/ beside the checkpoint")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="default: the file's own"
    )
    parser.add_argument("--max_shard_size", type=shard_size, default="5GB", help="default: %(default)s")
    parser.add_argument("--n_head", type=heads, help="number of heads, where the checkpoint does not tell")
    parser.add_argument(
        "--activation", choices=("gelu", "gelu_new"), default="gelu", help="exact (default) or tanh GELU"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model that is in the output folder")
    parser.add_argument("--no_verify", action="store_true", help="do not compare the folder with its source")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the folder to this repository, private if new")

    args = parser.parse_args(argv)
    for name in ("checkpoint_path", "tokenizer_path"):
        if not Path(getattr(args, name)).is_file():
            parser.error(f"argument --{name}: there is no file {getattr(args, name)}")
    args.output_dir = Path(args.output_dir or Path(args.checkpoint_path).parent / "hf")
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
    say(f'\nTry it:\n  python generate.py --checkpoint_path {path} --prompt "What is the capital of France?"')
    say(f'  pip install "transformers[serving]" && transformers serve {path} --trust-remote-code')
    if args.push_to_hub:
        say(f"\npushed        {push(folder, args.push_to_hub)}")


def say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # `| head`: that nobody reads on is no reason to stop converting
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    args = parse_arguments()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows a "?" rather than a traceback
    try:
        run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(
            f"convert_checkpoint.py: error: {error.name} is not installed for {sys.executable}: see the README",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        from hf_model.errors import UserError

        if not isinstance(error, UserError):
            raise
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
