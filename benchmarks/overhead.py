"""What a decoding step costs beside its weights: `python -m benchmarks.overhead`.

Models of 4 and of 16 layers, too narrow for their weights to matter, decode 200 tokens in their plain and their fast
form. The difference between the two depths is the cost of a layer. The rest is the cost of a token: embedding, head,
and the work of `generate` itself. Writes results/overhead.md beside this file.
"""

import statistics
import time

import torch

from benchmarks.decode import RESULTS
from benchmarks.engines import ThroughGenerate
from hf_model import CustomGPTConfig, CustomGPTForCausalLM
from hf_model.fast_cpu import fast_on_cpu

SHALLOW, DEEP, TOKENS, ROUNDS = 4, 16, 200, 9


def engine(form: str, n_layer: int) -> ThroughGenerate:
    config = CustomGPTConfig(n_layer=n_layer, n_head=2, n_embd=32, vocab_size=128, block_size=512, bias=False)
    model = CustomGPTForCausalLM(config).eval()
    return ThroughGenerate(fast_on_cpu(model) if form == "fast" else model)


def main() -> None:
    engines = {(form, n_layer): engine(form, n_layer) for form in ("plain", "fast") for n_layer in (SHALLOW, DEEP)}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in engines}
    for _ in range(ROUNDS + 1):  # the first warms up
        for key, generate in engines.items():
            start = time.perf_counter()
            generate([[1, 2, 3]], TOKENS)
            seconds[key].append(time.perf_counter() - start)
    step = {key: statistics.median(times[1:]) / TOKENS * 1e6 for key, times in seconds.items()}
    lines = ["| form | microseconds a layer | microseconds a token besides |", "|---|---:|---:|"]
    for form in ("plain", "fast"):
        layer = (step[form, DEEP] - step[form, SHALLOW]) / (DEEP - SHALLOW)
        lines.append(f"| {form} | {layer:.0f} | {step[form, SHALLOW] - SHALLOW * layer:.0f} |")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "overhead.md").write_text(
        "\n".join([f"torch {torch.__version__}, {torch.get_num_threads()} threads.", "", *lines, ""])
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
