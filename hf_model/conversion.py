"""A trainer's files, or a converted folder, to the folder of a format, and from there to the Hub."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import PreTrainedTokenizerFast

from hf_model.description import describe_architecture, describe_parameters, file_size, rounding
from hf_model.errors import UserError, memory_for, one_line
from hf_model.formats import Options, find_target
from hf_model.formats.cards import About, card_facts
from hf_model.formats.target import MissingEngineError
from hf_model.learnt.inspection import Inspection, examine
from hf_model.learnt.report import check_page, write_page
from hf_model.loading import check_weights
from hf_model.output_dir import check_target, resolved, whole_folder
from hf_model.source import Loaded, Source


@memory_for("to convert the model")
def convert(
    checkpoint_path: str | Path,
    tokenizer_path: str | Path | None,
    output_dir: str | Path,
    *,
    format: str = "transformers",
    dtype: torch.dtype | str = "auto",
    max_shard_size: str = "5GB",
    gguf_type: str = "f32",
    quantization: str | None = None,
    like: str = "original",
    n_head: int | None = None,
    activation: str = "auto",
    characters_of: str | Path | None = None,
    raw: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    training_data: str | Path | None = None,
    report_page: str | Path | None = None,
    about: About | None = None,
    on_tokenizer: Callable[[PreTrainedTokenizerFast], None] = lambda tokenizer: None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Convert a trainer's checkpoint and vocabulary, or a converted folder, to a format's folder.

    It appears whole or not at all.

    Args:
        checkpoint_path: a `.pt` file, or a converted folder, trained further or not.
        tokenizer_path, characters_of, raw: as in `loading.read_original`; where neither of the first two is given, a
            folder's own vocabulary is taken.
        output_dir: the folder to make.
        format: a name in `formats.FORMATS`.
        dtype, n_head, activation: as in `loading.read_original`.
        max_shard_size: the largest safetensors file, such as `"5GB"`.
        gguf_type: `"f32"`, `"f16"` or `"q8_0"`, for the format `"gguf"`.
        quantization: a name that CTranslate2 knows, for the format `"ctranslate2"`.
        like: `"original"` or `"nanogpt"`, whose checkpoint the format `"checkpoint"` writes.
        overwrite: replace a model's folder that is there already.
        verify: compare the folder with its source, by the format's own engine, before it takes its place.
        training_data: the data that the model was trained on, to be measured against, as in `inspection.inspect`.
        report_page: where to write a page that shows what the model has learnt.
        about: what the folder's model card is to say beside what is known: licence, languages and so on.
        on_tokenizer: called with the model's tokenizer, if the format needs one.
        report: called with each line of what there is to say.

    Returns:
        The folder's path.

    Raises:
        UserError: as `loading.read_original`, the format cannot hold the model, its packages are not installed, the
            folder cannot be written, or the verification failed.
    """
    output_dir = _named(Path(output_dir))
    source = Source(Path(checkpoint_path), tokenizer_path, dtype, n_head, activation, characters_of, raw)
    check_target(output_dir, overwrite)
    _check_apart(output_dir, [checkpoint_path, tokenizer_path, characters_of, training_data], report_page)
    if report_page is not None:
        check_page(Path(report_page))
    target = find_target(format)
    loaded = source.load(needs_tokenizer=format != "checkpoint" or training_data is not None or report_page is not None)
    if loaded.tokenizer is not None:
        on_tokenizer(loaded.tokenizer)
    inspection = None if loaded.vocabulary is None else examine(source, loaded, training_data)
    for line in _say(source, loaded, inspection):
        report(line)
    if report_page is not None and inspection is not None:
        write_page(inspection, loaded.model, loaded.tokenizer, Path(report_page))
        report(f"report        {report_page}")

    options = Options(
        card=card_facts(loaded.checkpoint, inspection, source.path, output_dir, about or About()),
        rounded=_rounding(source, loaded),
        max_shard_size=max_shard_size,
        gguf_type=gguf_type,
        quantization=quantization,
        like=like,
    )
    with whole_folder(output_dir, overwrite, warn=lambda line: report(f"warning: {line}")) as folder:
        for line in target.write(loaded, folder, options):
            report(line)
        # What is mapped goes before the folder is read back, so that the weights are not in memory twice.
        del loaded
        gc.collect()
        lines = [f"written       {output_dir}"]
        lines += [
            f"              {path.name:<32} {file_size(path.stat().st_size):>10}" for path in sorted(folder.iterdir())
        ]
        if verify:
            try:
                lines.append(f"verified      {target.verify(folder, source, options)}")
            except MissingEngineError as error:
                lines.append(f"not verified  {error}")
            except UserError as error:  # the folder that it speaks of is the one to be
                raise UserError(str(error).replace(str(folder), str(output_dir))) from None
            except Exception as error:  # whatever the library trips over in a folder that is not what was written
                raise UserError(f"{output_dir}: cannot be read back ({one_line(error, 200)})") from None
    for line in lines:  # now that it is true
        report(line)
    return output_dir


def _named(folder: Path) -> Path:
    """A folder under a name that leads to it before it is there and after: `..` depends on what stands before it."""
    return resolved(folder) if ".." in folder.parts else folder


def _check_apart(output_dir: Path, sources: Iterable[str | Path | None], page: str | Path | None) -> None:
    """Refuse a folder in whose place something else stands that is read or written.

    Raises:
        UserError: a source is the folder, or in it, or the page would be.
    """
    place = resolved(output_dir)
    for path in (Path(os.path.realpath(source)) for source in sources if source is not None):
        if not os.path.exists(path) or not os.path.exists(place):  # noqa: PTH110 (a path's own raises for long names)
            continue
        if path.samefile(place):
            raise UserError(f"{output_dir}: is the source itself; choose another --output_dir")
        if any(parent.samefile(place) for parent in path.parents):
            raise UserError(f"{output_dir}: holds {path.name!r}, which is a source; choose another --output_dir")
    if page is not None:
        page_place = resolved(Path(page))
        if page_place.is_relative_to(place) or place.is_relative_to(page_place):
            raise UserError(f"{page}: is in the way of {output_dir}; choose another name for --report")


def _rounding(source: Source, loaded: Loaded) -> str:
    own = loaded.checkpoint.dtype if loaded.checkpoint else check_weights(source.path, loaded.model.config)
    return rounding(own or loaded.model.dtype, loaded.model.dtype)


def _say(source: Source, loaded: Loaded, inspection: Inspection | None) -> Iterator[str]:
    """What the model is and what it has learnt; a folder's without a tokenizer cannot be asked."""
    if inspection is not None:
        yield from inspection.head()
        return
    yield f"source        {source.describe(loaded.checkpoint)}"
    yield f"architecture  {describe_architecture(loaded.model.config)}"
    yield f"parameters    {describe_parameters(loaded.model)}"
    yield "tokenizer     none, and none is needed"


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
