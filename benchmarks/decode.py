"""Speed of every installed engine that takes the same weights: `python -m benchmarks.decode`.

Random weights of two sizes, greedy decoding on the CPU. Each engine lives in a process of its own, for thread pools of
one disturb another's; the processes take turns, round by round, so that a busy moment of the machine hits them alike.
Their first tokens are compared, so that all are seen to compute the same. Writes results/decode.json, decode.md and
decode.png beside this file.
"""

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils import logging

from benchmarks.engines import ENGINES
from examples.plain_gpt import GPT, GPTConfig

SIZES = {
    "A": GPTConfig(n_layer=12, n_head=12, n_embd=768, vocab_size=32000, bias=False),
    "B": GPTConfig(n_layer=6, n_head=6, n_embd=384, vocab_size=30000, bias=False),
}


class Case(NamedTuple):
    rows: int
    prompt: int
    new: int

    def tokens(self) -> int:
        """What a speed counts: new tokens, or those of the prompt where one new token is all."""
        return self.rows * (self.prompt if self.new == 1 else self.new)


CASES = {
    "one sequence": Case(1, 32, 128),
    "prompt of 200": Case(1, 200, 1),
    "prompt of 1000": Case(1, 1000, 1),
    "8 sequences": Case(8, 32, 32),
    "32 sequences": Case(32, 32, 32),
    "past the context": Case(1, 1024, 4),
}
RESULTS = Path(__file__).parent / "results"
LEAST_SECONDS = 0.25  # of a turn: a short case is run again and again
SAME = 8  # tokens that must agree, for the engines that keep float32
DIED = "its process died"


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


def reading_speed(n_bytes: int) -> float:
    """Bytes per second that all threads read from so much memory again and again, at best: by sums, or by products."""
    rows = torch.ones(n_bytes // 4 // 1024, 1024)
    row = torch.ones(1, 1024)
    times: list[float] = []
    while sum(times) < 2:
        for read in (lambda: rows.view(torch.int64).sum(), lambda: F.linear(row, rows)):
            start = time.perf_counter()
            read()
            times.append(time.perf_counter() - start)
    return rows.nbytes / min(times)


def serve(engine: str, size: str, folder: Path, requests: Connection) -> None:
    """In a process of its own: build the engine, then answer each case with seconds and tokens, or why not."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    gpt = GPT(SIZES[size]).eval()
    try:
        generate = ENGINES[engine](gpt, folder)
    except ImportError as error:
        requests.send(str(error))
        return
    requests.send(None)
    if engine != "original":
        del gpt
    while case := requests.recv():
        rows = torch.randint(4, SIZES[size].vocab_size, case[:2], generator=torch.Generator().manual_seed(1)).tolist()
        try:
            times: list[float] = []
            while sum(times) < LEAST_SECONDS:
                start = time.perf_counter()
                tokens = generate(rows, case.new)
                times.append(time.perf_counter() - start)
            requests.send((statistics.median(times), tokens[0][:SAME]))
        except NotImplementedError as error:
            requests.send(str(error))


class Engine:
    """The near end of `serve`."""

    def __init__(self, name: str, size: str, folder: Path):
        self.requests, far = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        context.Process(target=serve, args=(name, size, folder, far), daemon=True).start()
        far.close()  # so that a process that dies is seen
        self.trouble: str | None = self.answer()

    def run(self, case: Case) -> Any:
        """Seconds and tokens, or why there are none."""
        with suppress(OSError):
            self.requests.send(case)
        return self.answer()

    def answer(self) -> Any:
        try:
            return self.requests.recv()
        except (EOFError, OSError):
            return DIED

    def end(self) -> None:
        with suppress(OSError):
            self.requests.send(None)


@contextmanager
def running(size: str, names: list[str]) -> Iterator[dict[str, Engine]]:
    """Those of the engines that are installed, warmed up."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = {name: Engine(name, size, folder) for name in names}
        for name, engine in list(engines.items()):
            stack.callback(engine.end)
            trouble = engine.trouble or engine.run(Case(1, 32, 2))
            if isinstance(trouble, str):
                print(f"  without {name}: {trouble}")
                del engines[name]
        yield engines


def measure(case: Case, engines: dict[str, Engine], rounds: int) -> dict[str, dict[str, float | str]]:
    """Tokens per second of each engine that takes the case, and how many of its tokens are the original's."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    first: dict[str, list[int]] = {}
    for turn in range(rounds):
        for name, engine in list(engines.items()):
            if name == "original" and turn:
                continue  # a full forward pass for every token: once must do
            answer = engine.run(case)
            if answer == DIED:
                print(f"  without {name} from here on: {DIED}")
                del engines[name]
            if isinstance(answer, tuple):
                seconds[name].append(answer[0])
                first[name] = answer[1]
    reference = first.get("original") or next(iter(first.values()), [])

    def result(times: list[float], tokens: list[int]) -> dict[str, float | str]:
        same = next((i for i, token in enumerate(reference) if tokens[i] != token), len(reference))
        spread = {"median": statistics.median(times), "best": min(times), "worst": max(times)}
        return {
            **{name: case.tokens() / time for name, time in spread.items()},
            "same_tokens": f"{same}/{len(reference)}",
        }

    return {name: result(times, first[name]) for name, times in seconds.items() if times}


def weights_read(config: GPTConfig) -> int:
    """Bytes of float32 weights that one token needs: all but the embeddings."""
    return 4 * (12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size)


def table(report: dict) -> str:
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        f"Tokens per second, greedy: medians of {report['rounds']} interleaved rounds, worst to best in brackets for "
        f"one sequence (32 tokens of prompt, 128 new). For the prompts, tokens of the prompt per second. {about}.",
    ]
    for name, size in report["sizes"].items():
        cases = list(dict.fromkeys(label for engine in size["engines"].values() for label in engine))
        speed = f"{size['reading'] / 1e9:.1f} GB/s: {size['limit_f32']:.1f} tokens/s"
        limit = f"Reading the float32 weights once for each token, at {speed}."
        lines += ["", f"**{name}: {text(SIZES[name])}.** {limit}", ""]
        lines += ["| engine | " + " | ".join(cases) + " |", "|---|" + "---:|" * len(cases)]
        for engine, results in size["engines"].items():
            cells = [f"{results[label]['median']:.1f}" if label in results else "" for label in cases]
            if r := results.get("one sequence"):
                cells[cases.index("one sequence")] += f" ({r['worst']:.0f} to {r['best']:.0f})"
            lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def text(config: GPTConfig) -> str:
    return f"{config.n_layer} layers of {config.n_embd}, vocabulary {config.vocab_size}"


def plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes, label = report["sizes"], "one sequence"
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(6.2 * len(sizes), 4.2), squeeze=False, layout="constrained")
    for axis, (name, size) in zip(axes[0], sizes.items(), strict=True):
        engines = {engine: results[label] for engine, results in size["engines"].items() if label in results}
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
        axis.set_xlabel("tokens/s, one sequence")
        axis.set_ylim(len(engines) - 0.4, -1)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[0, 1:]:
        axis.set_yticklabels([])
    figure.suptitle(f"{report['machine']['cpu']}, {report['machine']['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=130)


def number_of_rounds(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=number_of_rounds, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the engines to run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    names = [name for name in ENGINES if not args.only or any(part in name for part in args.only)]
    if not names:
        parser.error(f"argument --only: no engine's name holds {' or '.join(args.only)}: {', '.join(ENGINES)}")

    speeds = {name: reading_speed(weights_read(SIZES[name])) for name in args.sizes}  # before any engine is there
    report: dict = {"machine": machine(), "rounds": args.rounds, "sizes": {}}
    for name in args.sizes:
        print(f"{name}: {text(SIZES[name])}")
        with running(name, names) as engines:
            results: dict[str, dict] = {engine: {} for engine in engines}
            for label in args.cases:
                for engine, result in measure(CASES[label], engines, args.rounds).items():
                    results[engine][label] = result
                    speed_of = f"{result['median']:8.1f} tokens/s, {result['same_tokens']} same"
                    print(f"  {label:18} {engine:24} {speed_of}", flush=True)
        limit = speeds[name] / weights_read(SIZES[name])
        report["sizes"][name] = {"reading": speeds[name], "limit_f32": limit, "engines": results}

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "decode.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (args.out / "decode.md").write_text(table(report))
    if "one sequence" in args.cases:
        try:
            plot(report, args.out / "decode.png")
        except ImportError:
            print("no plot without matplotlib")
    print(table(report))


if __name__ == "__main__":
    main()
