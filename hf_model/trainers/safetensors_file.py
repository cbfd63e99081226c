"""Reads a safetensors file: its header says where each tensor is, and the values stay mapped."""

import math
import struct
from pathlib import Path
from typing import Any

from hf_model.reading import parse_json
from hf_model.trainers.archive import Archive, Entry, distrust, map_file
from hf_model.trainers.pickle_reader import MAX_DIMENSIONS, StoredBytes, StoredTensor

MAX_HEADER_BYTES = 25 * 2**20
# torch's names: of the storage class, and of the dtype if the class does not tell it.
DTYPES = {
    **{"F64": ("DoubleStorage", None), "F32": ("FloatStorage", None), "F16": ("HalfStorage", None)},
    **{"BF16": ("BFloat16Storage", None), "I64": ("LongStorage", None), "I32": ("IntStorage", None)},
    **{"I16": ("ShortStorage", None), "I8": ("CharStorage", None), "U8": ("ByteStorage", None)},
    **{"BOOL": ("BoolStorage", None), "F8_E4M3": ("UntypedStorage", "float8_e4m3fn")},
    **{"F8_E5M2": ("UntypedStorage", "float8_e5m2")},
}


def is_safetensors(head: bytes) -> bool:
    """Whether a file with these first bytes is a safetensors file: the length of a header in JSON, and its start."""
    return head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER_BYTES


def load_safetensors(path: Path) -> Archive:
    """Map a file and read its header.

    A name that the file's metadata gives to another tensor is that tensor too, as `safetensors.torch.save_model` writes
    tied weights.

    Source of the format: https://github.com/huggingface/safetensors#format

    Raises:
        UserError: the file is damaged.
    """
    with distrust(), path.open("rb") as file:
        content = map_file(file)
        (length,) = struct.unpack("<Q", content[:8])
        header = parse_json(content[8 : 8 + length].decode())
        metadata = {name: str(text) for name, text in header.pop("__metadata__", {}).items()}
        storages = {name: _entry(content, 8 + length, told) for name, told in header.items()}
        tensors = {name: _tensor(name, told) for name, told in header.items()}
        shared = {name: tensors[other] for name, other in metadata.items() if other in tensors}
        return Archive(shared | tensors, storages, metadata)


def _entry(content: Any, start: int, told: dict[str, Any]) -> Entry:
    first, last = told["data_offsets"]
    if not 0 <= first <= last <= len(content) - start:
        raise ValueError("a tensor past its end")
    return Entry(content, start + first, last - first)


def _tensor(name: str, told: dict[str, Any]) -> StoredTensor:
    shape = tuple(told["shape"])
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**60 for size in shape):
        raise ValueError("the sizes of a tensor are not sizes")
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    storage, dtype = DTYPES.get(told["dtype"], ("UntypedStorage", str(told["dtype"])))
    first, last = told["data_offsets"]
    length = last - first if storage == "UntypedStorage" else math.prod(shape)
    return StoredTensor(StoredBytes(name, storage, length), 0, shape, tuple(strides), dtype)
