"""What the engines read: one module for each format, which writes it and verifies it.

To add a format, add a row to the table and a module that has:

    write(loaded, folder, options) -> notes      writes the files into an empty folder; the notes are lines for the user
    verify(folder, source, options) -> words     compares the files with their source, by the engine that reads them
    TRY_IT, TRY_IT_RAW                           commands that try a model of instructions, and one of raw text
"""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from hf_model.errors import UserError
from hf_model.formats.target import Options
from hf_model.loading import Loaded, Source
from hf_model.tokenizer import example_prompt, takes_instructions

FORMATS = {
    "transformers": "transformers_folder",
    "gpt2": "gpt2",
    "gguf": "gguf",
    "ctranslate2": "ctranslate2",
    "onnx": "onnx",
    "checkpoint": "trainer_checkpoint",
}
N_TOKENS = 20  # asked of a server: with a short prompt, they stay within any context


class Format(Protocol):
    """What a module of the table has."""

    TRY_IT: str
    TRY_IT_RAW: str

    def write(self, loaded: Loaded, folder: Path, options: Options) -> list[str]: ...

    def verify(self, folder: Path, source: Source, options: Options) -> str: ...


def find_format(name: str) -> Format:
    """The module of a format. It imports its engine only when it uses it.

    Raises:
        UserError: there is no such format.
    """
    if name not in FORMATS:
        raise UserError(f"format={name!r} is none of {', '.join(FORMATS)}")
    return import_module(f"{__name__}.{FORMATS[name]}")


def how_to_try(
    name: str,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    options: Options | None = None,
    *,
    prompt: str = "",
    tokenizer_path: str | Path | None = None,
    generate: str = "custom-gpt-generate",
) -> list[str]:
    """Commands for a shell that try the folder just written; a prompt may put line breaks into a command.

    Args:
        name: the format.
        tokenizer: the model's; None if it has none.
        options: those that the folder was written with; None for the defaults.
        prompt: a prompt to try; "" for one that suits the tokenizer.
        tokenizer_path: the tokenizer that goes with a checkpoint, which holds none itself.
        generate: the command that answers prompts.
    """
    module, options = find_format(name), options or Options()
    path = Path(folder).as_posix()
    # Without "./" in front, a server could read the path as the name of a repository on the Hub.
    path = path if Path(folder).is_absolute() or path.startswith(".") else f"./{path}"
    if not prompt and tokenizer is not None:
        prompt = example_prompt(tokenizer)
    is_instructed = tokenizer is not None and takes_instructions(tokenizer)
    fields = {
        "generate": generate,
        "folder": shlex.quote(path),
        "file": shlex.quote(f"{path}/model-{options.gguf_type}.gguf"),
        "checkpoint": shlex.quote(f"{path}/ckpt.pt"),
        "tokenizer": shlex.quote(str(tokenizer_path or "tokenizer.json")),
        "modelfile": shlex.quote(f"{path}/Modelfile"),
        "script": shlex.quote(f"{path}/example.py"),
        "name": re.sub(r"[^a-z0-9]+", "-", Path(folder).absolute().name.lower()).strip("-") or "model",
        "prompt": shlex.quote(prompt),
        "request": shlex.quote(json.dumps({"model": path, "prompt": prompt, "max_tokens": N_TOKENS})),
    }
    template = module.TRY_IT if is_instructed else module.TRY_IT_RAW
    return [command.format(**fields) for command in template.splitlines()]
