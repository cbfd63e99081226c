"""Finds the weights in a file, and checks that the file holds each weight and that no two share their values."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from itertools import pairwise
from typing import Any

import torch

from hf_model.errors import UserError
from hf_model.trainers.architecture import is_copied
from hf_model.trainers.archive import STORAGE_DTYPES, Archive
from hf_model.trainers.pickle_reader import StandIn, StoredTensor, dict_of, kind_of
from hf_model.trainers.pickled_module import is_module, state_dict_of

WEIGHT_KEYS = ("model_state_dict", "model", "state_dict")
MASKED = -1e3  # at most, what is added to the scores of masked tokens
ARRAYS = ("_reconstruct", "ndarray")  # how a pickle makes NumPy's
OF_NUMPY = "holds NumPy arrays: save torch's tensors, as {'model': model.state_dict()} has them"
PARTS = ("DTensor", "ShardedTensor")  # of FSDP
OF_SEVERAL = (
    "of which each process saved its own part: in the trainer, save what torch.distributed.checkpoint.state_dict."
    "get_model_state_dict gives with StateDictOptions(full_state_dict=True, cpu_offload=True)"
)
PLAIN = (bool, int, float, str, bytes, type(None), list, dict)  # values beside the tensors of a bare state dict
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NUMBER_DTYPES = (*WEIGHT_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds all of these without loss."""
    return reduce(torch.promote_types, set(dtypes))


def find_weights(content: dict[Any, Any]) -> tuple[str | None, dict[Any, Any]]:
    """The state dict and its key. The key is None if the content itself is the state dict.

    A whole pickled module stands for its state dict.

    Raises:
        UserError: there is no state dict, or several stand under keys that are not known.
    """
    found = {key: weights for key, value in content.items() if (weights := _state_dict(value)) is not None}
    key = next((key for key in WEIGHT_KEYS if key in found), None)
    is_bare = any(isinstance(value, StoredTensor) and "." in str(key) for key, value in content.items())
    if key is None and is_bare:
        return None, {key: value for key, value in content.items() if not isinstance(value, PLAIN)}
    if key is None:
        named = [
            key for key, weights in found.items() if any(isinstance(one, StoredTensor) for one in weights.values())
        ]
        if len(named) > 1:
            raise UserError(f"holds tensors under {', '.join(map(str, named[:5]))}: save one of them alone")
        if any(kind_of(value) in PARTS for value in content.values()):
            raise UserError(f"holds weights {OF_SEVERAL}")
        if not named:
            if any(kind_of(value) in ARRAYS for inner in (content, *found.values()) for value in inner.values()):
                raise UserError(OF_NUMPY)
            if any(isinstance(one, dict) and "param_groups" in one for one in (content, *content.values())):
                raise UserError("holds the state of an optimizer and no weights: give the file of the model beside it")
            keys = [str(key) if isinstance(key, (str, int)) else f"a {kind_of(key)}" for key in list(content)[:10]]
            raise UserError(
                f"holds no weights under {', '.join(WEIGHT_KEYS)}; its keys are {', '.join(keys)}: "
                "save {'model': model.state_dict()} with torch.save"
            )
        key = named[0]
    return key, found[key]


def _state_dict(value: Any) -> dict[Any, Any] | None:
    if is_module(value):
        return state_dict_of(value)
    weights = dict_of(value)
    return weights if isinstance(weights, dict) else None


def weights_of(
    archive: Archive, state_dict: Mapping[str, Any], check_bytes: bool = True, tied: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, each with a floating-point dtype and a place of its own in the file.

    They are mapped from the file. A view with gaps between its values is copied, without the gaps.

    Args:
        check_bytes: compare every storage with its CRC32.
        tied: the names of the embedding and the head, which may share their values.

    Raises:
        UserError: a weight is not such a tensor, is damaged, or shares its values with another.
    """
    for name, value in state_dict.items():
        _check(archive, name, value)
    if check_bytes:
        _check_bytes(archive, state_dict)
    mapped = _Storages(archive)
    tensors = {name: mapped.tensor(value) for name, value in state_dict.items()}
    _check_places(tensors, tied)
    return {
        name: tensor if _span(tensor.shape, tensor.stride()) == tensor.numel() else tensor.contiguous()
        for name, tensor in tensors.items()
    }


def is_no_weight(archive: Archive, stored: Any) -> bool:
    """Whether a tensor is a causal mask, or whole numbers in order (positions). Modules keep these as buffers.

    A mask has one value on and below its diagonal and another one above: 0 and 1, or 0 and a very negative number.
    """
    if not isinstance(stored, StoredTensor) or dtype_of(stored) not in NUMBER_DTYPES or not stored.is_plain:
        return False
    is_expanded = math.prod(stored.shape) > _span(stored.shape, stored.stride)
    if is_expanded or not _is_inside(archive, stored):
        return False
    tensor = _Storages(archive).tensor(stored)
    if tensor.ndim >= 2 and tensor.shape[-1] == tensor.shape[-2] > 1 and tensor.numel() == tensor.shape[-1] ** 2:
        mask = tensor.reshape(tensor.shape[-2:])
        seen = torch.ones_like(mask, dtype=torch.bool).tril()
        past, future = mask[seen], mask[~seen]
        values = {float(past[0]), float(future[0])}
        is_usual = values == {0.0, 1.0} or (0.0 in values and min(values) <= MASKED)
        return is_usual and bool((past == past[0]).all() and (future == future[0]).all())
    is_whole = not tensor.is_floating_point() and tensor.numel() > 1
    return is_whole and bool((tensor.flatten() == torch.arange(tensor.numel())).all())


def number_of(archive: Archive, stored: StoredTensor) -> int | float | None:
    """The value of a tensor of one number; None if it is another tensor, or the file does not hold it."""
    is_number = dtype_of(stored) in NUMBER_DTYPES and stored.is_plain and math.prod(stored.shape) == 1
    return _Storages(archive).tensor(stored).item() if is_number and _is_inside(archive, stored) else None


def dtype_of(stored: StoredTensor) -> torch.dtype | None:
    """The dtype of a tensor; None if the file names no dtype that torch has."""
    dtype = getattr(torch, stored.dtype, None) if stored.dtype else STORAGE_DTYPES.get(stored.storage.dtype)
    return dtype if isinstance(dtype, torch.dtype) else None


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """The number of values from a tensor's first to its last."""
    if not math.prod(shape):
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _is_whole(archive: Archive, stored: StoredTensor) -> bool:
    """Whether the file holds all bytes of a tensor's storage, and no more."""
    entry, storage = archive.storages.get(stored.storage.key), stored.storage
    return (
        entry is not None and entry.length == storage.length * STORAGE_DTYPES.get(storage.dtype, torch.uint8).itemsize
    )


def _is_inside(archive: Archive, stored: StoredTensor) -> bool:
    """Whether the file holds all values of a tensor."""
    dtype, last = dtype_of(stored), stored.offset + _span(stored.shape, stored.stride)
    length = archive.storages[stored.storage.key].length if _is_whole(archive, stored) else -1
    return dtype is not None and last * dtype.itemsize <= length


def _check(archive: Archive, name: str, value: Any) -> None:
    """Check what the file says of a weight, before its bytes are touched."""
    if isinstance(value, StandIn) and "_rebuild_" in value.name:
        raise UserError(
            f"{name!r} was saved as another kind of tensor ({kind_of(value)}): save a dense one from the CPU"
        )
    if not isinstance(value, StoredTensor):
        if kind_of(value) in ARRAYS:
            raise UserError(OF_NUMPY)
        if kind_of(value) in PARTS:
            raise UserError(f"{name!r} is a {kind_of(value)}, {OF_SEVERAL}")
        raise UserError(f"{name!r} in its state dict is a {kind_of(value)}, not a tensor")
    if (dtype := dtype_of(value)) not in WEIGHT_DTYPES:
        told = dtype or value.dtype or value.storage.dtype
        raise UserError(f"{name!r} is not a dense floating-point tensor of 16, 32 or 64 bits ({told})")
    if not value.is_plain:
        raise UserError(f"{name!r} is the negative or conjugate view of other values: save it with .resolve_neg()")
    if not _is_whole(archive, value):
        raise UserError(f"is damaged: the bytes of {name!r} are not those that were written")
    if not _is_inside(archive, value):
        raise UserError(f"is damaged: {name!r} claims more values than the file holds")
    if math.prod(value.shape) > _span(value.shape, value.stride):
        raise UserError(f"{name!r} claims more values than the file holds: save it with .contiguous()")


def _check_bytes(archive: Archive, stored: Mapping[str, StoredTensor]) -> None:
    names: dict[str, str] = {}
    for name, value in stored.items():
        names.setdefault(value.storage.key, name)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        intact = pool.map(lambda key: archive.storages[key].is_intact(), names)
        for name, is_intact in zip(names.values(), intact, strict=True):
            if not is_intact:
                raise UserError(
                    f"is damaged: the bytes of {name!r} are not those that were written (their CRC32 differs)"
                )


def _check_places(state_dict: Mapping[str, torch.Tensor], tied: tuple[str, ...]) -> None:
    """Refuse weights that overlap, except for a tied head. Otherwise a small file could make a large model."""
    pair = [state_dict[name] for name in tied if name in state_dict]
    is_head_tied = len(pair) == 2 and is_copied(*pair)
    places = sorted(
        (tensor.data_ptr(), tensor.element_size() * _span(tensor.shape, tensor.stride()), name)
        for name, tensor in state_dict.items()
        if not (is_head_tied and name == tied[-1])
    )
    for (start, size, name), (next_start, _, next_name) in pairwise(places):
        if start + size > next_start:
            raise UserError(f"{name!r} and {next_name!r} share their values, which only the embedding and lm_head may")


class _Storages:
    """The file's storages as torch's, each made once, so that two tensors of one storage share their memory."""

    def __init__(self, archive: Archive):
        self.archive = archive
        self.made: dict[tuple[str, torch.dtype], torch.UntypedStorage] = {}

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        dtype = dtype_of(stored)
        assert dtype is not None
        key = (stored.storage.key, dtype)
        if key not in self.made:
            self.made[key] = self._storage(stored.storage.key, dtype)
        return torch.empty(0, dtype=dtype).set_(self.made[key], stored.offset, stored.shape, stored.stride)

    def _storage(self, key: str, dtype: torch.dtype) -> torch.UntypedStorage:
        entry = self.archive.storages[key]
        if not entry.length:
            return torch.UntypedStorage(0)
        storage = torch.frombuffer(entry.buffer(), dtype=torch.uint8).untyped_storage()
        if entry.is_big_endian != (sys.byteorder == "big"):
            storage = storage.clone()
            storage.byteswap(dtype)
        return storage
