"""GPT-2's byte-level BPE: its two files under either pair of names, and where an encoding called `gpt2` is cached."""

import hashlib
import os
import tempfile
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer, Tokenizer

from hf_model.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
# The two files in tiktoken's cache: their names there (SHA-1 of their address) and the SHA-256 that it expects of them.
TIKTOKEN_FILES = (
    (
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    (
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
)


def find_pair(path: Path) -> tuple[Path, Path] | None:
    """The vocabulary and the merges that a folder holds, or that a file of one of their names stands beside.

    `ByteLevelBPETokenizer.save_model(folder, "name")` puts "name-" in front of both.
    """
    for names in PAIRS:
        if path.is_dir():
            pair = path / names[0], path / names[1]
        elif ends := [name for name in names if path.name.endswith(name)]:
            prefix = path.name.removesuffix(ends[0])
            pair = path.with_name(prefix + names[0]), path.with_name(prefix + names[1])
        else:
            continue
        if all(file.is_file() for file in pair):
            return pair
    return None


def other_half(path: Path) -> str | None:
    """The name of the file that should stand beside one of GPT-2's two."""
    for pair in PAIRS:
        if path.name in pair:
            return pair[1 - pair.index(path.name)]
    return None


def read_pair(vocabulary: Path, merges: Path, special_tokens: tuple[str, ...]) -> Tokenizer:
    """The tokenizer of two files; of `special_tokens`, those that the vocabulary has are special.

    Raises:
        UserError: one of them cannot be read, or they are no such files.
    """
    try:
        backend: Tokenizer = ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges))._tokenizer
        known = backend.get_vocab()
        backend.add_special_tokens([token for token in special_tokens if token in known])
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # tokenizers raises nothing narrower, and its panics are not even an Exception
        raise UserError(f"{vocabulary} and {merges.name}: are no vocabulary and merges of BPE ({error})") from None
    return backend


def tiktoken_pair() -> tuple[Path, Path] | None:
    """The two files in tiktoken's cache, if they are there and whole."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    cache = Path(folder if folder is not None else Path(tempfile.gettempdir()) / "data-gym-cache")
    for name, digest in TIKTOKEN_FILES:
        try:
            if hashlib.sha256((cache / name).read_bytes()).hexdigest() != digest:
                return None
        except OSError:
            return None
    vocabulary, merges = (cache / name for name, _ in TIKTOKEN_FILES)
    return vocabulary, merges
