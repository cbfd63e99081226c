"""A `tokenizers` JSON file, as a `PreTrainedTokenizerFast` with the special tokens that its vocabulary has."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_model.errors import UserError
from hf_model.reading import parse_json
from hf_model.tokenizer.characters import UNKNOWN
from hf_model.tokenizer.check import check_tokenizer
from hf_model.tokenizer.prompt import BOS, CHAT_TEMPLATE, EOS, INSTRUCTION, PAD, PROMPT_FORMAT, RAW, UNK

# What special tokens that end a text, or fill up a row, are usually called.
END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|eos|>", "<|end_of_text|>", "<|end|>", EOS)
PAD_TOKENS = ("<pad>", "<|pad|>", "<|padding|>", PAD)


def convert_tokenizer(path: str | Path, model_max_length: int) -> PreTrainedTokenizerFast:
    """Wrap a `tokenizers` JSON file of byte-level BPE, as `wrap` does.

    Args:
        path: the JSON file.
        model_max_length: the model's context, in tokens.

    Raises:
        UserError: no such file, or one that is not the JSON of such a tokenizer.
    """
    return wrap(read_tokenizer(path), model_max_length)


def wrap(
    backend: Tokenizer,
    model_max_length: int,
    *,
    raw: bool = False,
    known: Mapping[str, str | None] | None = None,
    **facts: str,
) -> PreTrainedTokenizerFast:
    """A `tokenizers` object as transformers' tokenizer, with the special tokens that its vocabulary has.

    With `[BOS]` and `[EOS]` the model is one of the original's: `tokenizer(text)` gives `[BOS]` + text, without the
    `[EOS]` that the original's template appends (and its sampling loop drops again); `add_eos_token=True` brings it
    back. Where there is no `[PAD]`, `[EOS]` serves. The chat template makes the prompt of instructions, unless `raw`.

    Any other vocabulary is one of raw text, and so is its prompt.

    Args:
        raw: the model knows no instructions, whatever its tokenizer has.
        known: `eos_token`, `pad_token`, `unk_token`, where it is known which ones they are.
        facts: more entries of tokenizer_config.json.
    """
    vocabulary = backend.get_vocab()
    is_original = BOS in vocabulary and EOS in vocabulary
    how: dict[str, Any] = dict(facts)
    if is_original:
        how |= {
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD if PAD in vocabulary else EOS,
            "unk_token": UNK if UNK in vocabulary else None,
            "add_bos_token": True,
            "add_eos_token": False,
        }
    else:
        how |= _roles(backend, known or {})
        _drop_end(backend)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **how,
        **{PROMPT_FORMAT: INSTRUCTION if is_original and not raw else RAW},
        padding_side="left",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    if is_original and not raw:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _roles(backend: Tokenizer, known: Mapping[str, str | None]) -> dict[str, str]:
    """Which special token has which role: as it is known, by what the post-processor does, or by the usual names."""
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    before, after = added_ids(backend)
    end = known.get("eos_token") or (backend.id_to_token(after[-1]) if after else _first(END_TOKENS, special))
    unknown = known.get("unk_token") or _first((getattr(backend.model, "unk_token", None),), special)
    roles = {
        "bos_token": backend.id_to_token(before[0]) if before else None,
        "eos_token": end,
        "pad_token": known.get("pad_token") or _first(PAD_TOKENS, special) or end,
        "unk_token": unknown if unknown != end else None,  # GPT-2's tokenizers in transformers have one for all roles
    }
    return {role: token for role, token in roles.items() if token is not None}


def _first(names: Iterable[str | None], special: list[str]) -> str | None:
    return next((name for name in names if name in special), None)


def added_ids(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts in front of a text and behind it."""
    if backend.post_processor is None:
        return [], []
    ids, bare = (backend.encode("a", add_special_tokens=added).ids for added in (True, False))
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[:start], ids[start + len(bare) :]
    return [], []


def _drop_end(backend: Tokenizer) -> None:
    """Keep the post-processor from ending a text that a model is to go on with."""
    before, after = added_ids(backend)
    if after:
        tokens = [(backend.id_to_token(number), number) for number in before]
        backend.post_processor = TemplateProcessing(
            single=[*(token for token, _ in tokens), "$A"], special_tokens=tokens
        )


def check_fits(
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
    if tokenizer.add_bos_token:
        (folder / "special_tokens_map.json").write_text(json.dumps({"add_bos_token": True}) + "\n", encoding="utf-8")


@contextmanager
def no_panic_on_stderr() -> Iterator[None]:
    """For a block that calls into Rust: a panic there prints dozens of lines, and becomes no `Exception` here.

    Raises:
        RuntimeError: in place of the panic, so that nobody need catch a `BaseException`: a signal can be one too.
    """
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # of pyo3_runtime, a module that cannot be imported
                raise RuntimeError(str(error)) from None
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def check_regular(path: Path) -> None:
    """Refuse what is there but is no file: it is opened more than once, and a pipe would be waited for.

    Raises:
        UserError: it is not a regular file.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file")


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The `tokenizers` object in a JSON file, after a check that it is one of this family's kind.

    Raises:
        UserError: no such file, not a tokenizer, another kind of tokenizer, one of `[BOS]` and `[EOS]` missing, padding
            or truncation switched on, or ids that are left out.
    """
    path = Path(path)
    check_regular(path)
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
        raise UserError(
            f"{path}: is a {kind} tokenizer; this model family uses byte-level BPE (if your model was trained with it, "
            "give the folder that it is in, for AutoTokenizer)"
        )
    try:
        check_tokenizer(content)
        with no_panic_on_stderr():
            backend = Tokenizer.from_str(text)
            if getattr(backend.model, "unk_token", None) != UNKNOWN:  # which would refuse these characters
                backend.decode(backend.encode("Response: a").ids)  # some damage shows only in use
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: is a damaged tokenizer ({error})") from None

    vocabulary = backend.get_vocab(with_added_tokens=True)
    if len(missing := [token for token in (BOS, EOS) if token not in vocabulary]) == 1:  # without both: of raw text
        special = [token.content for token in backend.get_added_tokens_decoder().values()]
        raise UserError(f"{path}: lacks {missing[0]}; its special tokens are {', '.join(special) or 'none'}")
    is_of_characters = getattr(backend.model, "unk_token", None) == UNKNOWN
    if len(missing) == 2 and not is_of_characters and not backend.encode("Ж☃", add_special_tokens=False).ids:
        raise UserError(
            f"{path}: lacks [BOS] and [EOS], and leaves out what it does not know without a word: it is not byte-level "
            "and has no unknown token"
        )
    if backend.padding or backend.truncation:
        setting = "padding" if backend.padding else "truncation"
        raise UserError(
            f"{path}: has {setting} switched on, which would change every prompt: "
            f"call tokenizer.no_{setting}() and save it again"
        )
    if gaps := set(range(len(vocabulary))) - set(vocabulary.values()):
        raise UserError(f"{path}: has a hole in its vocabulary: no token has the id {min(gaps)}")
    return backend
