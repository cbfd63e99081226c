"""Measures whole processes, from start to end: `python -m benchmarks.processes`.

The models are the trained example and random ones of the sizes B and A.
- Answering: the original's way, then `generate.py` on the checkpoint, on the converted folder, and on the folder in
  float16; each up to the first token, and up to 150 tokens.
- Many prompts: one by one and in batches. The example answers 900 questions, the other models 64, with 16 tokens each.
- Converting: the whole conversion, its imports alone, and a bare read and write of the same tensors.
The programs take turns. The results go to results/processes.md and results/processes.json beside this file.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.decode import RESULTS, SIZES, machine, number_of_rounds
from examples.plain_gpt import GPT, save_checkpoint

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "capitals"
PROMPT = ["--prompt", "What is the capital of France?"]
BARE = """
import sys, torch
from safetensors.torch import save_file
state_dict = torch.load(sys.argv[1], mmap=True, weights_only=True)["model_state_dict"]
save_file(state_dict, sys.argv[2])
"""

IMPORTS = """
from hf_model_cli.run import quick_imports
with quick_imports():
    import hf_model.conversion
"""


def files_of(size: str, folder: Path) -> tuple[Path, Path]:
    """Write a random checkpoint, and the example's tokenizer, filled up to one token for each embedding."""
    config = SIZES[size]
    torch.manual_seed(0)
    save_checkpoint(folder / "ckpt.pt", GPT(config), 0)
    tokenizer = json.loads((EXAMPLE / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), config.vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder / "ckpt.pt", folder / "tokenizer.json"


def run(*command: str | Path) -> tuple[float, float]:
    """Run a command in a process; return its seconds and its peak resident memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr
    trouble = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(trouble.decode())
    return time.perf_counter() - start, usage.ru_maxrss / (1e6 if sys.platform == "linux" else 1e9)


def measure(label: str, programs: dict[str, list[str | Path]], rounds: int) -> dict[str, dict[str, float]]:
    """Run each program once a round, and return the median seconds and GB of each by its name."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, command in programs.items():
            if "OUTPUT" in command:
                output = Path(tempfile.gettempdir()) / f"converted-{os.getpid()}"
                results[name].append(run(*[output if part == "OUTPUT" else part for part in command]))
                shutil.rmtree(output) if output.is_dir() else output.unlink()
            else:
                results[name].append(run(*command))
    report = {
        name: {"seconds": statistics.median(s for s, _ in runs), "GB": statistics.median(m for _, m in runs)}
        for name, runs in results.items()
    }
    for name, result in report.items():
        print(f"{label:12} {name:36} {result['seconds']:7.2f} s {result['GB']:6.2f} GB", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["example", "B", "A"], choices=["example", *SIZES])
    parser.add_argument("--rounds", type=number_of_rounds, default=3)
    args = parser.parse_args()

    report: dict = {"machine": machine(), "rounds": args.rounds, "answering": {}, "many prompts": {}, "converting": {}}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            checkpoint, tokenizer = EXAMPLE / "ckpt.pt", EXAMPLE / "tokenizer.json"
            if size != "example":
                # In another process: the memory of this one would count as the programs'.
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    checkpoint, tokenizer = pool.apply(files_of, (size, folder))
            paths = ["--checkpoint_path", checkpoint, "--tokenizer_path", tokenizer]
            run("convert_checkpoint.py", *paths, "--output_dir", folder / "hf")
            programs: dict[str, list[str | Path]] = {}
            for new, until in (("1", "first token"), ("150", "end")):
                plain = ["-m", "benchmarks.plain_generate", checkpoint, tokenizer, new]
                ours = ["generate.py", *PROMPT, "--max_new_tokens", new]
                converted = [*ours, "--checkpoint_path", folder / "hf"]
                programs |= {
                    f"original, {until}": plain,
                    f"generate.py ckpt.pt, {until}": [*ours, *paths],
                    f"generate.py folder, {until}": converted,
                    f"generate.py folder float16, {until}": [*converted, "--dtype", "float16"],
                }
            report["answering"][size] = measure(size, programs, args.rounds)
            questions = (ROOT / "examples/evaluation/questions.jsonl").read_text().splitlines(keepends=True)
            (folder / "questions.jsonl").write_text("".join(questions if size == "example" else questions[::14][:64]))
            many = ["generate.py", "--prompts_file", folder / "questions.jsonl", "--output_file", "OUTPUT"]
            many += ["--checkpoint_path", folder / "hf", "--temperature", "0", "--max_new_tokens", "16"]
            batches: dict[str, list[str | Path]] = {
                "one by one": [*many, "--batch_size", "1"],
                "batches of 16": [*many, "--batch_size", "16"],
                "batches of 16 in float16": [*many, "--batch_size", "16", "--dtype", "float16"],
            }
            report["many prompts"][size] = measure(size, batches, args.rounds)
            convert = ["convert_checkpoint.py", *paths, "--output_dir", "OUTPUT"]
            conversion: dict[str, list[str | Path]] = {
                "imports of a bare conversion": ["-c", "import torch, safetensors.torch"],
                "bare conversion": ["-c", BARE, checkpoint, "OUTPUT"],
                "imports of convert_checkpoint.py": ["-c", IMPORTS],
                "convert_checkpoint.py": convert,
            }
            report["converting"][size] = measure(size, conversion, args.rounds)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "processes.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "processes.md").write_text(table(report))
    print(table(report))


def table(report: dict) -> str:
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [f"Medians of {report['rounds']} runs, the programs taking turns. {about}.", ""]
    for part in ("answering", "many prompts", "converting"):
        sizes = report[part]
        lines += ["| " + " | ".join([part, *sizes]) + " |", "|---|" + "---:|" * len(sizes)]
        for name in next(iter(sizes.values())):
            cells = (f"{size[name]['seconds']:.1f} s, {size[name]['GB']:.2f} GB" for size in sizes.values())
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
