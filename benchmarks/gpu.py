"""Decoding on a GPU in bfloat16: `python -m benchmarks.gpu`.

Random weights of size A and of 1.6 billion, in the original, in the library's GPT-2 and in this repository's model: by
`generate` as it is, and with a static cache, where the library compiles the step. Greedy, 32 tokens of prompt and 128
new, one sequence and eight; the ways take turns. Beside them stands the speed of reading the weights once for each
step, as fast as the card reads them in a sum. Attention is not cuDNN's, as in generate.py. Writes results/gpu.md beside
this file. `--device cpu` tries the program itself, without compiling.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.decode import RESULTS, SIZES, number_of_rounds, weights_read
from benchmarks.engines import gpt2, twin
from examples.plain_gpt import GPT, GPTConfig

MODELS = {
    "A": SIZES["A"],
    "XL": GPTConfig(n_layer=48, n_head=25, n_embd=1600, vocab_size=50304, bias=False),
}
PROMPT, NEW = 32, 128


def models(size: GPTConfig, device: torch.device) -> tuple[GPT, PreTrainedModel, PreTrainedModel]:
    """The original, the library's GPT-2 and ours, with the same random weights in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        gpt = GPT(size).eval()
        stock, ours = (model.to(torch.bfloat16) for model in (gpt2(gpt), twin(gpt)))
    for model in (stock, ours):
        model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
    return gpt.to(torch.bfloat16), stock, ours


def seconds(run: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def reading_speed(device: torch.device) -> float:
    """Bytes per second that a sum of more numbers than a cache holds reads, at best."""
    numbers = torch.ones(2**27, dtype=torch.int64, device=device)
    return numbers.nbytes / min(seconds(numbers.sum, device) for _ in range(10))


def measure(gpt: GPT, stock: Any, ours: Any, rows: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Of each way: tokens per second of all rows, and the seconds of the first call, compiling included."""
    ids = torch.randint(4, ours.config.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    ids = ids.to(ours.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW}
    runs: dict[str, Callable[[], object]] = {
        "transformers GPT-2": partial(stock.generate, **inputs),
        "this repository": partial(ours.generate, **inputs),
        "the same, static cache, compiled": partial(ours.generate, **inputs, cache_implementation="static"),
    }
    if rows == 1:
        runs = {"original": partial(gpt.generate, ids, NEW, temperature=0), **runs}
    first = {way: seconds(run, ours.device) for way, run in runs.items()}
    times: dict[str, list[float]] = {way: [] for way in runs}
    for turn in range(rounds + 1):
        for way, run in runs.items():
            taken = seconds(run, ours.device)
            if turn:  # the one before still warms up
                times[way].append(taken)
    return {way: (rows * NEW / statistics.median(times[way]), first[way]) for way in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--sizes", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=number_of_rounds, default=5)
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here, so nothing was measured")
    logging.set_verbosity_error()
    torch.backends.cuda.enable_cudnn_sdp(False)

    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    speed = reading_speed(args.device)
    lines = [
        f"{name}, torch {torch.__version__}, bfloat16, {PROMPT} tokens of prompt and {NEW} new: tokens per second of "
        f"all sequences, medians of {args.rounds} rounds, and the seconds of the first call. The card reads "
        f"{speed / 1e9:.0f} GB/s.",
        "",
        "| size | sequences | way | tokens/s | first call |",
        "|---|---:|---|---:|---:|",
    ]
    for size in args.sizes:
        limit = speed / (weights_read(MODELS[size]) / 2)  # of float32
        three = models(MODELS[size], args.device)
        for rows in (1, 8):
            for way, (tokens, first) in measure(*three, rows, args.rounds).items():
                lines.append(f"| {size} | {rows} | {way} | {tokens:.1f} | {first:.1f} s |")
                print(lines[-1], flush=True)
            lines.append(f"| {size} | {rows} | reading the weights once a step | {rows * limit:.0f} | |")
        del three
    print("\n".join(lines))
    if args.device.type == "cuda":
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "gpu.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
