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
CHAINS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MAX_AFFIX = 8  # characters that a part adds to a text

MAX_GROWTH = 200  # of a text's bytes in UTF-8, by a whole chain of parts; those of the tokenizers in use stay below
MAX_NORMALIZED = 2**24  # bytes that a normalizer makes of added tokens, more than they have
MAX_WORD = 200  # characters of a word of WordPiece, whose time for one is that of its cube; BERT's is 100

# Parts that go through a text once, and how many times longer each can make it: in bytes, of the worst text, and in
# whichever chain it may stand. What a part puts in front of a piece counts in full, since a piece may be one byte.
GROWTH = {
    **dict.fromkeys(("NFC", "NFD"), 3),
    **dict.fromkeys(("NFKC", "NFKD"), 11),
    **dict.fromkeys(("Lowercase", "WordPiece", "BPEDecoder", "CTC"), 2),
    "BertNormalizer": 6,  # the accents apart, in lower case
    "ByteLevel": 4,  # two for each byte, two for a space in front
    "Metaspace": 6,  # three for each space, three in front
    **dict.fromkeys(("Strip", "StripAccents", "Nmt", "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Digits"), 1),
    **dict.fromkeys(("Punctuation", "UnicodeScripts", "CharDelimiterSplit", "Split", "Fuse", "ByteFallback"), 1),
    **dict.fromkeys(("BertProcessing", "RobertaProcessing", "TemplateProcessing"), 1),
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
    try:
        _check_model(content["model"])
        _check_added(content.get("added_tokens") or [])
        growth = {name: _check_parts(name, content.get(name)) for name in CHAINS}
        for name in ("truncation", "padding"):
            _check_lengths(name, content.get(name))
    except (TypeError, AttributeError):
        raise ValueError("a value in it is of the wrong type") from None
    for what, times in (
        ("normalizer and pre_tokenizer", growth["normalizer"] * growth["pre_tokenizer"]),  # one after the other
        ("decoder", growth["decoder"]),
    ):
        if times > MAX_GROWTH:
            raise ValueError(f"its {what} could make a text {times:.3g} times longer, more than {MAX_GROWTH}")
    normalized = sum(_size(token["content"]) for token in content.get("added_tokens") or [] if token.get("normalized"))
    if normalized * (growth["normalizer"] - 1) > MAX_NORMALIZED:  # the library normalizes and indexes them at once
        raise ValueError("its added tokens and its normalizer make too much of a small file")


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
    if type(longest) is not int or not 0 <= longest <= MAX_WORD:
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


def _check_parts(name: str, part: Any) -> float:
    """Check a part, and the parts of a chain one by one.

    Returns:
        How many times longer they can make a text, one after the other.
    """
    parts = [] if part is None else [part]
    checked, growth = 0, 1.0
    while parts:
        part = parts.pop()
        checked += 1
        if not isinstance(part, dict) or checked > MAX_PARTS:
            raise ValueError(f"its {name} is no chain of at most {MAX_PARTS} parts")
        kind = part.get("type")
        for affix in ("prefix", "suffix", "replacement", "cleanup", "prepend"):
            if isinstance(part.get(affix), str):
                _check_affix(name, part[affix])
        if kind == "Sequence":
            inner = [part.get(key) for key in ("normalizers", "pretokenizers", "processors", "decoders") if key in part]
            if len(inner) != 1 or not isinstance(inner[0], list):
                raise ValueError(f"its {name} is no chain of at most {MAX_PARTS} parts")
            parts += inner[0]
        elif kind == "Replace":
            growth *= _check_pattern(name, part)
        elif kind == "Prepend":
            growth *= 1 + _size(part["prepend"])
        elif isinstance(kind, str) and kind in GROWTH:
            growth *= GROWTH[kind]
        else:
            raise ValueError(f"a {name} of the unknown or unneeded type {kind!r}")
        if kind == "Split":
            _check_pattern(name, part)
        elif kind == "TemplateProcessing":
            _check_template(part)
    return growth


def _check_pattern(name: str, part: dict[str, Any]) -> float:
    """A pattern must be a plain text or one of those known to take one pass.

    Returns:
        How many times longer a text can become if `content` takes the place of what matches.
    """
    pattern, content = part.get("pattern"), part.get("content", "")
    text, expression = (pattern.get("String"), pattern.get("Regex")) if isinstance(pattern, dict) else (None, None)
    if not isinstance(content, str) or (text is not None and expression is not None):
        raise ValueError(f"a {name} without one pattern and one text")
    if isinstance(expression, str) and (expression in KNOWN_PATTERNS or _is_simple(expression)):
        return 1 + _size(content)  # it may match no text at all, before each character: then the text stays too
    if isinstance(text, str) and text:
        return max(1, _size(content) / _size(text))
    raise ValueError(f"a {name} with the pattern {str(expression or text)[:80]!r}, which is not known to be quick")


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


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
    # Each piece of a text that is cut up repeats the end of the one before.
    if 2 * (settings.get("stride") or 0) > (settings.get("max_length") or 0):
        raise ValueError(f"its {name} repeats most of a text")
    for length in (fixed, settings.get("pad_to_multiple_of") or 0):
        if type(length) is not int or not 0 <= length <= 2**16:
            raise ValueError(f"its {name} makes every text {length!r} tokens long")


def _check_affix(name: str, text: Any) -> None:
    if not isinstance(text, str) or len(text) > MAX_AFFIX:
        raise ValueError(f"a {name} that makes a text longer")
