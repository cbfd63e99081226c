"""GPT-2's byte-level BPE: its two files under either pair of names, and tiktoken's cache of them."""

import hashlib
import os
import tempfile
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from hf_model.errors import UserError
from hf_model.reading import parse_json, read_bytes, read_text

END_OF_TEXT = "<|endoftext|>"
MAX_BYTES = 32 * 2**20  # of one of the two files; GPT-2's own two have 1.5 MB together
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
# The two files in tiktoken's cache: the name there (SHA-1 of the file's address) and the SHA-256 that tiktoken expects.
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
    """The vocabulary and the merges in a folder, or of which `path` is one. None if one of the two is missing.

    Both names may have the same beginning: `ByteLevelBPETokenizer.save_model(folder, "name")` writes "name-vocab.json".
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
    """The name of the second file, if `path` is one of GPT-2's two."""
    for pair in PAIRS:
        if path.name in pair:
            return pair[1 - pair.index(path.name)]
    return None


def is_by_id(path: Path) -> bool:
    """Whether a vocabulary maps ids to tokens, not tokens to ids."""
    try:
        content = parse_json(read_text(path, MAX_BYTES))
    except ValueError:
        return False
    return isinstance(content, dict) and bool(content) and all(key.isdecimal() for key in content)


def read_pair(vocabulary: Path, merges: Path, special_tokens: tuple[str, ...]) -> Tokenizer:
    """The tokenizer of two files.

    Args:
        special_tokens: tokens that are special if the vocabulary has them.

    Raises:
        UserError: one of the files cannot be read or is not what it should be, an id is missing or given twice, or a
            byte has no token, so that text would be lost without a word.
    """
    try:
        ids = _ids(read_text(vocabulary, MAX_BYTES))
        backend: Tokenizer = ByteLevelBPETokenizer(ids, _merges(read_text(merges, MAX_BYTES)))._tokenizer
        backend.add_special_tokens([token for token in special_tokens if token in ids])
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{vocabulary} and {merges.name}: are no vocabulary and merges of BPE ({error})") from None
    return backend


def _ids(text: str) -> dict[str, int]:
    """Token to id. The vocabulary must have every byte, and each id below its size once."""
    ids = parse_json(text)
    if not isinstance(ids, dict) or not all(type(number) is int for number in ids.values()):
        raise ValueError("the vocabulary is not a dict of tokens and their ids")
    if missing := set(range(len(ids))) - set(ids.values()):
        raise ValueError(f"there are {len(ids)} tokens, but none of them has the id {min(missing)}")
    if lost := sorted(set(ByteLevel.alphabet()) - ids.keys()):
        raise ValueError(f"there is no token for {lost[0]!r}, one of the 256 that stand for a byte")
    return ids


def _merges(text: str) -> list[tuple[str, str]]:
    """The pairs in a file of merges; its first line (the version) and empty lines hold none."""
    pairs = []
    for number, line in enumerate(text.split("\n"), start=1):
        parts = line.removesuffix("\r").split(" ")
        if parts == [""] or line.startswith("#version"):
            continue
        if len(parts) != 2:
            raise ValueError(f"line {number} of the merges is not a pair of tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def tiktoken_pair() -> tuple[Path, Path] | None:
    """The two files in tiktoken's cache; None unless both are there and have the right checksum."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    cache = Path(folder if folder is not None else Path(tempfile.gettempdir()) / "data-gym-cache")
    for name, digest in TIKTOKEN_FILES:
        try:
            if hashlib.sha256(read_bytes(cache / name, MAX_BYTES)).hexdigest() != digest:
                return None
        except UserError:
            return None
    vocabulary, merges = (cache / name for name, _ in TIKTOKEN_FILES)
    return vocabulary, merges
