"""Vocabularies of characters: nanoGPT's meta.pkl, the JSON of a trainer's own class, and a training text."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase

from hf_model.errors import UserError, some_of
from hf_model.reading import parse_json, read_bytes, read_text
from hf_model.trainers.pickle_reader import find, kind_of, read_pickle

# The name of the unknown token, which is not in the vocabulary. So the library raises an error on an unknown character;
# without an unknown token, the library would drop such characters without a word.
UNKNOWN = "(any character that the model was not trained on)"
CHARACTERS = "characters"  # the value of "vocabulary" in the tokenizer_config.json of such a vocabulary
CHUNK = 2**20
MAX_META_BYTES = 16 * 2**20  # a hundred thousand characters take three
MOST_CHARACTERS = 2**30  # of a training text
SPECIAL = re.compile(r"<.+>|\[.+\]")  # a token of several characters, such as <unk> or [PAD]
UNKNOWN_TOKENS = ("<unk>", "<UNK>", "[UNK]", "<|unk|>", "<unknown>")


def read_meta(path: Path) -> dict[str, int]:
    """Character to id, from nanoGPT's meta.pkl, which is never unpickled.

    Raises:
        UserError: the file holds code or something else, or its ids are not 0, 1, … for one character each.
    """
    meta = _plain_data(path)
    if not isinstance(meta, dict) or not isinstance(stoi := meta.get("stoi", _inverse(meta.get("itos"))), dict):
        keys = f"; its keys are {', '.join(map(repr, list(meta)[:10]))}" if isinstance(meta, dict) else ""
        raise UserError(f"{path}: has no 'stoi', the dict of characters and their ids that nanoGPT saves{keys}")
    for character, number in stoi.items():
        if not isinstance(character, str) or len(character) != 1:
            raise UserError(f"{path}: {character!r} in its 'stoi' is not one character")
        if not isinstance(number, int) or isinstance(number, bool):
            raise UserError(f"{path}: the id of {character!r} is {_shown(number)}, not an integer")
    _check_ids(path, stoi)
    if "itos" in meta and not _is_inverse(meta["itos"], stoi):
        raise UserError(f"{path}: its 'itos' is not the inverse of its 'stoi'")
    size = meta.get("vocab_size", len(stoi))
    if size != len(stoi):
        raise UserError(f"{path}: says vocab_size={_shown(size)}, but has {len(stoi)} characters")
    return stoi


def _plain_data(path: Path) -> Any:
    """The dicts, lists, texts and numbers of a pickle."""
    content = read_bytes(path, MAX_META_BYTES)
    try:
        meta, _ = read_pickle(content)
        other = find(meta, lambda value: not isinstance(value, dict | list | tuple | str | bytes | int | float | None))
        if other:
            raise UserError(f"{other[1] or 'its value'}: holds a {kind_of(other[0])}")
    except UserError as error:
        raise UserError(f"{path}: {error}. Save only dicts, lists, short texts and numbers") from None
    except Exception:
        raise UserError(f"{path}: is a damaged pickle, or not a pickle") from None
    return meta


def _shown(value: Any) -> str:
    """A value, or only its kind if it holds others or is a huge integer, since these can take long to print."""
    is_short = isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() <= 64)
    return repr(value) if is_short else f"a {type(value).__name__}"


def _check_ids(path: Path, stoi: Mapping[str, int]) -> None:
    if not stoi:
        raise UserError(f"{path}: has no characters")
    every = range(len(stoi))
    if missing := set(every) - {number for number in stoi.values() if number in every}:
        raise UserError(f"{path}: has {len(stoi)} characters, but none of them has the id {min(missing)}")
    if surrogates := [character for character in stoi if "\ud800" <= character <= "\udfff"]:
        raise UserError(f"{path}: {surrogates[0]!r} is half of a character (a surrogate), which no tokenizer can take")


def _inverse(itos: Any) -> dict[Any, Any] | None:
    """Character to id, from an `itos` that is a dict or a list; None if it is neither, or holds other values."""
    itos = dict(enumerate(itos)) if isinstance(itos, list | tuple) else itos
    if not isinstance(itos, dict) or not all(isinstance(character, str) for character in itos.values()):
        return None
    return {character: number for number, character in itos.items()}


def _is_inverse(itos: Any, stoi: Mapping[str, int]) -> bool:
    return isinstance(itos, dict | list | tuple) and len(itos) == len(stoi) and _inverse(itos) == stoi


def read_json_characters(path: Path) -> dict[str, int] | None:
    """Token to id, from a JSON file that a trainer's own class wrote; None if it is no vocabulary of characters.

    The file is a dict of tokens and ids, a dict of ids and tokens or a list of tokens, or a dict that has one of these
    under any key. The tokens are characters and special tokens such as `<unk>`; the ids are 0, 1, …. Of several
    vocabularies the largest is taken: the others may be special tokens or separators.

    Raises:
        UserError: the file cannot be read, holds half of a character, or gives the characters two different ids.
    """
    if path.suffix != ".json" or path.stat().st_size > MAX_META_BYTES:
        return None
    try:
        content = parse_json(read_text(path, MAX_META_BYTES))
    except ValueError:
        return None
    inner = content.values() if isinstance(content, dict) else ()
    found = [ids for one in (content, *inner) for ids in _both_ways(one) if _are_of_characters(ids)]
    if not found:
        return None
    largest = max(found, key=len)
    if any(len(ids) == len(largest) and ids != largest for ids in found):
        raise UserError(f"{path}: has two vocabularies of {len(largest)} tokens with different ids: keep the model's")
    _check_ids(path, largest)
    return largest


def _both_ways(value: Any) -> Iterator[dict[Any, Any]]:
    """A dict as it is, and the inverse of a list, or of a dict whose keys are numbers in JSON."""
    if isinstance(value, dict):
        yield value
        value = {int(key): token for key, token in value.items() if key.isdecimal() and len(key) < 10}
    if (ids := _inverse(value)) is not None:
        yield ids


def _are_of_characters(ids: Mapping[str, Any]) -> bool:
    others = [token for token in ids if len(token) != 1]
    are_numbers = all(type(number) is int for number in ids.values()) and set(ids.values()) == set(range(len(ids)))
    return are_numbers and len(others) < len(ids) - len(others) and all(map(SPECIAL.fullmatch, others))


def characters_in(path: Path) -> dict[str, int]:
    """Character to id of a training text. The trainers of character models number the sorted characters.

    Raises:
        UserError: the file cannot be read, is not UTF-8, is empty, or is too long.
    """
    found: set[str] = set()
    length = 0
    try:
        with path.open(encoding="utf-8") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
                length += len(chunk)
                if length > MOST_CHARACTERS:
                    raise UserError(f"{path}: is more than {MOST_CHARACTERS} characters long; a part of it will do")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    stoi = {character: number for number, character in enumerate(sorted(found))}
    _check_ids(path, stoi)
    return stoi


def character_backend(stoi: Mapping[str, int]) -> Tokenizer:
    """A tokenizer that gives each character its id, and an error for any other: BPE without merges."""
    backend = Tokenizer(models.BPE(vocab=dict(stoi), merges=[], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    return backend


def special_character_backend(ids: Mapping[str, int]) -> Tokenizer:
    """The same with special tokens, one of which may stand for unknown characters."""
    unknown = next((token for token in UNKNOWN_TOKENS if token in ids), UNKNOWN)
    backend = Tokenizer(models.BPE(vocab=dict(ids), merges=[], unk_token=unknown))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([token for token in ids if len(token) != 1])
    return backend


def is_of_characters(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `character_backend` made this tokenizer, here or in a folder that was converted."""
    return tokenizer.init_kwargs.get("vocabulary") == CHARACTERS


def check_characters(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Check that a tokenizer of characters knows each character of a text.

    Raises:
        UserError: it does not; the message names the first unknown characters and their positions.
    """
    known = tokenizer.get_vocab()
    unknown: dict[str, int] = {}  # to its first position
    for position, character in enumerate(text):
        if character not in known:
            unknown.setdefault(character, position)
    if unknown:
        named = [f"{char!r} (U+{ord(char):04X}) in position {position}" for char, position in unknown.items()]
        raise UserError(
            f"the text holds {some_of(named, 3)}: not among the {len(known)} characters that the model knows "
            "(the first position is 0)"
        )
