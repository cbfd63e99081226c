"""Load a model: `Source` says where the model comes from, `Loaded` is what was loaded."""

import copy
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.activations import ACT2FN
from typing_extensions import Unpack

from hf_model.choosing import CODE, TEXT_BYTES, Chosen, choose_form, describe_form, used_weights
from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.descriptions import checkpoint_choices, describe_rounding, shown, tokenizer_choices
from hf_model.devices import pick_device, pick_dtype
from hf_model.errors import UserError, memory_for, one_line, only_warnings
from hf_model.fast_cpu import fast_on_cpu
from hf_model.folder import (
    CONVERTED_FROM,
    check_weights,
    load_tokenizer,
    read_config,
    read_generation_config,
    read_weights,
    weight_files,
    with_weights,
)
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.reading import read_start
from hf_model.tokenizer import (
    AUTO,
    CHAT_TEMPLATE,
    FoundTokenizer,
    ModelInfo,
    chat_template,
    check_fits,
    check_template,
    check_tokens,
    end_ids,
    find_tokenizer,
    read_template,
    set_chat_template,
    switch_off,
    unused_ids,
)
from hf_model.trainers import Checkpoint, read_checkpoint
from hf_model.trainers.architecture import Architecture
from hf_model.trainers.folders import saved_file
from hf_model.trainers.module import Reading, read_module
from hf_model.trainers.module_calls import exact
from hf_model.trainers.module_parts import unwrap
from hf_model.trainers.names import FAMILY
from hf_model.trainers.own_code import build_module
from hf_model.trainers.stated import ACTIVATIONS as READ_ACTIVATIONS
from hf_model.trainers.stated import is_activation
from hf_model.trainers.tensors import dtype_name

AUTO_MAP = {
    "AutoConfig": "configuration_custom_gpt.CustomGPTConfig",
    "AutoModel": "modeling_custom_gpt.CustomGPTModel",
    "AutoModelForCausalLM": "modeling_custom_gpt.CustomGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_custom_gpt.CustomGPTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_custom_gpt.CustomGPTForTokenClassification",
    # `transformers serve` looks for a folder's own code under this name only.
    "AutoModelForDecision": "modeling_custom_gpt.CustomGPTForCausalLM",
}
# The activations that a user's own model may have; of two names for one function, the first is taken.
MODULE_ACTIVATIONS = {name: ACT2FN[name] for name in READ_ACTIVATIONS}
LOSSES = ("loss", "val_loss", "best_val_loss")  # what a checkpoint states of its training
LOGITS_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-9}  # largest difference, in standard deviations of the logits
# Those that a user may name for a checkpoint.
GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
ACTIVATIONS = ("auto", *GELUS, "relu", "silu", "quick_gelu", "relu2", "leaky_relu", "mish")
# One thread at a time: while `from_pretrained` builds a model, it sets torch's default dtype for the whole process.
FROM_PRETRAINED = threading.Lock()


class SourceOptions(TypedDict, total=False):
    """How to read a source: keyword arguments of `load`, `inspect` and `convert`, and fields of `Source`."""

    dtype: torch.dtype | str
    n_head: int | None
    activation: str
    characters_of: str | Path | None
    raw: bool
    instructions: bool
    chat_template: str | Path | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    ignore_model_args: Sequence[str]
    untie: bool
    model: str | None


@dataclass(frozen=True)
class Loaded:
    """A model on the CPU, with what is known of where it came from."""

    model: CustomGPTForCausalLM
    found: FoundTokenizer | None
    """The tokenizer and where it was found; None for a folder without one."""
    dtype: torch.dtype
    """The dtype of the weights in the source."""
    checkpoint: Checkpoint | None = None
    """What the trainer's file held, if there is one."""
    evidence: str = ""
    """How near the logits are to those of the user's own model, in words; "" if there is none."""
    choices: tuple[tuple[str, str], ...] = ()
    """What the user left open: the option, and what was chosen and why."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        assert self.found is not None
        return self.found.tokenizer


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a trainer's checkpoint with its tokenizer, a converted folder, or a module in memory.

    A source keeps no weights of files in memory. A format's `write` loads the source, and `verify` loads it again. So
    the writer's changes to its model cannot hide an error. A module is in memory already: it is read once.
    """

    path: Path
    """A `torch.save` file, or a folder that was converted and perhaps fine-tuned since."""
    tokenizer_path: str | Path | None = None
    """A tokenizer's file, folder or Hub name; `"auto"` looks where the trainer put it; None is a folder's own."""
    dtype: torch.dtype | str = "auto"
    """`"auto"` keeps the dtype of the weights; otherwise a floating-point dtype of torch, or its name."""
    n_head: int | None = None
    """The number of attention heads, for a checkpoint that does not state it."""
    activation: str = "auto"
    """`"gelu"` (exact), `"gelu_new"` or `"gelu_pytorch_tanh"` (tanh form) and others; `"auto"`: the trainer's."""
    characters_of: str | Path | None = None
    """The training text of a character-level model, in place of `tokenizer_path`."""
    raw: bool = False
    """Prompts are raw text, even if the tokenizer has `[BOS]` and `[EOS]`."""
    instructions: bool = False
    """Prompts are instructions, whatever the tokenizer's special tokens are called."""
    chat_template: str | Path | None = None
    """What makes the prompts: `"alpaca"`, `"chatml"` or a file of Jinja; None keeps the tokenizer's own."""
    bos_token: str | None = None
    """The token in front of a text; None keeps the tokenizer's own."""
    eos_token: str | None = None
    """The token that ends an answer."""
    pad_token: str | None = None
    """The token that fills up the rows of a batch."""
    training_data: str | Path | None = None
    """Text that the model was trained on, for a checkpoint whose names leave open what the model computes."""
    ignore_model_args: Sequence[str] = ()
    """Names of options in the checkpoint's `model_args` that are not known here and may be left out."""
    untie: bool = False
    """Keep the head as a matrix of its own although it is the embedding, so that training can change the two apart."""
    module: nn.Module | None = None
    """The user's own model, of any class; `path` is then its class's name, or the file of its weights."""

    def __post_init__(self) -> None:
        """Raises UserError for options that contradict each other."""
        if self.chat_template is not None and (self.raw or self.instructions):
            other = "raw" if self.raw else "instructions"
            raise UserError(f"--chat_template and --{other} contradict each other: give one of them")

    @classmethod
    def of(
        cls,
        origin: str | Path | nn.Module,
        tokenizer_path: str | Path | None = None,
        *,
        training_data: str | Path | None = None,
        **options: Unpack[SourceOptions],
    ) -> "Source":
        """The source of the public functions' arguments.

        Raises:
            UserError: `origin` is a state dict or a class.
        """
        check_origin(origin, tokenizer_path)
        model = options.pop("model", None)
        if isinstance(origin, nn.Module):
            return cls(Path(type(unwrap(origin)).__name__), tokenizer_path, module=origin, **options)
        path = _saved_file(Path(origin))
        module = None if model is None else build_module(model, path)
        return cls(path, tokenizer_path, module=module, training_data=training_data, **options)

    @property
    def is_folder(self) -> bool:
        return self.module is None and self.path.is_dir()

    def load(self, needs_tokenizer: bool = True, may_be_quantized: bool = False) -> Loaded:
        """Load model and tokenizer, on the CPU. The weights stay mapped from their file until they are used.

        Args:
            needs_tokenizer: False accepts a folder that has no tokenizer.
            may_be_quantized: True accepts a folder whose weights were quantized.

        Raises:
            UserError: a file is missing, damaged or not of this model family, or the files do not belong together.
        """
        if self.module is not None:
            loaded = self._load_module(needs_tokenizer)
        else:
            loaded = self._load_folder(needs_tokenizer) if self.is_folder else self._load_checkpoint()
        if is_quantized(loaded.model.config) and not may_be_quantized:
            raise UserError(f"{self.path}: is quantized, so its weights are not the trained ones: give the full model")
        return untied(loaded) if self.untie and loaded.model.config.tie_word_embeddings else loaded

    def find_tokenizer(self) -> FoundTokenizer:
        """The tokenizer, read again from the source."""
        if self._has_own_tokenizer:
            return self._own_tokenizer()
        if self.module is not None:
            sizes = self._reading.options
            return self._find_tokenizer(ModelInfo(self.path, sizes["vocab_size"], sizes["block_size"]))
        if self.is_folder:
            config = read_config(self.path)
            return self._find_tokenizer(ModelInfo(self.path, config.vocab_size, config.block_size))
        checkpoint = read_checkpoint(self.path, check_bytes=False)
        return self._find_tokenizer(_info(checkpoint, checkpoint.architecture(self.n_head)))

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors as they are in the source, mapped again, a tied head included."""
        if self.module is not None:
            weights = dict(self._reading.state_dict)
        elif self.is_folder:
            weights = read_weights(self.path)
        else:
            weights = dict(read_checkpoint(self.path, check_bytes=False).state_dict)
        weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
        return weights

    @property
    def _reading(self) -> Reading:
        return self._read[0]

    @functools.cached_property
    def _read(self) -> tuple[Reading, str]:
        """What `module` computes, and how near its logits are. To find out takes seconds, so it is done once.

        Most of the tensors are the module's own.
        """
        assert self.module is not None
        reading = read_module(self.module, MODULE_ACTIVATIONS)
        evidence = compare_logits(str(self.path), with_weights(_module_config(reading), reading.state_dict), reading)
        return replace(reading, samples=()), evidence

    @property
    def _has_own_tokenizer(self) -> bool:
        return self.is_folder and self.tokenizer_path in (None, AUTO) and self.characters_of is None

    def _own_tokenizer(self, config: CustomGPTConfig | None = None) -> FoundTokenizer:
        """The folder's tokenizer, with the kind of prompts that the user chose."""
        found = own_tokenizer(self.path, config)
        if self.raw:
            set_chat_template(found.tokenizer, None)
        elif self.chat_template is not None:
            set_chat_template(found.tokenizer, read_template(self.chat_template))
        check_tokens(found.tokenizer, self.path)
        check_template(found.tokenizer, self.chat_template or self.path)
        return found

    def _find_tokenizer(self, info: ModelInfo) -> FoundTokenizer:
        return find_tokenizer(
            self.tokenizer_path,
            info,
            characters_of=self.characters_of,
            raw=self.raw,
            instructions=self.instructions,
            chat_template=self.chat_template,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            pad_token=self.pad_token,
        )

    def _load_checkpoint(self) -> Loaded:
        if self.tokenizer_path is None and self.characters_of is None and self.path.exists():
            raise UserError(f'{self.path}: needs a tokenizer: give tokenizer_path, or "auto" to look for one')
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        checkpoint = read_checkpoint(self.path)
        if self.activation != "auto":  # the user has answered it
            checkpoint.unknown_args = {n: v for n, v in checkpoint.unknown_args.items() if not is_activation(n)}
        if unknown := [name for name in checkpoint.unknown_args if name not in self.ignore_model_args]:
            told = ", ".join(f"{name}={shown(checkpoint.unknown_args[name])}" for name in unknown)
            raise UserError(
                f"{self.path}: {checkpoint.stated_in} says {told}, which may change what the model computes, "
                f"in a way not known here: add --ignore_model_args {' '.join(unknown)} to convert anyway"
            )
        dtype, architecture = pick_dtype(self.dtype, checkpoint.dtype), checkpoint.architecture(self.n_head)
        found = self._find_tokenizer(_info(checkpoint, architecture))
        tokenizer = found.tokenizer
        try:
            forms = [
                CustomGPTConfig(
                    **asdict(architecture) | checkpoint.options | form,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
                for form in checkpoint.forms(architecture, None if self.activation == "auto" else self.activation)
            ]
        except StrictDataclassError as error:
            raise UserError(f"{self.path}: {error.__cause__ or error}") from None
        chosen = Chosen(forms[0], "") if len(forms) == 1 else self._choose_form(forms, checkpoint, found)
        config = chosen.config
        if checkpoint.names is not FAMILY:
            setattr(config, CONVERTED_FROM, checkpoint.names.trainer)
        config.dtype, config.auto_map = dtype, AUTO_MAP
        weights = used_weights(config, checkpoint.state_dict)
        model = with_weights(config, {name: tensor.to(dtype) for name, tensor in weights.items()})
        model.generation_config = default_generation(tokenizer, config.vocab_size)
        choices = []
        if chosen.why:
            only = f"only {len(forms)} forms were compared, and the model may be of another: to be sure, give {CODE}"
            choices = [("form", f"{describe_form(config)} ({chosen.why})"), ("warning", only)]
        if chosen.warning:
            choices.append(("warning", chosen.warning))
        choices += [*checkpoint_choices(checkpoint, self.n_head, self.activation), *tokenizer_choices(found)]
        return Loaded(model, found, checkpoint.dtype, checkpoint, choices=tuple(choices))

    def _choose_form(self, forms: list[CustomGPTConfig], checkpoint: Checkpoint, found: FoundTokenizer) -> Chosen:
        """Choose by the loss on the text that the user gave.

        Raises:
            UserError: there is no text, or the text does not tell.
        """
        path = self.characters_of or self.training_data
        if path is None:
            raise UserError(
                f"{self.path}: models of several kinds have the names of {checkpoint.names.trainer} "
                f"({checkpoint.names.left_open}): give the text that the model was trained on, with --characters_of "
                "(the conversion also takes --training_data), or the code that makes the model, with --model "
                "train.py:GPT"
            )
        text = read_start(Path(path), TEXT_BYTES).decode("utf-8", "ignore")
        stated = [checkpoint.progress[name] for name in LOSSES if name in checkpoint.progress]
        try:
            return choose_form(forms, checkpoint.state_dict, found.encode(text), max(stated, default=None))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def _load_module(self, needs_tokenizer: bool) -> Loaded:
        if self.tokenizer_path is None and self.characters_of is None and needs_tokenizer:
            raise UserError(f"{self.path}: needs a tokenizer: give tokenizer_path, or characters_of=TEXT")
        if self.n_head is not None or self.activation != "auto":
            raise UserError(f"{self.path}: n_head and activation are for a checkpoint; your own model tells")
        reading, evidence = self._read
        config = _module_config(reading)
        own, model = config.dtype, with_weights(config, reading.state_dict)
        if (dtype := pick_dtype(self.dtype, own)) != own:
            model = model.to(dtype)
            config.dtype = dtype
            evidence += f", before its weights were {describe_rounding(own, dtype) or f'put into {dtype_name(dtype)}'}"
        if self.tokenizer_path is None and self.characters_of is None:
            return Loaded(model, None, own, evidence=evidence)
        found = self._find_tokenizer(ModelInfo(self.path, config.vocab_size, config.block_size))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(found.tokenizer, name))
        model.generation_config = default_generation(found.tokenizer, config.vocab_size)
        choices = [("activation", f"{config.activation_function} (your model's)"), *tokenizer_choices(found)]
        choices += [("note", note) for note in reading.notes]
        return Loaded(model, found, own, evidence=evidence, choices=tuple(choices))

    def _load_folder(self, needs_tokenizer: bool) -> Loaded:
        folder = self.path
        if self.n_head is not None or self.activation != "auto":
            raise UserError(f"{folder}: --n_head and --activation are for a checkpoint; a folder's config.json tells")
        if self._has_own_tokenizer and (self.instructions or self.bos_token or self.eos_token or self.pad_token):
            raise UserError(
                f"{folder}: has its own kind of prompts and special tokens; to choose others, give its tokenizer too, "
                f"with --tokenizer_path {folder} (--raw and --chat_template do not need it)"
            )
        try:
            config = read_config(folder)
            has_tokenizer = not self._has_own_tokenizer or (folder / "tokenizer.json").is_file()
            model, own = _folder_model(folder, config, self.dtype)
            if needs_tokenizer and not has_tokenizer:
                raise UserError(f"{folder}: holds no tokenizer (no tokenizer.json); give one with --tokenizer_path")
            if not has_tokenizer:
                return Loaded(model, None, own)
            if self._has_own_tokenizer:
                found = self._own_tokenizer(config)
                check_fits(found.tokenizer, config.vocab_size, folder, folder)
                # Tokens may have been added since the folder was written, or another chat template.
                unused = unused_ids(found.tokenizer, config.vocab_size)
                model.generation_config.suppress_tokens = unused or None
                model.generation_config.eos_token_id = _ends_of_folder(model, found.tokenizer)
            else:
                found = self._find_tokenizer(ModelInfo(folder, config.vocab_size, config.block_size))
                model.generation_config = default_generation(found.tokenizer, config.vocab_size)
        except UserError:
            raise
        except StrictDataclassError as error:
            raise UserError(f"{folder}: cannot be loaded (config.json: {error.__cause__ or error})") from None
        except Exception as error:  # a stranger's file can make the library fail in any way
            raise UserError(f"{folder}: cannot be loaded ({one_line(error, 200)})") from None
        return Loaded(model, found, own, choices=tuple(tokenizer_choices(found)))


def _saved_file(origin: Path) -> Path:
    try:
        origin.stat()
    except FileNotFoundError:
        pass  # whoever reads the file says so
    except (OSError, ValueError) as error:  # the name is too long, or holds a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{one_line(origin, 100)}: cannot be read ({reason})") from None
    return saved_file(origin)


def untied(loaded: Loaded) -> Loaded:
    """The same with a copy of the embedding as the head."""
    config, weights = copy.deepcopy(loaded.model.config), dict(loaded.model.state_dict())
    config.tie_word_embeddings = False
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    model = with_weights(config, weights)
    model.generation_config = loaded.model.generation_config
    choices = [(item, text) for item, text in loaded.choices if item != "head"]
    said = ("head", "untied, as asked: a copy of the embedding, which training can change apart")
    return replace(loaded, model=model, choices=(said, *choices))


def check_origin(origin: object, tokenizer_path: object) -> None:
    """Raises UserError for a state dict or a class, or for a model in the tokenizer's place."""
    if isinstance(tokenizer_path, nn.Module):
        raise UserError(f"the tokenizer is a {type(tokenizer_path).__name__}: the model comes first")
    if isinstance(origin, type):
        raise UserError(f"{origin.__name__} is a class: give the model, which has the weights")
    if isinstance(origin, Mapping):
        raise UserError(f"the model is of type {type(origin).__name__}: give the model, not its state dict")


def check_option_names(function: str, options: Mapping[str, Any], known: type) -> None:
    """Raises TypeError, as Python does, for a keyword argument that a function does not have.

    Args:
        known: the TypedDict of the options.
    """
    for name in options:
        if name not in known.__annotations__:
            near = get_close_matches(name, known.__annotations__, n=1)
            advice = f". Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{advice}")


@memory_for("to load the model")
def load(
    checkpoint_path: str | Path | nn.Module,
    tokenizer_path: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    report: Callable[[str, str], None] = lambda item, text: only_warnings(f"{item}: {text}", 5),
    **options: Unpack[SourceOptions],
) -> tuple[CustomGPTForCausalLM, PreTrainedTokenizerFast]:
    """Load a trainer's checkpoint or a converted folder. Nothing is written.

    On a CPU the model takes the form that `fast_cpu.fast_on_cpu` gives, if it has one. Give its `plain()` to a
    `pipeline`, which works with the fast form but logs an error about a class that the library does not know.

    Args:
        checkpoint_path: a `torch.save` file, which is converted in memory; a converted folder; or your own model, a
            `torch.nn.Module` of any class.
        tokenizer_path: a tokenizer's file, folder or Hub name, or `"auto"` to look where the trainer put it. A folder
            has its own.
        device: where the model goes; by default the best device (see `pick_device`).
        report: called with a name and a description for each thing that was found or chosen. By default, warnings
            become Python's.
        options: `dtype` (`"auto"` keeps the weights' dtype), `n_head`, `activation`, `characters_of` (the training text
            of a character-level model), `raw`, `instructions` or `chat_template` (the kind of prompts), `bos_token`,
            `eos_token`, `pad_token` (names of tokens), `ignore_model_args` and `untie`, as in `Source`; `model`
            (`"FILE.py:NAME"`, your own code that makes the model of a checkpoint).

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        UserError: a file is missing, damaged or not of this model family, or the files do not belong together.
    """
    check_option_names("load", options, SourceOptions)
    loaded = Source.of(checkpoint_path, tokenizer_path, **options).load(may_be_quantized=True)
    assert loaded.found is not None
    report("tokenizer", loaded.found.taken + (f" ({loaded.found.why})" if loaded.found.why else ""))
    for item, text in loaded.choices:
        report(item, text)
    model = loaded.model
    if isinstance(checkpoint_path, nn.Module):
        model = copy.deepcopy(model)  # its weights are those of your own model, which may be trained on
    return fast_on_cpu(model.to(pick_device(device))), loaded.tokenizer


def _module_config(reading: Reading) -> CustomGPTConfig:
    config = CustomGPTConfig(**reading.options, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config.dtype, config.auto_map = reading.state_dict["transformer.wte.weight"].dtype, AUTO_MAP
    setattr(config, CONVERTED_FROM, "a class of its own")
    return config


@exact("cpu")
def compare_logits(name: str, model: CustomGPTForCausalLM, reading: Reading) -> str:
    """Compare a converted model's logits with those of the user's own model; half precision is computed in float32.

    Args:
        name: of the user's own model, for messages.

    Returns:
        What was found, in words.

    Raises:
        UserError: they differ by more than rounding.
    """
    rounded = ""
    if model.dtype not in LOGITS_CLOSE:
        rounded = "; a factor that half precision rounds? Give copy.deepcopy(model).float()"
        config = copy.deepcopy(model.config)
        config.dtype = torch.float32
        model = with_weights(config, {key: tensor.float() for key, tensor in model.state_dict().items()})
    largest = 0.0
    for ids, expected in reading.samples:
        difference = model(ids, use_cache=False, logits_to_keep=expected.shape[1]).logits
        if reading.log_probabilities:
            difference = difference.log_softmax(dim=-1)
        spread = float(expected.std())
        difference -= expected
        off = float(max(difference.max(), -difference.min())) / spread if spread > 0 else 0.0
        if not off <= LOGITS_CLOSE[model.dtype]:
            tokens = "1 token" if ids.shape[1] == 1 else f"{ids.shape[1]} tokens"
            raise UserError(
                f"{name}: cannot be read as a GPT: its layers fit, but its logits for {tokens} are "
                f"{off:.2g} of their standard deviation off{rounded}"
            )
        largest = max(largest, off)
    return "equal bit for bit" if largest == 0 else f"equal to within {largest:.1e} of their standard deviation"


def own_tokenizer(folder: Path, config: CustomGPTConfig | None = None) -> FoundTokenizer:
    """The tokenizer of a converted folder. The folder's own code is never run.

    Args:
        config: the folder's, if it has been read already.
    """
    tokenizer = load_tokenizer(folder, config or read_config(folder))
    notes = switch_off(tokenizer.backend_tokenizer)
    return FoundTokenizer(tokenizer, str(folder), lambda text: tokenizer(text, verbose=False).input_ids, notes=notes)


def default_generation(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> GenerationConfig:
    """The defaults of the original script. Ids without a token are never sampled."""
    ends = end_ids(tokenizer)
    return GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=50,
        repetition_penalty=1.0,
        max_new_tokens=150,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=unused_ids(tokenizer, vocab_size) or None,
    )


def _ends_of_folder(model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> int | list[int] | None:
    """The ids that end an answer: those of a folder's generation_config.json, and those of a chat template not ours."""
    known = model.generation_config.eos_token_id
    ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    if chat_template(tokenizer) in (None, CHAT_TEMPLATE) or not (new := set(end_ids(tokenizer)) - set(ids)):
        return known
    return [*sorted(new), *ids]


def is_quantized(config: CustomGPTConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _info(checkpoint: Checkpoint, architecture: Architecture) -> ModelInfo:
    return ModelInfo(checkpoint.path, architecture.vocab_size, architecture.block_size, checkpoint.dataset)


def _folder_model(
    folder: Path, config: CustomGPTConfig, dtype: torch.dtype | str
) -> tuple[CustomGPTForCausalLM, torch.dtype]:
    """A folder's model, and the dtype of the folder's weights."""
    if is_quantized(config):
        weight_files(folder)  # an index that leads out of the folder is an error
        with FROM_PRETRAINED:
            model: CustomGPTForCausalLM = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        own = model.dtype
    else:
        own = check_weights(folder, config)
        config.dtype = pick_dtype(dtype, own)
        config.auto_map = AUTO_MAP  # a trainer may have saved only some of the entries
        weights = {name: tensor.to(config.dtype) for name, tensor in read_weights(folder).items()}
        model = with_weights(config, weights)
    model.generation_config = read_generation_config(folder, config)
    return model, own
