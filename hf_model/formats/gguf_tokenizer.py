"""A tokenizer as GGUF stores it: byte-level BPE, or single characters."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_model.errors import UserError
from hf_model.formats.cards import code
from hf_model.tokenizer import chat_template, end_ids, end_text

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType, without its import
NO_MERGES = ["<none> <none>"]  # llama.cpp needs at least one; this one never applies
DEFAULT_END = 11  # the token that llama.cpp takes for the end of text if a byte-level vocabulary names none


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer's entries in a GGUF file."""

    model: str
    """`"gpt2"` is byte-level BPE; `"rwkv"` takes the longest match in a list of byte strings, here characters."""
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    """The ids of `bos`, `eos`, `unk`, `pad` and `eot`, the end of an answer, as far as they exist and differ."""
    adds_bos: bool
    merges: list[str] = field(default_factory=list)
    chat_template: str = ""
    notes: list[str] = field(default_factory=list)


def to_gguf(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> GgufTokenizer:
    """Express a tokenizer in llama.cpp's terms, with a token for each row of an embedding of `vocab_size` rows.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    _check_plain(parts)
    is_byte_level = _is_byte_level(parts)
    if not is_byte_level:
        _check_characters(parts)
    tokens = [f"<unused{index}>" if is_byte_level else rf"\xff\xff{index}" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, token_id in parts["model"]["vocab"].items():
        tokens[token_id] = token if is_byte_level else _escaped(token)
        types[token_id] = NORMAL
    for added in parts["added_tokens"]:
        tokens[added["id"]] = added["content"] if is_byte_level else _escaped(added["content"])
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    special = {kind: token_id for kind, token_id in ids.items() if token_id is not None}
    notes = []
    if (ends := end_ids(tokenizer)) and ends[0] != special.get("eos"):
        special["eot"] = ends[0]
    if end := end_text(tokenizer):
        notes.append(f"An answer ends at the text {code(end)}: give it to llama.cpp as a stop text.")
    if is_byte_level and "eos" not in special:
        special["eos"], note = _end(tokens, types)
        notes.append(note)
    return GgufTokenizer(
        model="gpt2" if is_byte_level else "rwkv",
        tokens=tokens,
        types=types,
        special=special,
        adds_bos=_adds_bos(tokenizer, is_byte_level),
        merges=[m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]] or NO_MERGES,
        chat_template=_plain_template(tokenizer),
        notes=notes,
    )


def _check_plain(parts: dict[str, Any]) -> None:
    """Check that nothing but the vocabulary changes a text: GGUF cannot express such parts."""
    model = parts["model"]
    if model["type"] != "BPE":
        raise UserError(f"llama.cpp's GPT-2 has no {model['type']} tokenizer: BPE or single characters only")
    if parts["normalizer"] is not None:
        raise UserError(f"llama.cpp has no normalizer for this tokenizer's {parts['normalizer']['type']}")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(setting):
            raise UserError(f"llama.cpp has no word for this tokenizer's {setting} ({model[setting]})")
    for added in parts["added_tokens"]:
        if trim := next((name for name in ("lstrip", "rstrip", "single_word") if added[name]), None):
            raise UserError(f"llama.cpp has no word for {trim} of this tokenizer's {added['content']!r}")


def _is_byte_level(parts: dict[str, Any]) -> bool:
    pre = parts["pre_tokenizer"]
    if pre is not None and pre["type"] == "ByteLevel":
        if pre["add_prefix_space"] or not pre["use_regex"]:
            raise UserError("llama.cpp splits and spaces a text as GPT-2 does, and this tokenizer does it differently")
        return True
    if pre is None or not parts["model"]["merges"]:
        return False
    raise UserError(f"llama.cpp splits a text as GPT-2 does, and this tokenizer by {pre['type']}")


def _check_characters(parts: dict[str, Any]) -> None:
    if parts["model"]["merges"]:
        raise UserError("llama.cpp has no BPE of characters, only of bytes, and this tokenizer has no byte-level split")
    added = {token["content"] for token in parts["added_tokens"]}
    if longer := next((token for token in parts["model"]["vocab"] if len(token) != 1 and token not in added), None):
        raise UserError(f"llama.cpp would take {longer!r} for one token, which this tokenizer never makes")


def _escaped(token: str) -> str:
    r"""A token as llama.cpp reads its byte strings: \x00 stands for a byte that is not plain ASCII."""
    return "".join(chr(b) if 32 <= b < 127 and chr(b) not in "\\'\"" else f"\\x{b:02x}" for b in token.encode())


def _end(tokens: list[str], types: list[int]) -> tuple[int, str]:
    """An id for the end of text in a vocabulary without one, and a note for the user."""
    if UNUSED in types:
        return types.index(UNUSED), "The vocabulary has no end of text; a padding row stands for it."
    end = min(DEFAULT_END, len(tokens) - 1)
    token = code(tokens[end])
    return end, f"The vocabulary has no end of text, and llama.cpp takes the token {token} for it: add `--ignore-eos`."


def _adds_bos(tokenizer: PreTrainedTokenizerFast, is_byte_level: bool) -> bool:
    """Whether `tokenizer(text)` puts the beginning of text in front. llama.cpp cannot add anything else."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    if ids == plain:
        return False
    if not is_byte_level or ids != [tokenizer.bos_token_id, *plain]:
        raise UserError(
            f"llama.cpp cannot add what this tokenizer adds to a text ({tokenizer.convert_ids_to_tokens(ids)})"
        )
    return True


def _plain_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The chat template without the tags that mark the trained text: not every engine reads them."""
    template = chat_template(tokenizer) or ""
    for tag, neutral in (("generation", "if true"), ("endgeneration", "endif")):
        template = re.sub(rf"(\{{%[-+]?)\s*{tag}\s*([-+]?%\}})", rf"\1 {neutral} \2", template)
    # Where a vocabulary names no such token, llama.cpp gives the template the text of token 11.
    for name in ("bos_token", "eos_token"):
        if name in template and getattr(tokenizer, name) is None:
            template = f'{{%- set {name} = "" -%}}\n{template}'
    return template
