"""Reads a training checkpoint, a `torch.save` file, without running anything in it. Knows nothing of transformers."""

import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import safe_globals

from hf_model.errors import UserError
from hf_model.mapping import Architecture, clean_names, infer_architecture

WEIGHT_KEYS = ("model_state_dict", "model", "state_dict")
MODEL_ARGS_KEYS = ("model_args", "config")

ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"
OTHER_FORMATS = {
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself: run `git lfs pull`",
    b"<": "is a web page, not a checkpoint: download the file itself",
    b"\x1f\x8b": "is gzip-compressed: unpack it first",
    b"{": "is a JSON file, not a checkpoint",
}


@dataclass
class Checkpoint:
    """What a file holds of the model. The tensors are mapped from the file where its format allows."""

    path: Path
    state_dict: dict[str, torch.Tensor]
    """Clean name to tensor, on the CPU, in the file's own dtypes."""
    model_args: dict[str, Any]
    """The sizes that the file states; empty where it states none."""
    weights_key: str | None
    """Where in the file the weights stood; None for a bare state dict."""
    progress: dict[str, Any] = field(default_factory=dict)
    """`iter_num` and the loss, where the file tells."""

    def architecture(self, n_head: int | None = None) -> Architecture:
        """The architecture that the weights and `model_args` tell; `n_head` overrides the file's.

        Raises:
            UserError: as `infer_architecture`, naming the file.
        """
        with _naming(self.path):
            return infer_architecture(self.state_dict, self.model_args, n_head)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every weight without loss."""
        dtypes = {tensor.dtype for tensor in self.state_dict.values()}
        dtype = dtypes.pop()
        for other in dtypes:
            dtype = torch.promote_types(dtype, other)
        return dtype


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the model's part of a checkpoint; optimizer state is never read into memory from a zip-format file.

    The weights stand under `model_state_dict`, `model` or `state_dict`, or the file is the state dict itself.

    Raises:
        UserError: no such file, another kind of file, a damaged one, one that would run code, or one without weights.
    """
    path = Path(path)
    with _naming(path):
        content = _load(path)
        weights_key, weights = _find_weights(content)
        state_dict = _checked(clean_names(weights))
    wrapper = content if weights_key is not None else {}
    return Checkpoint(
        path=path,
        state_dict=state_dict,
        model_args=_find_model_args(wrapper),
        weights_key=weights_key,
        progress={
            key: number
            for key in ("iter_num", "loss", "best_val_loss")
            if (number := _number(wrapper.get(key))) is not None
        },
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of an error's message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _load(path: Path) -> Any:
    """The unpickled content, with stand-ins for the harmless classes that it names."""
    is_zip = _is_zip(path)
    try:
        globals_named = _globals_in_zip(path) if is_zip else _globals_in_legacy_file(path)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, struct.error, RuntimeError) as error:
        raise UserError(f"is damaged or was not written to its end ({_one_line(error)})") from None
    stand_ins = [(StandIn, name) for name in globals_named if _is_harmless(name)]
    try:
        with safe_globals(stand_ins):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if found := re.search(r"(?:unsupported GLOBAL|Unsupported global: GLOBAL) (\S+)", str(error)):
            raise UserError(
                f"names {found[1]}, which is not data: it was not loaded, since that could run code. Save only the "
                "state dict and plain values: torch.save({'model': model.state_dict(), 'model_args': {...}}, path)"
            ) from None
        raise UserError(f"is not a checkpoint that can be read safely ({_one_line(error)})") from None
    # The file is not to be trusted in anything: whatever it trips in the reader is its fault.
    except Exception as error:
        raise UserError(f"is damaged or was not written to its end ({_one_line(error)})") from None


def _is_zip(path: Path) -> bool:
    """Whether the file is of the zip format of `torch.save`, or of the older one of bare pickles."""
    if path.is_dir():
        raise UserError("is a folder, not a checkpoint file")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise UserError("there is no such file") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from None
    if not head:
        raise UserError("is empty")
    if head.startswith(ZIP):
        return True
    if head.startswith(PICKLE):
        return False
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size:
        raise UserError("is a safetensors file, not a torch.save checkpoint")
    for magic, message in OTHER_FORMATS.items():
        if head.lstrip().startswith(magic):
            raise UserError(message)
    raise UserError("is not a torch.save checkpoint")


def _globals_in_zip(path: Path) -> set[str]:
    """The globals that the archive's pickle names, after a check of the archive itself."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        names = [entry.filename for entry in archive.infolist()]
        if len(set(names)) < len(names):
            raise UserError("holds two entries of one name")
        if any(name.startswith("/") or ".." in name.split("/") for name in names):
            raise UserError("holds entries with paths outside of the archive")
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise UserError("claims to hold more than its size, or is compressed: not written by torch.save")
        pickles = [name for name in names if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise UserError("is a zip file, but not one written by torch.save (no data.pkl)")
        with archive.open(pickles[0]) as file:
            return _globals_in_pickle(file)


def _globals_in_legacy_file(path: Path) -> set[str]:
    """The globals that the pickles at the start of an older file name: magic number, version, system, content."""
    with path.open("rb") as file:
        return set().union(*(_globals_in_pickle(file) for _ in range(4)))


def _globals_in_pickle(file: IO[bytes]) -> set[str]:
    return {
        str(argument).replace(" ", ".") for opcode, argument, _ in pickletools.genops(file) if opcode.name == "GLOBAL"
    }


HARMLESS = re.compile(
    r"argparse\.Namespace|pathlib\.(Pure)?(Posix|Windows)?Path|numpy\.dtype|numpy\._?core\.multiarray\.scalar"
)


def _is_harmless(name: str) -> bool:
    """Whether a stand-in may take the place of this global: plain records that trainers of this family pickle.

    Besides the listed ones these are classes (capitalised names) of the user's own code or of a third-party package.
    """
    module, _, attribute = name.rpartition(".")
    package = module.split(".")[0]
    is_foreign = package not in sys.stdlib_module_names and package not in ("torch", "numpy")
    return HARMLESS.fullmatch(name) is not None or (is_foreign and attribute[:1].isupper())


class StandIn:
    """Takes the place of an object in the file: keeps what was pickled of it, and has none of its class's code."""

    def __new__(cls, *args: Any) -> "StandIn":
        stand_in = super().__new__(cls)
        stand_in.args, stand_in.state = args, None
        return stand_in

    args: tuple[Any, ...]
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _find_weights(content: Any) -> tuple[str | None, Mapping[str, Any]]:
    """The key under which the state dict stands, None where it is the content itself, and the state dict."""
    if not isinstance(content, Mapping):
        raise UserError(
            f"holds a {type(content).__name__}, not a dict: save model.state_dict(), not the model, with torch.save"
        )
    for key in WEIGHT_KEYS:
        if isinstance(content.get(key), Mapping):
            return key, content[key]
    if any(isinstance(value, torch.Tensor) for name, value in content.items() if "." in str(name)):
        return None, content
    raise UserError(
        f"holds no weights under {', '.join(WEIGHT_KEYS)}; its keys are {', '.join(map(str, list(content)[:10]))}"
    )


def _checked(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, each one dense, of a floating-point dtype and all in the file."""
    checked: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{name!r} in its state dict is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
            raise UserError(f"{name!r} is not a dense floating-point tensor ({tensor.dtype}, {tensor.layout})")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{name!r} claims more values than the file holds")
        checked[name] = tensor.detach()
    return checked


def _find_model_args(content: Mapping[str, Any]) -> dict[str, Any]:
    """The stated sizes, from a dict or from the attributes of a configuration object."""
    for key in MODEL_ARGS_KEYS:
        stated = content.get(key)
        if isinstance(stated, StandIn):
            stated = stated.state
        if isinstance(stated, Mapping):
            wanted = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
            return {name: _number(stated[name], stated[name]) for name in wanted if stated.get(name) is not None}
    return {}


NUMPY_FORMATS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "u8": "Q", "u4": "I", "b1": "?"}


def _number(value: Any, default: Any = None) -> int | float | Any:
    """A plain number from a number, a tensor of one element or a pickled NumPy scalar; else the default."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, StandIn) and len(value.args) == 2 and isinstance(value.args[0], StandIn):
        dtype, raw = value.args
        code = NUMPY_FORMATS.get(dtype.args[0]) if dtype.args else None
        if code and isinstance(raw, bytes) and struct.calcsize(code) == len(raw):
            return struct.unpack("<" + code, raw)[0]
    return default


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:119] + "…"
