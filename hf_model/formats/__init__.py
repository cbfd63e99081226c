"""What an engine reads: one module for each target, with its writer and its verification.

A target is a module of the table below with two functions:

    write(loaded, folder, options) -> notes      the files, into an empty folder; what a user should know, line by line
    verify(folder, source, options) -> words     the files against their source, by the target's own engine
"""

from importlib import import_module
from pathlib import Path
from typing import Protocol

from hf_model.errors import UserError
from hf_model.formats.target import Options
from hf_model.loading import Loaded, Source


class Format(Protocol):
    def write(self, loaded: Loaded, folder: Path, options: Options) -> list[str]: ...

    def verify(self, folder: Path, source: Source, options: Options) -> str: ...


FORMATS = {
    "transformers": "transformers_folder",
    "gpt2": "gpt2",
    "gguf": "gguf",
    "ctranslate2": "ctranslate2",
    "onnx": "onnx",
    "checkpoint": "trainer_checkpoint",
}


def find_format(name: str) -> Format:
    """The module of a format; its engine is imported when it is used.

    Raises:
        UserError: there is no such format.
    """
    if name not in FORMATS:
        raise UserError(f"format={name!r} is none of {', '.join(FORMATS)}")
    return import_module(f"{__name__}.{FORMATS[name]}")
