"""What a decoding step costs beside its weights: `python -m benchmarks.overhead`.

Models too narrow for their weights to matter, of 4 and of 16 layers, decode 200 tokens by plain steps and by lean ones.
The difference of the two depths is the cost of a layer, and what is left that of a token: embedding, head, and the work
of `generate` itself. Writes results/overhead.md beside this file.
"""

import os
import statistics
import time

import torch

from benchmarks.decode import RESULTS
from benchmarks.engines import ThroughGenerate
from hf_model import CustomGPTConfig, CustomGPTForCausalLM

SHALLOW, DEEP, TOKENS, ROUNDS = 4, 16, 200, 9


def engine(n_layer: int) -> ThroughGenerate:
    config = CustomGPTConfig(n_layer=n_layer, n_head=2, n_embd=32, vocab_size=128, block_size=512, bias=False)
    return ThroughGenerate(CustomGPTForCausalLM(config).eval())


def main() -> None:
    engines = {n_layer: engine(n_layer) for n_layer in (SHALLOW, DEEP)}
    ways = {"plain": "1", "lean": ""}
    seconds: dict[tuple[str, int], list[float]] = {(way, n): [] for way in ways for n in engines}
    for _ in range(ROUNDS + 1):  # the first warms up
        for (way, n_layer), times in seconds.items():
            os.environ["CUSTOM_GPT_PLAIN_DECODE"] = ways[way]
            start = time.perf_counter()
            engines[n_layer]([[1, 2, 3]], TOKENS)
            times.append(time.perf_counter() - start)
    step = {key: statistics.median(times[1:]) / TOKENS * 1e6 for key, times in seconds.items()}
    lines = ["| step | microseconds a layer | microseconds a token besides |", "|---|---:|---:|"]
    for way in ways:
        layer = (step[way, DEEP] - step[way, SHALLOW]) / (DEEP - SHALLOW)
        lines.append(f"| {way} | {layer:.0f} | {step[way, SHALLOW] - SHALLOW * layer:.0f} |")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "overhead.md").write_text(
        "\n".join([f"torch {torch.__version__}, {torch.get_num_threads()} threads.", "", *lines, ""])
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
