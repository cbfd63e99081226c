"""Run what the pages say: every command and every Python block, page by page, in a copy of this repository.

    python docs/run_commands.py                     # all pages; what takes minutes is left out
    python docs/run_commands.py README.md --slow    # one page, all of it

A page marks what cannot be run with a comment in front of its block, `<!-- not run: it needs a terminal -->`, and what
takes minutes with `<!-- slow: two minutes -->`. The blocks of Python of a page are one program, in their order. A page
finds the example converted in `out/capitals` and, but for the README, which makes it, in `capitals-hf`.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:<!-- (not run|slow): ([^\n]*?) -->\n+)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLE = "--checkpoint_path examples/capitals/ckpt.pt --tokenizer_path examples/capitals/tokenizer.json"
CONVERT = f"python convert_checkpoint.py {EXAMPLE}"
LEFT_OUT = (".git", ".venv*", "out", "capitals-hf*", "__pycache__", "*.egg-info", ".*_cache")
SECONDS = 900


class Block(NamedTuple):
    page: str
    line: int
    language: str
    """`python`, or `bash` for commands."""
    code: str
    mark: str
    """Empty, `not run` or `slow`."""
    why: str


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that hold something to run."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        mark, why, language, content = found.groups()
        line = text.count("\n", 0, found.start(4))
        if language == "python":
            yield Block(page.name, line, "python", content, mark or "", why or "")
        elif language == "bash" or re.search(r"^\$ ", content, re.MULTILINE):
            code = content if language == "bash" else "\n".join(commands(content))
            yield Block(page.name, line, "bash", code, mark or "", why or "")


def commands(session: str) -> Iterator[str]:
    """What is typed in a session: the lines behind `$ `, and those that go on behind a backslash."""
    lines = iter(session.splitlines())
    for line in lines:
        if not line.startswith("$ ") or line.startswith("$ source .venv"):  # the environment is the one that runs this
            continue
        command = line.removeprefix("$ ")
        while command.endswith("\\"):
            command += f"\n{next(lines)}"
        if re.fullmatch(r"cat [\w.]+", command):  # a file of the reader's own: it holds what the page shows
            name, shown = command.removeprefix("cat "), session.partition(f"{line}\n")[2].partition("\n$ ")[0]
            command = f"[ -e {name} ] || cat > {name} <<'END'\n{shown}\nEND"
        yield command


def run(script: list[str], folder: Path) -> tuple[int, str, float]:
    """The exit status of a program, what it said, and its seconds."""
    start = time.monotonic()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "."}
    with subprocess.Popen(
        script,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=SECONDS)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return 124, f"not done after {SECONDS} s", time.monotonic() - start
    return process.returncode, said, time.monotonic() - start


def run_page(page: Path, slow: bool = False) -> bool:
    """Run a page's blocks, print a line for each, and return whether all of them went well."""
    found = list(blocks(page))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        prepare = [f"{CONVERT} --output_dir out/capitals"]
        if page.name != "README.md":
            prepare.append(f"{CONVERT} --output_dir capitals-hf")
        status, said, _ = run(["bash", "-ec", "\n".join(prepare)], folder)
        if status:
            print(f"{page.name}: FAILED to make the example\n{said[-3000:]}", flush=True)
            return False
        is_left_out = {block for block in found if block.mark == "not run" or (block.mark == "slow" and not slow)}
        for block in is_left_out:
            print(f"{block.page}:{block.line}: not run: {block.why}", flush=True)
        done = [block for block in found if block not in is_left_out]
        programs = [([block], block.code) for block in done if block.language == "bash"]
        if python := [block for block in done if block.language == "python"]:
            programs.append((python, "\n".join(block.code for block in python)))
        return not [of for of, code in programs if not run_blocks(of, code, folder)]  # each is run


def run_blocks(of: list[Block], code: str, folder: Path) -> bool:
    start = ["bash", "-ec"] if of[0].language == "bash" else [sys.executable, "-c"]
    status, said, seconds = run([*start, code], folder)
    places = ", ".join(str(block.line) for block in of)
    print(f"{of[0].page}:{places}: {'ran' if status == 0 else f'FAILED with {status}'} in {seconds:.0f} s", flush=True)
    if status:
        print(said[-3000:], flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pages", nargs="*", type=Path, default=[ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )
    parser.add_argument("--slow", action="store_true", help="what takes minutes too")
    args = parser.parse_args()
    return 1 if [page for page in args.pages if not run_page(page, args.slow)] else 0


if __name__ == "__main__":
    sys.exit(main())
