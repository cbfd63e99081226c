"""The tokenizer JSON of the original, as a `PreTrainedTokenizerFast`."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hf_model.errors import UserError
from hf_model.strict_json import parse_json
from hf_model.vocabulary.check import check_tokenizer
from hf_model.vocabulary.prompt import BOS, CHAT_TEMPLATE, EOS, PAD, UNK


def convert_tokenizer(path: str | Path, model_max_length: int) -> PreTrainedTokenizerFast:
    """Wrap a `tokenizers` JSON file of byte-level BPE with the special tokens `[UNK] [PAD] [BOS] [EOS]`.

    `tokenizer(text)` gives `[BOS]` + text, without the `[EOS]` that the original's template appends (and its sampling
    loop drops again); `add_eos_token=True` brings it back. Where there is no `[PAD]`, `[EOS]` serves.

    Args:
        path: the JSON file.
        model_max_length: the model's context, in tokens.

    Raises:
        UserError: no such file, or one that is not the JSON of such a tokenizer.
    """
    backend = read_tokenizer(path)
    vocabulary = backend.get_vocab()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD if PAD in vocabulary else EOS,
        unk_token=UNK if UNK in vocabulary else None,
        add_bos_token=True,
        add_eos_token=False,
        padding_side="left",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def check_vocabulary(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, tokenizer_path: str | Path, model_path: str | Path
) -> None:
    """Check that every id has an embedding.

    Raises:
        UserError: the tokenizer has more tokens than the model has embeddings.
    """
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{tokenizer_path}: has {len(tokenizer)} tokens, but {model_path} has embeddings for {vocab_size}: "
            "they do not belong together"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads; `add_eos_token=True` works on them too.

    The library reads from the template in tokenizer.json that `[BOS]` comes first, but forgets `add_bos_token` itself,
    and so would lose `[BOS]` where `add_eos_token=True` makes the template anew. This file is merged in after that.
    """
    tokenizer.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"add_bos_token": True}) + "\n", encoding="utf-8")


@contextmanager
def no_panic_on_stderr() -> Iterator[None]:
    """For a block that calls into Rust: a panic there prints dozens of lines before it becomes an exception here."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The `tokenizers` object in a JSON file, after a check that it is one of the original's kind.

    Raises:
        UserError: no such file, not a tokenizer, another kind of tokenizer, `[BOS]` or `[EOS]` missing, padding or
            truncation switched on, or ids that are left out.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            # A glance first, so that a checkpoint under this name is not read whole.
            raw = file.read(64)
            raw += file.read() if raw.lstrip().startswith(b"{") else b""
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-8")
        content = parse_json(text)
        kind = content["model"]["type"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: is not the JSON of a `tokenizers` tokenizer (Tokenizer.save writes one)") from None
    if kind != "BPE":
        raise UserError(f"{path}: is a {kind} tokenizer; this model family uses byte-level BPE")
    try:
        check_tokenizer(content)
        with no_panic_on_stderr():
            backend = Tokenizer.from_str(text)
            backend.decode(backend.encode("Response: a").ids)  # some damage shows only in use
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # tokenizers raises nothing narrower, and its panics are not even an Exception
        raise UserError(f"{path}: is a damaged tokenizer ({error})") from None

    vocabulary = backend.get_vocab(with_added_tokens=True)
    if missing := [token for token in (BOS, EOS) if token not in vocabulary]:
        special = [token.content for token in backend.get_added_tokens_decoder().values()]
        raise UserError(f"{path}: lacks {' and '.join(missing)}; its special tokens are {', '.join(special) or 'none'}")
    if backend.padding or backend.truncation:
        setting = "padding" if backend.padding else "truncation"
        raise UserError(
            f"{path}: has {setting} switched on, which would change every prompt: "
            f"call tokenizer.no_{setting}() and save it again"
        )
    if gaps := set(range(len(vocabulary))) - set(vocabulary.values()):
        raise UserError(f"{path}: has a hole in its vocabulary: no token has the id {min(gaps)}")
    return backend
