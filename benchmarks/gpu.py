"""Decoding on a GPU in bfloat16: `python -m benchmarks.gpu`.

Random models of size A and of 1.6 billion parameters, by `generate` as it is, and with a static cache, where the
library compiles the step. Greedy, 32 tokens of prompt and 128 new, one sequence and eight; the ways take turns. Beside
it stands the speed of reading the weights once for each step, as fast as the card reads them in a sum. Writes
results/gpu.md beside this file. `--device cpu` tries the program itself, without compiling.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers.utils import logging

from benchmarks.decode import RESULTS, SIZES, number_of_rounds, weights_read
from examples.plain_gpt import GPTConfig
from hf_model import CustomGPTConfig, CustomGPTForCausalLM

MODELS = {
    "A": SIZES["A"],
    "XL": GPTConfig(n_layer=48, n_head=25, n_embd=1600, vocab_size=50304, bias=False),
}
WAYS = {"generate": {}, "static cache, compiled": {"cache_implementation": "static"}}
PROMPT, NEW = 32, 128


def random_model(size: GPTConfig, device: torch.device) -> CustomGPTForCausalLM:
    config = CustomGPTConfig(
        **{name: getattr(size, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")}
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = CustomGPTForCausalLM(config).to(torch.bfloat16).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
    return model


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


def measure(model: CustomGPTForCausalLM, rows: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Of each way: tokens per second of all rows, and the seconds of the first call, compiling included."""
    ids = torch.randint(4, model.config.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    ids = ids.to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW}
    runs = {way: partial(model.generate, **inputs, **options) for way, options in WAYS.items()}
    first = {way: seconds(run, model.device) for way, run in runs.items()}
    times: dict[str, list[float]] = {way: [] for way in runs}
    for turn in range(rounds + 1):
        for way, run in runs.items():
            taken = seconds(run, model.device)
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

    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    speed = reading_speed(args.device)
    lines = [
        f"{name}, torch {torch.__version__}, bfloat16, {PROMPT} tokens of prompt and {NEW} new: tokens per second, "
        f"medians of {args.rounds} rounds, and the seconds of the first call. It reads {speed / 1e9:.0f} GB/s.",
        "",
        "| size | sequences | " + " | ".join(WAYS) + " | reading limit |",
        "|---|---:|" + "---:|" * (len(WAYS) + 1),
    ]
    for size in args.sizes:
        model = random_model(MODELS[size], args.device)
        limit = speed / (weights_read(MODELS[size]) / 2)  # of float32
        for rows in (1, 8):
            results = measure(model, rows, args.rounds).values()
            cells = " | ".join(f"{tokens:.1f} ({first:.1f} s)" for tokens, first in results)
            lines.append(f"| {size} | {rows} | {cells} | {rows * limit:.0f} |")
            print(lines[-1], flush=True)
        del model
    print("\n".join(lines))
    if args.device.type == "cuda":
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "gpu.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
