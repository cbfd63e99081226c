"""Byte-level BPE that other trainers keep as ranks or merges of bytes: tiktoken's files and minbpe's `.model`."""

import base64
import binascii
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_model.errors import UserError
from hf_model.reading import read_text

MAX_BYTES = 2**26
MAX_MINBPE_BYTES = 2**25  # of all tokens: a line of the file can double the longest one
MAX_SPLITS = 2**27  # bytes that are looked at to find all ways to split each token in two; tiktoken's own take 2**24
MINBPE = "minbpe v1"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken's own encodings by their number of ranks: the name, the pattern, and the special tokens.
ENCODINGS: dict[int, tuple[str, str, dict[str, int]]] = {
    50256: ("r50k_base", GPT2_PATTERN, {"<|endoftext|>": 50256}),
    50280: ("p50k_base", GPT2_PATTERN, {"<|endoftext|>": 50256}),
    100256: (
        "cl100k_base",
        GPT4_PATTERN,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    199998: ("o200k_base", GPT4O_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
MANY_DIGITS = re.compile(rb" [0-9]+|[0-9]{4,}")


def _byte_characters() -> dict[int, str]:
    """The character that stands for each byte in GPT-2's vocabulary: itself where it is printed, else one past 255."""
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (number for number in range(256) if number not in printed)
    return {number: chr(number) for number in printed} | {byte: chr(256 + n) for n, byte in enumerate(others)}


CHARACTERS = _byte_characters()


def minbpe_json(path: Path) -> dict[str, Any]:
    """The `tokenizers` JSON for a `.model` file of minbpe: its pattern, its special tokens, and pairs of ids to merge.

    Raises:
        UserError: the file cannot be read or is damaged, or two of its tokens are the same bytes.
    """
    lines = read_text(path, MAX_BYTES).split("\n")
    try:
        pattern, n_special = lines[1].removesuffix("\r"), int(lines[2])
        special = {}
        for line in lines[3 : 3 + n_special]:
            token, _, number = line.strip().rpartition(" ")
            special[token] = int(number)
        tokens = [bytes([number]) for number in range(256)]
        merges, n_bytes = [], 0
        for line in lines[3 + n_special :]:
            if line.strip():
                first, second = (tokens[int(number)] for number in line.split())
                if (n_bytes := n_bytes + len(first) + len(second)) > MAX_MINBPE_BYTES:
                    raise UserError(f"{path}: its tokens are more than {MAX_MINBPE_BYTES:,} bytes long together")
                merges.append((first, second))
                tokens.append(first + second)
    except UserError:
        raise
    except (ValueError, IndexError):
        raise UserError(f"{path}: is a damaged model of minbpe (save it again with tokenizer.save)") from None
    ranks: dict[bytes, int] = {}
    for index, made in enumerate(tokens):
        if (other := ranks.setdefault(made, index)) != index:
            raise UserError(
                f"{path}: its tokens {other} and {index} are the same bytes, {made!r}, which no `tokenizers` "
                "tokenizer can tell apart"
            )
    return _byte_level_json(ranks, merges, pattern, special)


def tiktoken_json(path: Path) -> tuple[dict[str, Any], str]:
    """The `tokenizers` JSON for a file of tiktoken: a token's bytes in base64 and its rank on each line.

    The file does not tell how a text is split, nor the special tokens. Both are known for tiktoken's own encodings.

    Returns:
        The JSON, and a note on the pattern and the special tokens that were taken.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    ranks: dict[bytes, int] = {}
    try:
        for line in read_text(path, MAX_BYTES).splitlines():
            if line.strip():
                token, number = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(number)
    except (ValueError, binascii.Error):
        raise UserError(
            f"{path}: is a damaged file of tiktoken: a line must hold a token in base64 and its rank"
        ) from None
    if lost := [number for number in range(256) if bytes([number]) not in ranks]:
        raise UserError(f"{path}: is a damaged file of tiktoken: it has no token for the byte {lost[0]}")
    if len(ranks) in ENCODINGS:
        name, pattern, special = ENCODINGS[len(ranks)]
        note = f"the pattern and the special tokens are those of {name}, as its number of ranks says"
    else:
        has_many = any(MANY_DIGITS.fullmatch(token) for token in ranks)
        name, pattern, special = ("GPT-2", GPT2_PATTERN, {}) if has_many else ("GPT-4", GPT4_PATTERN, {})
        note = (
            f"a file of tiktoken does not tell how a text is split: it is split as for {name}, and there are no "
            "special tokens (the tokenizer's JSON would tell both)"
        )
    check_splits(ranks, path)
    # tiktoken merges the two neighbours whose joint bytes have the lowest rank, whatever the two are.
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return _byte_level_json(ranks, merges, pattern, special, ignore_merges=True), note


def check_splits(tokens: Iterable[bytes | str], path: Path) -> None:
    """Check that all ways to split each token in two are found quickly: a token costs the square of its length.

    Raises:
        UserError: the tokens are too long.
    """
    if (most := sum(len(token) ** 2 for token in tokens)) > MAX_SPLITS:
        raise UserError(f"{path}: its tokens are too long: the squares of their lengths add up to {most:,}")


def _byte_level_json(
    ranks: dict[bytes, int],
    merges: list[tuple[bytes, bytes]],
    pattern: str,
    special: dict[str, int],
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The JSON of a byte-level BPE. What the pattern does not match is left out, as both trainers do."""
    names = {token: "".join(CHARACTERS[byte] for byte in token) for token in ranks}
    bytes_part = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for token, number in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_part]} if pattern else bytes_part,
        "post_processor": None,
        "decoder": bytes_part,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {names[token]: number for token, number in ranks.items()} | special,
            "merges": [[names[first], names[second]] for first, second in merges],
        },
    }
