"""Finds the tokenizer that `--tokenizer_path` names or, without a name, the one that a trainer left behind."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hf_model.errors import UserError, one_line, some_of
from hf_model.tokenizer.characters import (
    CHARACTERS,
    UNKNOWN,
    character_backend,
    characters_in,
    is_of_characters,
    read_json_characters,
    read_meta,
    special_character_backend,
)
from hf_model.tokenizer.files import (
    beginning,
    load_auto,
    read_tokenizer,
    read_word_pieces,
    tokenizer_of,
)
from hf_model.tokenizer.gpt2_files import END_OF_TEXT, find_pair, is_by_id, other_half, read_pair, tiktoken_pair
from hf_model.tokenizer.prompt import BOS, CHAT_TEMPLATE, EOS, PAD, UNK, chat_template
from hf_model.tokenizer.ranks import MINBPE, minbpe_json, tiktoken_json
from hf_model.tokenizer.sentence_pieces import sentence_pieces_json
from hf_model.tokenizer.templates import check_template, check_tokens, read_template
from hf_model.tokenizer.wrap import (
    begin_ids,
    check_fits,
    check_ids,
    find_roles,
    role_notes,
    switch_off,
    unknown_notes,
    wrap,
)
from hf_model.trainers import llm_c

AUTO = "auto"  # in place of a path: look where the trainer put it
PADDED_TO = 128  # trainers pad a vocabulary to a multiple of 8, 64 or 128
GPT2 = "gpt2"
GPT2_SIZES = (50257, 50304)  # the encoding's own size, and nanoGPT's padded one for training from scratch
GPT2_REPOSITORIES = ("openai-community/gpt2", GPT2)
ORIGINAL = Path("data/tokenizer/custom_gpt_tokenizer.json")
HUB_SECONDS = 5
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")
PICKLED_ENCODING = (
    "is a pickled encoding of tiktoken, and a pickle can run code: it was not opened. If you trust it, run "
    "`pip install tiktoken blobfile` and, in its folder, "
    '`python -c "import pickle; from transformers.integrations.tiktoken import convert_tiktoken_to_fast; '
    "convert_tiktoken_to_fast(pickle.load(open('tokenizer.pkl', 'rb')), 'tokenizer')\"`; "
    "then give tokenizer/tokenizer.json"
)
SPECIAL_TOKENS = (END_OF_TEXT, BOS, EOS, PAD, UNK)


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model that helps to find its tokenizer, and to check that the tokenizer fits."""

    path: Path
    vocab_size: int
    block_size: int
    dataset: str | None = None
    """nanoGPT's name of its data folder; None if the checkpoint does not tell."""


@dataclass(frozen=True)
class FoundTokenizer:
    """A tokenizer, where it was taken from, and how its source encodes."""

    tokenizer: PreTrainedTokenizerFast
    taken: str
    """The file, files or name."""
    encode: Callable[[str], list[int]]
    """The ids that `tokenizer(text)` must give. The source computes them; a written folder is compared with them."""
    why: str = ""
    """How the tokenizer was found; empty if the user named it."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: what was changed or guessed."""

    @property
    def unit(self) -> str:
        return "characters" if is_of_characters(self.tokenizer) else "tokens"


@dataclass(frozen=True)
class Choices:
    """The user's choices: the kind of prompts, and the special token of each role."""

    raw: bool = False
    chat_template: str | None = None
    """In Jinja."""
    roles: Mapping[str, str | None] = field(default_factory=dict)


def find_tokenizer(
    tokenizer_path: str | Path | None,
    model: ModelInfo,
    *,
    characters_of: str | Path | None = None,
    raw: bool = False,
    instructions: bool = False,
    chat_template: str | Path | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
) -> FoundTokenizer:
    """Find the tokenizer that a path or a name stands for.

    Args:
        tokenizer_path: a `tokenizers` JSON, nanoGPT's meta.pkl, a JSON of characters, either of GPT-2's two files,
            WordPiece's vocab.txt, SentencePiece's or minbpe's .model, tiktoken's ranks, a folder of any of them,
            `"gpt2"`, a folder or Hub name that AutoTokenizer knows; or `"auto"`, to look where the trainer put it.
        characters_of: the training text of a model of characters, in place of a path.
        raw: the model's prompts are raw text, whatever special tokens there are.
        instructions: the model's prompts are instructions, whatever the special tokens are called. By default they are
            if the vocabulary has `[BOS]` and `[EOS]`.
        chat_template: what makes the prompts: `"alpaca"`, `"chatml"`, or a file of Jinja. None keeps the tokenizer's
            own, if it has one.
        bos_token, eos_token, pad_token: the token that is put in front of each text, the one that ends an answer, and
            the one that fills up the rows of a batch; None keeps the tokenizer's own.

    Raises:
        UserError: there is no such file or name, it is not a tokenizer that can be used, it lacks a chosen token, it
            does not fit the model, or the chat template cannot be used.
    """
    template = CHAT_TEMPLATE if instructions else None if chat_template is None else read_template(chat_template)
    choices = Choices(raw, template, {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token})
    if characters_of is not None:
        found = _of_training_text(Path(characters_of), model, choices)
    elif tokenizer_path is None or str(tokenizer_path) == AUTO:
        found = _found(model, choices)
    else:
        found = _named(tokenizer_path, model, choices)
    check_fits(found.tokenizer, model.vocab_size, found.taken, model.path)
    check_tokens(found.tokenizer, found.taken)
    check_template(found.tokenizer, found.taken if chat_template is None else chat_template)
    return found


def _found(model: ModelInfo, choices: Choices) -> FoundTokenizer:
    """The tokenizer in one of the places where trainers put it; otherwise `gpt2`, if the vocabulary has its size."""
    looked = []
    for path, why in _places(model):
        if path.is_file():
            return replace(_named(path, model, choices), why=why)
        looked.append(str(path))
    if model.vocab_size in GPT2_SIZES:
        return replace(_named(GPT2, model, choices), why=f"a vocabulary of {model.vocab_size} is GPT-2's")
    if ORIGINAL.is_file():
        return _named(ORIGINAL, model, choices)
    data = f", nor {looked[-1]}" if model.dataset else ""
    raise UserError(
        f"{model.path}: there is no tokenizer beside it{data}, nor {ORIGINAL}: "
        "give --tokenizer_path (a tokenizer JSON, nanoGPT's meta.pkl, gpt2, a folder) or, for a model of characters, "
        "--characters_of its training text"
    )


def _places(model: ModelInfo) -> Iterator[tuple[Path, str]]:
    """The places to look in, each with the reason to report."""
    beside = model.path.parent
    for name in (ORIGINAL.name, "tokenizer.json", "meta.pkl", "tokenizer.model"):
        yield beside / name, "found beside the checkpoint"
    if pair := find_pair(beside):
        yield pair[0], "found beside the checkpoint"
    # The name comes from the checkpoint, maybe a stranger's: only paths inside data/ are allowed.
    if model.dataset and not Path(model.dataset).is_absolute() and ".." not in Path(model.dataset).parts:
        for root in (beside.parent, beside.parent.parent, Path()):
            yield root / "data" / model.dataset / "meta.pkl", "the checkpoint names this data"


def _named(source: str | Path, model: ModelInfo, choices: Choices) -> FoundTokenizer:
    """The tokenizer of a file, a folder or a name."""
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, model, choices)
    if not path.exists():
        return _of_name(str(source), model, choices)
    start = beginning(path)
    if pair := find_pair(path):
        return _of_pair(pair, f"{pair[0]} and {pair[1].name}", model, choices)
    if (ids := read_json_characters(path)) is not None:
        return _of_json_characters(ids, path, model, choices)
    if other_half(path) and is_by_id(path):
        raise UserError(f"{path}: maps ids to texts, as tokenizers written by hand do: save it with `tokenizers`")
    if other := other_half(path):
        raise UserError(f"{path}: is half of a vocabulary: its other file, {other}, is not beside it")
    if path.suffix in (".pkl", ".pickle") or start.startswith(b"\x80"):
        if b"tiktoken" in start:
            raise UserError(f"{path}: {PICKLED_ENCODING}")
        return _of_characters(read_meta(path), str(path), model, choices)
    backend, known, notes = _read(path, start)
    return _of_backend(backend, str(path), model, choices, known, notes)


def _read(path: Path, start: bytes) -> tuple[Tokenizer, Mapping[str, str | None], tuple[str, ...]]:
    """The tokenizer in a file whose first bytes are `start`, its special tokens by role, and notes."""
    if path.name.endswith("vocab.txt"):
        backend, note = read_word_pieces(path)
        return backend, {}, (note,)
    if path.suffix == ".txt":
        raise UserError(f"{path}: is no tokenizer; the training text of a model of characters goes to --characters_of")
    if start.startswith(MINBPE.encode()):
        return tokenizer_of(minbpe_json(path), path), {}, ()
    if TIKTOKEN_LINE.match(start):
        content, note = tiktoken_json(path)
        return tokenizer_of(content, path), {}, (note,)
    if int.from_bytes(start[:4], "little") == llm_c.TOKENIZER:
        raise UserError(f"{path}: is a tokenizer of llm.c, which is GPT-2's: give --tokenizer_path gpt2")
    if path.suffix == ".model":
        content, end, notes = sentence_pieces_json(path)
        return tokenizer_of(content, path), {"eos_token": end}, notes
    return read_tokenizer(path), {}, ()


def _of_folder(folder: Path, model: ModelInfo, choices: Choices) -> FoundTokenizer:
    if (folder / "tokenizer_config.json").is_file():
        return _of_auto_tokenizer(str(folder), str(folder), model, choices)
    for name in ("tokenizer.json", ORIGINAL.name, "meta.pkl", "tokenizer.model"):
        if (folder / name).is_file():
            return _named(folder / name, model, choices)
    if pair := find_pair(folder):
        return _named(pair[0], model, choices)
    try:
        return _of_auto_tokenizer(str(folder), str(folder), model, choices)
    except UserError:
        raise UserError(
            f"{folder}: cannot be read as a tokenizer: AutoTokenizer does not know it, and it holds no tokenizer.json, "
            "no meta.pkl, no tokenizer.model, and no vocab.json with merges.txt"
        ) from None


def _of_name(name: str, model: ModelInfo, choices: Choices) -> FoundTokenizer:
    """A tokenizer in transformers' or tiktoken's cache, or on the Hub."""
    repositories = GPT2_REPOSITORIES if name in GPT2_REPOSITORIES else (name,)
    for repository in repositories:
        try:
            return _of_auto_tokenizer(repository, f"{name}, from transformers' cache", model, choices, is_local=True)
        except UserError:
            continue
    if name in GPT2_REPOSITORIES and (pair := tiktoken_pair()):
        return _of_pair(pair, f"{name}, from tiktoken's cache", model, choices)
    try:
        _check_hub()
        return _of_auto_tokenizer(repositories[0], f"{name}, from the Hub", model, choices)
    except UserError as error:
        if name not in GPT2_REPOSITORIES:
            raise UserError(
                f"{name}: there is no such file or folder, nor a tokenizer of that name ({error})"
            ) from None
        raise UserError(
            f"{name}: is neither in transformers' cache nor in tiktoken's ({one_line(error, 100)}); where there is a "
            f"network, run `hf download {GPT2_REPOSITORIES[0]} tokenizer.json --local-dir gpt2-tokenizer`, and give "
            "that folder with --tokenizer_path"
        ) from None


def _check_hub() -> None:
    """Find out in seconds whether the Hub answers: the library itself would retry for a minute."""
    if constants.HF_HUB_OFFLINE:
        raise UserError("the Hub is switched off by HF_HUB_OFFLINE")
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # the class depends on the library that makes the requests
        raise UserError(f"the Hub cannot be reached: {error}") from None


def _of_auto_tokenizer(
    name: str, taken: str, model: ModelInfo, choices: Choices, is_local: bool = False
) -> FoundTokenizer:
    loaded = load_auto(name, local_files_only=is_local)
    if is_of_characters(loaded):
        return _of_characters(loaded.get_vocab(), taken, model, choices)
    own = choices.chat_template or chat_template(loaded)
    choices = replace(choices, chat_template=own, raw=choices.raw or own is None)
    known = {role: getattr(loaded, role) for role in ("eos_token", "pad_token", "unk_token")}
    if loaded.add_bos_token:
        known["bos_token"] = loaded.bos_token
    return _of_backend(loaded.backend_tokenizer, taken, model, choices, known)


def _of_pair(pair: tuple[Path, Path], taken: str, model: ModelInfo, choices: Choices) -> FoundTokenizer:
    return _of_backend(read_pair(*pair, SPECIAL_TOKENS), taken, model, choices)


def _of_backend(
    backend: Tokenizer,
    taken: str,
    model: ModelInfo,
    choices: Choices,
    known: Mapping[str, str | None] | None = None,
    notes: tuple[str, ...] = (),
) -> FoundTokenizer:
    if getattr(backend.model, "unk_token", None) == UNKNOWN:  # the tokenizer.json of a converted model of characters
        return _of_characters(backend.get_vocab(), taken, model, choices)
    check_ids(backend, taken)
    notes += switch_off(backend)
    notes += (*role_notes(backend, known, choices.roles, choices.chat_template), *unknown_notes(backend))
    roles = find_roles(backend, known, choices.roles)
    before = begin_ids(backend, roles)

    def encode(text: str) -> list[int]:
        return [*before, *backend.encode(text, add_special_tokens=False).ids]

    tokenizer = wrap(backend, model.block_size, raw=choices.raw, chat_template=choices.chat_template, roles=roles)
    return FoundTokenizer(tokenizer, taken, encode, notes=notes)


def _of_training_text(path: Path, model: ModelInfo, choices: Choices) -> FoundTokenizer:
    stoi = characters_in(path)
    if len(stoi) != model.vocab_size:
        raise UserError(
            f"{path}: has {len(stoi)} different characters, but {model.path} has embeddings for {model.vocab_size}: it "
            "is not the text that the vocabulary was made of. Give that text, or with --tokenizer_path a JSON dict of "
            "the characters and their ids"
        )
    return _of_characters(stoi, f"the characters of {path}", model, choices)


def _of_json_characters(ids: dict[str, int], path: Path, model: ModelInfo, choices: Choices) -> FoundTokenizer:
    is_padded = model.vocab_size % 8 == 0 and len(ids) < model.vocab_size < len(ids) + PADDED_TO
    if len(ids) != model.vocab_size and not is_padded:
        raise UserError(
            f"{path}: holds {len(ids)} characters, and the model has {model.vocab_size} tokens: it is not the model's "
            "vocabulary"
        )
    special = [token for token in ids if len(token) != 1]
    if not special:
        return _of_characters(ids, str(path), model, choices)
    backend = special_character_backend(ids)
    unknown = backend.model.unk_token
    becomes = f"; a character that it does not know becomes {unknown}" if unknown in ids else ""
    note = f"a vocabulary of characters, with the special tokens {some_of(special, 5)}{becomes}"
    return _of_backend(backend, str(path), model, choices, notes=(note,))


def _of_characters(stoi: dict[str, int], taken: str, model: ModelInfo, choices: Choices) -> FoundTokenizer:
    backend = character_backend(stoi)
    roles = find_roles(backend, chosen=choices.roles)
    template = choices.chat_template
    tokenizer = wrap(
        backend, model.block_size, raw=template is None, chat_template=template, roles=roles, vocabulary=CHARACTERS
    )
    before = begin_ids(backend, roles)
    return FoundTokenizer(tokenizer, taken, lambda text: [*before, *(stoi[character] for character in text)])
