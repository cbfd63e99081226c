"""Tokenizers out of files: a `tokenizers` JSON, a WordPiece vocab.txt, and whatever AutoTokenizer reads in a folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import BertWordPieceTokenizer, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_model.errors import UserError, one_line
from hf_model.reading import read_start, read_text
from hf_model.tokenizer.trial import MAX_TOKENIZER_BYTES, check_by_trial

MAX_VOCABULARY_BYTES = 2**25


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a JSON file of the `tokenizers` library, which is tried out first.

    Raises:
        UserError: there is no such file, the library cannot read it, or using it takes too much time or memory.
    """
    path = Path(path)
    # Look at the first bytes, so that a large file of another kind is not read whole.
    text = read_text(path, MAX_TOKENIZER_BYTES) if beginning(path).lstrip().startswith(b"{") else ""
    check_by_trial(text, path)
    return Tokenizer.from_str(text)


def tokenizer_of(content: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer of a JSON that was made from another file. It is tried out in the same way as a JSON file.

    Raises:
        UserError: using it takes too much time or memory.
    """
    text = json.dumps(content, ensure_ascii=False)
    check_by_trial(text, path)
    return Tokenizer.from_str(text)


def beginning(path: Path) -> bytes:
    """The first bytes of a file, by which its kind is known, without a byte order mark.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    return read_start(path, 64).removeprefix(b"\xef\xbb\xbf")


def read_word_pieces(path: Path) -> tuple[Tokenizer, str]:
    """The tokenizer of a vocab.txt, as BERT's is, and a note on what the file does not tell.

    Raises:
        UserError: the file cannot be read, or lacks a token that such a tokenizer needs.
    """
    tokens = read_text(path, MAX_VOCABULARY_BYTES).split("\n")
    tokens = [token.removesuffix("\r") for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if missing := [token for token in ("[UNK]", "[SEP]", "[CLS]") if token not in vocabulary]:
        raise UserError(
            f"{path}: has no {missing[0]}, which a WordPiece vocab.txt has; give the tokenizer's JSON (Tokenizer.save "
            "writes one), or, if this is the training text of a model of characters, give it with --characters_of"
        )
    has_capitals = any(token != token.lower() for token in tokens if not (token[:1] == "[" and token[-1:] == "]"))
    backend: Tokenizer = BertWordPieceTokenizer(vocabulary, lowercase=not has_capitals)._tokenizer
    case = "capitals are kept, since the vocabulary has some" if has_capitals else "a text is put in lower case"
    return backend, f"a vocab.txt does not tell how a text is prepared; as in BERT, {case}"


def load_auto(name: str, **how: Any) -> PreTrainedTokenizerFast:
    """What `AutoTokenizer.from_pretrained(name, **how)` gives for a folder or a name. The folder's code is never run.

    A folder's tokenizer.json is tried out before the library reads it. Without such a file, the loaded
    tokenizer is tried out afterwards.

    Raises:
        UserError: the library cannot load it, it has no fast form, or using it takes too much time or memory.
    """
    path = Path(name, "tokenizer.json")
    if has_json := path.exists():
        check_by_trial(read_text(path, MAX_TOKENIZER_BYTES), path)
    try:
        # A stranger's folder may name code of its own; the library would ask on the terminal whether to run it.
        with panics_as_errors():
            loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **how)
    except Exception as error:  # a damaged file can make the library fail in any way
        raise UserError(f"{name}: AutoTokenizer cannot load it ({one_line(error, 150)})") from None
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise UserError(f"{name}: is a {type(loaded).__name__}, which has no fast form (a tokenizer.json)")
    if not has_json:
        check_by_trial(loaded.backend_tokenizer.to_str(), name)
    return loaded


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """For a block that calls Rust with files that were not tried out. A panic in Rust is no `Exception`.

    Raises:
        RuntimeError: in place of the panic. Callers then need not catch `BaseException`, which a signal can be too.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of pyo3_runtime, a module that cannot be imported
            raise RuntimeError(str(error)) from None
        raise
