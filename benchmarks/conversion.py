"""How long a conversion takes, beside copying the weights: `python -m benchmarks.conversion [--sizes 124M 774M]`.

For each size a checkpoint of nanoGPT's form is written, with AdamW's state. Then `cp` of the converted weights and
`convert_checkpoint.py` run in turn, each to a new place and with nothing left to write to the disk from before. As a
conversion ends when its files are on the disk, a copy does too (`sync`). Private memory is the most that the process
has beside the mapped files, sampled from /proc ten times a second (Linux). Writes results/conversion.md beside this
file.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.decode import RESULTS
from examples.plain_gpt import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
SIZES = {"124M": (12, 12, 768), "774M": (36, 20, 1280), "1.5B": (48, 25, 1600)}  # layers, heads, width: GPT-2's
VOCABULARY, CONTEXT = 50304, 1024
TOKENIZER = ROOT / "examples" / "capitals" / "tokenizer.json"


def write_checkpoint(path: Path, size: str) -> None:
    """A tied model in float32 with the optimizer's state, as nanoGPT saves them."""
    n_layer, n_head, n_embd = SIZES[size]
    with torch.device("meta"):
        model = GPT(
            GPTConfig(
                **{"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": CONTEXT},
                **{"vocab_size": VOCABULARY, "bias": False, "tied": True},
            )
        )
    model.to_empty(device="cpu")
    model.lm_head.weight = model.transformer.wte.weight
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    moments = {
        i: {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        for i, parameter in enumerate(model.parameters())
    }
    content = {"model": model.state_dict(), "optimizer": {"state": moments}, "model_args": model.model_args()}
    torch.save(content | {"iter_num": 1, "best_val_loss": 3.0, "config": {}}, path)


def run(command: list[str]) -> tuple[float, int]:
    """The seconds that a command takes, and the most private memory that it had, in bytes."""
    os.sync()  # so that it does not wait for what others wrote
    start, most = time.perf_counter(), 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, _private(process.pid))
            time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return time.perf_counter() - start, most


def _private(pid: int) -> int:
    """The anonymous memory of a process, which no file backs."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def measure(folder: Path, size: str, rounds: int) -> str:
    checkpoint, out, copy = folder / "ckpt.pt", folder / "hf", folder / "copy"
    write_checkpoint(checkpoint, size)
    convert = [sys.executable, "convert_checkpoint.py", "--checkpoint_path", str(checkpoint)]
    convert += ["--tokenizer_path", str(TOKENIZER), "--output_dir", str(out)]
    run(convert)  # the first warms up
    copies, conversions = [], []
    for _ in range(rounds):
        copy.mkdir()
        copies.append(run(["sh", "-c", f"cp {out}/*.safetensors {copy} && sync {copy}/*"])[0])
        for written in (copy, out):
            shutil.rmtree(written)
        conversions.append(run(convert))
    seconds, copied = statistics.median(took for took, _ in conversions), statistics.median(copies)
    private = max(most for _, most in conversions)
    file, weights = checkpoint.stat().st_size, sum(path.stat().st_size for path in out.glob("*.safetensors"))
    figures = (f"{file / 1e9:.1f} GB", f"{weights / 1e9:.1f} GB", f"{copied:.1f} s", f"{seconds:.1f} s")
    return f"| {size} | {' | '.join(figures)} | {seconds / copied:.1f} | {private / 1e9:.1f} GB |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    head = ["parameters", "file", "weights", "`cp` and `sync` of the weights", "conversion", "ratio", "private memory"]
    lines = [f"| {' | '.join(head)} |", "|---|---:|---:|---:|---:|---:|---:|"]
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(measure(Path(folder), size, args.rounds))
            print(lines[-1], flush=True)
    text = "\n".join([f"torch {torch.__version__}, {torch.get_num_threads()} threads.", "", *lines, ""])
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "conversion.md").write_text(text)


if __name__ == "__main__":
    main()
