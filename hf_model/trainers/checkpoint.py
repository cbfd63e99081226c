"""Reads what a checkpoint file holds of the model: weights under clean names, sizes, progress."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_model.errors import UserError, one_line, some_of
from hf_model.trainers import archive, llm_c, saved
from hf_model.trainers.architecture import Architecture, infer_architecture, is_tied, with_zero_biases, without_layer
from hf_model.trainers.names import FAMILY, WRITTEN_OUT_TANH, Names, Placed, place_names
from hf_model.trainers.pickle_reader import StandIn, dict_of, kind_of
from hf_model.trainers.pickled_module import activation_of, epsilon_of, heads_of, is_module
from hf_model.trainers.stated import (
    HEADS,
    Beside,
    options_beside,
    progress_of,
    read_options,
    stated_options,
    stated_sizes,
    unknown_options,
)
from hf_model.trainers.table import Trainer, find_trainer
from hf_model.trainers.tensors import find_weights, is_no_weight, weights_of, widest

MAX_NAME = 200
COUNTERS = re.compile(r"(^|\.)(n_averaged|num_batches_tracked)$")  # of averaged models and of norms
GPT2_VOCABULARY = 50257
TIES = re.compile(r"(^|_)(tie|tied|tying)(_|$)")
ADVICE = "a model with parts of its own is read by its code (--model FILE.py:NAME)"
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
    """The key of the weights in the file; None for a bare state dict, and for llm.c's files."""
    kind: str = "a bare state dict"
    """What the file is, in words, if the weights have no key."""
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
    stated_in: str = "model_args"
    """Where the sizes and options stand: in the file, or in a config.json beside it."""
    beside: str = ""
    """The config.json beside the file that states sizes and options, in words; "" if none does."""
    config_unused: str = ""
    """Why the config.json beside the file is not used; "" if it is, or if there is none."""
    has_head_alone: bool = False
    """Whether the file has the head and no embedding, as some savers leave a tied pair."""
    other_keys: tuple[str, ...] = ()
    """The keys of what else the file holds. None of it is kept."""

    names: Names = FAMILY
    """The trainer's names of the tensors in the file."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `CustomGPTConfig` that the file tells beside the sizes."""
    module_class: str = ""
    """The class of the whole module that the file holds; "" for a state dict."""
    n_head: int | None = None
    """The number of heads that the tensors or the module's attributes show."""
    no_biases: tuple[str, ...] = ()
    """Biases that the file lacks in every layer, while it has others. They are zeros here. `{i}` is the layer."""

    def architecture(self, n_head: int | None = None) -> Architecture:
        """The architecture, from the weights and `model_args`; `n_head` overrides the file's.

        Raises:
            UserError: as `infer_architecture`, with the name of the file.
        """
        with naming(self.path):
            stated = n_head if n_head is not None else self.model_args.get("n_head")
            if self.n_head is not None and not self.module_class and stated not in (None, self.n_head):
                raise UserError(f"n_head={stated}, but its layers have tensors for {self.n_head} heads")
            told = self.told_heads() if n_head is None else None
            if stated is None and told is None and self.config_unused:
                raise UserError(f"{self.config_unused}: give --n_head")
            model_args = {"dropout": self.trainer.dropout} | self.model_args
            return infer_architecture(self.state_dict, model_args, told[0] if told else n_head, self.stated_in)

    def forms(self, architecture: Architecture, activation: str | None) -> list[dict[str, Any]]:
        """What the model may compute, as fields of `CustomGPTConfig`; several if the trainer's names leave it open.

        Args:
            activation: the user's choice; None leaves it to the file.
        """
        if len(self.names.forms) == 1:
            return [{"activation_function": activation or self.trainer.activation}]
        activation = activation or (self.trainer.activation if self.trainer.is_known else None)
        has_one_scale, final_norms = architecture.n_head == 1, (True, False) if self._has_untrained_norm else (True,)
        forms: list[dict[str, Any]] = []
        for named in self.names.forms:
            form = dict(named) | ({"activation_function": activation} if activation else {})
            if form["attention_scale"] == "width":
                form["attention_scale"] = architecture.n_embd**-0.5
            if form["final_norm"] not in final_norms or (has_one_scale and form["attention_scale"] is not None):
                continue
            if form not in forms:
                forms.append(form)
        return forms

    @property
    def _has_untrained_norm(self) -> bool:
        """Whether the final norm has the values that it began with, as one that the model never calls."""
        weight = self.state_dict["transformer.ln_f.weight"]
        bias = self.state_dict.get("transformer.ln_f.bias")
        return bool((weight == weight[0]).all()) and (bias is None or not bias.any())

    def told_heads(self) -> tuple[int, str] | None:
        """The number of heads if the file itself does not state it, and the words that say what does.

        The place is always told if it is outside the file.
        """
        if self.n_head is not None:
            return self.n_head, "the saved module says so" if self.module_class else "each head has its own tensors"
        embedding = self.state_dict.get("transformer.wte.weight")
        if (stated := self.model_args.get("n_head")) is not None:
            return (stated, self.beside) if self.beside else None
        if embedding is None or embedding.ndim != 2:
            return None
        width = embedding.shape[1]
        usual = self.names.n_head.get((width, n_layers(self.state_dict)))
        if usual is not None and GPT2_VOCABULARY <= embedding.shape[0] <= GPT2_VOCABULARY + 1000:
            return usual, "GPT-2's number for this width and depth; give another one with --n_head"
        return None

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
        if llm_c.is_model(archive.read_head(path)):
            model_args, state_dict = llm_c.read(path)
            trainer = Trainer(WRITTEN_OUT_TANH, "llm.c's")
            return Checkpoint(path, state_dict, model_args, weights_key=None, kind="llm.c's format", trainer=trainer)
        return _read(path, check_bytes)


def n_layers(state_dict: Mapping[str, torch.Tensor]) -> int:
    return len({name.split(".")[2] for name in state_dict if name.startswith("transformer.h.")})


def _sizes_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The sizes that the weights show; 0 for a matrix that is missing."""
    embeddings = (state_dict.get(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    (vocab_size, n_embd), (block_size, _) = (
        (0, 0) if one is None or one.ndim != 2 else one.shape for one in embeddings
    )
    return {"n_layer": n_layers(state_dict), "n_embd": n_embd, "block_size": block_size, "vocab_size": vocab_size}


def _read(path: Path, check_bytes: bool) -> Checkpoint:
    file, content = load_content(path)
    weights_key, weights = find_weights(content)
    placed = _place(file, weights)
    tied = placed.names_of("wte", "lm_head")
    joined = placed.joined(weights_of(file, {name: weights[name] for name in placed.places}, check_bytes, tied))
    # Some savers keep one name of a tied pair. The original's heads are never tied: there, a weight is missing.
    is_original = placed.names is FAMILY and weights_key == "model_state_dict"
    may_tie = placed.names.may_tie and not is_original
    has_head_alone = may_tie and "lm_head.weight" in joined and "transformer.wte.weight" not in joined
    if has_head_alone:
        joined["transformer.wte.weight"] = joined.pop("lm_head.weight")
    state_dict = with_zero_biases(joined)

    whole = content[weights_key] if weights_key is not None else None
    module = whole if is_module(whole) else None
    beside = {key: value for key, value in content.items() if isinstance(key, str) and key not in weights}
    stated, is_of_model, place = stated_options(beside if module is None else beside | module.state)
    outside = Beside({}, "")
    if weights_key is None:
        outside = options_beside(path, file.metadata, _sizes_of(state_dict))
        stated, is_of_model, place = outside.options, outside.is_of_model, outside.place
    if "lm_head.weight" not in joined and any(TIES.search(str(name)) and stated[name] is False for name in stated):
        raise UserError(f"it lacks 'lm_head.weight', and its {place} say that the head is not tied")
    sizes = stated_sizes(stated, file)
    known = {size for tensor in state_dict.values() for size in tensor.shape} | {n_layers(state_dict), *sizes.values()}
    if isinstance(n_head := sizes.get("n_head"), int) and n_head > 0:
        known.add(_sizes_of(state_dict)["n_embd"] // n_head)  # the width of a head
    config = beside.get("config")
    dataset, start = (config.get(key) if isinstance(config, dict) else None for key in ("dataset", "init_from"))
    trainer = find_trainer(
        placed.names,
        weights_key,
        beside.keys(),
        sizes,
        has_config_object=isinstance(config, StandIn),
        has_masks=any(len(shape := weights[name].shape) > 1 and shape[-1] == shape[-2] for name in placed.others),
        has_biases=any(name.endswith(".bias") for name in state_dict),
        is_tied="transformer.wte.weight" in state_dict and is_tied(state_dict),
    )
    # transformers' own class has the activation that its configuration says; others' classes have one of their own.
    own = None if placed.names.is_transposed else placed.names.activation
    left, told, stated_epsilon = read_options(stated, file, is_of_model, own)
    options: dict[str, Any] = {"layer_norm_epsilon": stated_epsilon} if stated_epsilon else {}
    if told:
        trainer = Trainer(told, f"{place} says so", dropout=trainer.dropout)
    if module is not None:
        mlps = {name.rpartition(".")[0].rpartition(".")[0] + "." for name in placed.names_of("mlp.c_fc")}
        if activation := activation_of(module, mlps):
            is_usual = trainer.is_known and trainer.activation == activation
            trainer = Trainer(activation, "a module of the saved model", is_usual, trainer.dropout)
        if epsilon := epsilon_of(module):
            options["layer_norm_epsilon"] = epsilon
    return Checkpoint(
        path=path,
        state_dict=state_dict,
        model_args=sizes,
        weights_key=weights_key,
        progress=progress_of(beside, file),
        trainer=trainer,
        dataset=dataset if isinstance(dataset, str) and len(dataset) <= MAX_NAME else None,
        started_from=start if isinstance(start, str) and start in GPT2_NAMES else None,
        is_pretrained=is_original and "loss" in beside and "config" not in beside,
        unknown_args=unknown_options(left, known, is_of_model),
        stated_in=place,
        beside=outside.says,
        config_unused=outside.unused,
        has_head_alone=has_head_alone,
        other_keys=tuple(
            one_line(key, MAX_NAME)
            for key, value in beside.items()
            if key != weights_key and value is not None and value != {}
        ),
        names=placed.names,
        options=options,
        module_class=kind_of(module) if module else "",
        n_head=placed.n_head or (heads_of(module, HEADS) if module else None),
        no_biases=(*dict.fromkeys(without_layer(n) for n in state_dict if n not in joined), *placed.unbiased_parts),
    )


def _place(file: archive.Archive, weights: Mapping[Any, Any]) -> Placed:
    """Place the tensors by the table of trainers' names. What has no place must be a buffer, such as a causal mask.

    Raises:
        UserError: the names are no trainer's, or other tensors are left.
    """
    for name in weights:
        if not isinstance(name, str):
            raise UserError(f"its state dict has the key {name!r}, which is not a name")
    placed = place_names({name: getattr(value, "shape", ()) for name, value in weights.items()})
    others = [name for name in placed.others if not COUNTERS.search(name) and not is_no_weight(file, weights[name])]
    if others:
        raise UserError(f"it holds {some_of(list(map(repr, others)), 5)}, which this model has no place for: {ADVICE}")
    return placed


def load_content(path: Path) -> tuple[archive.Archive, dict[Any, Any]]:
    """A file that holds weights (see `saved.load`), and the dict in it.

    Raises:
        UserError: as `read_checkpoint`, without the name of the file.
    """
    file = saved.load(path)
    content = {"model": file.value} if is_module(file.value) else dict_of(file.value)
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
