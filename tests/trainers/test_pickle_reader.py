"""Every honest pickle is read: plain values equal pickle's own, and objects are stand-ins beside the weights."""

import argparse
import array
import collections
import datetime
import decimal
import enum
import fractions
import functools
import io
import logging
import os
import pathlib
import pickle
import platform
import random
import re
import string
import sys
import types
import typing
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_model.trainers import archive, read_checkpoint
from hf_model.trainers.pickle_reader import StandIn, StoredTensor, read_pickle
from tests.tiny import gpt

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PLAIN = {
    "a meta": {"vocab_size": 3, "stoi": {"a": 0, "Ж": 1, "🙂": 2}, "itos": {0: "a", 1: "Ж", 2: "🙂"}},
    "numbers": [0, 1, 255, 256, 65535, 65536, -1, 2**31, 2**40, -(2**40), 2**100, 1.5, True, False, None],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "nested": {"a": [{"b": ["c"] * 3}, []], 7: {}},
    "texts": ["", "a" * 300, "\ud800", "tab\t, line\n, backslash\\"],
    "a thousand characters": {chr(number): number for number in range(0x4E00, 0x4E00 + 1000)},
    "an ordered dict": collections.OrderedDict(a=1, b=[2]),
    "one list twice": [["a"]] * 2,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain_data_is_what_pickle_reads(value: object, protocol: int) -> None:
    read, storages = read_pickle(pickle.dumps(value, protocol))
    assert read == value
    assert storages == []
    assert type(value) is not list or repr(read) == repr(value)  # True is not 1


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_bytes_are_what_pickle_reads(protocol: int) -> None:
    value = [b"", b"\x00\xff", bytes(300)]
    assert read_pickle(pickle.dumps(value, protocol))[0] == value


class Colour(enum.Enum):
    RED = "red"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class settings(dict):  # noqa: N801  # people have classes with small letters
    """A dict whose keys are attributes too."""


class Slots:
    __slots__ = ("n_head",)

    def __init__(self) -> None:
        self.n_head = 4


@dataclass
class Config:
    n_head: int = 4
    activation: type = nn.GELU
    kind: typing.Any = typing.Any
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])


class _Private:
    class Config(dict):
        """A class inside a class."""

    class Kind(enum.Enum):
        """Its members are written as Python 3.11.0 to 3.11.3 write them."""

        SMALL = 1

        def __reduce_ex__(self, protocol: int) -> tuple:
            return getattr, (type(self), self.name)


class Node:
    """As OmegaConf pickles a config: a type of the library `typing` in its metadata."""

    def __init__(self) -> None:
        self.__dict__["_metadata"] = {"ref_type": typing.Any, "object_type": dict, "key_type": dict[str, typing.Any]}
        self.__dict__["_content"] = {"n_head": 4}


def tensor_with_attributes() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.note = "mine"  # type: ignore[attr-defined]
    return tensor


HONEST: dict[str, Any] = {
    "a version of torch": torch.__version__,
    "dicts": [collections.defaultdict(list, a=[1]), collections.Counter("aab"), settings(lr=1e-3)],
    "lists": [collections.deque([1, 2], 5), array.array("f", [1.0]), {1, 2}, frozenset("ab"), bytearray(b"x")],
    "dates": [
        datetime.datetime.now(datetime.timezone.utc), datetime.date.today(), datetime.timedelta(hours=3),
        datetime.time(12),
    ],
    "numbers": [decimal.Decimal("0.1"), fractions.Fraction(1, 3), complex(1, 2), uuid.uuid4(), range(3), slice(1)],
    "enum members": [Colour.RED, Rights.READ | Rights.WRITE],
    "paths": [pathlib.Path("out"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("b")],
    "a partial of a class": functools.partial(torch.optim.AdamW, lr=1e-3),
    "classes": [nn.GELU, torch.optim.AdamW, int, str, dict, type(None), ValueError, Config],
    "classes in classes": [_Private.Config, _Private.Config(n_head=4), _Private.Kind.SMALL, {_Private.Kind.SMALL: 1}],
    "objects": [Config(), Slots(), _Private(), Node(), argparse.Namespace(a=1), types.SimpleNamespace(b=2)],
    "types": [typing.Any, typing.Optional[int], dict[str, int], typing.Callable],  # noqa: UP045
    "an exception": RuntimeError("stopped", 3),
    "a pattern": re.compile(r"\w+"),
    "a buffer": io.BytesIO(b"x"),
    "Python's generator": random.getstate(),
    "a random.Random": random.Random(0),
    "NumPy": [
        np.float32(1.5), np.int64(3), np.bool_(True), np.str_("a"), np.datetime64("2024-01-01"), np.arange(4),
        np.array(["a"]), np.array([None, 1], dtype=object), np.dtype("float32"), np.float64,
        np.random.default_rng(0), np.random.RandomState(0), np.random.get_state(), np.ma.array([1], mask=[True]),
        np.rec.array([(1, 2.0)], dtype=[("a", int), ("b", float)]),
    ],
    "torch": [
        torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.device("cpu"), torch.Size([1, 2]), torch.strided,
        torch.get_rng_state(), nn.functional.gelu, torch.Tensor, nn.Parameter(torch.ones(2)),
    ],
    "other tensors": [
        torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr(), torch.ones(2, device="meta"),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.ones(2).to(torch.complex64),
        torch.ones(2).to(torch.float8_e5m2), tensor_with_attributes(), torch.empty(0), torch.ones(2, 2).T,
        torch.quantize_per_channel(torch.ones(4, 4), torch.ones(4), torch.zeros(4), 0, torch.quint4x2),
        torch.ones([1] * 20),
    ],
    "records of the system": [
        Path().stat(), os.terminal_size((80, 24)), os.times(), platform.uname(), re.IGNORECASE, string.Template("$a"),
        logging.LogRecord("train", logging.INFO, "train.py", 1, "loss", (), None),
    ],
    "objects of the training": [torch.amp.GradScaler("cpu"), torch.utils.data.DataLoader([1, 2, 3])],
    "a module": nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.LayerNorm(2)),
    "an optimizer": torch.optim.AdamW(nn.Linear(2, 2).parameters()),
    "a schedule": torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), 5),
    "keys of every kind": {(1, 2): 3, 0.5: 1, 2**40: 2, None: 3, Colour.RED: 4, b"x": 5, frozenset(): 6, "a" * 5000: 7},
    "600,000 losses": [0.5 + number for number in range(600_000)],
}  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:.*sparse csr", "ignore:.*Sparse CSR", "ignore:.*quantize_per_tensor", "ignore:Typed"
)
@pytest.mark.parametrize("how", [{}, {"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}], ids=str)
@pytest.mark.parametrize("value", HONEST.values(), ids=HONEST)
def test_what_honest_people_save_beside_the_weights_is_read(value: object, how: dict, tmp_path: Path) -> None:
    weights = dict(gpt().state_dict())
    torch.save({"beside": value, "model": weights, "model_args": {"n_head": 4}}, tmp_path / "ckpt.pt", **how)
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint.architecture().n_head == 4
    assert list(checkpoint.state_dict) == list(weights)
    assert all(torch.equal(checkpoint.state_dict[name], weight) for name, weight in weights.items())


def test_a_hundred_thousand_log_entries_are_read(tmp_path: Path) -> None:
    log = [{"step": step, "loss": 1.0 / (step + 1), "lr": 1e-3, "time": step * 0.5} for step in range(100_000)]
    torch.save({"log": log, "model": gpt().state_dict(), "model_args": {"n_head": 4}}, tmp_path / "ckpt.pt")
    assert read_checkpoint(tmp_path / "ckpt.pt").architecture().n_head == 4


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_object_keeps_what_was_pickled(protocol: int) -> None:
    read, _ = read_pickle(pickle.dumps([Config(n_head=8), settings(lr=1e-3), Colour.RED, Config], protocol))
    config, items, colour, cls = read
    assert isinstance(config, StandIn) and config.name.endswith(".Config") and config.state["n_head"] == 8
    assert items.content == {"lr": 1e-3}
    if Colour.RED.__reduce_ex__(protocol)[0] is getattr:  # Python 3.11.0 to 3.11.3
        assert colour.name.endswith(".Colour.RED")
    else:
        assert colour.args == ("red",)
    assert cls.name == config.name and cls.state is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_class_in_a_class_has_its_full_name(protocol: int) -> None:
    value = [_Private.Config, _Private.Config(n_head=8), _Private.Kind.SMALL, _Private.Kind.SMALL]
    cls, config, member, again = read_pickle(pickle.dumps(value, protocol))[0]
    assert cls.name == config.name == f"{__name__}._Private.Config"
    assert config.content == {"n_head": 8}
    assert member.name == f"{__name__}._Private.Kind.SMALL" and again is member


def test_a_pickled_module_keeps_its_tensors(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "model.pt")
    module = archive.load(tmp_path / "model.pt").value
    weight = module.state["_parameters"]["weight"]
    assert module.name == "torch.nn.modules.linear.Linear"
    assert isinstance(weight, StoredTensor) and weight.shape == (3, 2)


def test_python_2_s_classes_are_read() -> None:
    old = b"(c__main__\nConfig\no}S'n_head'\nI4\nsb."  # an instance of a class of the old style
    assert read_pickle(old)[0].state == {"n_head": 4}
    assert read_pickle(b"(i__main__\nConfig\n(dS'n_head'\nI4\nsb.")[0].state == {"n_head": 4}
    assert read_pickle(b"ccollections\nOrderedDict\n(((S'a'\nI1\ntltR.")[0] == {"a": 1}


def test_a_state_dict_of_parameters_or_of_another_dict_s_class_is_read(tmp_path: Path) -> None:
    model = gpt()
    for weights in (dict(model.named_parameters()), settings(model.state_dict())):
        torch.save(settings(model=weights, model_args=settings(n_head=4)), tmp_path / "ckpt.pt")
        checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
        assert checkpoint.architecture().n_head == 4
        assert all(torch.equal(checkpoint.state_dict[name], weight) for name, weight in weights.items())


def test_what_torch_loads_safely_is_read(tmp_path: Path) -> None:
    """Every global that `torch.load(weights_only=True)` takes is taken here."""
    from torch._weights_only_unpickler import _get_allowed_globals

    for name in _get_allowed_globals():
        module, _, attribute = name.rpartition(".")
        read, _ = read_pickle(f"c{module}\n{attribute}\n.".encode())
        assert read.name == name


def test_nothing_is_imported_to_judge_a_name() -> None:
    read_pickle(b"cthis_module_does_not_exist\nConfig\n.")
    before = set(sys.modules)
    read_pickle(b"cantigravity_of_theirs.Config\nConfig\n.")
    assert set(sys.modules) == before
