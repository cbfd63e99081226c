"""What `--tokenizer_path` names, or where a trainer put its vocabulary if nothing is named: a table of the kinds."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_model.errors import UserError, one_line
from hf_model.reading import parse_json, read_text
from hf_model.tokenizer.characters import (
    CHARACTERS,
    UNKNOWN,
    character_backend,
    characters_in,
    is_of_characters,
    read_meta,
)
from hf_model.tokenizer.check import check_tokenizer
from hf_model.tokenizer.gpt2_files import END_OF_TEXT, find_pair, other_half, read_pair, tiktoken_pair
from hf_model.tokenizer.prompt import BOS, EOS, PAD, UNK, takes_instructions
from hf_model.tokenizer.wrap import (
    added_ids,
    check_fits,
    check_regular,
    no_panic_on_stderr,
    read_tokenizer,
    wrap,
)

AUTO = "auto"  # in place of a path: look where the trainer put it
GPT2 = "gpt2"
GPT2_SIZES = (50257, 50304)  # the encoding's own, and padded, as nanoGPT has it where it trains from scratch
GPT2_REPOSITORIES = ("openai-community/gpt2", GPT2)
ORIGINAL = Path("data/tokenizer/custom_gpt_tokenizer.json")
HUB_SECONDS = 5
SPECIAL_TOKENS = (END_OF_TEXT, BOS, EOS, PAD, UNK)


@dataclass(frozen=True)
class ModelInfo:
    """What of a model tells where its vocabulary is, and what goes with it."""

    path: Path
    vocab_size: int
    block_size: int
    dataset: str | None = None
    """nanoGPT's name of its data folder, where the checkpoint tells."""


@dataclass(frozen=True)
class FoundTokenizer:
    """A tokenizer, where it was taken from, and what its source itself encodes."""

    tokenizer: PreTrainedTokenizerFast
    taken: str
    """The file, files or name."""
    encode: Callable[[str], list[int]]
    """What `tokenizer(text)` must give, by the source: a written folder is compared with it."""
    why: str = ""
    """How it was found, where it was not named."""

    @property
    def unit(self) -> str:
        return "characters" if is_of_characters(self.tokenizer) else "tokens"


def find_tokenizer(
    tokenizer_path: str | Path | None, model: ModelInfo, *, characters_of: str | Path | None = None, raw: bool = False
) -> FoundTokenizer:
    """The vocabulary that a path or a name stands for.

    Args:
        tokenizer_path: a `tokenizers` JSON, nanoGPT's meta.pkl, either of GPT-2's two files, a folder of any of them,
            `"gpt2"`, a folder or Hub name that AutoTokenizer knows; or `"auto"`, to look where the trainer put it.
        characters_of: the training text of a model of characters, in place of a path.
        raw: the model's prompts are raw text, whatever special tokens there are.

    Raises:
        UserError: there is no such thing, it is not what it should be, or it does not go with the model.
    """
    if characters_of is not None:
        vocabulary = _of_training_text(Path(characters_of), model)
    elif tokenizer_path is None or str(tokenizer_path) == AUTO:
        vocabulary = _found(model, raw)
    else:
        vocabulary = _named(tokenizer_path, model, raw)
    check_fits(vocabulary.tokenizer, model.vocab_size, vocabulary.taken, model.path)
    return vocabulary


def _found(model: ModelInfo, raw: bool) -> FoundTokenizer:
    """The vocabulary where the trainers of this family put it, or the one that they take for granted."""
    looked = []
    for path, why in _places(model):
        if path.is_file():
            return replace(_named(path, model, raw), why=why)
        looked.append(str(path))
    if model.vocab_size in GPT2_SIZES:
        return replace(_named(GPT2, model, raw), why=f"a vocabulary of {model.vocab_size} is GPT-2's")
    if ORIGINAL.is_file():
        return _named(ORIGINAL, model, raw)
    data = f", nor {looked[-1]}" if model.dataset else ""
    raise UserError(
        f"{model.path}: there is no tokenizer beside it{data}, nor {ORIGINAL}: "
        "give --tokenizer_path (a tokenizer JSON, nanoGPT's meta.pkl, gpt2, a folder) or, for a model of characters, "
        "--characters_of its training text"
    )


def _places(model: ModelInfo) -> Iterator[tuple[Path, str]]:
    """Where to look, and what is said of a vocabulary that is found there."""
    beside = model.path.parent
    for name in (ORIGINAL.name, "tokenizer.json", "meta.pkl"):
        yield beside / name, "found beside the checkpoint"
    if pair := find_pair(beside):
        yield pair[0], "found beside the checkpoint"
    # The name comes out of the file: it may lead into data/ only.
    if model.dataset and not Path(model.dataset).is_absolute() and ".." not in Path(model.dataset).parts:
        for root in (beside.parent, beside.parent.parent, Path()):
            yield root / "data" / model.dataset / "meta.pkl", "the checkpoint names this data"


def _named(source: str | Path, model: ModelInfo, raw: bool) -> FoundTokenizer:
    """The vocabulary of a file, a folder or a name."""
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, model, raw)
    if not path.exists():
        return _of_name(str(source), model, raw)
    check_regular(path)
    if pair := find_pair(path):
        return _of_pair(pair, f"{pair[0]} and {pair[1].name}", model, raw)
    if other := other_half(path):
        raise UserError(f"{path}: is half of a vocabulary: its other file, {other}, is not beside it")
    if _is_pickle(path):
        return _of_characters(read_meta(path), str(path), model)
    if path.suffix == ".txt":
        raise UserError(f"{path}: is no tokenizer; the training text of a model of characters goes to --characters_of")
    return _of_backend(read_tokenizer(path), str(path), model, raw)


def _is_pickle(path: Path) -> bool:
    if path.suffix in (".pkl", ".pickle"):
        return True
    try:
        with path.open("rb") as file:
            return file.read(1) == b"\x80"
    except OSError:
        return False


def _of_folder(folder: Path, model: ModelInfo, raw: bool) -> FoundTokenizer:
    if (folder / "tokenizer_config.json").is_file():
        return _of_auto_tokenizer(str(folder), str(folder), model, raw)
    for name in ("tokenizer.json", ORIGINAL.name, "meta.pkl"):
        if (folder / name).is_file():
            return _named(folder / name, model, raw)
    if pair := find_pair(folder):
        return _named(pair[0], model, raw)
    try:
        return _of_auto_tokenizer(str(folder), str(folder), model, raw)
    except UserError:
        raise UserError(
            f"{folder}: cannot be read as a tokenizer: AutoTokenizer does not know it, and it holds no tokenizer.json, "
            "no meta.pkl, and no vocab.json with merges.txt"
        ) from None


def _of_name(name: str, model: ModelInfo, raw: bool) -> FoundTokenizer:
    """A vocabulary that transformers or tiktoken has in its cache, or that the Hub has."""
    repositories = GPT2_REPOSITORIES if name in GPT2_REPOSITORIES else (name,)
    for repository in repositories:
        try:
            return _of_auto_tokenizer(repository, f"{name}, from transformers' cache", model, raw, is_local=True)
        except UserError:
            continue
    if name in GPT2_REPOSITORIES and (pair := tiktoken_pair()):
        return _of_pair(pair, f"{name}, from tiktoken's cache", model, raw)
    try:
        _check_hub()
        return _of_auto_tokenizer(repositories[0], f"{name}, from the Hub", model, raw)
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
    """Find out in seconds whether the Hub answers: the library would try again for a minute."""
    if constants.HF_HUB_OFFLINE:
        raise UserError("the Hub is switched off by HF_HUB_OFFLINE")
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of whichever library makes the requests
        raise UserError(f"the Hub cannot be reached: {error}") from None


def _of_auto_tokenizer(name: str, taken: str, model: ModelInfo, raw: bool, is_local: bool = False) -> FoundTokenizer:
    if (path := Path(name, "tokenizer.json")).is_file():
        try:
            check_tokenizer(parse_json(read_text(path, 2**27)))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    try:
        # A stranger's folder may name code of its own; the library would ask on the terminal whether to run it.
        with no_panic_on_stderr():
            loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=is_local)
    except Exception as error:  # whatever its files trip in the library
        raise UserError(f"{name}: AutoTokenizer cannot load it ({one_line(error, 150)})") from None
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise UserError(f"{name}: is a {type(loaded).__name__}, which has no fast form (a tokenizer.json)")
    try:
        check_tokenizer(json.loads(loaded.backend_tokenizer.to_str()))
    except ValueError as error:
        raise UserError(f"{name}: is not a tokenizer for this model family ({error})") from None
    if is_of_characters(loaded):
        return _of_characters(loaded.get_vocab(), taken, model)
    known = {role: getattr(loaded, role) for role in ("eos_token", "pad_token", "unk_token")}
    raw = raw or not takes_instructions(loaded)
    return _of_backend(loaded.backend_tokenizer, taken, model, raw, known)


def _of_pair(pair: tuple[Path, Path], taken: str, model: ModelInfo, raw: bool) -> FoundTokenizer:
    return _of_backend(read_pair(*pair, SPECIAL_TOKENS), taken, model, raw)


def _of_backend(
    backend: Tokenizer, taken: str, model: ModelInfo, raw: bool, known: dict[str, str | None] | None = None
) -> FoundTokenizer:
    vocabulary = backend.get_vocab()
    if getattr(backend.model, "unk_token", None) == UNKNOWN:  # the tokenizer.json of a converted model of characters
        return _of_characters(vocabulary, taken, model)
    is_original = BOS in vocabulary and EOS in vocabulary
    before = [vocabulary[BOS]] if is_original else added_ids(backend)[0]

    def encode(text: str) -> list[int]:
        return [*before, *backend.encode(text, add_special_tokens=False).ids]

    return FoundTokenizer(wrap(backend, model.block_size, raw=raw, known=known), taken, encode)


def _of_training_text(path: Path, model: ModelInfo) -> FoundTokenizer:
    stoi = characters_in(path)
    if len(stoi) != model.vocab_size:
        raise UserError(
            f"{path}: has {len(stoi)} different characters, but {model.path} has embeddings for {model.vocab_size}: it "
            "is not the text that the model was trained on"
        )
    return _of_characters(stoi, f"the characters of {path}", model)


def _of_characters(stoi: dict[str, int], taken: str, model: ModelInfo) -> FoundTokenizer:
    tokenizer = wrap(character_backend(stoi), model.block_size, raw=True, vocabulary=CHARACTERS)
    return FoundTokenizer(tokenizer, taken, lambda text: [stoi[character] for character in text])
