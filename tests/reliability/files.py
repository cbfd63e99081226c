"""Files that no honest trainer writes, for the tests of this folder."""

import io
import pickle
import resource
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.tiny import gpt

State = dict[str, torch.Tensor]


def weights(**sizes: int) -> State:
    return dict(gpt(**sizes).state_dict())


def save(path: Path, content: object, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


def save_pickle(path: Path, content: bytes) -> Path:
    """Write an archive of torch's form around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ckpt/data.pkl", content)
        archive.writestr("ckpt/byteorder", "little")
        archive.writestr("ckpt/version", "3\n")
    return path


def rezip(path: Path, edited: dict[str, bytes | None]) -> Path:
    """Replace entries of an archive, with CRCs that are right again; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            replacement = edited.get(name.partition("/")[2], content)
            if replacement is not None:
                archive.writestr(name, replacement)
    return path


class Calls:
    """Pickles as a call of a function: what makes a pickle a program."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call

    def __call__(self) -> None:
        """Pickle asks of the function that it can be called; it may be the result of a call itself."""


def view(of: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Calls:
    """Unpickles as a tensor of any geometry over another one's storage."""
    storage = of._typed_storage()
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


def plain_pickle(content: object, protocol: int) -> bytes:
    file = io.BytesIO()
    pickle.Pickler(file, protocol).dump(content)
    return file.getvalue()


@contextmanager
def bounded(seconds: float = 60, mebibytes: int = 200) -> Iterator[None]:
    """A block that must end in time and without taking memory."""
    start, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.perf_counter() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < mebibytes * 1024  # kB
