"""Everything there is to say about a checkpoint or a folder, gathered once: as lines for people, or values for JSON."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast
from typing_extensions import Unpack

from hf_model.descriptions import (
    describe_architecture,
    describe_parameters,
    describe_source,
    describe_tokenizer,
)
from hf_model.errors import memory_for, some_of
from hf_model.learnt.diagnosis import Diagnosis, Finding, diagnose, non_finite
from hf_model.learnt.training_data import Measurement, measure
from hf_model.loading import Loaded, Source, SourceOptions, check_option_names
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import CHAT_TEMPLATE, PAD, chat_template, is_of_characters
from hf_model.tokenizer.find import PADDED_TO
from hf_model.trainers.tensors import dtype_name

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "tie_word_embeddings", "dropout")
READ_KEYS = ("iter_num", "step", "loss", "best_val_loss", "val_loss", "model_args")


@dataclass(frozen=True)
class Found:
    """A value of the architecture, and what told it."""

    value: int | float | bool | str
    origin: str


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint or a folder is, and what its model has learnt."""

    path: str
    source: str
    """The line that describes the file or the folder."""
    weights_key: str | None
    progress: dict[str, Any]
    other_keys: tuple[str, ...]
    """The other keys of the file, such as the optimizer's state."""
    architecture: dict[str, Found]
    architecture_line: str
    parameters: int
    parameters_line: str
    dtype: str
    tokenizer_path: str
    tokenizer_line: str
    tokens: int
    choices: tuple[tuple[str, str], ...]
    """For each thing that the user did not specify: its name, and what was chosen and why."""
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    non_finite: tuple[str, ...]
    """The names of weights that hold NaN or infinities."""
    diagnosis: Diagnosis | None
    """None where weights are not finite: such a model cannot be asked anything."""
    measurement: Measurement | None
    """None without training data."""

    @property
    def has_optimizer(self) -> bool:
        return any("optimizer" in key for key in self.other_keys)

    def facts(self) -> Iterator[Finding]:
        """What the model is; for each thing that the user did not specify, what was chosen and why."""
        yield Finding("source", self.source)
        yield Finding("architecture", self.architecture_line)
        yield Finding("parameters", self.parameters_line)
        yield Finding("tokenizer", self.tokenizer_line)
        for item, text in self.choices:
            yield Finding(item, text)

    def left_out(self) -> Iterator[Finding]:
        """What else the file holds, which a conversion leaves out."""
        state = "saved in the file; a conversion leaves it out" if self.has_optimizer else "not saved"
        yield Finding("optimizer", state)
        if self.other_keys:
            yield Finding("also there", ", ".join(self.other_keys))

    def findings(self) -> Iterator[Finding]:
        """What a user should know before using the weights."""
        for note in self.notes:
            yield Finding("note", note)
        for warning in self.warnings:
            yield Finding("warning", warning)
        if bad := self.non_finite:
            yield Finding("warning", f"there are NaN or infinite values in {some_of(bad, 3)}: the model cannot work")
        if self.diagnosis is not None and self.diagnosis.is_harm:
            yield Finding("warning", str(self.diagnosis))
        if self.measurement is not None:
            yield from self.measurement.findings()

    def head(self) -> list[str]:
        """The lines that a conversion begins with."""
        return [*map(str, self.facts()), *map(str, self.findings())]

    def lines(self) -> Iterator[str]:
        """All there is to say, with the origin of each value and the diagnosis of a healthy model too."""
        for fact in self.facts():
            yield str(fact)
            if fact.about == "architecture":
                yield from (f"              {', '.join(names)}: from {origin}" for origin, names in self.origins())
        yield from map(str, self.left_out())
        if self.diagnosis is not None and not self.diagnosis.is_harm:
            yield str(Finding("diagnosis", str(self.diagnosis)))
        yield from map(str, self.findings())

    def origins(self) -> list[tuple[str, list[str]]]:
        """Each origin, and the names of the values that it told."""
        names: dict[str, list[str]] = {}
        for name, found in self.architecture.items():
            names.setdefault(found.origin, []).append(name)
        return list(names.items())

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON; NaN and infinities become None."""
        diagnosis = None if self.diagnosis is None else {**asdict(self.diagnosis), "text": str(self.diagnosis)}
        return plain(
            {
                "path": self.path,
                "source": {
                    "weights_key": self.weights_key,
                    "progress": self.progress,
                    "optimizer": self.has_optimizer,
                    "other_keys": self.other_keys,
                },
                "architecture": {name: asdict(found) for name, found in self.architecture.items()},
                "parameters": self.parameters,
                "dtype": self.dtype,
                "tokenizer": {"path": self.tokenizer_path, "tokens": self.tokens},
                "notes": self.notes,
                "warnings": self.warnings,
                "non_finite": self.non_finite,
                "diagnosis": diagnosis,
                "training_data": None if self.measurement is None else self.measurement.as_dict(),
            }
        )


def plain(value: Any) -> Any:
    """The same value as JSON can hold it: dicts with string keys, lists, finite numbers or None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@memory_for("to look at the model")
def inspect(
    checkpoint_path: str | Path | nn.Module,
    tokenizer_path: str | Path | None = None,
    *,
    training_data: str | Path | None = None,
    **options: Unpack[SourceOptions],
) -> tuple[Inspection, CustomGPTForCausalLM, PreTrainedTokenizerFast]:
    """Look at a checkpoint file or a converted folder. Nothing is written.

    Args:
        checkpoint_path, tokenizer_path, options: as in `loading.load`.
        training_data: the records or the text that the model was trained on.

    Returns:
        The inspection, the model on the CPU and its tokenizer.

    Raises:
        UserError: a file or the folder is invalid.
    """
    check_option_names("inspect", options, SourceOptions)
    source = Source.of(checkpoint_path, tokenizer_path, training_data=training_data, **options)
    loaded = source.load()
    return examine(source, loaded, training_data), loaded.model, loaded.tokenizer


def examine(source: Source, loaded: Loaded, training_data: str | Path | None = None) -> Inspection:
    """Inspect a model that was loaded with its tokenizer.

    Raises:
        UserError: the training data cannot be read.
    """
    model, tokenizer, checkpoint, vocabulary = loaded.model, loaded.tokenizer, loaded.checkpoint, loaded.found
    assert vocabulary is not None
    bad = tuple(non_finite(dict(model.named_parameters())))
    return Inspection(
        path=str(source.path),
        source=describe_source(source.path, checkpoint, source.module is not None),
        weights_key=None if checkpoint is None else checkpoint.weights_key,
        progress={} if checkpoint is None else checkpoint.progress,
        other_keys=() if checkpoint is None else tuple(key for key in checkpoint.other_keys if key not in READ_KEYS),
        architecture=_architecture(source, loaded),
        architecture_line=describe_architecture(model.config),
        parameters=model.num_parameters(),
        parameters_line=describe_parameters(model),
        dtype=dtype_name(model.dtype),
        tokenizer_path=vocabulary.taken,
        tokenizer_line=describe_tokenizer(vocabulary),
        tokens=len(tokenizer),
        choices=loaded.choices,
        notes=tuple(_notes(loaded)),
        warnings=tuple(_warnings(loaded)),
        non_finite=bad,
        diagnosis=None if bad else diagnose(model, tokenizer),
        measurement=None if training_data is None or bad else measure(model, tokenizer, Path(training_data)),
    )


def _architecture(source: Source, loaded: Loaded) -> dict[str, Found]:
    """Each size and option, and what told it."""
    config, checkpoint = loaded.model.config, loaded.checkpoint
    if checkpoint is None:
        place = "its config.json" if source.module is None else "your model"
        return {name: Found(getattr(config, name), place) for name in (*SIZES, "activation_function")}
    default = "the trainer's default (the file does not tell)"
    activation = checkpoint.trainer.why or default
    told = checkpoint.told_heads()
    heads = told[1] if told else "model_args"
    origin = dict.fromkeys(SIZES, "the weights") | {
        "n_head": heads if source.n_head is None else "--n_head",
        "dropout": "model_args" if "dropout" in checkpoint.model_args else default,
        "activation_function": activation if source.activation == "auto" else "--activation",
    }
    return {name: Found(getattr(config, name), why) for name, why in origin.items()}


def _notes(loaded: Loaded) -> Iterator[str]:
    tokenizer, is_instruction = loaded.tokenizer, chat_template(loaded.tokenizer) == CHAT_TEMPLATE
    if loaded.checkpoint is not None and loaded.checkpoint.is_pretrained and is_instruction:
        yield "this is a pre-training file, and its model knows no instructions; --raw makes it a model of raw text"
    if is_instruction and PAD not in tokenizer.get_vocab():
        yield f"the tokenizer has no {PAD}; {tokenizer.eos_token} serves as the padding token"
    unused = loaded.model.config.vocab_size - len(tokenizer)
    if 0 < unused < PADDED_TO:
        yield f"the weights' vocabulary is padded: {unused} ids have no token and are kept from being sampled"
        if is_of_characters(tokenizer):
            yield "few trainers pad a vocabulary of characters, so these may be the characters of another text"


def _warnings(loaded: Loaded) -> Iterator[str]:
    n_tokens, vocab_size = len(loaded.tokenizer), loaded.model.config.vocab_size
    if vocab_size - n_tokens >= PADDED_TO:
        yield (
            f"the tokenizer has {n_tokens:,} tokens and the model embeddings for {vocab_size:,}: it is probably not "
            "the tokenizer of the training. The ids without a token are kept from being sampled"
        )
