"""Read a converted folder, which may come from a stranger: the library sees only what is checked here.

A folder's own code is never run. Unknown fields are named in a warning and left out; impossible values are errors.
"""

import copy
import json
import re
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.reading import LFS_ADVICE, LFS_POINTER, parse_json, read_start
from hf_model.tokenizer.trial import MAX_TOKENIZER_BYTES, check_by_trial
from hf_model.trainers import widest
from hf_model.trainers.tensors import WEIGHT_DTYPES, dtype_name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"  # the only folder in a folder that transformers reads
# By their names in a safetensors file.
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

# transformers writes one id to a line of generation_config.json, and a padded vocabulary can have 2**20 unused ids.
MAX_BYTES = {"tokenizer.json": MAX_TOKENIZER_BYTES, INDEX: 2**25, "generation_config.json": 2**24}
MAX_OTHER_BYTES = 2**21
MAX_LABELS = 10_000
MAX_TEMPLATES = 100

# The field of config.json that says whose model this was, if its trainer has names of its own.
CONVERTED_FROM = "converted_from"
CONFIG_FIELDS = {
    *CustomGPTConfig.__annotations__,
    *("model_type", "architectures", "auto_map", "transformers_version", "problem_type", "id2label", "label2id"),
    *("dtype", "torch_dtype", "quantization_config", CONVERTED_FROM),
}
TOKENIZER_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", None)
# The fields of tokenizer_config.json that are used, and their types. Any other field whose name ends in _token is used
# too. The fields in SILENT are left out without a warning: transformers writes them, and they change nothing here.
TOKENIZER_FIELDS: dict[str, tuple[type, ...]] = {
    "model_max_length": (int, float),
    "chat_template": (str, list, dict),
    "added_tokens_decoder": (dict,),
    **dict.fromkeys(
        ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"), (list, dict)
    ),
    "model_input_names": (list,),
    **dict.fromkeys(("padding_side", "truncation_side", "errors", "prompt_format", "vocabulary"), (str,)),
    **dict.fromkeys(("clean_up_tokenization_spaces", "split_special_tokens", "add_prefix_space"), (bool,)),
    **dict.fromkeys(("add_bos_token", "add_eos_token"), (bool,)),
}
SILENT = {
    *("tokenizer_class", "backend", "processor_class", "name_or_path", "transformers_version", "language", "auto_map"),
    *("max_length", "stride", "pad_to_multiple_of", "pad_token_type_id", "truncation_strategy", "is_local"),
    *("local_files_only", "trim_offsets", "verbose", "do_lower_case", "legacy", "use_fast"),
}


# Small files: regular, within the folder, of a bounded size.


def read_file(folder: Path, name: str) -> str | None:
    """The text of a file of a folder, or None if there is none.

    Raises:
        UserError: a link leads out of the folder, or the file is not a regular one, too large or not UTF-8.
    """
    path, limit = folder / name, MAX_BYTES.get(name, MAX_OTHER_BYTES)
    try:
        if path.is_symlink() and not _is_inside(folder, path.resolve()):
            raise ValueError("is a link that leads out of the folder")
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("is not a regular file")
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"is larger than {limit:,} bytes")
        if content.startswith(LFS_POINTER):
            raise ValueError(LFS_ADVICE)
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise cannot_load(folder, f"{name} {getattr(error, 'strerror', None) or error}") from None


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of a folder, or None if there is no such file.

    Raises:
        UserError: as `read_file`, or the file is not the JSON of an object.
    """
    text = read_file(folder, name)
    if text is None:
        return None
    try:
        content = parse_json(text)
    except ValueError as error:
        raise cannot_load(folder, f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise cannot_load(folder, f"{name} is not the JSON of an object")
    return content


def cannot_load(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder}: cannot be loaded ({reason})")


def _is_inside(folder: Path, path: Path) -> bool:
    """Whether a link's target is in the folder, or where the Hub's cache keeps the content of its snapshots."""
    places = [folder.resolve()]
    if places[0].parent.name == "snapshots":
        places.append(places[0].parent.parent / "blobs")
    return any(path.is_relative_to(place) for place in places)


def _warn_of_unknown(folder: Path, name: str, fields: dict[str, Any], known: Iterable[str]) -> None:
    unknown = [field for field, value in fields.items() if value not in (None, False) and field not in known]
    if listed := json.dumps(unknown[:5], ensure_ascii=False)[1:-1]:
        warnings.warn(f"{folder}: {name} has the unknown fields {listed}: ignored", stacklevel=3)


# Configuration.


def read_config(folder: Path) -> CustomGPTConfig:
    """The configuration of a folder: the fields that this model has.

    Raises:
        UserError: the folder holds no model, or a model of another type, or an impossible size.
        StrictDataclassError: a value is of the wrong type or impossible.
    """
    fields = read_json(folder, "config.json")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds a PEFT adapter: save merge_and_unload() of it and give that folder")
    if fields is None:
        raise UserError(f"{folder}: holds no model (no config.json)")
    model_type = fields.get("model_type")
    if model_type != CustomGPTConfig.model_type:
        if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
            found = next((name for name in (WEIGHTS, INDEX, "pytorch_model.bin") if (folder / name).is_file()), None)
            advice = f": give --checkpoint_path {folder / found} --tokenizer_path {folder}" if found else ""
            advice = advice if model_type == "gpt2" else ""
            raise UserError(
                f"{folder}: holds a model of type {model_type!r}, not {CustomGPTConfig.model_type!r}{advice}"
            )
        code = ", with code of its own, which is not run" if fields.get("auto_map") else ""
        found = next((name for name in (WEIGHTS, INDEX, "pytorch_model.bin") if (folder / name).is_file()), None)
        advice = f"; if its weights are those of a trainer, give --checkpoint_path {folder / found}" if found else ""
        raise cannot_load(folder, f"unknown model_type {model_type!r}{code}{advice}")
    for name in ("id2label", "label2id"):
        if name in fields and not (isinstance(fields[name], dict) and len(fields[name]) <= MAX_LABELS):
            raise cannot_load(folder, f"config.json: {name} is not a dict of at most {MAX_LABELS} labels")
    for name in ("dtype", "torch_dtype"):
        if fields.get(name) not in (None, *map(dtype_name, WEIGHT_DTYPES)):
            raise cannot_load(folder, f"config.json: unsupported {name} {fields[name]!r}")
    _warn_of_unknown(folder, "config.json", fields, CONFIG_FIELDS)
    return CustomGPTConfig.from_dict({name: value for name, value in fields.items() if name in CONFIG_FIELDS})


# Generation settings.


def _number(low: float, high: float, *types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types and low <= value <= high


def _are_ids(value: Any) -> bool:
    is_id = _number(0, 2**31, int)
    return is_id(value) or (isinstance(value, list) and len(value) <= 2**20 and all(map(is_id, value)))


GENERATION_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (_number(1e-6, 1e6, int, float), "a number above 0"),
    "top_k": (_number(0, 2**31, int), "a whole number"),
    "top_p": (_number(1e-9, 1, int, float), "a number above 0 and up to 1"),
    "repetition_penalty": (_number(1e-6, 1e6, int, float), "a number above 0"),
    "max_new_tokens": (_number(1, 10**9, int), "a whole number above 0"),
    "bos_token_id": (_number(0, 2**31, int), "a token id"),
    "eos_token_id": (_are_ids, "a token id or a list of them"),
    "pad_token_id": (_number(0, 2**31, int), "a token id"),
    "suppress_tokens": (_are_ids, "a list of token ids"),
}


def read_generation_config(folder: Path, config: CustomGPTConfig) -> GenerationConfig:
    """The folder's defaults for sampling: the fields that this project writes.

    Raises:
        UserError: a value is of the wrong type or out of its bounds.
    """
    fields = read_json(folder, "generation_config.json")
    if fields is None:
        fields = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if fields.get("do_sample") in (None, False):  # greedy, which some trainers write as a temperature or top_p of 0
        fields |= {name: None for name in ("temperature", "top_p") if fields.get(name) == 0}
    known = {name: fields[name] for name in GENERATION_FIELDS if fields.get(name) is not None}
    for name, value in known.items():
        is_valid, what = GENERATION_FIELDS[name]
        if not is_valid(value):
            raise UserError(f"{folder}: generation_config.json says {name}={value!r}, which is not {what}")
    if isinstance(suppressed := known.get("suppress_tokens"), list):  # the vocabulary may have become smaller since
        known["suppress_tokens"] = [token for token in suppressed if token < config.vocab_size] or None
    silent = {"transformers_version", "_from_model_config"}
    _warn_of_unknown(folder, "generation_config.json", fields, GENERATION_FIELDS.keys() | silent)
    return GenerationConfig(**known)


# The tokenizer.


def load_tokenizer(folder: Path, config: CustomGPTConfig) -> PreTrainedTokenizerFast:
    """The folder's tokenizer. `AutoTokenizer` loads it from a temporary copy of the checked files.

    Raises:
        UserError: a file cannot be read, tokenizer.json is not a tokenizer that can be used, or a field of
            tokenizer_config.json has the wrong type.
    """
    files = _tokenizer_files(folder)
    if "tokenizer.json" not in files:
        raise cannot_load(folder, "no tokenizer.json")
    check_by_trial(files["tokenizer.json"], folder / "tokenizer.json")
    with tempfile.TemporaryDirectory() as copy:
        for name, text in files.items():
            path = Path(copy, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        tokenizer: Any = AutoTokenizer.from_pretrained(copy, config=config, trust_remote_code=False)
        tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(folder)
    return tokenizer


def _tokenizer_files(folder: Path) -> dict[str, str]:
    names = ["tokenizer.json", "added_tokens.json", "chat_template.jinja"]
    if (folder / TEMPLATES).is_dir():
        names += [f"{TEMPLATES}/{path.name}" for path in sorted((folder / TEMPLATES).glob("*.jinja"))[:MAX_TEMPLATES]]
    files = {name: text for name in names if (text := read_file(folder, name)) is not None}
    read_json(folder, "added_tokens.json")  # so that the error names the file
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (fields := read_json(folder, name)) is not None:
            files[name] = json.dumps(_known_fields(folder, name, fields))
    return files


def _known_fields(folder: Path, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a file that are used. transformers would turn any other field into an attribute or a path."""
    known: dict[str, Any] = {}
    if (kind := fields.get("tokenizer_class")) not in TOKENIZER_CLASSES:
        raise UserError(f"{folder}: {name} says tokenizer_class={kind!r}, which is not supported")
    if kind is not None:
        known["tokenizer_class"] = kind
    for field, value in fields.items():
        types = TOKENIZER_FIELDS.get(field) or ((str, dict) if field.endswith("_token") else ())
        if types and value is not None and not (type(value) in types and _is_possible(field, value)):
            raise UserError(f"{folder}: {name} says {field}={value!r}, which is not possible")
        if types:
            known[field] = value
    _warn_of_unknown(folder, name, fields, known.keys() | SILENT)
    return known


def _is_possible(field: str, value: Any) -> bool:
    if field in ("padding_side", "truncation_side"):
        return value in ("left", "right")
    if field == "model_max_length":
        return value >= 1
    if field == "chat_template" and not isinstance(value, str):  # several; transformers saves each in a file of its own
        pairs = value.items() if isinstance(value, dict) else [(one["name"], one["template"]) for one in value]
        return all(re.fullmatch(r"\w[\w.-]{0,99}", name) and isinstance(text, str) for name, text in pairs)
    return True


# Weights.


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's weights: one, or the shards that the index names.

    Raises:
        UserError: the folder has none, or a shard is missing or a pointer of Git LFS.
    """
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else _shards(folder)
    for file in files:
        read_start(file, len(LFS_POINTER))
    return files


def _shards(folder: Path) -> list[Path]:
    index = read_json(folder, INDEX)
    if index is None:
        raise cannot_load(folder, f"no {WEIGHTS} and no {INDEX}")
    shards = index.get("weight_map")
    names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
    if not names:
        raise cannot_load(folder, f"{INDEX} names no shards")
    for name in names:
        if not re.fullmatch(r"[^/\\]+\.safetensors", name) or not (folder / name).is_file():
            raise cannot_load(folder, f"{INDEX} names {name!r}, and there is no such shard in the folder")
    return [folder / name for name in names]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's tensors by name, mapped from its files.

    Raises:
        UserError: a file is missing or damaged.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise cannot_load(folder, f"{path.name}: {error}") from None
    return weights


def with_weights(
    config: CustomGPTConfig,
    state_dict: dict[str, torch.Tensor],
    model_class: type[CustomGPTForCausalLM] = CustomGPTForCausalLM,
) -> CustomGPTForCausalLM:
    """A model in evaluation mode that uses these tensors: nothing is initialised or copied."""
    with torch.device("meta"):
        model = model_class(config)
    if config.tie_word_embeddings:
        state_dict = state_dict | {"lm_head.weight": state_dict["transformer.wte.weight"]}
    model.load_state_dict(state_dict, assign=True)
    model.tie_weights()
    return model.eval()


def same_weights(model_class: type[CustomGPTForCausalLM], model: CustomGPTForCausalLM) -> Any:
    """A model of the class, which uses the tensors and has the settings of `model`."""
    twin = with_weights(copy.deepcopy(model.config), model.state_dict(), model_class)
    twin.generation_config = copy.deepcopy(model.generation_config)
    twin.loss_type = model.loss_type  # the library takes the type from the class's name, and warns of unknown names
    return twin


def check_weights(folder: Path, config: CustomGPTConfig) -> torch.dtype:
    """Check by the headers of the files that a folder's weights are those of its configuration.

    Returns:
        The narrowest dtype that holds all weights without loss.

    Raises:
        UserError: a weight is missing, unknown, of another shape than config.json says, or of an unsupported dtype.
    """
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    header = file.get_slice(name)
                    shapes[name], dtypes[name] = header.get_shape(), header.get_dtype()
        except (SafetensorError, OSError) as error:
            raise cannot_load(folder, f"{path.name}: {error}") from None
    n_layers = len({match[1] for name in shapes if (match := re.match(r"transformer\.h\.(\d+)\.", name))})
    if config.n_layer != n_layers:  # checked before the model is built: a billion layers would take forever
        raise _mismatch(folder, f"n_layer={config.n_layer}, but the weights have {n_layers} layers")
    with torch.device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in CustomGPTForCausalLM(config).state_dict().items()}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := sorted(expected.keys() - shapes.keys() - optional):
        raise _mismatch(folder, f"the weights lack {', '.join(missing[:5])}")
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise _mismatch(folder, f"the model has no place for {', '.join(unknown[:5])}")
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise _mismatch(folder, f"{name} has the shape {shape}, and config.json says {expected[name]}")
        if dtypes[name] not in SAFETENSORS_DTYPES:
            raise UserError(f"{folder}: {name} has the unsupported dtype {dtypes[name]}")
    return widest(SAFETENSORS_DTYPES[dtype] for dtype in dtypes.values())


def _mismatch(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: its config.json and its weights do not belong together ({what})")
