"""A checkpoint and a tokenizer JSON to a Hugging Face folder on disk, and from there to the Hub."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import PreTrainedTokenizerFast

from hf_model.description import describe_architecture, describe_parameters, describe_source, file_size, rounding
from hf_model.diagnosis import STUTTER_SHARE, copied_share, non_finite
from hf_model.disk import check_target, whole_folder
from hf_model.errors import UserError, memory_for, one_line
from hf_model.formats import transformers_folder
from hf_model.loading import load_original
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.vocabulary import PAD


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
    rounded = rounding(checkpoint.dtype, model.dtype)
    report(f"source        {describe_source(checkpoint)}")
    report(f"architecture  {describe_architecture(model.config)}")
    report(f"parameters    {describe_parameters(model)}")
    report(f"tokenizer     {tokenizer_path} ({len(tokenizer)} tokens)")
    for line in _diagnose(model, tokenizer):
        report(line)

    with whole_folder(output_dir, overwrite, warn=lambda line: report(f"warning: {line}")) as folder:
        transformers_folder.write(
            model, tokenizer, folder, name=output_dir.name, max_shard_size=max_shard_size, rounded=rounded
        )
        # What is mapped goes before the folder is read back, so that the weights are not in memory twice.
        del model, checkpoint
        gc.collect()
        report(f"written       {output_dir}")
        for file in sorted(folder.iterdir()):
            report(f"              {file.name:<32} {file_size(file.stat().st_size):>10}")
        if verify:
            try:
                verified = transformers_folder.verify(folder, checkpoint_path, tokenizer_path)
            except UserError:
                raise
            except Exception as error:  # whatever the library trips over in a folder that is not what was written
                raise UserError(f"{output_dir}: cannot be read back ({one_line(error, 200)})") from None
            report(f"verified      {verified}")
    return output_dir


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
