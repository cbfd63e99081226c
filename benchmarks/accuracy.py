"""What a reduced precision costs: `python -m benchmarks.accuracy`.

The trained example reads the texts of examples/evaluation in each dtype, by the forward pass that takes a prompt in
`generate`. The table shows the perplexity (high, because it counts the questions, which training masked), the share of
positions with the same likeliest token as in float32, and the largest difference of a logit. Writes
results/accuracy.md beside this file.
"""

import json
import math

import torch
import torch.nn.functional as F

from benchmarks.decode import RESULTS
from benchmarks.processes import EXAMPLE, ROOT
from hf_model import load
from hf_model.fast_cpu import FastCache, FastCustomGPT
from hf_model.tokenizer import format_example

DTYPES = ("float32", "float16", "bfloat16")


@torch.no_grad()
def logits_of(model: FastCustomGPT, texts: list[torch.Tensor]) -> torch.Tensor:
    """Of all positions but each text's last one, in float32, of shape (N, V)."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1])[None]
        inputs = {"input_ids": ids, "position_ids": positions, "past_key_values": FastCache(model)}
        return model(**inputs, return_dict=True).logits[0, :-1]

    return torch.cat([logits(ids) for ids in texts])


def main() -> None:
    files = EXAMPLE / "ckpt.pt", EXAMPLE / "tokenizer.json"
    models = {}
    for dtype in DTYPES:
        models[dtype], tokenizer = load(*files, device="cpu", dtype=dtype)
    records = [json.loads(line) for line in (ROOT / "examples/evaluation/questions.jsonl").read_text().splitlines()]
    formatted = [format_example(record["instruction"], record["output"], record["input"]) for record in records]
    texts = [tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids for text in formatted]
    targets = torch.cat([ids[0, 1:] for ids in texts])

    lines = [
        f"The trained example on {len(texts)} texts, {len(targets)} tokens.",
        "",
        "| dtype | perplexity | likeliest token as in float32 | largest difference of a logit |",
        "|---|---:|---:|---:|",
    ]
    exact = logits_of(models["float32"], texts)
    for dtype, model in models.items():
        logits = logits_of(model, texts)
        perplexity = math.exp(F.cross_entropy(logits, targets).item())
        agreement = (logits.argmax(-1) == exact.argmax(-1)).float().mean().item()
        difference = (logits - exact).abs().max().item()
        lines.append(f"| {dtype} | {perplexity:.6f} | {agreement:.3%} | {difference:.4f} |")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "accuracy.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
