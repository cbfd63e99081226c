"""What the formats share: the options of a conversion, the engines' packages, and how files are written."""

import copy
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError, memory_for, one_line
from hf_model.folder import with_weights
from hf_model.formats.cards import CardFacts
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import save_tokenizer

TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")
GGUF_TYPES = ("f32", "f16", "q8_0")
TRAINERS = ("original", "nanogpt")
SHARD_SIZE = r"[1-9]\d{0,5}(\.\d{1,6})?[KMGT]B"


@dataclass(frozen=True)
class Options:
    """How to write a model. Each format reads its own fields.

    Raises:
        UserError: a field has a value that its format does not know.
    """

    card: CardFacts = field(default_factory=CardFacts)
    max_shard_size: str = "5GB"
    gguf_type: str = "f32"
    quantization: str | None = None
    like: str = "original"

    def __post_init__(self) -> None:
        for name, known in (("gguf_type", GGUF_TYPES), ("like", TRAINERS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}")
        if not re.fullmatch(SHARD_SIZE, self.max_shard_size, re.ASCII | re.IGNORECASE):
            raise UserError(f"max_shard_size={self.max_shard_size!r} is not a size such as 500MB or 5GB")


def beyond_gpt2(config: CustomGPTConfig) -> list[str]:
    """What a model has that no GPT-2 has, in words. Sizes, activation and attention scale are not among it."""
    differs = {
        "has post-norm blocks": not config.norm_first,
        "has no final LayerNorm": not config.final_norm,
        "has a bias at its head": config.head_bias,
    }
    return [name for name, is_so in differs.items() if is_so]


def check_plain_gpt2(config: CustomGPTConfig, what: str, activations: Collection[str] | None = None) -> None:
    """Check that a model is a GPT-2 but for sizes, activation and attention scale.

    Args:
        what: the format's model, such as `"llama.cpp's GPT-2"`.
        activations: those that it has; None for any.

    Raises:
        UserError: it is not; the message names all that differs.
    """
    found = beyond_gpt2(config)
    if activations is not None and config.activation_function not in activations:
        found.append(f"has the activation {config.activation_function}")
    if found:
        raise UserError(
            f"{what} cannot hold this model, which {' and '.join(found)}: use --format transformers or onnx"
        )


def with_usual_scale(model: CustomGPTForCausalLM) -> CustomGPTForCausalLM:
    """The model with its attention scale folded into the rows of the queries; the model itself if it has none."""
    config = model.config
    if config.attention_scale is None:
        return model
    factor = config.attention_scale * (config.n_embd // config.n_head) ** 0.5
    usual, weights = copy.deepcopy(config), dict(model.state_dict())
    usual.attention_scale = None
    for name, tensor in weights.items():
        if ".c_attn." in name:
            weights[name] = tensor.clone()
            weights[name][: config.n_embd] *= factor
    folded = with_weights(usual, weights)
    folded.generation_config = model.generation_config
    return folded


class MissingEngineError(Exception):
    """The engine that verifies a format is not installed. The message says how to install it."""


def require(packages: Sequence[str], extra: str, error: type[Exception] = UserError) -> None:
    """Raise `error`, with the remedy, if one of these packages is not installed."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        names = " and ".join(absent)
        raise error(f'{names} not installed for {sys.executable}: pip install "custom-gpt-hf[{extra}]"')


@contextmanager
def engine_errors(problem: str, written_to: Path | None = None) -> Iterator[None]:
    """Turn whatever an engine raises into a UserError that begins with `problem`.

    Args:
        written_to: the folder that the engine writes into. An engine may report a full disk in any words, so the disk
            is asked before the model is blamed.

    Raises:
        UserError: the engine failed.
        OSError: the disk is full, or failed.
    """
    try:
        with memory_for("to convert the model"):
            yield
    except (UserError, MissingEngineError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        if written_to is not None:
            _check_disk(written_to)
        raise UserError(f"{problem} ({one_line(error, 300)})") from None


def _check_disk(folder: Path) -> None:
    """Make the largest file of a folder longer; raises OSError where the disk, a quota or a limit does not let it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size, default=folder / "probe")
    with largest.open("ab") as file:
        file.write(bytes(2**20))


def save_model(model: PreTrainedModel, folder: Path, max_shard_size: str) -> None:
    """`save_pretrained`, with weights that the same users may read as the other files.

    Raises:
        OSError: the disk is full.
    """
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except SafetensorError as error:  # raised for the errors of the disk
        raise OSError(str(error)) from None
    for weights in folder.glob("*.safetensors"):  # safetensors lets only the owner read them
        shutil.copymode(folder / "config.json", weights)


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer that `AutoTokenizer` of transformers 4.57 and 5 loads."""
    save_tokenizer(tokenizer, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # Version 5 writes `TokenizersBackend`, which 4.57 does not know. Version 5 knows the older name too.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
