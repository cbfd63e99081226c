"""What a tokenizer's JSON may ask for, before the library builds it: work in proportion to the text, and no more.

A tokenizer of a stranger's can multiply a text (a normalizer that replaces one letter by a million), take forever over
it (a regular expression that backtracks), or fill memory with padding. Byte-level BPE tokenizers need none of that, so
only parts that cannot do it are let through: that is less to get wrong than to run the library with limits.
"""

import re
from typing import Any

MAX_TOKENS = 2**20
MAX_TOKEN_LENGTH = 1000
MAX_PARTS = 16  # in a chain of normalizers, pre-tokenizers, post-processors or decoders
MAX_AFFIX = 8  # characters that a part adds to a text, or puts in the place of one

# Parts that take no patterns, and go through a text once.
PLAIN_PARTS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer", "Nmt", "ByteLevel"),
    *("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Digits", "Punctuation", "UnicodeScripts"),
    *("CharDelimiterSplit", "Metaspace", "BPEDecoder", "WordPiece", "Fuse", "ByteFallback", "CTC"),
    *("BertProcessing", "RobertaProcessing"),
}
# Regular expressions of tokenizers that are in use: of GPT-2, of GPT-4 and its relatives, of Llama 3, of Qwen.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    *(_CL100K % digits for digits in ("", "{1,3}")),
    r"\s+",
    r"\n+",
    r" {2,}",
    r"\p{N}{1,3}",
}
NO_REPETITION = re.compile(r"[^*+?{}|()]*(\(\?s:\.\)|\(\?s\)\.)?")  # matched in one step for each character


def check_tokenizer(content: Any) -> None:
    """Refuse what a tokenizer of this family does not need and could do harm.

    Args:
        content: the parsed JSON of a `tokenizers` file.

    Raises:
        ValueError: says what.
    """
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("it has no model")
    _check_model(content["model"])
    _check_added(content.get("added_tokens") or [])
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        _check_parts(name, content.get(name))
    for name in ("truncation", "padding"):
        _check_lengths(name, content.get(name))


def _check_model(model: dict[str, Any]) -> None:
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        if not all(type(index) is int and 0 <= index < MAX_TOKENS for index in vocabulary.values()):
            raise ValueError("an id of its vocabulary is no id")
    elif isinstance(vocabulary, list):  # of Unigram
        vocabulary = [pair[0] if isinstance(pair, list) and pair else pair for pair in vocabulary]
    else:
        raise ValueError("it has no vocabulary")
    if len(vocabulary) > MAX_TOKENS or not all(map(_is_token, vocabulary)):
        raise ValueError("its vocabulary is too large, or a token of it is")
    merges = model.get("merges") or []
    if not isinstance(merges, list) or len(merges) > 2 * MAX_TOKENS:
        raise ValueError("its merges are no list of merges")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        _check_affix(name, model.get(name) or "")
    longest = model.get("max_input_chars_per_word", 0)
    if type(longest) is not int or longest > MAX_TOKEN_LENGTH:
        raise ValueError(f"it allows words of {longest!r} characters")


def _check_added(added: Any) -> None:
    if not isinstance(added, list) or len(added) > MAX_TOKENS:
        raise ValueError("its added tokens are no list of tokens")
    for token in added:
        if not isinstance(token, dict) or not _is_token(token.get("content")) or not token["content"]:
            raise ValueError("an added token is no token")
        if type(token.get("id")) is not int or not 0 <= token["id"] < MAX_TOKENS:
            raise ValueError("an added token's id is no id")


def _is_token(text: Any) -> bool:
    return isinstance(text, str) and len(text) <= MAX_TOKEN_LENGTH


def _check_parts(name: str, part: Any) -> None:
    """Check a part, and the parts of a chain one by one."""
    parts = [] if part is None else [part]
    checked = 0
    while parts:
        part = parts.pop()
        checked += 1
        if not isinstance(part, dict) or checked > MAX_PARTS:
            raise ValueError(f"its {name} is no chain of at most {MAX_PARTS} parts")
        kind = part.get("type")
        if kind == "Sequence":
            inner = [part.get(key) for key in ("normalizers", "pretokenizers", "processors", "decoders") if key in part]
            if len(inner) != 1 or not isinstance(inner[0], list):
                raise ValueError(f"its {name} is no chain of at most {MAX_PARTS} parts")
            parts += inner[0]
        elif kind in ("Split", "Replace"):
            _check_pattern(name, part)
        elif kind in ("Prepend", "Strip"):
            _check_affix(name, part.get("prepend") or "")
        elif kind == "TemplateProcessing":
            _check_template(part)
        elif kind not in PLAIN_PARTS:
            raise ValueError(f"a {name} of the unknown or unneeded type {kind!r}")
        for affix in ("prefix", "suffix", "replacement", "cleanup"):
            if isinstance(part.get(affix), str):
                _check_affix(name, part[affix])


def _check_pattern(name: str, part: dict[str, Any]) -> None:
    """A pattern must be a plain text or one of those known to take one pass, and what replaces it no longer than it."""
    pattern = part.get("pattern")
    text, expression = (pattern.get("String"), pattern.get("Regex")) if isinstance(pattern, dict) else (None, None)
    if isinstance(expression, str) and (expression in KNOWN_PATTERNS or _is_simple(expression)):
        longest = 1
    elif isinstance(text, str) and text:
        longest = max(len(text), 1)
    else:
        raise ValueError(f"a {name} with the pattern {str(expression or text)[:80]!r}, which is not known to be quick")
    replacement = part.get("content", "")
    if not isinstance(replacement, str) or len(replacement) > longest:
        raise ValueError(f"a {name} that makes a text longer")


def _is_simple(expression: str) -> bool:
    return len(expression) <= MAX_TOKEN_LENGTH and bool(expression) and NO_REPETITION.fullmatch(expression) is not None


def _check_template(part: dict[str, Any]) -> None:
    """A template must hold each text once: another could repeat it."""
    for name, sequences in (("single", ["A"]), ("pair", ["A", "B"])):
        items = part.get(name)
        if not isinstance(items, list) or len(items) > MAX_PARTS:
            raise ValueError("its post_processor is no template")
        texts = [item["Sequence"].get("id") for item in items if isinstance(item, dict) and "Sequence" in item]
        if sorted(map(str, texts)) != sequences:
            raise ValueError("its post_processor repeats a text, or leaves it out")
    special = part.get("special_tokens")
    if not isinstance(special, dict) or len(special) > MAX_PARTS:
        raise ValueError("its post_processor is no template")
    for token in special.values():
        if (
            not isinstance(token, dict)
            or len(token.get("ids") or []) > MAX_PARTS
            or len(token.get("tokens") or []) > MAX_PARTS
        ):
            raise ValueError("its post_processor is no template")


def _check_lengths(name: str, settings: Any) -> None:
    """Lengths that the library pads every text to."""
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise ValueError(f"its {name} is no {name}")
    strategy = settings.get("strategy")
    fixed = strategy.get("Fixed") if isinstance(strategy, dict) else 0
    for length in (fixed, settings.get("pad_to_multiple_of") or 0):
        if type(length) is not int or not 0 <= length <= 2**16:
            raise ValueError(f"its {name} makes every text {length!r} tokens long")


def _check_affix(name: str, text: Any) -> None:
    if not isinstance(text, str) or len(text) > MAX_AFFIX:
        raise ValueError(f"a {name} that makes a text longer")
