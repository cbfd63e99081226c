"""Reads what holds weights: a `torch.save` file, a safetensors file, or the index of weights in several files."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_model.errors import UserError
from hf_model.reading import parse_json, read_text
from hf_model.trainers import archive
from hf_model.trainers.archive import Archive, Entry
from hf_model.trainers.pickle_reader import StoredTensor
from hf_model.trainers.safetensors_file import is_safetensors, load_safetensors

INDEX_ENDING = ".index.json"
MAX_INDEX_BYTES = 2**25
MAX_SHARDS = 1000


def load(path: Path) -> Archive:
    """Map a file, or the files of an index, and read what they hold, but no values of tensors.

    Raises:
        UserError: a file is missing or damaged, refers to code, or is of another kind.
    """
    if path.name.endswith(INDEX_ENDING):
        return _load_shards(path)
    if is_safetensors(archive.read_head(path)):
        return load_safetensors(path)
    return archive.load(path)


def _load_shards(index: Path) -> Archive:
    """The state dict whose parts are in the files that an index names, as accelerate and transformers write it."""
    weights: dict[str, Any] = {}
    storages: dict[str, Entry] = {}
    places = _weight_map(index)
    for name in sorted(set(places.values())):
        try:
            part = load(index.with_name(name))
        except UserError as error:
            raise UserError(f"its part {name}: {error}") from None
        if not isinstance(part.value, dict):
            raise UserError(f"its part {name} holds no state dict")
        for key in part.value:
            if (place := places.setdefault(key, name)) != name:
                raise UserError(f"its part {name} holds {key!r}, which belongs in {place}: copy the files again")
        # Storages have the same keys in each file.
        storages |= {f"{name}/{key}": entry for key, entry in part.storages.items()}
        weights |= {key: _renamed(value, name) for key, value in part.value.items()}
    return Archive(weights, storages)


def _renamed(value: Any, shard: str) -> Any:
    if not isinstance(value, StoredTensor):
        return value
    return replace(value, storage=replace(value.storage, key=f"{shard}/{value.storage.key}"))


def _weight_map(index: Path) -> dict[str, str]:
    """The name of each tensor, and the file that an index names for it. All are in the index's own folder."""
    try:
        weight_map = parse_json(read_text(index, MAX_INDEX_BYTES))["weight_map"]
        places = {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise UserError(str(error).removeprefix(f"{index}: ")) from None
        raise UserError("is not an index of weights (no weight_map)") from None
    names = sorted(set(places.values()))
    if not 0 < len(names) <= MAX_SHARDS:
        raise UserError(f"names {len(names)} files of weights")
    for name in names:
        if not re.fullmatch(r"[^/\\]+\.(safetensors|bin|pt|pth)", name) or not index.with_name(name).is_file():
            raise UserError(f"names {name!r}, and there is no such file beside it: download or copy it too")
    return places
