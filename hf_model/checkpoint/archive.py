"""A `torch.save` file to the values in it, without running anything: kinds of files, archives, pickles, checksums."""

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
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from hf_model.checkpoint.scan import MAX_PICKLE_BYTES, scan_pickle
from hf_model.errors import UserError, memory_for, one_line

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


def is_zip(path: Path) -> bool:
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


def load(path: Path, is_zip: bool) -> Any:
    """The unpickled content, with stand-ins for the harmless classes that it names."""
    with distrust():
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


def check_bytes(path: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Find every weight's storage among the archive's records by its size and CRC32: mapping a file compares neither.

    Raises:
        UserError: a weight is not what was written.
    """
    with distrust(), zipfile.ZipFile(path) as archive:
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


@contextmanager
def distrust() -> Iterator[None]:
    """The file is not to be trusted in anything: whatever it trips in the reader is its fault."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"is damaged or was not written to its end ({one_line(error, 120)})") from None
