"""Finds the file of the weights in a folder that a trainer wrote, or says which command makes such a file."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_model.errors import UserError, some_of
from hf_model.reading import parse_json, read_text

MAX_CONFIG_BYTES = 2**21
# The whole of the weights, as accelerate and transformers name it.
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
PART = re.compile(r".*-\d{5}-of-\d{5}\.\w+")
# What trainers save beside the weights.
STATE = re.compile(r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args|dl_state|meta)[\w.-]*")
DEEPSPEED = "mp_rank_00_model_states.pt"
PARTITION = re.compile(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(model|optim)_states\.pt")
OWN_TYPE = "custom_gpt"  # of a folder that this project wrote
MOST_NAMED = 5
RUNS = "That command runs what the files hold: use it for your own files only"


def is_model_folder(folder: Path) -> bool:
    """Whether transformers or PEFT wrote a folder: its config.json has a model type, or it holds an adapter."""
    if (folder / "generation_config.json").exists() and not (folder / "config.json").exists():
        return True  # whoever loads the folder says what is missing
    return (folder / "adapter_config.json").exists() or _model_type(folder) is not None


def _model_type(folder: Path) -> Any:
    """The model type in a folder's config.json; "" if the file cannot be read, None if there is no type or no file."""
    try:
        fields = parse_json(read_text(folder / "config.json", MAX_CONFIG_BYTES))
    except ValueError:  # whoever loads the folder says what is wrong
        return "" if (folder / "config.json").exists() else None
    return fields.get("model_type") if isinstance(fields, dict) else ""


def saved_file(path: Path) -> Path:
    """The file with the weights in a trainer's folder. A file, and a folder of transformers, are returned as they are.

    Raises:
        UserError: the folder holds no weights or those of several models, its library must join the weights first, or
            it cannot be read.
    """
    try:
        return _saved_file(path)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _saved_file(path: Path) -> Path:
    if path.name.endswith(".distcp") or path.name == ".metadata":
        raise _distributed(path.parent)
    if PARTITION.fullmatch(path.name):
        if (whole := path.with_name(DEEPSPEED)).is_file():
            raise UserError(f"{path}: holds a part of the optimizer's state: give {whole}, which has the weights")
        raise _partitioned(path.parent)
    if path.name in WHOLE and _model_type(path.parent) == OWN_TYPE:
        return path.parent
    if not path.is_dir() or is_model_folder(path):
        return path
    if (path / ".metadata").is_file():
        raise _distributed(path)
    found = [file for name in WHOLE if (file := path / name).is_file()]
    others = [file for file in _weights_in(path) if file not in found]
    if not found and (deepspeed := _deepspeed_file(path)):
        return deepspeed
    if len(found) + len(others) == 1:
        return [*found, *others][0]
    if found or others:
        raise UserError(f"{path}: holds {_names([*found, *others])}: give one of them with --checkpoint_path")
    raise _nothing(path)


def _weights_in(folder: Path) -> list[Path]:
    """The files of weights in a folder, but not the parts of an index."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in WEIGHTS
        and file.is_file()
        and not STATE.fullmatch(file.name)
        and not PART.fullmatch(file.name)
        and not PARTITION.fullmatch(file.name)
    ]


def _deepspeed_file(folder: Path) -> Path | None:
    """The file of a DeepSpeed checkpoint with the weights, in the folder or in the step that its file `latest` names.

    Source of the layout: https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html

    Raises:
        UserError: each process wrote its own part of the weights.
    """
    steps = [folder, *folder.glob("global_step*")]
    if (folder / "latest").is_file():
        tag = read_text(folder / "latest", 1000).strip()
        steps = [folder / tag] if re.fullmatch(r"\w[\w.=-]*", tag) else []
    steps = [step for step in steps if step.is_dir() and any(step.glob("*mp_rank_00_model_states.pt"))]
    if len(steps) > 1:
        raise UserError(f"{folder}: holds {_names(steps)}: give one of them with --checkpoint_path")
    for step in steps:
        if not (step / DEEPSPEED).is_file():
            raise _partitioned(step)
        if (step / DEEPSPEED.replace("00", "01")).is_file():
            raise UserError(
                f"{step}: each weight is split between several processes (tensor parallelism), which is not read: "
                "save the model's whole state dict with the trainer's own code"
            )
        return step / DEEPSPEED
    return None


def _partitioned(step: Path) -> UserError:
    """What to do with the files of ZeRO, by DeepSpeed's own program: the installed one, not the copy in the folder."""
    top = step.parent
    tag = "" if (top / "latest").is_file() else f" -t {_quoted(step.name)}"
    joined = top / "joined"
    return UserError(
        f"{step}: each process wrote its part of every weight (DeepSpeed's ZeRO); join them with: "
        f"python -m deepspeed.utils.zero_to_fp32 {_quoted(top)} {_quoted(joined)}{tag}; "
        f"then give --checkpoint_path {_quoted(joined)}. {RUNS}"
    )


def _distributed(folder: Path) -> UserError:
    """What to do with a checkpoint of torch.distributed. Only its own reader may open .metadata, which is a pickle."""
    joined = folder.with_name(f"{folder.name}.pt")
    return UserError(
        f"{folder}: is a checkpoint of torch.distributed; make one file of it with: python -m "
        f"torch.distributed.checkpoint.format_utils dcp_to_torch {_quoted(folder)} {_quoted(joined)}; "
        f"then give --checkpoint_path {_quoted(joined)}. {RUNS}"
    )


def _nothing(folder: Path) -> UserError:
    """Why a folder without a file of weights cannot be read, and what to give instead."""
    if parts := [file for file in sorted(folder.iterdir()) if PART.fullmatch(file.name)]:
        return UserError(f"{folder}: holds {_names(parts)} without an index: copy the file ….index.json too")
    inner = [one for one in folder.iterdir() if one.is_dir()]
    if joined := [one for one in inner if (one / ".metadata").is_file()]:
        return _distributed(joined[0])
    if found := [one for one in inner if _weights_in(one) or any((one / name).is_file() for name in WHOLE)]:
        return UserError(f"{folder}: holds {_names(found)}: give one of them with --checkpoint_path")
    return UserError(f"{folder}: holds no model (no config.json) and no checkpoint ({', '.join(WEIGHTS)})")


def _names(paths: Iterable[Path]) -> str:
    """The names of files or folders, the newest first."""
    newest = sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    return some_of([_quoted(path) for path in newest], MOST_NAMED)


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(path))
