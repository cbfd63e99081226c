"""A checkpoint and a tokenizer JSON to a Hugging Face folder on disk, and from there to the Hub."""

import gc
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from hf_model.description import file_size, rounding
from hf_model.disk import check_target, whole_folder
from hf_model.errors import UserError, memory_for, one_line
from hf_model.formats import transformers_folder
from hf_model.inspection import examine
from hf_model.loading import load_original
from hf_model.report import write_page


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
    training_data: str | Path | None = None,
    report_page: str | Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Convert the original's two files to a Hugging Face folder, which appears whole or not at all.

    Args:
        checkpoint_path, tokenizer_path, dtype, n_head, activation: as in `load_original`.
        output_dir: the folder to make.
        max_shard_size: the largest safetensors file, such as `"5GB"`.
        overwrite: replace a model's folder that is there already.
        verify: load the folder back and compare it with the source before it takes its place.
        training_data: the data that the model was trained on, to be measured against, as in `inspect`.
        report_page: where to write a page that shows what the model has learnt.
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
    inspection = examine(model, tokenizer, checkpoint_path, tokenizer_path, checkpoint, n_head, training_data)
    for line in inspection.head():
        report(line)
    if report_page is not None:
        write_page(inspection, model, tokenizer, Path(report_page))
        report(f"report        {report_page}")

    with whole_folder(output_dir, overwrite) as folder:
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
                report(f"verified      {transformers_folder.verify(folder, checkpoint_path, tokenizer_path)}")
            except UserError:
                raise
            except Exception as error:  # whatever the library trips over in a folder that is not what was written
                raise UserError(f"{output_dir}: cannot be read back ({one_line(error, 200)})") from None
    return output_dir


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
