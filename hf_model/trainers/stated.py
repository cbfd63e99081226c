"""What a checkpoint states beside its weights: sizes, options of the model, progress of the training."""

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_model.errors import one_line
from hf_model.reading import parse_json, read_text
from hf_model.trainers.archive import Archive
from hf_model.trainers.pickle_reader import StandIn, StoredTensor, fields_of, kind_of
from hf_model.trainers.table import MINGPT_TYPES
from hf_model.trainers.tensors import number_of

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
HEADS = ("n_head", "n_heads", "num_heads", "nhead", "num_attention_heads")
# Other trainers' names of what no shape shows.
OTHER_NAMES = {**dict.fromkeys(HEADS, "n_head"), "drop_rate": "dropout"}
# Options of the model only. A configuration object under one of the other keys holds such options too.
MODEL_KEYS = ("model_args", "model_cfg")
MIXED_KEYS = ("config", "hyper_parameters", "cfg", "model_config", "hparams", "args")  # may hold the training's too
NAMESPACES = ("Namespace", "SimpleNamespace", "AttributeDict")  # hold a command line, or Lightning's hyperparameters
PROGRESS = ("iter_num", "step", "loss", "best_val_loss", "val_loss")
# The activations that are read, by transformers' names. Of two names for one function, the first is taken.
ACTIVATIONS = (
    *("gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "silu", "quick_gelu", "relu2", "leaky_relu", "mish"),
    *("tanh", "sigmoid", "relu6", "laplace"),
)
# What trainers call the options that are read: the activation, and the norms' epsilon.
ACTIVATION = re.compile(
    r"((mlp|ffn?|hidden|feed_?forward)_)?(activation|act|non_?linearity|nonlin)(_(fn|func|function|type|layer|name))?"
    r"|gelu_(type|approximate)|approximate"
)
EPSILON = re.compile(r"(layer_?norm|ln|norm)_eps(ilon)?")
BARE_EPSILON = ("eps", "epsilon")  # may be the optimizer's
# Options with the values that this model has. To switch them off is another model.
ON = (True, None)
ALWAYS_ON: tuple[tuple[re.Pattern[str], tuple[Any, ...]], ...] = (
    (re.compile(r"norm_first|pre_?(norm|ln)|(use_)?final_(layer_?)?norm|(use_)?ln_f"), ON),
    (re.compile(r"(is_)?causal|scale_(attn|attention)(_weights)?|use_pos(_?(emb|enc|ition)\w*)?"), ON),
    (re.compile(r"pos(ition(al)?)?_?(emb|enc)\w*"), (*ON, "learned", "learnt", "absolute", "learned_absolute")),
)
# Options of a kind, and the words for the kinds that this model has.
KINDS = re.compile(
    r"(layer_?norm|norm|attn|attention|mlp|ffn?|block|arch(itecture)?|variant)(_(type|name|kind|class|position|pos|style))*"
)
OUR_KINDS = (
    *(
        "layernorm",
        "layer_norm",
        "layer",
        "ln",
        "pre",
        "pre_norm",
        "prenorm",
        "pre_ln",
        "mha",
        "causal",
        "full",
        "flash",
    ),
    *("sdpa", "standard", "default", "mlp", "gpt", "gpt2", "gpt-2", "nanogpt"),
)
OTHER_KINDS = re.compile(r"rope|rotary|alibi|glu|rms|moe|llama|post|sliding|local|sparse|parallel", re.IGNORECASE)
# Options that change what a model computes, by words in their names. Among the training's options, only these count.
OPTIONS_OF_MODELS = re.compile(
    r"(^|_)mup($|_)|softmax_?(1|one)|(^|_)rope($|_)|rotary|alibi|swiglu|geglu|(^|_)glu($|_)|gated|swish|rms_?norm|qk_?norm"
    r"|(soft|logits?)_?cap|post_?(ln|norm)|sliding|expert|moe($|_)|kv_heads?|key_value_heads|query_groups|multi_query"
    r"|(attn|attention|logits?|embed\w*|residual)_(scal|mult)|scale_(attn|attention|emb|logit|resid)"
    r"|parallel_(residual|block|attn|attention|mlp|ff|layer)|(batch|group|scale|deep|weight)_?norm|embed\w*_norm"
    r"|norm_(type|name|class|position|style|first)|(attn|attention|mlp|ffn?)_(type|name|kind)|talking_heads|causal"
    r"|pos(ition(al)?)?_?(emb|enc)|rel(ative)?_pos"
    r"|(?<!eval_)(?<!log_)(?<!loss_)(?<!smoothing_)(?<!metrics_)window(s|_size|_pattern|_len|_length)?$"
)
# A name of these words, one of the first group among them, is that of an option that changes no logits: the training's,
# or one whose effect the weights show.
HARMLESS = re.compile(
    r"strategy|accelerator|accumulate|drop|pdrop|dropout|droppath|layerdrop|bias|biases|tie|tied|tying|weights|init|initializer|flash|sdpa|backend"
    r"|cache|device|devices|dtype|precision|amp|compile|compiled|seed|seeds|batch|batches|batchsize|lr|learning"
    r"|decay|wd|beta|betas|grad|grads|gradient|gradients|clip|clipping|warmup|iter|iters|iteration|iterations|step"
    r"|steps|epoch|epochs|optim|optimizer|adam|adamw|sched|scheduler|momentum|nesterov|ema|wandb|tensorboard|log"
    r"|logs|logging|logger|data|dataset|datasets|corpus|tokenizer|train|training|eval|evaluation|val|valid"
    r"|validation|test|path|paths|dir|dirs|file|files|filename|folder|root|url|name|project|tag|tags|note|notes"
    r"|comment|description|author|version|date|commit|checkpoint|checkpoints|checkpointing|ckpt|save|resume|worker"
    r"|workers|gpu|gpus|cuda|ddp|fsdp|rank|verbose|debug|patience|interval|every|freq|bos|eos|pad|unk|sampling"
    r"|temperature|implementation|impl|generate|ratio|mult"
)
FILLING = re.compile(
    r"n|num|max|min|total|always|work|check|t|dev|size|rate|prob|p|use|is|has|add|with|from|in|out|to|per|of|at|a|model|best|current"
    r"|global|start|attn|attention|embd|emb|embed|embedding|resid|residual|hidden|mlp|ff|ffn|ffwd|qkv|q|k|v|c|proj"
    r"|head|lm|ln|norm|linear|layer|layers|classifier|input|output|std|range|method|fn|type|mode|weight|word"
    r"|embeddings|token|tokens|id|ids|idx|index|only|all|first|last|time|loss|accum|accumulation|micro|mini|torch"
    r"|pin|memory|exp|experiment|run|task|job|user|entity|group|level|limit|fraction|top|by|kv"
)
# Whole names of such options.
HARMLESS_NAMES = re.compile(
    r"init_scale|activation_checkpointing|activation_offloading|label_smoothing|world_size|output_hidden_states|output_attentions|return_dict"
    r"|reorder_and_upcast_attn|top_k|top_p|model_type|expansion_factor|block_list|block_lists|ignore_index"
    r"|padding_idx|n_samples"
)
# A name of these words is that of a size. Its value changes nothing if the weights have it as a size.
SIZE_WORDS = re.compile(
    r"n|num|d|dim|dims|dimension|dimensions|size|len|length|max|min|layer|layers|block|blocks|head|heads|embd|emb"
    r"|embed|embeds|embedding|embeddings|hidden|inner|intermediate|vocab|vocabulary|padded|context|ctx|seq|sequence"
    r"|position|positions|token|tokens|input|ff|ffn|ffw|ffwd|feed|forward|mlp|model|decoder|transformer|attention"
    r"|attn|width|depth|channels|units|nlayer|nlayers|nhead|nheads|nhid|ninp|dmodel|dff|seqlen|maxlen|blocksize"
)
# Other trainers' names of the sizes that the weights show.
SIZE_NAMES = {
    "n_layer": ("n_layer", "n_layers", "num_layers", "num_hidden_layers", "n_blocks", "num_blocks", "depth"),
    "n_embd": ("n_embd", "n_embed", "emb_dim", "embed_dim", "embedding_dim", "d_model", "hidden_size", "dim"),
    "block_size": (
        *("block_size", "context_length", "context_size", "n_positions", "n_ctx", "max_position_embeddings"),
        *("max_seq_len", "seq_len", "ctx_len", "max_len"),
    ),
    "vocab_size": ("vocab_size", "n_vocab", "padded_vocab_size"),
}
# Of transformers' config.json: fields that do not change the logits.
GENERIC = re.compile(
    r"architectures|auto_map|model_type|(torch_)?dtype|transformers_version|_name_or_path|\w+_token_id|id2label|label2id"
    r"|initializer_range|problem_type|summary_\w+|task_specific_params|converted_from"
)
OUR_TYPES = (None, "gpt2", "custom_gpt")
# Families of transformers whose config.json says nothing of a file that is read here.
OTHER_TYPES = re.compile(
    r"bert|roberta|gpt_?neox?|gptj|codegen|openai-gpt|opt|bloom|mpt|t5|(code_?)?llama|mi[sx]tral|qwen|gemma|phi|falcon",
    re.I,
)
MAX_CONFIG_BYTES, MAX_TEXT, MAX_NAME, MAX_OPTION = 2**21, 1000, 60, 200
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
    for name, value in told.items():
        told[name] = number(value, file, value if isinstance(value, str) else f"a {kind_of(value)}")
    return told


def read_options(
    stated: Mapping[Any, Any], file: Archive, is_of_model: bool, own: str | None = None
) -> tuple[dict[Any, Any], str | None, float | None]:
    """The options that are left, and the activation and the norms' epsilon that are among the options.

    An activation that is not known here, and several that differ, are left among the options.

    Args:
        is_of_model: whether all options are the model's. A bare `eps` among the training's is the optimizer's.
        own: the activation of the trainer's class. Another one that is stated is left among the options. The word
            `gelu` stands for each form of it.
    """
    names = {name: _snake(name) for name in stated if isinstance(name, str) and stated[name] is not None}
    acts = {name: _activation(stated[name]) for name, snake in names.items() if ACTIVATION.fullmatch(snake)}
    is_training = not is_of_model or any(re.search(r"(^|_)(lr|learning_rate)(_|$)", snake) for snake in names.values())
    bare = () if is_training else BARE_EPSILON
    epsilons = {
        name: number(stated[name], file) for name, snake in names.items() if EPSILON.fullmatch(snake) or snake in bare
    }
    activation = next(iter(acts.values())) if len(set(acts.values())) == 1 else None
    is_other = own is not None and activation != own and not (activation == "gelu" and own.startswith("gelu"))
    activation = None if is_other else activation
    epsilon = next(iter(epsilons.values())) if len(set(epsilons.values())) == 1 else None
    epsilon = epsilon if isinstance(epsilon, float) and 0 < epsilon < 1 else None
    read = {*(acts if activation else ()), *(epsilons if epsilon else ())}
    left = {name: value for name, value in stated.items() if name not in read}
    return left, activation if own is None else None, epsilon


def is_activation(name: str) -> bool:
    """Whether trainers call the option of the activation so."""
    return ACTIVATION.fullmatch(_snake(name)) is not None


def _activation(value: Any) -> str | None:
    name = value.lower() if isinstance(value, str) else ""
    name = "silu" if name == "swish" else name
    return name if name in ACTIVATIONS else None


def unknown_options(stated: Mapping[Any, Any], sizes: Iterable[int], is_of_model: bool = True) -> dict[str, Any]:
    """Options that may change what the model computes, in a way that this project does not know.

    Args:
        sizes: the sizes that the weights have. An option that is named and valued like a size is known.
        is_of_model: whether all options are the model's. Among the training's, only names that models are known to have
            count.
    """
    n_head = next((value for name, value in stated.items() if name in HEADS), None)
    sizes = set(sizes)
    return {
        name: value
        for name, value in stated.items()
        if isinstance(name, str)
        and name not in SIZES
        and name not in OTHER_NAMES
        and not _is_known(_snake(name), value, sizes, n_head, is_of_model)
    }


def _is_known(name: str, value: Any, sizes: set[int], n_head: Any, is_of_model: bool) -> bool:
    is_plain = isinstance(value, (bool, int, float, str, type(None)))
    for pattern, values in ALWAYS_ON:
        if pattern.fullmatch(name):
            return is_plain and (value.lower() if isinstance(value, str) else value) in values
    if is_plain and value in OFF:
        return not EPSILON.fullmatch(name)
    kind = value.lower() if KINDS.fullmatch(name) and isinstance(value, str) else ""
    if kind in OUR_KINDS or OTHER_KINDS.search(kind):
        return kind in OUR_KINDS
    if re.search(r"(kv|key_value)_heads?|query_groups", name) and value == n_head:
        return True
    if ACTIVATION.fullmatch(name) or EPSILON.fullmatch(name) or OPTIONS_OF_MODELS.search(name):
        return False
    words = re.findall(r"[a-z]+", name)
    is_size = type(value) is int and value in sizes and all(map(SIZE_WORDS.fullmatch, words))
    return not is_of_model or is_size or is_harmless(name)


def is_harmless(name: str) -> bool:
    """Whether an option with this name, in lower case, changes no logits in evaluation."""
    words = re.findall(r"[a-z]+", name)
    marks = [word for word in words if HARMLESS.fullmatch(word)]
    is_clear = bool(marks) and all(word in marks or FILLING.fullmatch(word) for word in words)
    return is_clear or HARMLESS_NAMES.fullmatch(name) is not None


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name[:MAX_OPTION]).lower().strip("_")


@dataclass(frozen=True)
class Beside:
    """What stands beside the weights of a bare state dict."""

    options: dict[Any, Any]
    place: str
    is_of_model: bool = True
    says: str = ""
    """What the config.json says of the heads, in words; "" if there is none, or it is not used."""
    unused: str = ""
    """Why the config.json beside the file is not used; "" if it is, or if there is none."""


def options_beside(path: Path, metadata: Mapping[str, str], sizes: Mapping[str, int]) -> Beside:
    """The options in the config.json beside a file, or in the metadata of a safetensors file.

    A config.json is used if it states at least one of the weights' sizes, and no other ones. In minGPT's, the name of a
    type may stand for the sizes.

    Args:
        sizes: `n_layer`, `n_embd`, `block_size` and `vocab_size` of the weights.
    """
    found, said = _config_beside(path.with_name("config.json"))
    unused = found and _other_model(found, said, sizes)
    if found and not unused:
        options = {name: value for name, value in found.items() if not GENERIC.fullmatch(name)}
        return Beside(options, "config.json beside it", says=f"{path.with_name('config.json')} says {said}")
    fields = {name: _value(text) for name, text in metadata.items() if name != "format"}
    return Beside(fields, "its metadata", is_of_model=False, unused=unused or "")


def _config_beside(config: Path) -> tuple[dict[str, Any] | None, str]:
    """The fields of a config.json, or of a dict in it, that state the number of heads, and the words that say it."""
    if not config.is_file():
        return None, ""
    try:
        fields = parse_json(read_text(config, MAX_CONFIG_BYTES))
    except ValueError:
        return None, ""
    fields = fields if isinstance(fields, dict) else {}
    for one in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        if (n_head := next((one[name] for name in HEADS if one.get(name) is not None), None)) is not None:
            return _of_type(one, one.get("model_type")), f"n_head={one_line(n_head, MAX_NAME)}"
        if isinstance(kind := one.get("model_type"), str) and kind in MINGPT_TYPES:
            return _of_type(one, kind), kind
    return None, ""


def _of_type(config: dict[str, Any], kind: Any) -> dict[str, Any]:
    """A configuration with the sizes that the name of minGPT's type stands for, where it states none."""
    if (
        not isinstance(kind, str)
        or kind not in MINGPT_TYPES
        or (kind == "gpt2" and any(config.get(name) is not None for name in HEADS))
    ):
        return config  # transformers' type `gpt2` stands for no sizes
    told = zip(("n_layer", "n_head", "n_embd"), MINGPT_TYPES[kind], strict=True)
    return dict(told) | {name: value for name, value in config.items() if value is not None}


def _other_model(config: Mapping[str, Any], said: str, sizes: Mapping[str, int]) -> str:
    """Why a config.json belongs to another model than the weights; "" if it is theirs."""
    stated = {
        size: value for size, names in SIZE_NAMES.items() for name in names if (value := config.get(name)) is not None
    }
    kind = config.get("model_type")
    if kind not in (*OUR_TYPES, *MINGPT_TYPES) and OTHER_TYPES.match(str(kind)):
        return f"config.json beside it is of a model of type {one_line(kind, MAX_NAME)}"
    layers, width = stated.get("n_layer", sizes["n_layer"]), stated.get("n_embd", sizes["n_embd"])
    if (layers, width) != (sizes["n_layer"], sizes["n_embd"]):
        return (
            f"config.json beside it says {said} ({layers} layers, {width} wide), but the weights have "
            f"{sizes['n_layer']} layers and are {sizes['n_embd']} wide"
        )
    if other := next((size for size, value in stated.items() if value != sizes[size]), None):
        return f"config.json beside it says {other}={stated[other]!r}, but the weights say {sizes[other]}"
    return "" if stated else "config.json beside it states no size of the weights, so that it may be of another model"


def _value(text: str) -> Any:
    """The value of a text of JSON, such as a number; another text itself."""
    try:
        return parse_json(text) if len(text) <= MAX_TEXT else text
    except ValueError:
        return text


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
