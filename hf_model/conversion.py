"""A checkpoint and a tokenizer JSON to a model and a tokenizer in memory, and to a Hugging Face folder on disk."""

import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from hf_model.checkpoint import Checkpoint, read_checkpoint
from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.diagnosis import STUTTER_SHARE, copied_share, non_finite
from hf_model.errors import UserError, memory_for, one_line
from hf_model.folder import check_target, whole_folder
from hf_model.model_card import model_card
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.prompt import PAD, format_example, format_prompt
from hf_model.tokenization import check_vocabulary, convert_tokenizer, read_tokenizer, save_tokenizer

AUTO_MAP = {
    "AutoConfig": "configuration_custom_gpt.CustomGPTConfig",
    "AutoModel": "modeling_custom_gpt.CustomGPTModel",
    "AutoModelForCausalLM": "modeling_custom_gpt.CustomGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_custom_gpt.CustomGPTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_custom_gpt.CustomGPTForTokenClassification",
    # `transformers serve` takes a folder's own code by this name alone, before it looks for the library's classes.
    "AutoModelForDecision": "modeling_custom_gpt.CustomGPTForCausalLM",
}
TOKENIZER_PROBES = (
    format_prompt("What is the capital of France?"),
    format_example("Summarize the text.", "Done.", "Two  spaces,\na new line, 12345 and 'quotes'."),
    "Ünïcödé, 漢字, العربية, 🙂\t\u00a0end ",
)
VERIFY_BYTES = 256 * 2**20  # how much is compared before memory is let go


def load_original(
    checkpoint_path: str | Path,
    tokenizer_path: str | Path,
    *,
    dtype: str = "auto",
    n_head: int | None = None,
    activation: str = "gelu",
) -> tuple[CustomGPTForCausalLM, PreTrainedTokenizerFast, Checkpoint]:
    """Make the model and the tokenizer of the original's two files, in memory; nothing is written.

    The weights stay mapped from the file (zip format) and are read when they are used.

    Args:
        checkpoint_path: `torch.save` file.
        tokenizer_path: `tokenizers` JSON.
        dtype: `"auto"` for the file's own, or the name of a torch dtype.
        n_head: number of attention heads, where the file does not tell.
        activation: `"gelu"` (exact) or `"gelu_new"` (tanh).

    Raises:
        UserError: one of the files is not what it should be, or they do not belong together.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    architecture = checkpoint.architecture(n_head)
    tokenizer = convert_tokenizer(tokenizer_path, model_max_length=architecture.block_size)
    check_vocabulary(tokenizer, architecture.vocab_size, tokenizer_path, checkpoint_path)
    try:
        config = CustomGPTConfig(
            **asdict(architecture),
            activation_function=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except StrictDataclassError as error:
        raise UserError(f"{checkpoint_path}: {error}") from None
    torch_dtype = checkpoint.dtype if dtype == "auto" else getattr(torch, dtype)
    config.dtype, config.auto_map = torch_dtype, AUTO_MAP
    model = _model_of(config, {name: tensor.to(torch_dtype) for name, tensor in checkpoint.state_dict.items()})
    model.generation_config = default_generation(tokenizer, architecture.vocab_size)
    return model, tokenizer, checkpoint


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
    unused = list(range(len(tokenizer), vocab_size))
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


@memory_for("to convert the model")
def convert(
    checkpoint_path: str | Path,
    tokenizer_path: str | Path,
    output_dir: str | Path,
    *,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    n_head: int | None = None,
    activation: str = "gelu",
    overwrite: bool = False,
    verify: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Convert the original's two files to a Hugging Face folder, which appears whole or not at all.

    Args:
        checkpoint_path, tokenizer_path, dtype, n_head, activation: as in `load_original`.
        output_dir: the folder to make.
        max_shard_size: the largest safetensors file, such as `"5GB"`.
        overwrite: replace a model's folder that is there already.
        verify: load the folder back and compare it with the source before it takes its place.
        report: called with each line of what there is to say.

    Returns:
        The folder's path.

    Raises:
        UserError: as `load_original`, the folder cannot be written, or the verification failed.
    """
    output_dir = Path(output_dir)
    check_target(output_dir, overwrite)
    model, tokenizer, checkpoint = load_original(
        checkpoint_path, tokenizer_path, dtype=dtype, n_head=n_head, activation=activation
    )
    rounded = _rounded(checkpoint.dtype, model.dtype)
    report(f"source        {_describe_source(checkpoint)}")
    report(f"architecture  {describe_architecture(model.config)}")
    report(f"parameters    {describe_parameters(model)}")
    report(f"tokenizer     {tokenizer_path} ({len(tokenizer)} tokens)")
    for line in _diagnose(model, tokenizer):
        report(line)

    with whole_folder(output_dir, overwrite) as folder:
        try:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        except SafetensorError as error:  # its own form of a full disk
            raise UserError(f"{output_dir}: cannot be written ({error})") from None
        for weights in folder.glob("*.safetensors"):  # which safetensors lets nobody read but their owner
            shutil.copymode(folder / "config.json", weights)
        save_tokenizer(tokenizer, folder)
        (folder / "README.md").write_text(model_card(model.config, output_dir.name, rounded), encoding="utf-8")
        # What is mapped goes before the folder is read back, so that the weights are not in memory twice.
        del model, checkpoint
        gc.collect()
        report(f"written       {output_dir}")
        for file in sorted(folder.iterdir()):
            report(f"              {file.name:<32} {_size(file.stat().st_size):>10}")
        if verify:
            try:
                report(f"verified      {verify_folder(folder, checkpoint_path, tokenizer_path)}")
            except UserError:
                raise
            except Exception as error:  # whatever the library trips over in a folder that is not what was written
                raise UserError(f"{output_dir}: cannot be read back ({one_line(error, 200)})") from None
    return output_dir


def describe_architecture(config: CustomGPTConfig) -> str:
    return (
        f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, context {config.block_size}, "
        f"vocabulary {config.vocab_size}, {'with' if config.bias else 'no'} biases, "
        f"head {'tied' if config.tie_word_embeddings else 'untied'}, {config.activation_function}"
    )


def describe_parameters(model: CustomGPTForCausalLM) -> str:
    return f"{model.num_parameters():,} in {_name(model.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounded(source: torch.dtype, dtype: torch.dtype) -> str:
    """What became of the weights, in words; "" if `dtype` holds whatever `source` does."""
    return "" if torch.promote_types(source, dtype) == dtype else f"rounded from {_name(source)} to {_name(dtype)}"


def _describe_source(checkpoint: Checkpoint) -> str:
    place = f"weights under {checkpoint.weights_key!r}" if checkpoint.weights_key else "a bare state dict"
    progress = "".join(f", {name} {number:.6g}" for name, number in checkpoint.progress.items())
    return f"{checkpoint.path} ({place}{progress})"


def _diagnose(model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Lines on what a user should know before trusting the weights."""
    if PAD not in tokenizer.get_vocab():
        yield f"note: the tokenizer has no {PAD}; {tokenizer.eos_token} serves as the padding token"
    if unused := model.config.vocab_size - len(tokenizer):
        yield f"note: the weights' vocabulary is padded: {unused} ids have no token and are kept from being sampled"
    if bad := non_finite(dict(model.named_parameters())):
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        yield f"warning: there are NaN or infinite values in {', '.join(bad[:3])}{more}: the model cannot work"
    elif (share := copied_share(model, tokenizer)) > STUTTER_SHARE:
        yield (
            f"warning: the model stutters: at {share:.0%} of the positions of responses it predicts the token that it "
            "has just read. Its labels were probably not shifted by one in fine-tuning, so it has learnt to repeat; "
            "sampling options will not cure that, fine-tuning with shifted labels will (the labels of this model in "
            "transformers are shifted)"
        )


def verify_folder(folder: Path, checkpoint_path: str | Path, tokenizer_path: str | Path) -> str:
    """Load a folder back by the Auto classes and compare it with its source.

    Returns:
        What was compared, in words.

    Raises:
        UserError: a tensor or a token differs.
    """
    tokenizer, original = AutoTokenizer.from_pretrained(folder), read_tokenizer(tokenizer_path)
    for text in TOKENIZER_PROBES:
        expected = [tokenizer.bos_token_id, *original.encode(text, add_special_tokens=False).ids]
        if tokenizer(text).input_ids != expected:
            raise UserError(f"{folder}: the tokenizer encodes {text!r} differently from {tokenizer_path}")

    names = list(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    remaining = list(names)
    while remaining:
        # Both sides are mapped afresh for every few tensors, so that memory holds neither file whole.
        written = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        checkpoint = read_checkpoint(checkpoint_path, check_bytes=False)
        source = checkpoint.state_dict
        source.setdefault("lm_head.weight", source["transformer.wte.weight"])
        if astray := written.keys() ^ source.keys():
            raise UserError(f"{folder}: {', '.join(sorted(astray))} is on one side only")
        compared_bytes = 0
        while remaining and compared_bytes < VERIFY_BYTES:
            name = remaining.pop()
            tensor = written[name]
            if not _same_bits(tensor, source[name].to(tensor.dtype)):
                raise UserError(f"{folder}: {name} differs from {checkpoint_path}: the disk or the memory is faulty")
            compared_bytes += tensor.nbytes
    rounded = _rounded(checkpoint.dtype, tensor.dtype)
    equal = f"{len(names)} tensors equal bit for bit" + (f" to the source's, {rounded}" if rounded else "")
    return f"{equal}, {len(TOKENIZER_PROBES)} texts encoded the same"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype are equal as bits: NaN is itself, and 0.0 is not -0.0."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))


def push(folder: Path, repo_id: str) -> str:
    """Upload a converted folder to a repository of the Hub, made private if it is new.

    Returns:
        The repository's address.

    Raises:
        UserError: the Hub refused or cannot be reached. The folder stays as it is.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Add the converted model")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{folder} is complete, but was not pushed to {repo_id}: {error}") from None
    return str(url)


def _size(n_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"
