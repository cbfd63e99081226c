"""Coverage-guided fuzzing of what a user sees: exit status, one line, time, memory, and nothing written.

Run by hand; it needs `pip install atheris`. The first argument is what to fuzz, the others are libFuzzer's:

    python -m tests.reliability.fuzz_command_lines checkpoint|tokenizer|config|generation|records -max_total_time=600
"""

import contextlib
import io
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hf_model", "hf_model_cli"]):
    from hf_model.conversion import convert
    from hf_model_cli import convert as convert_command
    from hf_model_cli import generate as generate_command
from tests.reliability.files import save, weights
from tests.tiny import CHECKPOINT, TOKENIZER

PLACE = Path(tempfile.mkdtemp())
FOLDER, INPUT, OUTPUT = PLACE / "hf", PLACE / "input", PLACE / "output"
MAX_SECONDS, MAX_MEBIBYTES = 20, 600  # of one run: the libraries keep a little of each, such as what they logged
MODEL = ["--checkpoint_path", str(CHECKPOINT), "--tokenizer_path", str(TOKENIZER)]


def as_pickle(data: bytes) -> None:
    """An archive of torch's form around any pickle."""
    with zipfile.ZipFile(INPUT, "w") as archive:
        archive.writestr("ckpt/data.pkl", data)
        for index in range(30):
            archive.writestr(f"ckpt/data/{index}", bytes(4 * 300 * 8))


def into(name: str) -> Callable[[bytes], object]:
    return lambda data: (FOLDER / name).write_bytes(data)


CONVERT, GENERATE = convert_command.main, generate_command.main
SHORT = ["--prompt", "a", "--max_new_tokens", "2"]
# What to fuzz: how to write it down, the command, its arguments, and a file to begin with.
TARGETS: dict[str, tuple[Callable[[bytes], object], Callable[[], int], list[str], Callable[[], bytes]]] = {
    "checkpoint": (
        as_pickle,
        CONVERT,
        [*MODEL, "--checkpoint_path", str(INPUT), "--output_dir", str(OUTPUT)],
        lambda: zipfile.ZipFile(save(PLACE / "seed", {"model": weights(n_embd=8)})).read("seed/data.pkl"),
    ),
    "tokenizer": (
        INPUT.write_bytes,
        CONVERT,
        [*MODEL, "--tokenizer_path", str(INPUT), "--output_dir", str(OUTPUT)],
        TOKENIZER.read_bytes,
    ),
    "config": (
        into("config.json"),
        GENERATE,
        ["--checkpoint_path", str(FOLDER), *SHORT],
        lambda: (FOLDER / "config.json").read_bytes(),
    ),
    "generation": (
        into("generation_config.json"),
        GENERATE,
        ["--checkpoint_path", str(FOLDER), *SHORT],
        lambda: (FOLDER / "generation_config.json").read_bytes(),
    ),
    "records": (
        INPUT.write_bytes,
        GENERATE,
        [*MODEL, "--prompts_file", str(INPUT), "--output_file", str(OUTPUT), "--max_new_tokens", "2"],
        lambda: b'{"instruction": "a", "input": "b", "x": [1e3, {"y": null}]}\n',
    ),
}


def try_one(data: bytes, write: Callable[[bytes], object], main: Callable[[], int], arguments: list[str]) -> None:
    write(data)
    sys.argv = ["command", *arguments]
    errors, start = io.StringIO(), time.process_time()  # not the time that others take
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status: object = main()
        except SystemExit as end:
            status = end.code
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith("warning: ")]
    assert status in (0, 2), status
    assert len(lines) == (1 if status == 2 else 0), lines
    assert time.process_time() - start < MAX_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MAX_MEBIBYTES * 1024
    if status == 2:
        assert not OUTPUT.exists() and not [path for path in PLACE.iterdir() if path.name.endswith(".partial")]
    elif OUTPUT.is_dir():
        shutil.rmtree(OUTPUT)
    else:
        for line in OUTPUT.read_text().splitlines() if OUTPUT.exists() else ():
            json.loads(line, parse_constant=lambda text: sys.exit(f"{text} is not JSON"))
        OUTPUT.unlink(missing_ok=True)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    write, main, arguments, seed = TARGETS[sys.argv.pop(1)]
    convert(CHECKPOINT, TOKENIZER, FOLDER)
    corpus = PLACE / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed())
    atheris.Setup([*sys.argv, str(corpus)], lambda data: try_one(data, write, main, arguments))
    atheris.Fuzz()
