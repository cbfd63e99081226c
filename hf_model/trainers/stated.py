"""What a checkpoint states beside its weights: sizes, options of the model, progress of the training."""

import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_model.reading import parse_json, read_text
from hf_model.trainers.archive import Archive
from hf_model.trainers.pickle_reader import StandIn, StoredTensor, fields_of, kind_of
from hf_model.trainers.tensors import number_of

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
HEADS = ("n_head", "n_heads", "num_heads", "nhead", "num_attention_heads")
# Other trainers' names of what no shape shows.
OTHER_NAMES = {**dict.fromkeys(HEADS, "n_head"), "drop_rate": "dropout"}
MODEL_KEYS = ("model_args",)  # hold options of the model only; as does a configuration object under the others
MIXED_KEYS = ("config", "hyper_parameters", "cfg", "model_config", "hparams", "args")  # may hold the training's too
NAMESPACES = ("Namespace", "SimpleNamespace", "AttributeDict")  # hold a command line, or Lightning's hyperparameters
PROGRESS = ("iter_num", "step", "loss", "best_val_loss", "val_loss")
# Options that change no forward pass in evaluation, by their names.
HARMLESS_ARGS = re.compile(
    r"drop|flash|sdpa|device|dtype|compile|seed|batch|(^|_)lr($|_)|learning_rate|decay|betas?($|_)|grad|warmup|(^|_)iters?($|_)"
    r"|max_steps|optim|path|(^|_)dir|(^|_)log(_|$|ging)|wandb|data|name|checkpoint|init_|tie_|tying|use_cache"
)
# Options that change it, by their names. All others among the training's options are taken for the training's.
OPTIONS_OF_MODELS = re.compile(
    r"mup|softmax_?1|rope|rotary|alibi|swiglu|geglu|gated|rms_?norm|qk_?norm|soft_?cap|logit_cap|post_?(ln|norm)|sliding"
    r"|expert|moe($|_)|kv_heads?|query_groups|(attn|attention|logits?|embed\w*)_scal|scale_(attn|attention|emb|logit)"
)
# Of transformers' config.json: fields that do not change the logits.
GENERIC = re.compile(
    r"architectures|auto_map|model_type|(torch_)?dtype|transformers_version|_name_or_path|\w+_token_id|id2label|label2id"
    r"|initializer_range|problem_type|summary_\w+|task_specific_params"
)
MAX_CONFIG_BYTES, MAX_TEXT = 2**21, 1000
# Names of sizes. An option with such a name changes nothing if the weights have its value as a size.
SIZE_NAMES = re.compile(
    r"(^|_)(n|num|d|dim|size|len|length|layers?|blocks?|heads?|embd?|embed|embedding|hidden|vocab|context|ctx|ff|ffn|mlp)(_|$)"
)
KNOWN_DEFAULTS: dict[str, Any] = {
    **{"layer_norm_epsilon": 1e-5, "layer_norm_eps": 1e-5, "norm_eps": 1e-5, "causal": True},
    "scale_attn_weights": True,
}
OFF = (None, False, 0, "", "none", "None")
NUMPY_FORMATS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "u8": "Q", "u4": "I", "b1": "?"}


def stated_options(content: Mapping[str, Any]) -> tuple[dict[Any, Any], bool, str]:
    """The options that a checkpoint states, whether all of them are the model's, and the key that they are under.

    They are a dict, or the items or attributes of an object, or such a thing inside another one.
    """
    for key in (*MODEL_KEYS, *MIXED_KEYS):
        fields = fields_of(content.get(key))
        if fields is None:
            continue
        is_mixed = key in MIXED_KEYS and (isinstance(content[key], dict) or kind_of(content[key]) in NAMESPACES)
        inner = (value for value in fields.values() if _has_sizes(fields_of(value)))
        if not _has_sizes(fields) and (found := next(inner, None)) is not None:
            return fields_of(found) or {}, isinstance(found, StandIn) or not is_mixed, key
        return fields, not is_mixed, key
    return {}, False, MODEL_KEYS[0]


def _has_sizes(fields: dict[Any, Any] | None) -> bool:
    return fields is not None and any(name in fields for name in (*SIZES, *OTHER_NAMES))


def stated_sizes(stated: Mapping[Any, Any], file: Archive) -> dict[str, Any]:
    """The sizes that are stated, under the names of `SIZES`."""
    told = {OTHER_NAMES.get(name, name): value for name, value in stated.items() if value is not None}
    told = {name: value for name, value in told.items() if name in SIZES}
    return {name: number(value, file, f"a {kind_of(value)}") for name, value in told.items()}


def unknown_options(stated: Mapping[Any, Any], sizes: Iterable[int], is_of_model: bool = True) -> dict[str, Any]:
    """Options that this project does not know, and that are switched on.

    Args:
        sizes: the sizes that the weights have. An option that is named and valued like a size is known.
        is_of_model: whether all options are the model's. Among the training's, only names that models are known to have
            count.
    """
    sizes = set(sizes)
    return {
        name: value
        for name, value in stated.items()
        if isinstance(name, str)
        and name not in SIZES
        and name not in OTHER_NAMES
        and (is_of_model or OPTIONS_OF_MODELS.search(name))
        and not HARMLESS_ARGS.search(name)
        and not (SIZE_NAMES.search(name) and type(value) is int and value in sizes)
        and not (isinstance(value, (bool, int, float, str, type(None))) and value in OFF)
        and KNOWN_DEFAULTS.get(name, OFF) != value
    }


def options_beside(path: Path, metadata: Mapping[str, str]) -> tuple[dict[Any, Any], str]:
    """The options in the config.json beside a bare state dict, or in the metadata of a safetensors file, and the place.

    minGPT's config.json is another one: see `table.heads_beside`.
    """
    config = path.with_name("config.json")
    if config.is_file():
        try:
            fields = parse_json(read_text(config, MAX_CONFIG_BYTES))
        except ValueError:
            fields = None
        known = (
            {name: value for name, value in fields.items() if not GENERIC.fullmatch(name)} if fields_of(fields) else {}
        )
        inner = (
            value for key, value in known.items() if key != "model" and isinstance(value, dict) and _has_heads(value)
        )
        if found := known if _has_heads(known) else next(inner, None):
            return found, "config.json beside it"
    return {name: _value(text) for name, text in metadata.items() if name != "format"}, "its metadata"


def _has_heads(fields: Mapping[Any, Any]) -> bool:
    return any(name in fields for name in HEADS)


def _value(text: str) -> Any:
    """The value of a text of JSON, such as a number; None for another text."""
    try:
        return parse_json(text) if len(text) <= MAX_TEXT else None
    except ValueError:
        return None


def progress_of(content: Mapping[str, Any], file: Archive) -> dict[str, Any]:
    return {key: found for key in PROGRESS if (found := number(content.get(key), file)) is not None}


def number(value: Any, file: Archive, default: Any = None) -> int | float | Any:
    """A plain number from a number, a tensor of one element or a pickled NumPy scalar; else the default."""
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64):
        return value
    if isinstance(value, StoredTensor):
        return default if (found := number_of(file, value)) is None else found
    if isinstance(value, StandIn) and len(value.args) == 2 and isinstance(value.args[0], StandIn):
        dtype, raw = value.args
        if isinstance(raw, StandIn) and raw.name == "_codecs.encode" and raw.args:  # bytes in protocol 2
            text = raw.args[0]
            raw = text.encode("latin1", "ignore") if isinstance(text, str) and len(text) <= 8 else None
        code = NUMPY_FORMATS.get(dtype.args[0]) if dtype.args and isinstance(dtype.args[0], str) else None
        if code and isinstance(raw, bytes) and struct.calcsize(code) == len(raw):
            return struct.unpack("<" + code, raw)[0]
    return default
