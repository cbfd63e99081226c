"""A `tokenizers` object as a `PreTrainedTokenizerFast`: its special tokens, its prompt format, how it is saved."""

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_model.errors import UserError
from hf_model.tokenizer.files import read_tokenizer
from hf_model.tokenizer.prompt import BOS, CHAT_TEMPLATE, EOS, IM_END, IM_START, PAD, UNK, end_tokens, set_chat_template
from hf_model.tokenizer.trial import remember_ours

# The usual names of special tokens that begin a text, end it, or fill up a row.
BEGIN_TOKENS = ("<s>", "<bos>", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>", BOS)
END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|eos|>", "<|end_of_text|>", "<|end|>", "<|im_end|>", EOS)
PAD_TOKENS = ("<pad>", "<|pad|>", "<|padding|>", PAD)


def convert_tokenizer(path: str | Path, model_max_length: int) -> PreTrainedTokenizerFast:
    """Wrap a JSON file of the `tokenizers` library, as `wrap` does.

    Args:
        path: the JSON file.
        model_max_length: the model's context, in tokens.

    Raises:
        UserError: there is no such file, or it is not a tokenizer that can be used.
    """
    return wrap(read_tokenizer(path), model_max_length)


def wrap(
    backend: Tokenizer,
    model_max_length: int,
    *,
    raw: bool = False,
    chat_template: str | None = None,
    roles: Mapping[str, str | None] | None = None,
    **facts: str,
) -> PreTrainedTokenizerFast:
    """A `tokenizers` object as transformers' tokenizer. `backend` is changed: it no longer ends, pads or cuts a text.

    A vocabulary with `[BOS]` and `[EOS]` is the original's. Its model takes instructions, and the chat template makes
    the prompt. `tokenizer(text)` gives `[BOS]` + text. The original's template appends `[EOS]` too, which its sampling
    loop drops again; `add_eos_token=True` brings it back.

    With any other vocabulary the model takes raw text, unless there is a `chat_template`.

    Args:
        raw: the model takes raw text, whatever special tokens its tokenizer has.
        chat_template: what makes the prompts, in Jinja.
        roles: what `find_roles` gives for this backend; None finds it here.
        facts: more entries of tokenizer_config.json.
    """
    switch_off(backend)
    roles = find_roles(backend) if roles is None else roles
    if raw:
        chat_template = None
    elif chat_template is None and is_original(backend):
        chat_template = CHAT_TEMPLATE
    how: dict[str, Any] = {**facts, **{role: token for role, token in roles.items() if token is not None}}
    if chat_template == CHAT_TEMPLATE or is_original(backend):
        how |= {"add_bos_token": roles.get("bos_token") is not None, "add_eos_token": False}
    else:
        _drop_end(backend, begin_ids(backend, roles))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **how,
        padding_side="left",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    set_chat_template(tokenizer, chat_template)
    if chat_template is not None:
        _hide(tokenizer, [IM_START, *end_tokens(tokenizer)])
    return tokenizer


def _hide(tokenizer: PreTrainedTokenizerFast, names: list[str]) -> None:
    """Make added tokens special ones, which answers do not show: a trainer may have added them as ordinary ones."""
    added = tokenizer.added_tokens_decoder.values()
    shown = [token.content for token in added if token.content in names and not token.special]
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in shown])


def is_original(backend: Tokenizer) -> bool:
    """Whether a vocabulary has the special tokens of the original trainer."""
    return backend.token_to_id(BOS) is not None and backend.token_to_id(EOS) is not None


def switch_off(backend: Tokenizer) -> tuple[str, ...]:
    """Switch off what would change prompts: padding, truncation, and the dropout of BPE.

    Returns:
        A note on each that was switched on.
    """
    notes = []
    for name, is_on, switch in (
        ("padding", backend.padding is not None, backend.no_padding),
        ("truncation", backend.truncation is not None, backend.no_truncation),
    ):
        if is_on:
            switch()
            notes.append(f"{name} is switched on in the tokenizer, for every text: it is switched off here")
    if isinstance(backend.model, models.BPE) and backend.model.dropout:
        backend.model.dropout = None
        notes.append("dropout of merges is switched on in the tokenizer, for training: it is switched off here")
    return tuple(notes)


def find_roles(
    backend: Tokenizer, known: Mapping[str, str | None] | None = None, chosen: Mapping[str, str | None] | None = None
) -> dict[str, str | None]:
    """Which token is the `bos_token`, `eos_token`, `pad_token` and `unk_token`; None where there is none.

    The first of these that names a token decides: the user (`chosen`), a tokenizer_config.json (`known`), the names of
    the original's tokens, the post-processor's tokens in front of a text and behind it, the usual names.

    Raises:
        UserError: the vocabulary lacks a token that the user has chosen.
    """
    known = known or {}
    vocabulary, special = backend.get_vocab(), special_tokens(backend)
    picked = {role: token for role, token in (chosen or {}).items() if token is not None}
    for role, token in picked.items():
        if token not in vocabulary:
            raise UserError(
                f"--{role} {token!r}: the tokenizer has no such token; its special tokens are "
                f"{', '.join(special) or 'none'}"
            )
    begin: str | None
    end: str | None
    if is_original(backend):
        begin, end, pad, unknown = BOS, EOS, _first([PAD], vocabulary), _first([UNK], vocabulary)
    else:
        before, after = added_ids(backend)
        begin = backend.id_to_token(before[0]) if before else None
        end = backend.id_to_token(after[-1]) if after else _first(END_TOKENS, special)
        pad, unknown = _first(PAD_TOKENS, special), getattr(backend.model, "unk_token", None)
    roles = {"bos_token": begin, "eos_token": end, "pad_token": pad, "unk_token": unknown}
    roles |= {role: token for role, token in known.items() if token is not None} | picked
    # GPT-2's tokenizers in transformers have one token for all roles. A token that is not special stays text.
    if roles["unk_token"] == roles["eos_token"] or roles["unk_token"] not in special:
        roles["unk_token"] = None
    return roles | {"pad_token": roles["pad_token"] or roles["eos_token"]}


def role_notes(
    backend: Tokenizer,
    known: Mapping[str, str | None] | None,
    chosen: Mapping[str, str | None],
    chat_template: str | None = None,
) -> Iterator[str]:
    """Notes on the special tokens that the user did not choose; none for the original's tokenizer.

    Args:
        chat_template: what makes the prompts. An answer may end at a token that stands in it.
    """
    if is_original(backend):
        return
    roles, special = find_roles(backend, known), special_tokens(backend)
    before, after = added_ids(backend)
    if before and not chosen.get("bos_token"):
        yield f"{roles['bos_token']} begins a text: the tokenizer puts it in front"
    elif (begin := _first(BEGIN_TOKENS, special)) and not chosen.get("bos_token"):
        yield f"the tokenizer does not put {begin} in front of a text; --bos_token {begin!r} would"
    if chat_template is None and all(backend.token_to_id(token) is not None for token in (IM_START, IM_END)):
        yield f"there are {IM_START} and {IM_END}; for a model that was fine-tuned on ChatML: --chat_template chatml"
    if not chosen.get("eos_token"):
        used = (roles["eos_token"], *(token for token in END_TOKENS if token in (chat_template or "")))
        others = [token for token in END_TOKENS if token in special and token not in used]
        if after:
            yield f"{roles['eos_token']} ends a text: the tokenizer puts it behind"
        if others:
            yield f"{roles['eos_token']} ends a text, not {' or '.join(others)}; --eos_token chooses another"


def unknown_notes(backend: Tokenizer) -> Iterator[str]:
    """A note on a tokenizer that has no token for unknown words or characters."""
    try:
        if not backend.encode("Ж☃", add_special_tokens=False).ids:
            yield "words and characters that the tokenizer does not know are silently left out of a text"
    except Exception:  # tokenizers raises nothing narrower
        yield "the tokenizer has no token for words and characters that it does not know: a text with one is an error"


def special_tokens(backend: Tokenizer) -> list[str]:
    return [token.content for token in backend.get_added_tokens_decoder().values() if token.special]


def _first(names: Iterable[str], tokens: Container[str]) -> str | None:
    return next((name for name in names if name in tokens), None)


def added_ids(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts in front of a text, and those that it puts behind."""
    if backend.post_processor is None:
        return [], []
    bare = backend.encode(_known_text(backend), add_special_tokens=False)
    ids = backend.post_process(bare).ids
    for start in range(len(ids) - len(bare.ids) + 1):
        if bare.ids and ids[start : start + len(bare.ids)] == bare.ids:
            return ids[:start], ids[start + len(bare.ids) :]
    return [], []


def _known_text(backend: Tokenizer) -> str:
    """A short text that gives at least one token; "" if there is none."""
    for text in ("a", *sorted(backend.get_vocab(), key=len)[:1000]):
        try:
            if backend.encode(text, add_special_tokens=False).ids:
                return text
        except Exception:  # a character that the vocabulary lacks; tokenizers raises nothing narrower
            continue
    return ""


def begin_ids(backend: Tokenizer, roles: Mapping[str, str | None]) -> list[int]:
    """The ids in front of each text: the post-processor's, or the `bos_token` if it is not among them."""
    before = added_ids(backend)[0]
    begin = roles.get("bos_token")
    first = None if begin is None else backend.token_to_id(begin)
    return before if first is None or first in before else [first]


def _drop_end(backend: Tokenizer, before: list[int]) -> None:
    """Let the post-processor put these ids in front of a text and nothing behind it: a model continues the text."""
    if added_ids(backend) == (before, []):
        return
    tokens = [(backend.id_to_token(number), number) for number in before]
    names = [token for token, _ in tokens]
    template = processors.TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", *names, "$B"], special_tokens=tokens
    )
    trim = _trimming(backend)
    backend.post_processor = processors.Sequence([trim, template]) if trim else template


def _trimming(backend: Tokenizer) -> processors.ByteLevel | None:
    """The part of the post-processor that leaves the spaces out of the offsets of tokens."""
    if backend.post_processor is None:
        return None
    state = json.loads(backend.post_processor.__getstate__())
    for part in state.get("processors", [state]):
        if part.get("trim_offsets"):
            return processors.ByteLevel(add_prefix_space=part["add_prefix_space"], trim_offsets=True)
    return None


def check_fits(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, tokenizer_path: str | Path, model_path: str | Path
) -> None:
    """Check that every id has an embedding.

    Raises:
        UserError: the tokenizer has an id for which the model has no embedding.
    """
    ids = set(tokenizer.get_vocab().values())
    if max(ids, default=0) >= vocab_size:
        has = f"{len(ids)} tokens" if len(ids) > vocab_size else f"a token with the id {max(ids)}"
        raise UserError(
            f"{tokenizer_path}: has {has}, but {model_path} has embeddings for {vocab_size}: "
            "they do not belong together"
        )


def check_ids(backend: Tokenizer, tokenizer_path: str) -> None:
    """Check that no two tokens have the same id: the library would lose one of them when it copies the tokenizer.

    Raises:
        UserError: two tokens have the same id.
    """
    by_id: dict[int, str] = {}
    for token, number in backend.get_vocab().items():
        if (other := by_id.setdefault(number, token)) != token:
            raise UserError(f"{tokenizer_path}: has two tokens with the id {number}, {other!r} and {token!r}")


def unused_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """The ids below `vocab_size` that no token has: rows that pad the embedding, and holes in the vocabulary."""
    used = set(tokenizer.get_vocab().values())
    return [number for number in range(vocab_size) if number not in used]


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads; `add_eos_token=True` works on them too."""
    tokenizer.save_pretrained(folder)
    if tokenizer.add_bos_token:
        # The library does not save `add_bos_token`. With `add_eos_token=True` it makes a new template, and would drop
        # `[BOS]`. It reads this file last.
        (folder / "special_tokens_map.json").write_text(json.dumps({"add_bos_token": True}) + "\n", encoding="utf-8")
    remember_ours(folder / "tokenizer.json")
