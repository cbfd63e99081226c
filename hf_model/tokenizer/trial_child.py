"""Use an untrusted tokenizer or chat template. `trial.py` runs this file as a script, in a process of its own.

The script's arguments are `tokenizer` or `template`, and the folders that hold the libraries. It reads from standard
input the tokenizer's JSON, or JSON with the `template` and the `special` tokens by role. It writes JSON objects to
standard output, one a line: `doing` before each step, then `passed` or what was wrong. If a step takes too much time or
memory, the process ends; the last line then tells the step.

The script imports nothing of this project, so it starts in a twentieth of a second (for a template, in half a second).
"""

import json
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

if __name__ == "__main__":
    # Python runs isolated from the user's own paths, where the packages may be. In front, so that the versions are the
    # same as in the process that asks; for these imports.
    sys.path[:0] = sys.argv[2:]

from tokenizers import Tokenizer

if __name__ == "__main__":
    if sys.argv[1] == "template":
        from jinja2.exceptions import SecurityError
        from transformers.utils.chat_template_utils import render_jinja_template
    else:
        del sys.path[: len(sys.argv) - 2]

try:
    import resource
except ImportError:  # Windows: the parent's timeout is the only limit
    resource = None  # type: ignore[assignment]

MEMORY = 2**30  # bytes of address space, beside those for the JSON
MEMORY_FOR_A_BYTE = 32  # of the JSON
STEP_SECONDS = 5  # of computing
ALL_SECONDS = 10
LOAD_BYTES_A_SECOND = 2**21  # what the slowest machine reads
LENGTH = 20_000  # bytes of a text
SHORT = 2_000  # bytes of a text of the tokenizer's own characters
OWN_TEXTS = 48
GROWTH = 32  # times: NFKC makes eleven bytes of one, and a byte-level alphabet two bytes of one
AROUND = 1_000  # tokens or bytes that may be added to a text, however short
MAX_ID = 2**24  # the library counts up to the largest id when it saves a tokenizer
MAX_TOKEN = 2**16  # characters
MAX_PADDED = 2**20  # tokens
QUESTION = "What is the capital of France?"
MAX_ADDED = 2**20  # bytes that a chat template may add to a conversation
TURNS = 50


class RefusedError(Exception):
    pass


def set_limit(name: str, most: float, *, is_final: bool) -> None:
    """Limit the process. A stricter limit that holds already stays; a final one cannot be raised again."""
    if resource is None:
        return
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    limit = int(most) if hard == resource.RLIM_INFINITY else min(int(most), hard)
    with suppress(ValueError, OSError):  # macOS does not limit the address space
        resource.setrlimit(kind, (limit, limit if is_final else hard))


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


def begin(step: str, seconds: float = STEP_SECONDS) -> None:
    """Say what comes next, which may compute for about so many seconds."""
    tell(doing=step)
    set_limit("RLIMIT_CPU", time.process_time() + seconds + 1, is_final=False)


def check_sizes(content: dict, tokenizer: Tokenizer) -> None:
    """Refuse sizes that no text would show."""
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values(), default=0) >= MAX_ID:
        raise RefusedError(f"a token has the id {max(vocabulary.values())}, more than {MAX_ID}")
    if longest := max(map(len, vocabulary), default=0) // MAX_TOKEN:
        raise RefusedError(f"a token is {longest * MAX_TOKEN} characters long or more")
    padding = content.get("padding") or {}
    strategy = padding.get("strategy")
    fixed = strategy.get("Fixed", 0) if isinstance(strategy, dict) else 0
    if max(fixed, padding.get("pad_to_multiple_of") or 0) > MAX_PADDED:
        raise RefusedError(f"its padding makes every text more than {MAX_PADDED} tokens long")


def runs() -> dict[str, str]:
    """Texts that make patterns backtrack and normalizers multiply. At the end of each run a pattern may fail."""
    characters = {
        "one letter": "a",
        "spaces": " ",
        "line breaks": "\n",
        "digits": "1",
        "one sign": "=",
        "letters with accents": "é",
        "combining accents": "\u0301",
        "Chinese characters": "漢",
        "emoji": "🙂",
        "ligatures": "\ufdfa",  # eighteen letters in NFKC
    }
    texts = {name: one * (LENGTH // len(one.encode())) + "!x" for name, one in characters.items()}
    words = "".join("a" * length + " " for length in (10, 100, 1000, 3000, 5000))
    mixed = "It's 12 o'clock,\n\n\t(ÜberCamelCase) 漢字 e\u0301 🙂 \u00a0\ufdfa -- x_y  "
    texts["words of all lengths"] = words * (LENGTH // len(words))
    texts["runs of every sign of ASCII"] = "".join(chr(number) * 60 for number in range(32, 127))
    texts["characters of every kind"] = mixed * (LENGTH // len(mixed.encode()))
    return texts


def own_texts(content: dict, tokenizer: Tokenizer) -> dict[str, str]:
    """Runs of the characters and texts in the tokenizer's own parts: a part may act on nothing else."""
    found: dict[str, None] = {}  # in the order in which they are found
    parts = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, list):
            parts += part
        elif isinstance(part, str) and part:
            found.update(dict.fromkeys([*re.findall(r"\w+", part), part, *part][:SHORT]))
    alphabet = sorted(token for token in tokenizer.get_vocab() if len(token) == 1)
    found = dict.fromkeys([*list(found)[:OWN_TEXTS], *alphabet[:: len(alphabet) // 16 + 1]])
    texts = {f"{one[:20]!r} again and again": one * (SHORT // len(one.encode()) + 1) + "!x" for one in found}
    if special := list(tokenizer.get_added_tokens_decoder().values())[:SHORT]:
        row = "".join(f"a{token.content}" for token in special)
        texts["its added tokens"] = row * (SHORT // len(row) + 1)
    return texts


def size(text: str) -> int:
    return len(text.encode(errors="replace"))


def use(tokenizer: Tokenizer, name: str, text: str) -> None:
    """Encode and decode a text. An error of the library, for instance on an unknown character, does no harm."""
    most = GROWTH * size(text) + AROUND
    what = f"{size(text):,} bytes of {name}" if text else "an empty text"
    begin(f"encoding {what}")
    try:
        prepared = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        if size(prepared) > most:
            raise RefusedError(f"its normalizer makes {size(prepared):,} bytes out of {what}")
        if tokenizer.pre_tokenizer:
            pieces = tokenizer.pre_tokenizer.pre_tokenize_str(prepared)
            if (length := sum(size(piece) for piece, _ in pieces)) > most:
                raise RefusedError(f"its pre_tokenizer makes {length:,} bytes out of {what}")
        encoding = tokenizer.encode(text)
        if len(encoding.ids) > most:
            raise RefusedError(f"it makes {len(encoding.ids):,} tokens out of {what}")
        begin(f"decoding {what}")
        decoded = tokenizer.decode(encoding.ids, skip_special_tokens=False)
        if size(decoded) > GROWTH * (size(text) + sum(map(size, encoding.tokens))) + AROUND:
            raise RefusedError(f"it decodes {what} to {size(decoded):,} bytes")
    except (RefusedError, MemoryError):
        raise
    except Exception:  # tokenizers raises nothing narrower
        return


def set_limits(text: str, seconds: float) -> None:
    """Limit the process for good. `seconds` is how long reading the text may take."""
    set_limit("RLIMIT_CORE", 0, is_final=True)
    set_limit("RLIMIT_AS", MEMORY + MEMORY_FOR_A_BYTE * len(text), is_final=True)
    set_limit("RLIMIT_CPU", time.process_time() + seconds + ALL_SECONDS, is_final=True)


def try_tokenizer(text: str) -> None:
    loading = STEP_SECONDS + len(text) / LOAD_BYTES_A_SECOND
    set_limits(text, loading)
    begin("loading it", loading)
    content = json.loads(text)
    tokenizer = Tokenizer.from_str(text)
    check_sizes(content, tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for name, one in {"": "", "a letter": "a", **runs(), **own_texts(content, tokenizer)}.items():
        use(tokenizer, name, one)


def chats() -> dict[str, list[dict[str, str]]]:
    """Conversations, the simplest first: a template may refuse any but that one."""
    asked, answered = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Paris"}
    system = {"role": "system", "content": "Be brief."}
    hard = {name: [{"role": "user", "content": text}] for name, text in runs().items()}
    return {
        "a question": [asked],
        "a question with an input": [asked | {"input": "France"}],
        "an answer": [asked, answered],
        "a second question": [asked, answered, asked],
        "a system message": [system, asked, answered, asked],
        f"{TURNS} turns": [asked, answered] * TURNS + [asked],
        **hard,
    }


def conversations(question: str, answer: str, earlier: str, more: str) -> dict[str, tuple[list[dict[str, str]], bool]]:
    """The conversations that show what a chat template does, and whether the model answers.

    `prompt.py` renders them too, in the user's process. With words drawn at random, no template can tell the two apart.
    """
    asked, answered = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {
        "a question": ([asked], True),
        "a question alone": ([asked], False),
        "an answer": ([asked, answered], False),
        "an input": ([asked | {"input": more}], True),
        "a second question": ([{"role": "user", "content": earlier}, answered, asked], True),
    }


def renderings() -> Iterator[tuple[str, list[dict[str, str]], bool]]:
    """The name of each conversation to try, its messages, and whether the model answers."""
    for name, messages in chats().items():
        for is_prompt in (True, False):
            yield name, messages, is_prompt
    for name, how in conversations(*(secrets.token_hex(8) for _ in range(4))).items():
        yield f"{name} in random words", *how


def try_template(text: str) -> None:
    """Render a chat template. Its own errors do no harm, but to the simplest conversation."""
    request = json.loads(text)
    set_limits(text, STEP_SECONDS)
    for name, messages, is_prompt in renderings():
        begin(f"rendering {name}")
        how = {"chat_template": request["template"], "add_generation_prompt": is_prompt, **request["special"]}
        try:
            rendered = render_jinja_template([messages], **how)[0][0]
        except SecurityError as error:
            raise RefusedError(f"it reaches for what no template needs ({error})") from None
        except MemoryError:
            raise
        except Exception:
            if name == "a question":
                raise
            continue
        if size(rendered) > GROWTH * size(json.dumps(messages, ensure_ascii=False)) + MAX_ADDED:
            raise RefusedError(f"it makes {size(rendered):,} bytes out of {name}")
        if name == "a question" and QUESTION not in rendered:
            raise RefusedError("it leaves out the user's question")


def main() -> None:
    try:
        text = sys.stdin.buffer.read().decode()
        try_template(text) if sys.argv[1] == "template" else try_tokenizer(text)
        tell(passed=True)
    except RefusedError as error:
        tell(refused=str(error))
    except MemoryError:
        tell(memory=True)
    except Exception as error:  # of the loading: no JSON, or none of a tokenizer; or of a template
        tell(unreadable=str(error))
    except BaseException as error:
        tell(panic=str(error))  # of Rust: pyo3's PanicException, a class that cannot be imported


if __name__ == "__main__":
    main()
