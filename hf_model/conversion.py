"""Convert a source to the folder of a format, compare the two, and upload the folder to the Hub."""

import gc
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, constants
from torch import nn
from transformers import PreTrainedTokenizerFast
from typing_extensions import Unpack

from hf_model.descriptions import (
    describe_architecture,
    describe_parameters,
    describe_rounding,
    describe_source,
)
from hf_model.errors import UserError, memory_for, one_line, only_warnings
from hf_model.formats import Format, Options, find_format
from hf_model.formats.cards import About, card_facts, state_not_compared
from hf_model.formats.target import MissingEngineError
from hf_model.learnt.inspection import examine
from hf_model.learnt.page import check_page, write_page
from hf_model.loading import Loaded, Source, SourceOptions, check_option_names, check_origin
from hf_model.output_dir import Hashes, check_target, resolved, whole_folder


class ConvertOptions(SourceOptions, total=False):
    """Keyword arguments of `convert` that a source or a format takes."""

    max_shard_size: str
    gguf_type: str
    quantization: str | None
    like: str


@memory_for("to convert the model")
def convert(
    checkpoint_path: str | Path | nn.Module,
    tokenizer_path: str | Path | None,
    output_dir: str | Path,
    *,
    format: str = "transformers",
    overwrite: bool = False,
    verify: bool = True,
    training_data: str | Path | None = None,
    report_page: str | Path | None = None,
    about: About | None = None,
    on_tokenizer: Callable[[PreTrainedTokenizerFast], None] = lambda tokenizer: None,
    report: Callable[[str], None] = only_warnings,
    on_step: Callable[[str], None] = lambda step: None,
    **options: Unpack[ConvertOptions],
) -> Path:
    """Convert a trainer's checkpoint and tokenizer, or a converted folder, to the folder of a format.

    The folder appears only when it is complete.

    Args:
        checkpoint_path, tokenizer_path: as in `load`: a file, a folder or your own `torch.nn.Module`.
        output_dir: the folder to make.
        format: `"transformers"`, `"gpt2"`, `"gguf"`, `"ctranslate2"`, `"onnx"` or `"checkpoint"`.
        overwrite: replace a folder that an earlier conversion wrote, or move another one aside.
        verify: compare the new folder with its source, in the format's own engine, before it gets its final name.
        training_data: data that the model was trained on; the report then says how well the model fits it.
        report_page: where to write an HTML page that shows what the model has learnt.
        about: what the checkpoint does not tell and the model card needs: licence, languages and so on.
        on_tokenizer: called with the model's tokenizer, if the format needs one.
        report: called with each line of the report. By default, its warnings become Python's.
        on_step: called with the name of each step when it begins.
        options: those of `load`; `max_shard_size` (such as `"5GB"`); `gguf_type` (`"f32"`, `"f16"` or `"q8_0"`);
            `quantization` (a name that CTranslate2 knows); `like` (the trainer that reads what the format
            `"checkpoint"` writes: `"original"` or `"nanogpt"`).

    Returns:
        The folder's path.

    Raises:
        UserError: as in `load`; or the format cannot hold the model, its packages are not installed, the folder cannot
            be written, or the folder differs from its source.
    """
    check_option_names("convert", options, ConvertOptions)
    check_origin(checkpoint_path, tokenizer_path)
    named = cast(dict[str, Any], options)
    how = {name: named.pop(name) for name in SourceOptions.__annotations__ if name in named}
    target, choices = find_format(format), Options(**named)
    folder, page = _final_path(Path(output_dir)), None if report_page is None else Path(report_page)
    check_target(folder, overwrite)
    files = [] if isinstance(checkpoint_path, nn.Module) else [checkpoint_path]
    _check_apart(folder, [*files, tokenizer_path, how.get("characters_of"), training_data], page)
    if page is not None:
        check_page(page)

    on_step("reading the model")
    # Only now: with `model`, this runs the user's code.
    source = Source.of(checkpoint_path, tokenizer_path, training_data=training_data, **how)
    loaded = source.load(needs_tokenizer=format != "checkpoint" or training_data is not None or page is not None)
    inspection = None
    if loaded.found is not None:
        on_tokenizer(loaded.tokenizer)
        on_step("looking at what the model has learnt")
        inspection = examine(source, loaded, training_data)
    for line in _head(source, loaded) if inspection is None else inspection.head():
        report(line)
    if page is not None and inspection is not None:
        write_page(inspection, loaded.model, loaded.tokenizer, page)
        report(f"report        {page}")

    card = card_facts(loaded, inspection, source, folder, about or About())
    rounded = describe_rounding(loaded.dtype, loaded.model.dtype)
    choices = replace(choices, card=replace(card, rounded=rounded))
    on_step(f"writing {folder}")
    hashes = Hashes()
    with whole_folder(folder, overwrite, say=report, hashes=hashes) as new:
        for line in target.write(loaded, new, choices):
            report(line)
        evidence = loaded.evidence
        # Free the mapped weights before the folder is read back, so that memory does not hold them twice.
        del loaded
        gc.collect()
        lines = [f"written       {folder}"]
        lines += [f"              {path.name:<32} {_file_size(path):>10}" for path in sorted(new.iterdir())]
        if evidence:
            of = "" if format == "transformers" else f" (as it was read, before it became {format})"
            lines.append(f"verified      your model's own logits: {evidence}{of}")
        hashes.begin(new)  # while the folder is read back
        if verify:
            on_step("comparing what was written with its source")
        compared = _verify(target, new, source, choices, folder) if verify else ""
        lines += [compared] if compared else []
        if not compared.startswith("verified"):
            state_not_compared(new, card)
    for line in lines:  # the folder is in its place now
        report(line)
    return folder


def _verify(target: Format, new: Path, source: Source, options: Options, folder: Path) -> str:
    """Compare the files in `new` with their source; errors name `folder`, the final path."""
    try:
        return f"verified      {target.verify(new, source, options)}"
    except MissingEngineError as error:
        return f"not verified  {error}"
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except Exception as error:  # a damaged file can make the library fail in any way
        raise UserError(f"{folder}: cannot be read back ({one_line(error, 200)})") from None


def _final_path(folder: Path) -> Path:
    """The path with its links followed if it holds `..`, because making a folder can change what `..` means."""
    return resolved(folder) if ".." in folder.parts else folder


def _check_apart(folder: Path, sources: Iterable[str | Path | None], page: Path | None) -> None:
    """Check that the new folder replaces no source, and that the report page is apart from it.

    Raises:
        UserError: a source is the folder or in it, or the page is in the folder's way.
    """
    place = resolved(folder)
    for path in (Path(os.path.realpath(source)) for source in sources if source is not None):
        if not os.path.exists(path) or not os.path.exists(place):  # noqa: PTH110 (a Path's raises for long names)
            continue
        if path.samefile(place):
            raise UserError(f"{folder}: is the source itself; choose another --output_dir")
        if any(parent.samefile(place) for parent in path.parents):
            raise UserError(f"{folder}: holds {path.name!r}, which is a source; choose another --output_dir")
    if page is not None:
        page_place = resolved(page)
        if page_place.is_relative_to(place) or place.is_relative_to(page_place):
            raise UserError(f"{page}: is in the way of {folder}; choose another name for --report")


def _head(source: Source, loaded: Loaded) -> list[str]:
    """The first lines of the report for a folder without a tokenizer, whose model cannot be asked anything."""
    return [
        f"source        {describe_source(source.path, loaded.checkpoint, source.module is not None)}",
        f"architecture  {describe_architecture(loaded.model.config)}",
        f"parameters    {describe_parameters(loaded.model)}",
        "tokenizer     none, and none is needed",
    ]


def _file_size(path: Path) -> str:
    n_bytes = path.stat().st_size
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"


def full_repo_name(repo_id: str) -> str:
    """The full name, `owner/name`, of a repository on the Hub that the user may write to.

    Raises:
        UserError: the Hub cannot be reached, the user is not logged in, or may not write there.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push_to_hub: HF_HUB_OFFLINE is set; unset it, or leave the option out")
    try:
        user = HfApi().whoami()
    except Exception as error:  # of whichever HTTP library
        advice = "check the network, and log in with `hf auth login`"
        raise UserError(
            f"--push_to_hub: the Hub does not tell who you are ({one_line(error, 150)}): {advice}"
        ) from None
    owner, _, name = repo_id.rpartition("/")
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
    if owner and owner not in owners:
        raise UserError(f"--push_to_hub {repo_id}: you may write to repositories of {', '.join(owners)} only")
    return f"{owner or owners[0]}/{name}"


def push(folder: Path, repo_id: str) -> str:
    """Upload a converted folder to a repository of the Hub, which is made private if it is new.

    Returns:
        The repository's address.

    Raises:
        UserError: the Hub refused or cannot be reached. The folder stays as it is.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Add the converted model")
    except Exception as error:  # of whichever HTTP library
        raise UserError(f"{folder} is complete, but was not pushed to {repo_id}: {one_line(error, 300)}") from None
    return str(url)
