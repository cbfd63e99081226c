"""The weights among a file's values, each checked to be a tensor of its own that the file really holds."""

import math
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from itertools import pairwise
from typing import Any

import torch

from hf_model.errors import UserError
from hf_model.trainers.architecture import is_tied
from hf_model.trainers.archive import ITEM_BYTES, Archive, Entry, is_intact
from hf_model.trainers.pickle_reader import StoredTensor, kind_of

WEIGHT_KEYS = ("model_state_dict", "model", "state_dict")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
NUMBER_DTYPES = (*WEIGHT_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds all of these without loss."""
    return reduce(torch.promote_types, set(dtypes))


def find_weights(content: dict[Any, Any]) -> tuple[str | None, dict[Any, Any]]:
    """The key under which the state dict stands, None where it is the content itself, and the state dict."""
    for key in WEIGHT_KEYS:
        if isinstance(weights := content.get(key), dict):
            return key, weights
    if any(
        isinstance(value, StoredTensor) and isinstance(name, str) and "." in name for name, value in content.items()
    ):
        return None, content
    keys = [str(key) if isinstance(key, (str, int)) else f"a {kind_of(key)}" for key in list(content)[:10]]
    raise UserError(f"holds no weights under {', '.join(WEIGHT_KEYS)}; its keys are {', '.join(keys)}")


def weights_of(archive: Archive, state_dict: Mapping[str, Any], check_bytes: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, each one of a floating-point dtype and in a place of its own in the file.

    They are mapped from the file. A view with gaps between its values is copied, so that what is used and what is
    written are the same.

    Args:
        check_bytes: compare every storage with its CRC32.

    Raises:
        UserError: a weight is no tensor of that kind, is damaged, or shares its values with another.
    """
    stored: dict[str, StoredTensor] = {}
    for name, value in state_dict.items():
        if not isinstance(value, StoredTensor):
            raise UserError(f"{name!r} in its state dict is a {kind_of(value)}, not a tensor")
        dtype = dtype_of(value)
        if dtype not in WEIGHT_DTYPES:
            told = dtype or value.dtype or value.storage.dtype
            raise UserError(f"{name!r} is not a dense floating-point tensor of 16, 32 or 64 bits ({told})")
        _check_geometry(archive, name, value)
        stored[name] = value
    if check_bytes:
        _check_bytes(archive, stored)
    mapped = _Storages(archive)
    tensors = {name: mapped.tensor(value) for name, value in stored.items()}
    check_places(tensors)
    return {
        name: tensor if _span(stored[name]) == tensor.numel() else tensor.contiguous()
        for name, tensor in tensors.items()
    }


def number_of(archive: Archive, stored: StoredTensor) -> int | float | None:
    """The value of a tensor of one number; None if it is another one, or its file does not hold it."""
    record = archive.storages.get(stored.storage.key)
    if dtype_of(stored) not in NUMBER_DTYPES or not stored.is_plain or math.prod(stored.shape) != 1 or record is None:
        return None
    if not _is_inside(stored, record):
        return None
    return _Storages(archive).tensor(stored).item()


def dtype_of(stored: StoredTensor) -> torch.dtype | None:
    """None of the dtypes that are neither weights nor numbers."""
    return getattr(torch, stored.dtype, None) if stored.dtype else DTYPES.get(stored.storage.dtype)


def check_places(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that overlap, a tied head aside: a small file could make a large model, and safetensors none."""
    tied = {"lm_head.weight"} if "transformer.wte.weight" in state_dict and is_tied(state_dict) else set()
    places = sorted(
        (tensor.data_ptr(), _bytes_spanned(tensor), name) for name, tensor in state_dict.items() if name not in tied
    )
    for (start, size, name), (next_start, _, next_name) in pairwise(places):
        if start + size > next_start:
            raise UserError(f"{name!r} and {next_name!r} share their values, which only the embedding and lm_head may")


def _bytes_spanned(tensor: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _span(stored: StoredTensor) -> int:
    """How many values lie between a tensor's first and its last, both counted."""
    if not math.prod(stored.shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(stored.shape, stored.stride, strict=True))


def _is_inside(stored: StoredTensor, record: Entry) -> bool:
    """Whether a record is as long as its storage should be, and a tensor within it."""
    dtype, length = dtype_of(stored), stored.storage.length * ITEM_BYTES.get(stored.storage.dtype, 1)
    last = stored.offset + _span(stored)
    return dtype is not None and record.length == length and last * dtype.itemsize <= length


def _check_geometry(archive: Archive, name: str, stored: StoredTensor) -> None:
    if not stored.is_plain:
        raise UserError(f"{name!r} is the negative or conjugate view of other values: save it with .resolve_neg()")
    record = archive.storages.get(stored.storage.key)
    if record is None:
        raise UserError(f"is damaged: the bytes of {name!r} are not in the file")
    if record.length != stored.storage.length * ITEM_BYTES.get(stored.storage.dtype, 1):
        raise UserError(
            f"is damaged: the bytes of {name!r} are not those that were written (there are {record.length})"
        )
    if not _is_inside(stored, record):
        raise UserError(f"is damaged: {name!r} claims more values than the file holds")
    reached = 1
    for stride, size in sorted(zip(stored.stride, stored.shape, strict=True)):
        if size > 1 and stride < reached:
            raise UserError(f"{name!r} claims more values than the file holds")
        reached += (size - 1) * stride


def _check_bytes(archive: Archive, stored: Mapping[str, StoredTensor]) -> None:
    names: dict[str, str] = {}
    for name, value in stored.items():
        names.setdefault(value.storage.key, name)
    records = [archive.storages[key] for key in names]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, intact in zip(
            names.values(), pool.map(lambda record: is_intact(archive, record), records), strict=True
        ):
            if not intact:
                raise UserError(
                    f"is damaged: the bytes of {name!r} are not those that were written (their CRC32 differs)"
                )


class _Storages:
    """The file's storages as torch's, each made once, so that two tensors of one storage share their memory."""

    def __init__(self, archive: Archive):
        self.archive = archive
        self.whole = torch.frombuffer(archive.content, dtype=torch.uint8).untyped_storage()
        self.made: dict[tuple[str, torch.dtype], torch.UntypedStorage] = {}

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        dtype = dtype_of(stored)
        assert dtype is not None
        key = (stored.storage.key, dtype)
        if key not in self.made:
            record = self.archive.storages[stored.storage.key]
            storage = self.whole[record.start : record.start + record.length]
            if self.archive.is_big_endian != (sys.byteorder == "big"):
                storage = storage.clone()
                storage.byteswap(dtype)
            self.made[key] = storage
        return torch.empty(0, dtype=dtype).set_(self.made[key], stored.offset, stored.shape, stored.stride)
