"""Reads what a checkpoint file holds of the model: weights under clean names, sizes, progress."""

import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_model.errors import UserError, one_line
from hf_model.trainers import archive
from hf_model.trainers.architecture import Architecture, clean_names, infer_architecture, is_tied
from hf_model.trainers.pickle_reader import StandIn, StoredTensor, dict_of, fields_of, kind_of
from hf_model.trainers.table import Trainer, find_trainer, heads_beside
from hf_model.trainers.tensors import find_weights, number_of, weights_of, widest

# Options that change no forward pass in evaluation, by their names.
HARMLESS_ARGS = re.compile(
    r"drop|flash|sdpa|device|dtype|compile|seed|batch|(^|_)lr($|_)|learning_rate|decay|betas?($|_)|grad|warmup|(^|_)iters?($|_)"
    r"|max_steps|optim|path|(^|_)dir|(^|_)log(_|$|ging)|wandb|data|name|checkpoint|init_|tie_|tying|use_cache"
)
KNOWN_DEFAULTS: dict[str, Any] = {"layer_norm_epsilon": 1e-5, "layer_norm_eps": 1e-5, "norm_eps": 1e-5, "causal": True}
OFF = (None, False, 0, "", "none", "None")
MODEL_ARGS_KEYS = ("model_args", "config")
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
PROGRESS = ("iter_num", "step", "loss", "best_val_loss", "val_loss")
MAX_NAME = 200
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


@dataclass
class Checkpoint:
    """What a file holds of the model. The tensors are mapped from the file."""

    path: Path
    state_dict: dict[str, torch.Tensor]
    """Clean name to tensor, on the CPU, in the file's own dtypes."""
    model_args: dict[str, Any]
    """The sizes that the file states; empty if it states none."""
    weights_key: str | None
    """The key of the weights in the file; None for a bare state dict."""
    progress: dict[str, Any] = field(default_factory=dict)
    """`iter_num` and the loss, if the file has them."""
    trainer: Trainer = field(default_factory=lambda: Trainer(is_known=False))
    """The trainer that writes such files."""
    dataset: str | None = None
    """nanoGPT's name of the training data."""
    started_from: str | None = None
    """nanoGPT's name of the GPT-2 model that training started from, such as `gpt2-xl`."""
    is_pretrained: bool = False
    """Whether the original's pre-training wrote the file, so that the model knows no instructions."""
    unknown_args: dict[str, Any] = field(default_factory=dict)
    """Options in `model_args` that are switched on and may change what the model computes, in a way not known here."""
    has_head_alone: bool = False
    """Whether the file has the head and no embedding, as some savers leave a tied pair."""
    other_keys: tuple[str, ...] = ()
    """The keys of what else the file holds. None of it is kept."""

    def architecture(self, n_head: int | None = None) -> Architecture:
        """The architecture, from the weights and `model_args`; `n_head` overrides the file's.

        Raises:
            UserError: as `infer_architecture`, with the name of the file.
        """
        with naming(self.path):
            beside = self.heads_beside() if n_head is None else None
            model_args = {"dropout": self.trainer.dropout} | self.model_args
            return infer_architecture(self.state_dict, model_args, beside[0] if beside else n_head)

    def heads_beside(self) -> tuple[int, str] | None:
        """For a bare state dict, the number of heads in the config.json beside it, and the words that say so."""
        embedding = self.state_dict.get("transformer.wte.weight")
        if self.weights_key is not None or embedding is None or embedding.ndim != 2:
            return None
        n_layer = len({name.split(".")[2] for name in self.state_dict if name.startswith("transformer.h.")})
        return heads_beside(self.path, n_layer, embedding.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every weight without loss."""
        return widest(tensor.dtype for tensor in self.state_dict.values())


def read_checkpoint(path: str | Path, check_bytes: bool = True) -> Checkpoint:
    """Read the model's part of a checkpoint. Optimizer state is never read into memory from a zip-format file.

    The weights stand under `model_state_dict`, `model` or `state_dict`, or the file is the state dict itself.

    Args:
        path: the file.
        check_bytes: compare every weight with its CRC32, which takes a pass over the weights. The older format has
            no CRC32.

    Raises:
        UserError: there is no such file, it is of another kind, is damaged, refers to code, or has no weights.
    """
    path = Path(path)
    with naming(path):
        file, content = load_content(path)
        weights_key, weights = find_weights(content)
        named = clean_names(weights)
        # Some savers keep one name of a tied pair. The original's heads are never tied: there, a weight is missing.
        may_be_tied = weights_key != "model_state_dict"
        has_head_alone = may_be_tied and "lm_head.weight" in named and "transformer.wte.weight" not in named
        if has_head_alone:
            named["transformer.wte.weight"] = named.pop("lm_head.weight")
        state_dict = weights_of(file, named, check_bytes)
    beside = {} if weights_key is None else {key: value for key, value in content.items() if isinstance(key, str)}
    stated = _stated(beside)
    told = {name: value for name in SIZES if (value := stated.get(name)) is not None}
    model_args = {name: _number(value, file, f"a {kind_of(value)}") for name, value in told.items()}
    config = beside.get("config")
    dataset, start = (config.get(key) if isinstance(config, dict) else None for key in ("dataset", "init_from"))
    return Checkpoint(
        path=path,
        state_dict=state_dict,
        model_args=model_args,
        weights_key=weights_key,
        progress={key: number for key in PROGRESS if (number := _number(beside.get(key), file)) is not None},
        trainer=find_trainer(
            weights_key,
            beside.keys(),
            model_args,
            has_config_object=isinstance(config, StandIn),
            has_masks=len(state_dict) < len(weights),
            has_biases=any(name.endswith(".bias") for name in state_dict),
            is_tied="transformer.wte.weight" in state_dict and is_tied(state_dict),
        ),
        dataset=dataset if isinstance(dataset, str) and len(dataset) <= MAX_NAME else None,
        started_from=start if isinstance(start, str) and start in GPT2_NAMES else None,
        is_pretrained=weights_key == "model_state_dict" and "loss" in beside and "config" not in beside,
        unknown_args=_unknown_args(beside, stated),
        has_head_alone=has_head_alone,
        other_keys=tuple(
            one_line(key, MAX_NAME)
            for key, value in beside.items()
            if key != weights_key and value is not None and value != {}
        ),
    )


def load_content(path: Path) -> tuple[archive.Archive, dict[Any, Any]]:
    """A `torch.save` file, and the dict in it.

    Raises:
        UserError: as `read_checkpoint`, without the name of the file.
    """
    file = archive.load(path)
    content = dict_of(file.value)
    if not isinstance(content, dict):
        raise UserError(f"holds a {kind_of(content)}, not a dict: save model.state_dict() with torch.save")
    return file, content


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of an error's message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _stated(content: Mapping[str, Any]) -> dict[Any, Any]:
    """`model_args`, or else `config`: a dict, or the items or the attributes of an object."""
    found = (fields_of(content.get(key)) for key in MODEL_ARGS_KEYS)
    return next((fields for fields in found if fields is not None), {})


def _unknown_args(content: Mapping[str, Any], stated: Mapping[Any, Any]) -> dict[str, Any]:
    """Options of the model that this project does not know, and that are switched on.

    They are looked for in `model_args` and in a configuration object. A `config` that is a dict holds the training's
    options too.
    """
    if not isinstance(content.get("model_args"), (dict, StandIn)) and not isinstance(content.get("config"), StandIn):
        return {}
    return {
        name: value
        for name, value in stated.items()
        if isinstance(name, str)
        and name not in SIZES
        and not HARMLESS_ARGS.search(name)
        and not (isinstance(value, (bool, int, float, str, type(None))) and value in OFF)
        and KNOWN_DEFAULTS.get(name, OFF) != value
    }


NUMPY_FORMATS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "u8": "Q", "u4": "I", "b1": "?"}


def _number(value: Any, file: archive.Archive, default: Any = None) -> int | float | Any:
    """A plain number from a number, a tensor of one element or a pickled NumPy scalar; else the default."""
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64):
        return value
    if isinstance(value, StoredTensor):
        return default if (number := number_of(file, value)) is None else number
    if isinstance(value, StandIn) and len(value.args) == 2 and isinstance(value.args[0], StandIn):
        dtype, raw = value.args
        if isinstance(raw, StandIn) and raw.name == "_codecs.encode" and raw.args:  # bytes in protocol 2
            text = raw.args[0]
            raw = text.encode("latin1", "ignore") if isinstance(text, str) and len(text) <= 8 else None
        code = NUMPY_FORMATS.get(dtype.args[0]) if dtype.args and isinstance(dtype.args[0], str) else None
        if code and isinstance(raw, bytes) and struct.calcsize(code) == len(raw):
            return struct.unpack("<" + code, raw)[0]
    return default
