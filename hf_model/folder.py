"""What the files of a converted folder may say, looked through before a library acts on any of it.

The library builds what config.json says, reads what the other files name, and follows links. A stranger's folder may
therefore say only what a folder of this project says, in bounded values, and leads nowhere out of itself.
"""

import json
import os
import re
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedTokenizerFast

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError
from hf_model.reading import parse_json

MAX_BYTES = {"model.safetensors.index.json": 2**25}
MAX_OTHER_BYTES = 2**21
MAX_LABELS = 10_000
MAX_TEMPLATES = 100
MAX_ADDED = 10_000
MAX_TOKENS = 2**20
MAX_TOKEN_LENGTH = 1000
TEMPLATES = "additional_chat_templates"  # the one folder in a folder that the library reads
READ_BY_THE_LIBRARY = re.compile(
    r".*\.(json|safetensors|jinja|model|tiktoken)|.*(vocab|merges|dict)\.txt|tokenizer\.model.*|" + TEMPLATES
)

MODEL_FIELDS = set(CustomGPTConfig.__annotations__)
OTHER_FIELDS = {
    *("model_type", "architectures", "auto_map", "transformers_version", "problem_type", "id2label", "label2id"),
    *("dtype", "torch_dtype", "quantization_config"),
}
DTYPES = ("float32", "float16", "bfloat16", "float64", None)
SPECIAL_TOKENS = re.compile(
    r"(bos|eos|unk|pad|sep|cls|mask)_token|(additional|extra)_special_tokens|add_(bos|eos)_token"
)
TOKENIZER_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", None)
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")  # becomes the name of a file


def _number(low: float, high: float, *types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types and low <= value <= high


def _ids(value: Any) -> bool:
    is_id = _number(0, 2**31, int)
    return is_id(value) or (isinstance(value, list) and len(value) <= 2**20 and all(map(is_id, value)))


GENERATION_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (_number(1e-6, 1e6, int, float), "a number above 0"),
    "top_k": (_number(0, 2**31, int), "a whole number"),
    "top_p": (_number(1e-9, 1, int, float), "a number above 0 and up to 1"),
    "repetition_penalty": (_number(1e-6, 1e6, int, float), "a number above 0"),
    "max_new_tokens": (_number(1, 10**9, int), "a whole number above 0"),
    "bos_token_id": (_number(0, 2**31, int), "a token's id"),
    "eos_token_id": (_ids, "a token's id, or several"),
    "pad_token_id": (_number(0, 2**31, int), "a token's id"),
    "suppress_tokens": (_ids, "tokens' ids"),
}
SAYS_NOTHING = {"transformers_version", "_from_model_config"}


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) in {type(one) for one in values} and value in values


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TOKEN_LENGTH


def _is_token(value: Any) -> bool:
    """A token's text, or all that `AddedToken` takes."""
    if not isinstance(value, dict):
        return _is_text(value)
    flags = [flag for key, flag in value.items() if key not in ("content", "__type", "id")]
    known = {"content", "__type", "id", "single_word", "lstrip", "rstrip", "normalized", "special"}
    return _is_text(value.get("content")) and value.keys() <= known and all(type(flag) is bool for flag in flags)


def _are_tokens(value: Any) -> bool:
    tokens = list(value.values()) if isinstance(value, dict) else value
    return isinstance(tokens, list) and len(tokens) <= MAX_ADDED and all(map(_is_token, tokens))


def _is_decoder(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) > MAX_TOKENS:
        return False
    return all(re.fullmatch("[0-9]{1,7}", key) and isinstance(token, dict) for key, token in value.items()) and all(
        map(_is_token, value.values())
    )


def _are_templates(value: Any) -> bool:
    """One template, or several under names that can be those of files."""
    if isinstance(value, list) and all(isinstance(one, dict) and one.keys() == {"name", "template"} for one in value):
        pairs = [(one["name"], one["template"]) for one in value]
    elif isinstance(value, dict):
        pairs = list(value.items())
    else:
        return isinstance(value, str)
    return len(pairs) <= MAX_TEMPLATES and all(
        isinstance(name, str) and TEMPLATE_NAME.fullmatch(name) and isinstance(template, str)
        for name, template in pairs
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 100 and all(map(_is_text, value))


_SWITCH = (_one_of(True, False), "true or false")
_SIDE = (_one_of("left", "right"), "left or right")
_TEXT = (_is_text, "a short text")
_COUNT = (_number(0, 2**20, int), "a whole number")
_TOKEN = (_is_token, "a token")
_TOKENS = (_are_tokens, f"a list of at most {MAX_ADDED} tokens")
# What tokenizer_config.json may say: what the library writes, as it is and as it was in versions before.
TOKENIZER_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_max_length": (_number(1, 1e31, int, float), "a number above 0"),  # 1e30 stands for none
    "chat_template": (_are_templates, f"a template, or at most {MAX_TEMPLATES} with plain names"),
    "added_tokens_decoder": (_is_decoder, "a dict of ids and tokens"),
    "extra_special_tokens": _TOKENS,
    "additional_special_tokens": _TOKENS,
    "model_specific_special_tokens": _TOKENS,
    "model_input_names": (_are_names, "a list of names"),
    "padding_side": _SIDE,
    "truncation_side": _SIDE,
    "auto_map": (lambda value: isinstance(value, dict | list), "a dict"),  # and then the library refuses it
    "errors": (_one_of("strict", "replace", "ignore"), "strict, replace or ignore"),
    **dict.fromkeys(("max_length", "stride", "pad_to_multiple_of", "pad_token_type_id"), _COUNT),
    **dict.fromkeys(("tokenizer_class", "backend", "vocabulary", "prompt_format", "processor_class"), _TEXT),
    **dict.fromkeys(("name_or_path", "truncation_strategy", "transformers_version", "language"), _TEXT),
    **dict.fromkeys(("clean_up_tokenization_spaces", "split_special_tokens", "add_prefix_space", "is_local"), _SWITCH),
    **dict.fromkeys(("local_files_only", "add_bos_token", "add_eos_token", "trim_offsets", "verbose"), _SWITCH),
    **dict.fromkeys(("do_lower_case", "legacy", "use_fast", "use_default_system_prompt"), _SWITCH),
}


def check_folder(folder: Path) -> None:
    """Look through the files of a folder that the library reads, but for its tokenizer.json: that one is tried out.

    Raises:
        UserError: one of them is no file, leads out of the folder, or says what no folder of this project says.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter, which names another model: merge the two and save the result")
    check_places(folder)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in (read_json(folder, name) or {}).items():
            _check_field(folder, name, key, value)
    for token, index in (read_json(folder, "added_tokens.json") or {}).items():
        if not _is_text(token) or not _number(0, MAX_TOKENS, int)(index):
            raise UserError(f"{folder}: added_tokens.json says {token!r}: {index!r}, which is no token and its id")
    its = read_json(folder, "tokenizer_config.json") or {}
    if its.get("tokenizer_class") not in TOKENIZER_CLASSES and "auto_map" not in its:  # which the library refuses
        raise UserError(
            f"{folder}: tokenizer_config.json says tokenizer_class={its['tokenizer_class']!r}, not one of ours"
        )
    if (index := read_json(folder, "model.safetensors.index.json")) is not None:
        _check_index(folder, index.get("weight_map"))


def _check_field(folder: Path, name: str, key: str, value: Any) -> None:
    """The library makes attributes of what tokenizer_config.json says, so that nothing can be ignored here."""
    if name.startswith("special") and not SPECIAL_TOKENS.fullmatch(key):
        raise UserError(f"{folder}: {name} says {key!r}, which a folder of this project does not")
    field = TOKENIZER_FIELDS.get(key) or (_TOKEN if key.endswith("_token") else None)
    # A number or a switch of another version of the library does nothing, unless it hides what the library has.
    does_nothing = value is None or (type(value) in (bool, int, float) and not hasattr(PreTrainedTokenizerFast, key))
    if field is None and not does_nothing:
        raise UserError(f"{folder}: {name} says {key!r}, which a folder of this project does not")
    if field is not None and value is not None and not field[0](value):
        raise UserError(f"{folder}: {name} says {key}={value!r}, which is not {field[1]}")


def read_config(folder: Path) -> CustomGPTConfig:
    """The configuration of a folder: the fields that this model has. Others are named in a warning, and ignored.

    Raises:
        UserError: the folder holds none, or that of another model.
        StrictDataclassError: a value is of the wrong type or impossible.
    """
    said = read_json(folder, "config.json")
    if said is None:
        raise UserError(f"{folder}: holds no model (no config.json)")
    model_type = said.get("model_type")
    if model_type != CustomGPTConfig.model_type:
        if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
            raise UserError(f"{folder}: holds a model of type {model_type!r}, not {CustomGPTConfig.model_type!r}")
        code = ", which asks for custom code to be run" if said.get("auto_map") else ""
        raise _cannot_be_loaded(folder, f"it holds a model of the unknown type {model_type!r}{code}")
    for name in ("id2label", "label2id"):
        if name in said and not (isinstance(said[name], dict) and len(said[name]) <= MAX_LABELS):
            raise _cannot_be_loaded(folder, f"config.json: {name} is no dict of at most {MAX_LABELS} labels")
    for name in ("dtype", "torch_dtype"):
        if said.get(name) not in DTYPES:
            raise _cannot_be_loaded(folder, f"config.json: {name} is {said[name]!r}")
    known = {name: value for name, value in said.items() if name in MODEL_FIELDS | OTHER_FIELDS}
    _warn_of_others(folder, "config.json", said, set(known))
    return CustomGPTConfig.from_dict(known)


def read_generation_config(folder: Path, config: CustomGPTConfig) -> GenerationConfig:
    """The defaults for sampling of a folder: the fields that this project writes. Others are named, and ignored.

    Raises:
        UserError: a value is of the wrong type or out of its bounds.
    """
    said = read_json(folder, "generation_config.json")
    if said is None:
        said = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    known = {name: said[name] for name in GENERATION_FIELDS if said.get(name) is not None}
    for name, value in known.items():
        is_right, what = GENERATION_FIELDS[name]
        if not is_right(value):
            raise UserError(f"{folder}: generation_config.json says {name}={value!r}, which is not {what}")
    if any(token >= config.vocab_size for token in _listed(known.get("suppress_tokens"))):
        raise UserError(f"{folder}: generation_config.json says suppress_tokens, some of which the model does not have")
    _warn_of_others(folder, "generation_config.json", said, set(GENERATION_FIELDS) | SAYS_NOTHING)
    return GenerationConfig(**known)


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of a folder; None where there is no such file.

    Raises:
        UserError: it is no file, far too large, or not the JSON of an object.
    """
    limit = MAX_BYTES.get(name, MAX_OTHER_BYTES)
    try:
        if not stat.S_ISREG((folder / name).stat().st_mode):
            raise ValueError("is not a regular file")
        with (folder / name).open("rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise ValueError(f"is larger than {limit} bytes")
        content = parse_json(raw.decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("is not the JSON of an object")
        return content
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _cannot_be_loaded(folder, f"{name}: {error.strerror}") from None
    except ValueError as error:
        raise _cannot_be_loaded(folder, f"{name}: {error}") from None


def _cannot_be_loaded(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder}: cannot be loaded ({reason})")


def check_places(folder: Path) -> None:
    """Check each file that the library would read, in the folder and in the one inside it.

    Raises:
        UserError: one of them is not a regular file, or a link that leads out of the folder.
    """
    for entry in os.scandir(folder):
        if READ_BY_THE_LIBRARY.fullmatch(entry.name):
            _check_place(folder, entry)
    if (folder / TEMPLATES).is_dir():
        for number, entry in enumerate(os.scandir(folder / TEMPLATES)):
            _check_place(folder, entry)
            if number >= MAX_TEMPLATES or not entry.is_file() or entry.stat().st_size > MAX_OTHER_BYTES:
                raise UserError(f"{folder}: {TEMPLATES} holds too many files, too large ones, or others")


def _check_place(folder: Path, entry: os.DirEntry[str]) -> None:
    """A link may lead to another file of the folder, or to where the Hub's cache keeps the content of its snapshots."""
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    real = Path(entry.path).resolve()
    if entry.is_symlink() and not any(real.is_relative_to(place) for place in inside):
        raise UserError(f"{folder}: {entry.name!r} is a link that leads out of the folder")
    if real.exists() and not real.is_file() and not real.is_dir():
        raise UserError(f"{folder}: {entry.name!r} is not a regular file")


def _check_index(folder: Path, weight_map: Any) -> None:
    names = set(weight_map.values()) if isinstance(weight_map, dict) and _are_texts(weight_map.values()) else {""}
    for name in names:
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{folder}: model.safetensors.index.json names {name!r}, which is no part of the folder")


def _are_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _warn_of_others(folder: Path, name: str, said: dict[str, Any], known: set[str]) -> None:
    others = [key for key, value in said.items() if key not in known and value not in (None, False)]
    if others:
        listed = json.dumps(others[:5], ensure_ascii=False)[1:-1]
        warnings.warn(f"{folder}: {name} says {listed}, which this model has no use for: ignored", stacklevel=2)
