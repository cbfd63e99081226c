"""Reads a training checkpoint, a `torch.save` file, without running anything in it. Knows nothing of transformers."""

import io
import re
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from hf_model.errors import UserError, memory_for, one_line
from hf_model.mapping import Architecture, clean_names, infer_architecture, is_tied
from hf_model.pickle_scan import MAX_PICKLE_BYTES, scan_pickle

WEIGHT_KEYS = ("model_state_dict", "model", "state_dict")
MODEL_ARGS_KEYS = ("model_args", "config")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of torch's magic number
OTHER_FORMATS = {
    b"\x80": "is a plain pickle, which can run code: it was not opened. Save it with torch.save",
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself: run `git lfs pull`",
    b"<": "is a web page, not a checkpoint: download the file itself",
    b"\x1f\x8b": "is gzip-compressed: unpack it first",
    b"{": "is a JSON file, not a checkpoint",
}

# What torch needs to make tensors and bytes, and no more of what its own safe loading lets pass.
TORCH_GLOBALS = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|complex)"
    r"|torch\.(\w+Storage|storage\.\w+Storage|Size|device|b?float\w+|u?int\d+|bool|complex\d+)"
    r"|torch\._utils\._rebuild_(tensor(_v2|_v3)?|parameter)|torch\.nn\.parameter\.Parameter"
)
# Plain records of the standard library and of NumPy that trainers of this family pickle.
HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path"
    r"|numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
)
LOADING = threading.Lock()  # torch keeps the globals that it lets pass in one place for all threads


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


def read_checkpoint(path: str | Path, check_bytes: bool = True) -> Checkpoint:
    """Read the model's part of a checkpoint; optimizer state is never read into memory from a zip-format file.

    The weights stand under `model_state_dict`, `model` or `state_dict`, or the file is the state dict itself.

    Args:
        path: the file.
        check_bytes: compare every weight with its CRC32. It costs a pass over the weights; the older format has none.

    Raises:
        UserError: no such file, another kind of file, a damaged one, one that would run code, or one without weights.
    """
    path = Path(path)
    with _naming(path):
        is_zip = _is_zip(path)
        loaded = _load(path, is_zip)
        content = _plain_dict(loaded)
        if content is None:
            raise UserError(f"holds a {type(loaded).__name__}, not a dict: save model.state_dict() with torch.save")
        weights_key, weights = _find_weights(content)
        state_dict = _checked(clean_names(weights))
        if is_zip and check_bytes:
            _check_bytes(path, state_dict)
        _check_places(state_dict)
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


@contextmanager
def _distrust() -> Iterator[None]:
    """The file is not to be trusted in anything: whatever it trips in the reader is its fault."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"is damaged or was not written to its end ({one_line(error, 120)})") from None


def _is_zip(path: Path) -> bool:
    """Whether the file is of the zip format of `torch.save`, or of the older one of bare pickles."""
    try:
        if path.is_dir():
            raise UserError("is a folder, not a checkpoint file")
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise UserError("is not a regular file")
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
    if head.startswith(LEGACY):
        return False
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size:
        raise UserError("is a safetensors file, not a torch.save checkpoint")
    for magic, message in OTHER_FORMATS.items():
        if head.lstrip().startswith(magic):
            raise UserError(message)
    raise UserError("is not a torch.save checkpoint")


def _load(path: Path, is_zip: bool) -> Any:
    """The unpickled content, with stand-ins for the harmless classes that it names."""
    with _distrust():
        stand_ins = []
        for name in sorted(_globals_in_zip(path) if is_zip else _globals_in_legacy_file(path)):
            if _is_harmless(name):
                stand_ins.append((type(name.rpartition(".")[2], (StandIn,), {}), name))
            elif not TORCH_GLOBALS.fullmatch(name):
                raise UserError(
                    f"names {name}, which is not data: it was not loaded, since that could run code. Save only the "
                    "state dict and plain values: torch.save({'model': model.state_dict(), 'model_args': {...}}, path)"
                )
        with memory_for("to load it"), LOADING, safe_globals(stand_ins):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _globals_in_zip(path: Path) -> set[str]:
    """The globals that the archive's pickle names, after a check of the archive itself."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names):
            raise UserError("holds two entries of one name")
        if any(name.startswith("/") or ".." in name.split("/") for name in names):
            raise UserError("holds entries with paths outside of the archive")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError("is a compressed archive, which torch.save does not write: unpack it first")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError("claims to hold more than its size")
        if any(name.split("/")[-1] == "constants.pkl" for name in names):
            raise UserError("is a TorchScript archive, not a checkpoint: save the model's state_dict() with torch.save")
        pickles = [entry for entry in entries if entry.filename.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise UserError("is a zip file, but not one written by torch.save (no data.pkl)")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise UserError(f"holds {pickles[0].file_size} bytes of values beside its tensors: more than a model's")
        return scan_pickle(io.BytesIO(_read_entry(archive, pickles[0])))


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """An entry's bytes, compared with its CRC32 where there is one: `set_crc32_options(False)` writes 0 for all."""
    if entry.CRC == 0:
        entry.CRC = None  # type: ignore[assignment]
    return archive.read(entry)


def _globals_in_legacy_file(path: Path) -> set[str]:
    """The globals of the pickles at the start of an older file: magic number, version, system, content, storages."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    head.seek(len(LEGACY))
    return set().union(*(scan_pickle(head) for _ in range(4)))


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


def _plain_dict(value: Any) -> dict[Any, Any] | None:
    """A dict of the file's as nothing but a dict: the file can give an OrderedDict attributes that hide its methods."""
    return dict(dict.items(value)) if isinstance(value, dict) else None


def _find_weights(content: dict[Any, Any]) -> tuple[str | None, dict[Any, Any]]:
    """The key under which the state dict stands, None where it is the content itself, and the state dict."""
    for key in WEIGHT_KEYS:
        if (weights := _plain_dict(content.get(key))) is not None:
            return key, weights
    if any(isinstance(value, torch.Tensor) for name, value in content.items() if "." in str(name)):
        return None, content
    raise UserError(
        f"holds no weights under {', '.join(WEIGHT_KEYS)}; its keys are {', '.join(map(str, list(content)[:10]))}"
    )


def _checked(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, each one of a floating-point dtype and all in its storage."""
    checked: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{name!r} in its state dict is a {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in WEIGHT_DTYPES:
            raise UserError(f"{name!r} is not a dense floating-point tensor of 16, 32 or 64 bits ({tensor.dtype})")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{name!r} claims more values than the file holds")
        checked[name] = tensor.detach()
    return checked


def _check_places(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that overlap, a tied head aside: a small file could make a large model, and safetensors none."""
    tied = {"lm_head.weight"} if "transformer.wte.weight" in state_dict and is_tied(state_dict) else set()
    places = sorted((tensor.data_ptr(), tensor.nbytes, name) for name, tensor in state_dict.items() if name not in tied)
    for (start, size, name), (next_start, _, next_name) in pairwise(places):
        if start + size > next_start:
            raise UserError(f"{name!r} and {next_name!r} share their values, which only the embedding and lm_head may")


def _check_bytes(path: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Find every weight's storage among the archive's records by its size and CRC32: mapping a file compares neither.

    Raises:
        UserError: a weight is not what was written.
    """
    with _distrust(), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        orders = [_read_entry(archive, entry) for entry in entries if entry.filename.endswith("/byteorder")]
    if any(order != sys.byteorder.encode() for order in orders):
        return  # written on the other kind of machine: the bytes were swapped in loading
    records = {(entry.file_size, entry.CRC or 0) for entry in entries}
    storages: dict[int, tuple[str, torch.UntypedStorage]] = {}
    for name, tensor in state_dict.items():
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), (name, storage))

    def is_intact(named: tuple[str, torch.UntypedStorage]) -> bool:
        content = torch.empty(0, dtype=torch.uint8).set_(named[1]).numpy().data
        return not records.isdisjoint({(len(content), 0), (len(content), zlib.crc32(content))})

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for (name, _), intact in zip(storages.values(), pool.map(is_intact, storages.values()), strict=True):
            if not intact:
                raise UserError(
                    f"is damaged: the bytes of {name!r} are not those that were written (their CRC32 differs)"
                )


def _find_model_args(content: Mapping[str, Any]) -> dict[str, Any]:
    """The stated sizes, from a dict or from the attributes of a configuration object."""
    for key in MODEL_ARGS_KEYS:
        stated = content.get(key)
        if (plain := _plain_dict(stated.state if isinstance(stated, StandIn) else stated)) is not None:
            wanted = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
            return {
                name: _number(value, f"a {type(value).__name__}")
                for name in wanted
                if (value := plain.get(name)) is not None
            }
    return {}


NUMPY_FORMATS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "u8": "Q", "u4": "I", "b1": "?"}


def _number(value: Any, default: Any = None) -> int | float | Any:
    """A plain number from a number, a tensor of one element or a pickled NumPy scalar; else the default."""
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64):
        return value
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return _number(value.item(), default)
    if isinstance(value, StandIn) and len(value.args) == 2 and isinstance(value.args[0], StandIn):
        dtype, raw = value.args
        code = NUMPY_FORMATS.get(str(dtype.args[0])) if dtype.args else None
        if code and isinstance(raw, bytes) and struct.calcsize(code) == len(raw):
            return struct.unpack("<" + code, raw)[0]
    return default
