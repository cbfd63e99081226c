"""Tokens per second of every installed engine that takes the same weights: `python -m benchmarks.decode`.

Random weights of two sizes, greedy decoding of one sequence on the CPU. The engines take turns, round by round, so that
a busy moment of the machine hits them alike; their first tokens are compared, so that all are seen to compute the same.
Writes results/decode.json, decode.md and decode.png beside this file.
"""

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.engines import ENGINES, Generate
from examples.plain_gpt import GPT, GPTConfig

SIZES = {
    "A": GPTConfig(n_layer=12, n_head=12, n_embd=768, vocab_size=32000, bias=False),
    "B": GPTConfig(n_layer=6, n_head=6, n_embd=384, vocab_size=30000, bias=False),
}
RESULTS = Path(__file__).parent / "results"
SAME = 8  # tokens that must agree, for the engines that keep float32


def machine() -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", cpuinfo)
    names = ("torch", "transformers", "ctranslate2", "llama-cpp-python")
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **{package: found for package in names if (found := installed(package))},
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def reading_speed() -> float:
    """Bytes per second that all threads read from memory, at best."""
    parts = [torch.randn(4096, 1024) for _ in range(16)]  # 16 MiB each: far more than a cache in all
    row = torch.randn(1, 4096)

    def seconds() -> float:
        start = time.perf_counter()
        for part in parts:
            row @ part
        return time.perf_counter() - start

    return sum(part.nbytes for part in parts) / min(seconds() for _ in range(10))


def build(gpt: GPT, folder: Path, only: list[str]) -> Iterator[tuple[str, Generate]]:
    for name, engine in ENGINES.items():
        if only and not any(part in name for part in only):
            continue
        try:
            yield name, engine(gpt, folder)
        except ImportError as error:
            print(f"  without {name}: {error}")


def measure(config: GPTConfig, prompt_length: int, new: int, rounds: int, only: list[str]) -> dict[str, dict]:
    torch.manual_seed(0)
    gpt = GPT(config).eval()
    prompt = torch.randint(4, config.vocab_size, (prompt_length,)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        engines = dict(build(gpt, Path(folder), only))
        first = {name: generate(prompt, SAME) for name, generate in engines.items()}  # warms up, too
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(rounds):
            for name, generate in engines.items():
                if name == "original" and turn > 1:
                    continue  # a full forward pass for every token: two rounds must do
                start = time.perf_counter()
                generate(prompt, new)
                seconds[name].append(time.perf_counter() - start)
    reference = first.get("original") or next(iter(first.values()))
    return {
        name: {
            "median": new / statistics.median(times),
            "best": new / min(times),
            "worst": new / max(times),
            "same_tokens": next((i for i in range(SAME) if first[name][i] != reference[i]), SAME),
        }
        for name, times in seconds.items()
    }


def weights_read(config: GPTConfig) -> int:
    """Bytes of float32 weights that one token needs: all but the embeddings."""
    return 4 * (12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size)


def table(report: dict) -> str:
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        f"{report['prompt']}-token prompt, {report['new']} new tokens, one sequence, greedy; median tokens/s of "
        f"{report['rounds']} interleaved rounds (worst to best). {about}.",
        "",
        "| engine | " + " | ".join(f"{size}: {text(SIZES[size])}" for size in report["sizes"]) + " |",
        "|---|" + "---|" * len(report["sizes"]),
    ]
    names = list(dict.fromkeys(name for size in report["sizes"].values() for name in size["engines"]))
    for name in names:
        cells = []
        for size in report["sizes"].values():
            r = size["engines"].get(name)
            cells.append(f"{r['median']:.1f} ({r['worst']:.1f} to {r['best']:.1f})" if r else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    limits = (f"{size['limit_f32']:.1f}" for size in report["sizes"].values())
    return "\n".join([*lines, "| *reading the float32 weights once* | " + " | ".join(limits) + " |", ""])


def text(config: GPTConfig) -> str:
    return f"{config.n_layer} layers of {config.n_embd}, vocabulary {config.vocab_size}"


def plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = report["sizes"]
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(6.2 * len(sizes), 4.2), squeeze=False, layout="constrained")
    for axis, (name, size) in zip(axes[0], sizes.items(), strict=True):
        engines = size["engines"]
        medians = [r["median"] for r in engines.values()]
        below = [r["median"] - r["worst"] for r in engines.values()]
        above = [r["best"] - r["median"] for r in engines.values()]
        colours = ["#d1603d" if engine.startswith("this") else "#8aa1b1" for engine in engines]
        axis.barh(list(engines), medians, xerr=[below, above], color=colours, error_kw={"lw": 1, "ecolor": "#444444"})
        for row, r in enumerate(engines.values()):
            axis.annotate(f"{r['median']:.0f}", (r["best"], row), (4, 0), textcoords="offset points", va="center")
        axis.axvline(size["limit_f32"], color="#444444", ls="--", lw=1)
        limit = (size["limit_f32"], -0.75)
        axis.annotate("float32 reading limit", limit, (3, 0), textcoords="offset points", fontsize=8)
        axis.set_title(f"{name}: {text(SIZES[name])}", fontsize=10)
        axis.set_xlabel("tokens/s")
        axis.set_ylim(len(engines) - 0.4, -1)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[0, 1:]:
        axis.set_yticklabels([])
    figure.suptitle(f"{report['machine']['cpu']}, {report['machine']['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the engines to run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    speed = reading_speed()
    report: dict = {
        "machine": machine() | {"reading GB/s": round(speed / 1e9, 1)},
        **{"prompt": args.prompt, "new": args.new, "rounds": args.rounds, "sizes": {}},
    }
    for name in args.sizes:
        print(f"{name}: {text(SIZES[name])}")
        engines = measure(SIZES[name], args.prompt, args.new, args.rounds, args.only)
        report["sizes"][name] = {"limit_f32": speed / weights_read(SIZES[name]), "engines": engines}
        for engine, r in engines.items():
            print(f"  {engine:28} {r['median']:7.1f} tokens/s   first {r['same_tokens']} of {SAME} tokens the same")

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "decode.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (args.out / "decode.md").write_text(table(report))
    try:
        plot(report, args.out / "decode.png")
    except ImportError:
        print("no plot without matplotlib")
    print(table(report))


if __name__ == "__main__":
    main()
