"""The original's two files, or a converted folder, to a model and a tokenizer in memory."""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError, memory_for, one_line
from hf_model.folder import check_folder, read_config, read_generation_config
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import (
    FoundTokenizer,
    ModelInfo,
    check_fits,
    find_tokenizer,
    own_tokenizer,
    takes_instructions,
    unused_ids,
)
from hf_model.tokenizer.prompt import PROMPT_FORMAT, RAW
from hf_model.trainers import Checkpoint, read_checkpoint, widest

AUTO_MAP = {
    "AutoConfig": "configuration_custom_gpt.CustomGPTConfig",
    "AutoModel": "modeling_custom_gpt.CustomGPTModel",
    "AutoModelForCausalLM": "modeling_custom_gpt.CustomGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_custom_gpt.CustomGPTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_custom_gpt.CustomGPTForTokenClassification",
    # `transformers serve` takes a folder's own code by this name alone, before it looks for the library's classes.
    "AutoModelForDecision": "modeling_custom_gpt.CustomGPTForCausalLM",
}


# By safetensors' names, and by torch's.
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED.values()}
ACTIVATIONS = ("auto", "gelu", "gelu_new", "gelu_pytorch_tanh")


def pick_dtype(dtype: torch.dtype | str, own: torch.dtype) -> torch.dtype:
    """The dtype of that name; `"auto"` is the weights' own.

    Raises:
        UserError: there is none that weights can have.
    """
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in DTYPES:
        raise UserError(f"dtype={name!r} is none of auto, {', '.join(DTYPES)}")
    return own if name == "auto" else DTYPES[name]


def pick_device(name: torch.device | str | None = None) -> torch.device:
    """The device of that name, or the best one there is: cuda, then mps, then the CPU.

    Raises:
        UserError: there is no such device.
    """
    accelerators = [
        *(f"cuda:{index}" for index in range(torch.cuda.device_count())),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    if name is None:
        return torch.device(accelerators[0] if accelerators else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("holds no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # each backend has its own way of not being there
        raise UserError(
            f"--device {name}: there is no such device here; there is {', '.join([*accelerators, 'cpu'])}"
        ) from None
    return device


@memory_for("to load the model")
def load(
    checkpoint_path: str | Path,
    tokenizer_path: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    n_head: int | None = None,
    activation: str = "auto",
    characters_of: str | Path | None = None,
    raw: bool = False,
    report: Callable[[str, str], None] = lambda item, text: None,
) -> tuple[CustomGPTForCausalLM, PreTrainedTokenizerFast]:
    """Load a trainer's checkpoint file, or a converted folder.

    Args:
        checkpoint_path: a `.pt` file (converted in memory, memory-mapped, nothing written) or a folder.
        tokenizer_path, characters_of, raw: as in `read_original`; neither of the first two takes the folder's own.
        device: where the model goes; None is the best device there is, as `pick_device` says.
        dtype: `"auto"` for that of the weights, or a floating-point dtype of torch, or its name.
        n_head, activation: as in `read_original`, for a file.
        report: called with each thing that was found or chosen: what it is, and what was taken and why.

    Raises:
        UserError: a file or the folder is not what it should be.
    """
    if Path(checkpoint_path).is_dir():
        model, vocabulary = load_folder(Path(checkpoint_path), tokenizer_path, dtype, characters_of, raw)
        assert vocabulary is not None
        choices = prompt_choice(vocabulary.tokenizer)
    else:
        original = read_original(
            checkpoint_path,
            tokenizer_path,
            dtype=dtype,
            n_head=n_head,
            activation=activation,
            characters_of=characters_of,
            raw=raw,
        )
        model, vocabulary, choices = original.model, original.vocabulary, original.choices
    report("tokenizer", vocabulary.taken + (f" ({vocabulary.why})" if vocabulary.why else ""))
    for item, text in choices:
        report(item, text)
    return model.to(pick_device(device)), vocabulary.tokenizer


def load_folder(
    folder: Path,
    tokenizer_path: str | Path | None,
    dtype: torch.dtype | str,
    characters_of: str | Path | None = None,
    raw: bool = False,
    needs_tokenizer: bool = True,
) -> tuple[CustomGPTForCausalLM, FoundTokenizer | None]:
    """`load` of a folder, on the CPU. If `needs_tokenizer` is False, the vocabulary of a folder without one is None."""
    try:
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
            raise UserError(f"{folder}: is a PEFT adapter; save merge_and_unload() of it and give that folder")
        config = read_config(folder)
        check_folder(folder)
        is_given = tokenizer_path is not None or characters_of is not None
        has_tokenizer = is_given or (folder / "tokenizer.json").is_file()
        own_dtype = check_weights(folder, config)
        if needs_tokenizer and not has_tokenizer:
            raise UserError(f"{folder}: holds no tokenizer (no tokenizer.json); give one with --tokenizer_path")
        # A stranger's folder may name code of its own; the library would ask on the terminal whether to run it.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            generation_config=read_generation_config(folder, config),
            dtype=pick_dtype(dtype, own_dtype) if own_dtype else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, loading = loaded
        if astray := sorted(loading["missing_keys"] | loading["unexpected_keys"]):  # the library would go on without
            raise UserError(f"{folder}: its config.json and its weights do not belong together ({', '.join(astray)})")
        if not has_tokenizer:
            return model, None
        if tokenizer_path is None and characters_of is None:
            vocabulary = own_vocabulary(folder, config)
            check_fits(vocabulary.tokenizer, config.vocab_size, folder, folder)
        else:
            source = ModelInfo(folder, config.vocab_size, config.block_size)
            vocabulary = find_tokenizer(tokenizer_path, source, characters_of=characters_of, raw=raw)
            model.generation_config = default_generation(vocabulary.tokenizer, config.vocab_size)
        if raw:
            vocabulary.tokenizer.init_kwargs[PROMPT_FORMAT] = RAW
            vocabulary.tokenizer.chat_template = None
        return model, vocabulary
    except UserError:
        raise
    # The folder's files are not to be trusted in anything: whatever they trip in the library is their fault.
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):  # the library's own words speak of a table that it logs
            raise UserError(f"{folder}: cannot be loaded (its config.json and its weights differ in sizes)") from None
        raise UserError(f"{folder}: cannot be loaded ({one_line(error, 200)})") from None


def check_weights(folder: Path, config: CustomGPTConfig) -> torch.dtype | None:
    """The narrowest dtype that holds all weights without loss; None of quantized ones.

    Raises:
        UserError: config.json has sizes that the weights cannot have, for which the library would first take the time
            and the memory; or a weight is no real number, of which the library would drop a part.
    """
    layers: set[str] = set()
    n_bytes, dtypes = 0, {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:  # reads names, shapes and dtypes only
            for name in file.keys():  # noqa: SIM118
                layers.update(re.findall(r"\bh\.(\d+)\.", name))
                dtypes[name] = file.get_slice(name).get_dtype()
        n_bytes += path.stat().st_size
    if not n_bytes:
        raise UserError(f"{folder}: cannot be loaded (no file named model.safetensors, nor a part of it)")
    n_weights = (config.vocab_size + config.block_size + 12 * config.n_layer * config.n_embd) * config.n_embd
    if config.n_layer > len(layers) or n_weights > 2 * n_bytes:  # the narrowest weights have four bits
        raise UserError(
            f"{folder}: its config.json and its weights do not belong together (n_layer={config.n_layer}, "
            f"n_embd={config.n_embd}, vocab_size={config.vocab_size} and block_size={config.block_size} are "
            f"more than the weights' {len(layers)} layers and {n_bytes:,} bytes)"
        )
    if getattr(config, "quantization_config", None) is not None:
        return None
    if strange := [name for name, dtype in dtypes.items() if dtype not in STORED]:
        raise UserError(f"{folder}: the weight {strange[0]!r} is of the type {dtypes[strange[0]]}, which no GPT's is")
    return widest(STORED[dtype] for dtype in dtypes.values())


def own_vocabulary(folder: Path, config: CustomGPTConfig | None = None) -> FoundTokenizer:
    """The tokenizer of a converted folder.

    Args:
        config: the folder's, where it has been read already.
    """
    return own_tokenizer(folder, config=config or read_config(folder))


@dataclass(frozen=True)
class Original:
    """A trainer's checkpoint and its vocabulary, in memory."""

    model: CustomGPTForCausalLM
    vocabulary: FoundTokenizer
    checkpoint: Checkpoint
    choices: tuple[tuple[str, str], ...]
    """What the user did not say: what it is, and what was taken and why."""


def load_original(
    checkpoint_path: str | Path, tokenizer_path: str | Path | None, **how: Any
) -> tuple[CustomGPTForCausalLM, PreTrainedTokenizerFast, Checkpoint]:
    """Model, tokenizer and checkpoint of `read_original`, which takes the same arguments."""
    original = read_original(checkpoint_path, tokenizer_path, **how)
    return original.model, original.vocabulary.tokenizer, original.checkpoint


def read_original(
    checkpoint_path: str | Path,
    tokenizer_path: str | Path | None,
    *,
    dtype: torch.dtype | str = "auto",
    n_head: int | None = None,
    activation: str = "auto",
    characters_of: str | Path | None = None,
    raw: bool = False,
) -> Original:
    """Make the model and the tokenizer of a trainer's files, in memory; nothing is written.

    The weights stay mapped from the file (zip format) and are read when they are used.

    Args:
        checkpoint_path: `torch.save` file.
        tokenizer_path: a `tokenizers` JSON, nanoGPT's meta.pkl, either of GPT-2's two files, a folder of any of them,
            the name `"gpt2"`, a folder or name that AutoTokenizer knows; or `"auto"`, to look where the trainer put it.
        dtype: `"auto"` for the file's own, or a floating-point dtype of torch, or its name.
        n_head: number of attention heads, where the file does not tell.
        activation: `"gelu"` (exact), `"gelu_new"` or `"gelu_pytorch_tanh"` (tanh, written out or torch's); `"auto"` for
            what the file tells.
        characters_of: the training text of a model of characters, in place of `tokenizer_path`.
        raw: the model's prompts are raw text, though its tokenizer has `[BOS]` and `[EOS]`.

    Raises:
        UserError: one of the files is not what it should be, or they do not belong together.
    """
    if tokenizer_path is None and characters_of is None and Path(checkpoint_path).exists():
        raise UserError(f'{checkpoint_path}: is a file, so the tokenizer must be given too, or "auto" to look for it')
    if activation not in ACTIVATIONS:
        raise UserError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
    checkpoint = read_checkpoint(checkpoint_path)
    torch_dtype = pick_dtype(dtype, checkpoint.dtype)
    architecture = checkpoint.architecture(n_head)
    source = ModelInfo(checkpoint.path, architecture.vocab_size, architecture.block_size, checkpoint.dataset)
    vocabulary = find_tokenizer(tokenizer_path, source, characters_of=characters_of, raw=raw)
    tokenizer = vocabulary.tokenizer
    try:
        config = CustomGPTConfig(
            **asdict(architecture),
            activation_function=checkpoint.trainer.activation if activation == "auto" else activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except StrictDataclassError as error:
        raise UserError(f"{checkpoint_path}: {error}") from None
    config.dtype, config.auto_map = torch_dtype, AUTO_MAP
    model = _model_of(config, {name: tensor.to(torch_dtype) for name, tensor in checkpoint.state_dict.items()})
    model.generation_config = default_generation(tokenizer, architecture.vocab_size)
    return Original(model, vocabulary, checkpoint, tuple(_choices(checkpoint, tokenizer, n_head, activation)))


def _choices(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, n_head: int | None, activation: str
) -> Iterator[tuple[str, str]]:
    """What is said of choices that the user did not make; of the original's own files, nothing."""
    if n_head is None and (beside := checkpoint.heads_beside()):
        yield "heads", f"{beside[0]} ({beside[1]})"
    trainer = checkpoint.trainer
    if activation == "auto" and not trainer.is_known:
        yield (
            "activation",
            (f"{trainer.activation}, though nothing in the file tells: an older relative wants --activation gelu_new"),
        )
    elif activation == "auto" and trainer.why:
        yield "activation", f"{trainer.activation} ({trainer.why})"
    yield from prompt_choice(tokenizer)


def prompt_choice(tokenizer: PreTrainedTokenizerFast) -> tuple[tuple[str, str], ...]:
    """What is said of a model's prompts; of instructions, nothing."""
    if takes_instructions(tokenizer):
        return ()
    return (("prompt", f"raw text; a text ends at {tokenizer.eos_token or 'max_new_tokens only'}"),)


def _model_of(config: CustomGPTConfig, state_dict: dict[str, torch.Tensor]) -> CustomGPTForCausalLM:
    """A model around these tensors: built without memory of its own, so nothing is initialised or copied."""
    if config.tie_word_embeddings:
        state_dict["lm_head.weight"] = state_dict["transformer.wte.weight"]
    with torch.device("meta"):
        model = CustomGPTForCausalLM(config)
    model.load_state_dict(state_dict, assign=True)
    model.tie_weights()
    return model.eval()


def default_generation(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> GenerationConfig:
    """The original script's defaults. Ids past the tokenizer's vocabulary (padding rows) are never sampled."""
    unused = unused_ids(tokenizer, vocab_size)
    return GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=50,
        repetition_penalty=1.0,
        max_new_tokens=150,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=unused or None,
    )
