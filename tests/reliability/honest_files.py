"""Honest files, made by the libraries themselves: each is read, or refused with a line that says what to do.

This module imports nothing of the project, so that any version of torch can write the files:

    python tests/reliability/honest_files.py write FOLDER     # in an environment with that version
    python -m tests.reliability.honest_files read FOLDER      # in this project's
"""

import argparse
import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import importlib.util
import io
import ipaddress
import pathlib
import pickle
import random
import re
import sys
import types
import uuid
import warnings
import zoneinfo
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

State = dict[str, torch.Tensor]
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 30, "bias": True, "dropout": 0.0}
WIDTHS = {"attn.c_attn": (24, 8), "attn.c_proj": (8, 8), "mlp.c_fc": (32, 8), "mlp.c_proj": (8, 32)}
FORMS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
PROTOCOLS = (2, 3, 4, 5)

# The remedies, as patterns of the lines that refuse a file.
SAVE_A_STATE_DICT = r"save .*model\.state_dict\(\)"
REFERS_TO_CODE = r"refers to .*(Functions, and classes that can act, are not read|save)"


def shapes() -> dict[str, tuple[int, ...]]:
    C = SIZES["n_embd"]
    found: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (SIZES["vocab_size"], C),
        "transformer.wpe.weight": (SIZES["block_size"], C),
    }
    for layer in range(SIZES["n_layer"]):
        block = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            found |= {f"{block}.{norm}.weight": (C,), f"{block}.{norm}.bias": (C,)}
        for name, shape in WIDTHS.items():
            found |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return found | {
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
        "lm_head.weight": found["transformer.wte.weight"],
    }


def weights(dtype: torch.dtype = torch.float32, tied: bool = False) -> State:
    """Weights that every version of torch computes to the same bits."""
    state: State = {}
    for salt, (name, shape) in enumerate(shapes().items()):
        numbers = (torch.arange(int(np.prod(shape))) * 7919 + salt * 101) % 2003 - 1001
        state[name] = (numbers.to(torch.float32) / 1024).reshape(shape).to(dtype)
    if tied:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


class Honest(NamedTuple):
    """A file, and what is to become of it."""

    name: str
    write: Callable[[Path], object]
    """Takes the path of the file, whose folder is its own."""
    refused: str = ""
    """A pattern of the line that may refuse it, with the remedy. Empty for a file that is read."""
    expected: Callable[[], State] = weights
    needs: str = ""
    """The module of another library that writes it."""
    path: str = "ckpt.pt"


# A model and trainers of the user's own, in a script of his own.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        C = SIZES["n_embd"]
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        V, C, T = SIZES["vocab_size"], SIZES["n_embd"], SIZES["block_size"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, C),
                "wpe": nn.Embedding(T, C),
                "h": nn.ModuleList(Block() for _ in range(SIZES["n_layer"])),
                "ln_f": nn.LayerNorm(C),
            }
        )
        self.lm_head = nn.Linear(C, V, bias=False)
        self.load_state_dict(weights())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.transformer["ln_f"](self.transformer["wte"](ids)))


@dataclasses.dataclass
class TrainConfig:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    out: Path = Path("out")


@dataclasses.dataclass(frozen=True)
class FrozenConfig:
    steps: int = 3


@dataclasses.dataclass
class SlotsConfig:
    __slots__ = ("steps",)
    steps: int


class PlainConfig:
    def __init__(self) -> None:
        self.steps = 3


class AttributeDict(dict):
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class Metrics(NamedTuple):
    loss: float
    accuracy: float


class Phase(enum.Enum):
    PRETRAIN = "pretrain"


class Level(enum.IntEnum):
    HIGH = 2


class Options(enum.Flag):
    FAST = enum.auto()
    SAFE = enum.auto()


class TrainingError(Exception):
    pass


def schedule(step: int) -> float:
    return 1.0 / (1 + step)


# Values that stand beside the weights


def stepped(make: Callable[..., Any], **options: Any) -> tuple[Any, nn.Module]:
    """An optimizer after one step, and its model."""
    model = nn.Linear(4, 4)
    optimizer = make(model.parameters(), **options)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step(lambda: model(torch.ones(1, 4)).sum())
    return optimizer, model


def optimizers() -> dict[str, Callable[[], Any]]:
    """The states of all optimizers that this torch has."""
    kinds: dict[str, dict[str, Any]] = {
        "AdamW": {},
        "Adam": {"amsgrad": True},
        "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        "Adafactor": {},
        "Adagrad": {},
        "Adadelta": {},
        "Adamax": {},
        "NAdam": {},
        "RAdam": {},
        "RMSprop": {"momentum": 0.5, "centered": True},
        "Rprop": {},
        "ASGD": {},
        "LBFGS": {},
    }
    found: dict[str, Callable[[], Any]] = {}
    for name, options in kinds.items():
        if make := getattr(torch.optim, name, None):
            found[name] = lambda make=make, options=options: stepped(make, **options)[0].state_dict()
    found["AdamW, foreach"] = lambda: stepped(torch.optim.AdamW, foreach=True)[0].state_dict()
    found["AdamW, capturable"] = lambda: stepped(torch.optim.AdamW, lr=torch.tensor(1e-3))[0].state_dict()
    found["AdamW, two groups"] = lambda: torch.optim.AdamW(
        [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.1}, {"params": [nn.Parameter(torch.ones(2))]}]
    ).state_dict()
    if torch.__version__ >= "2.4":
        found["AdamW, fused"] = lambda: stepped(torch.optim.AdamW, fused=True)[0].state_dict()
    found["a whole optimizer"] = lambda: stepped(torch.optim.AdamW)[0]
    return found


def schedulers() -> dict[str, Callable[[], Any]]:
    kinds = torch.optim.lr_scheduler

    def state(make: Callable[[Any], Any]) -> Callable[[], Any]:
        return lambda: make(stepped(torch.optim.SGD, lr=0.1, momentum=0.9)[0]).state_dict()

    return {
        "StepLR": state(lambda o: kinds.StepLR(o, 3)),
        "LambdaLR of a function": state(lambda o: kinds.LambdaLR(o, schedule)),
        "LambdaLR of an object": state(lambda o: kinds.LambdaLR(o, functools.partial(schedule))),
        "CosineAnnealingLR": state(lambda o: kinds.CosineAnnealingLR(o, 10)),
        "CosineAnnealingWarmRestarts": state(lambda o: kinds.CosineAnnealingWarmRestarts(o, 10)),
        "LinearLR": state(lambda o: kinds.LinearLR(o)),
        "SequentialLR": state(
            lambda o: kinds.SequentialLR(o, [kinds.LinearLR(o), kinds.CosineAnnealingLR(o, 10)], milestones=[5])
        ),
        "ReduceLROnPlateau": state(lambda o: kinds.ReduceLROnPlateau(o)),
        "MultiStepLR": state(lambda o: kinds.MultiStepLR(o, [1, 2])),
        "ExponentialLR": state(lambda o: kinds.ExponentialLR(o, 0.9)),
        "PolynomialLR": state(lambda o: kinds.PolynomialLR(o)),
    }


def random_states() -> dict[str, Callable[[], Any]]:
    return {
        "torch's": torch.get_rng_state,
        "one of each GPU": lambda: [torch.get_rng_state(), torch.get_rng_state()],
        "numpy's": np.random.get_state,
        "numpy's generator": lambda: np.random.default_rng(1).bit_generator.state,
        "numpy's RandomState": lambda: np.random.RandomState(1),
        "python's": random.getstate,
        "all": lambda: {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()},
        "a torch.Generator's": lambda: torch.Generator().get_state(),
    }


VALUES: dict[str, Callable[[], Any]] = {
    "Namespace": lambda: argparse.Namespace(lr=1e-3, out=Path("out")),
    "SimpleNamespace": lambda: types.SimpleNamespace(lr=1e-3),
    "a dataclass": TrainConfig,
    "a frozen dataclass": FrozenConfig,
    "a dataclass with slots": lambda: SlotsConfig(3),
    "an object": PlainConfig,
    "a dict with attributes": lambda: AttributeDict(lr=1e-3, nested=AttributeDict(x=1)),
    "NamedTuple": lambda: Metrics(0.5, 0.9),
    "Enum": lambda: Phase.PRETRAIN,
    "IntEnum": lambda: Level.HIGH,
    "Flag": lambda: Options.FAST | Options.SAFE,
    "Path": lambda: Path("out") / "ckpt.pt",
    "PurePath": lambda: pathlib.PurePosixPath("out"),
    "WindowsPath": lambda: pathlib.PureWindowsPath("C:/out"),
    "datetime": lambda: datetime.datetime(2024, 1, 2, 3, 4, 5),
    "datetime with a zone": lambda: datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
    "ZoneInfo": lambda: zoneinfo.ZoneInfo("UTC"),
    "date and time": lambda: [datetime.date(2024, 1, 2), datetime.time(3, 4), datetime.timedelta(seconds=5)],
    "UUID": lambda: uuid.UUID(int=5),
    "partial of a class": lambda: functools.partial(dict, a=1),
    "torch.Size": lambda: torch.Size([2, 3]),
    "torch.device": lambda: torch.device("cuda", 0),
    "torch.dtype": lambda: [torch.float32, torch.bfloat16, torch.float64, torch.int64],
    "torch.layout and memory format": lambda: [torch.strided, torch.sparse_coo],
    "TorchVersion": lambda: torch.__version__,
    "deque": lambda: collections.deque([1.5, 2.5], maxlen=10),
    "Counter": lambda: collections.Counter("hello"),
    "defaultdict": lambda: collections.defaultdict(list, losses=[1.0]),
    "OrderedDict": lambda: collections.OrderedDict(a=1, b=collections.OrderedDict(c=2)),
    "ChainMap": lambda: collections.ChainMap({"a": 1}, {"b": 2}),
    "UserDict": lambda: collections.UserDict(a=1),
    "set and frozenset": lambda: [{1, 2}, frozenset({"a"}), set(), frozenset()],
    "complex": lambda: 1 + 2j,
    "bytes": lambda: [b"", b"\x00\xff", bytearray(b"abc")],
    "Decimal": lambda: decimal.Decimal("1.5"),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "range and slice": lambda: [range(3), slice(1, 2)],
    "Ellipsis and NotImplemented": lambda: [..., NotImplemented],
    "classes": lambda: [int, str, dict, collections.OrderedDict, PlainConfig],
    "None's type": lambda: type(None),
    "numbers": lambda: [0, -1, 2**31, -(2**63), 2**200, 1e300, float("inf"), float("nan"), True, None],
    "texts": lambda: ["", "漢字 🙂", "a\nb", "\ud800", "x" * 100_000],
    "keys of every kind": lambda: {1: 1, "a": 2, None: 3, False: 4, (1, "b"): 5, 1.5: 6, b"c": 7, Phase.PRETRAIN: 8},
    "a list of itself": lambda: (lambda items: items.append(items) or items)([1]),
    "600,000 losses": lambda: [float(i) for i in range(600_000)],
    "100,000 log entries": lambda: [{"step": i, "loss": 1.5} for i in range(100_000)],
    "regular expression": lambda: re.compile("a+"),
    "address": lambda: ipaddress.ip_address("127.0.0.1"),
    "array": lambda: array.array("d", [1.0, 2.0]),
    "exception": lambda: [ValueError("x"), TrainingError("y"), OSError(2, "No such file")],
    "generic alias": lambda: [list[int], dict[str, int]],
    "BytesIO": lambda: io.BytesIO(b"abc"),
    "numpy scalars": lambda: [
        np.float64(1.5),
        np.float32(1.5),
        np.float16(1.5),
        np.int64(3),
        np.bool_(True),
        np.uint8(1),
    ],
    "numpy text": lambda: [np.str_("a"), np.bytes_(b"a")],
    "numpy times": lambda: [np.datetime64("2024-01-02"), np.timedelta64(3, "s")],
    "numpy arrays": lambda: [np.arange(4), np.ones((2, 2), order="F"), np.zeros(0), np.array(1.5)],
    "numpy array of objects": lambda: np.array([{"a": 1}, None], dtype=object),
    "numpy array of records": lambda: np.zeros(2, dtype=[("a", "f4"), ("b", "i8")]),
    "numpy dtypes": lambda: [np.dtype("float32"), np.dtype(">i4"), np.float32],
    "masked array": lambda: np.ma.masked_array([1.0, 2.0], mask=[True, False]),
    "tensors of every dtype": lambda: [
        torch.ones(2, dtype=getattr(torch, name))
        for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float64", "complex64")
    ],
    "empty and 0-d tensors": lambda: [torch.zeros(0), torch.tensor(1.5), torch.zeros(2, 0, 3)],
    "sparse tensor": lambda: torch.eye(3).to_sparse(),
    "CSR tensor": lambda: torch.eye(3).to_sparse_csr(),
    "quantized tensor": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta tensor": lambda: torch.empty(3, device="meta"),
    "views of one tensor": lambda: (lambda t: [t[0], t[:, 1], t.t(), t.expand(2, 3, 3)])(torch.ones(3, 3)),
    "parameter and gradient": lambda: [nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)],
    "a conjugate": lambda: torch.tensor([1 + 1j]).conj(),
    "a storage": lambda: torch.ones(3).untyped_storage() if hasattr(torch.Tensor, "untyped_storage") else None,
    "modules": lambda: [nn.GELU(), nn.Linear(2, 2), nn.Sequential(nn.ReLU())],
    "classes of modules": lambda: [nn.GELU, nn.Linear, torch.optim.AdamW],
    "functions of torch": lambda: [torch.nn.functional.gelu, torch.nn.functional.relu],
    "loss": lambda: nn.CrossEntropyLoss(),
}
REFUSED_VALUES: dict[str, Callable[[], Any]] = {
    "a function of one's own": lambda: schedule,
    "partial of a function": lambda: functools.partial(schedule, 3),
    "builtin function": lambda: len,
    "method": lambda: AttributeDict(a=1).update,
    "NumPy function": lambda: np.exp,
    "math": lambda: torch.tanh,
}


def save(path: Path, content: Any, **how: Any) -> None:
    torch.save(content, path, **how)


def nanogpt(**beside: Any) -> dict[str, Any]:
    return {"model": weights(), "model_args": dict(SIZES), "iter_num": 5, "best_val_loss": torch.tensor(1.5), **beside}


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: value.numpy() for name, value in weights().items()})
    return file.getvalue()


def forms() -> Iterator[Honest]:
    """The weights in every form and protocol, under every key."""
    for form, how in FORMS.items():
        for protocol in PROTOCOLS:
            for key in ("model_state_dict", "model", "state_dict"):
                content = {key: weights(), "model_args": dict(SIZES), "iter_num": 1}
                yield Honest(
                    f"{key}, {form}, protocol {protocol}",
                    lambda path, content=content, how=how, protocol=protocol: save(
                        path, content, pickle_protocol=protocol, **how
                    ),
                )
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            content = nanogpt() | {"model": weights(dtype)}
            yield Honest(
                f"{dtype}, {form}",
                lambda path, content=content, how=how: save(path, content, **how),
                expected=functools.partial(weights, dtype),
            )
        mixed = weights(torch.bfloat16) | {name: value for name, value in weights().items() if ".ln_" in name}
        yield Honest(
            f"norms in float32, the rest in bfloat16, {form}",
            lambda path, mixed=mixed, how=how: save(path, nanogpt() | {"model": mixed}, **how),
            expected=lambda mixed=mixed: mixed,
        )
        tied = functools.partial(weights, tied=True)
        yield Honest(
            f"tied, {form}",
            lambda path, how=how: save(path, nanogpt() | {"model": weights(tied=True)}, **how),
            expected=tied,
        )
        copied = {name: value.clone() for name, value in tied().items()}
        yield Honest(
            f"tied, as copies, {form}",
            lambda path, copied=copied, how=how: save(path, nanogpt() | {"model": copied}, **how),
            expected=tied,
        )
    no_head = {name: value for name, value in tied().items() if name != "lm_head.weight"}
    yield Honest(
        "tied, without a head", lambda path: save(path, nanogpt() | {"model": no_head}), expected=lambda: no_head
    )
    no_biases = {name: value for name, value in weights().items() if not name.endswith(".bias")}
    yield Honest(
        "without biases",
        lambda path: save(path, nanogpt() | {"model": no_biases, "model_args": SIZES | {"bias": False}}),
        expected=lambda: no_biases,
    )


def wrapped() -> Iterator[Honest]:
    """State dicts of wrapped models, with buffers, and of other classes."""
    prefixes = ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "_orig_mod._orig_mod.")
    for prefix in prefixes:
        state = {prefix + name: value for name, value in weights().items()}
        yield Honest(f"prefix {prefix}", lambda path, state=state: save(path, nanogpt() | {"model": state}))
    blocks = {name.replace("transformer.h.0.", "transformer.h.0._orig_mod."): v for name, v in weights().items()}
    yield Honest("a block compiled by itself", lambda path: save(path, nanogpt() | {"model": blocks}))
    yield Honest("a state dict of DataParallel", lambda path: save(path, nn.DataParallel(GPT()).state_dict()))
    yield Honest("a bare state dict", lambda path: save(path, weights()))
    yield Honest("a bare state dict, legacy", lambda path: save(path, weights(), **FORMS["legacy"]))
    yield Honest("a module's own state dict", lambda path: save(path, nanogpt() | {"model": GPT().state_dict()}))
    yield Honest("parameters", lambda path: save(path, nanogpt() | {"model": dict(GPT().named_parameters())}))
    yield Honest("state of one's own dict", lambda path: save(path, nanogpt() | {"model": AttributeDict(weights())}))
    yield Honest("OrderedDict", lambda path: save(path, collections.OrderedDict(nanogpt())))
    yield Honest("defaultdict", lambda path: save(path, collections.defaultdict(list, nanogpt())))
    transposed = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in weights().items()}
    yield Honest("transposed in memory", lambda path: save(path, nanogpt() | {"model": transposed}))
    flat = torch.cat([value.reshape(-1) for value in weights().values()])
    sizes = [value.numel() for value in weights().values()]
    views = dict(
        zip(
            weights(),
            (f.reshape(w.shape) for f, w in zip(flat.split(sizes), weights().values(), strict=True)),
            strict=True,
        )
    )
    yield Honest("views of one flat tensor, as FSDP has them", lambda path: save(path, nanogpt() | {"model": views}))
    mask = torch.ones(16, 16).tril()
    buffers = {
        "bias": mask[None, None],
        "mask": mask.bool(),
        "tril": mask,
        "causal_mask": ~mask.bool(),
        "masked_bias": torch.tensor(-1e4),
        "added_mask": torch.full((16, 16), float("-inf")).triu(1),
    }
    for name, buffer in buffers.items():
        masks = {f"transformer.h.{layer}.attn.{name}": buffer.clone() for layer in range(2)}
        yield Honest(
            f"causal masks called {name}",
            lambda path, masks=masks: save(path, nanogpt() | {"model": weights() | masks}),
        )
    window = mask - mask.tril(-4)
    local = {f"transformer.h.{layer}.attn.bias": window[None, None].clone() for layer in range(2)}
    yield Honest(
        "masks of a sliding window",
        lambda path: save(path, nanogpt() | {"model": weights() | local}),
        "no place for: .*--model",
    )
    yield Honest(
        "an averaged model",
        lambda path: save(path, nanogpt() | {"model": torch.optim.swa_utils.AveragedModel(GPT()).state_dict()}),
    )


def beside() -> Iterator[Honest]:
    """Every kind of value that people save beside the weights, in the form that each protocol gives it."""
    kinds = {
        "optimizer": optimizers(),
        "scheduler": schedulers(),
        "random state": random_states(),
        "value": VALUES,
        "scaler": {"GradScaler": lambda: torch.cuda.amp.GradScaler(enabled=False).state_dict()},
    }
    for kind, makers in kinds.items():
        for name, make in makers.items():
            for protocol in (2, 5) if kind == "value" else (2,):
                yield Honest(
                    f"{kind}, {name}, protocol {protocol}",
                    lambda path, make=make, kind=kind, protocol=protocol: save(
                        path, nanogpt(**{kind: make()}), pickle_protocol=protocol
                    ),
                )
    for name, make in REFUSED_VALUES.items():
        yield Honest(f"value, {name}", lambda path, make=make: save(path, nanogpt(value=make())), REFERS_TO_CODE)


def other_kinds() -> Iterator[Honest]:
    """Files that hold something other than a state dict, or are no checkpoints."""
    yield Honest("a list of weights", lambda path: save(path, list(weights().values())), SAVE_A_STATE_DICT)
    yield Honest("a tensor", lambda path: save(path, torch.ones(3)), SAVE_A_STATE_DICT)
    yield Honest("TorchScript", lambda path: torch.jit.script(nn.Linear(2, 2)).save(str(path)), r"torch\.jit\.load")
    optimizer = torch.optim.AdamW(GPT().parameters()).state_dict()
    yield Honest("an optimizer alone", lambda path: save(path, optimizer), "give the file of the model")
    yield Honest(
        "an optimizer in a dict", lambda path: save(path, {"optimizer": optimizer}), "give the file of the model"
    )
    yield Honest("weights under another key", lambda path: save(path, {"net": weights()}))
    yield Honest("a whole model", lambda path: save(path, GPT()))
    yield Honest("a whole model in a dict", lambda path: save(path, nanogpt() | {"model": GPT()}))
    yield Honest("a whole model, legacy", lambda path: save(path, GPT(), **FORMS["legacy"]))
    yield Honest("a whole model in a plain pickle", lambda path: path.write_bytes(pickle.dumps(GPT())))
    yield Honest("no weights", lambda path: save(path, {"a": 1}), SAVE_A_STATE_DICT)
    yield Honest("a plain pickle", lambda path: path.write_bytes(pickle.dumps({"a": 1})), SAVE_A_STATE_DICT)
    yield Honest(
        "NumPy's arrays",
        lambda path: path.write_bytes(npz()),
        r"torch\.save",
    )
    half = {name: value.to_sparse() if name == "lm_head.weight" else value for name, value in weights().items()}
    yield Honest("a sparse weight", lambda path: save(path, nanogpt() | {"model": half}), "save a dense one")
    meta = {name: value.to("meta") for name, value in weights().items()}
    yield Honest("weights without values", lambda path: save(path, nanogpt() | {"model": meta}), "save")
    whole = {name: value.to(torch.int8) for name, value in weights().items()}
    yield Honest(
        "weights of 8 bits", lambda path: save(path, nanogpt() | {"model": whole}), "not a dense floating-point tensor"
    )


def lightning() -> Iterator[Honest]:
    """A checkpoint of Lightning's Trainer, whose module holds the GPT as `model`."""

    def write(path: Path) -> None:
        import lightning
        from torch.utils.data import DataLoader

        class Lit(lightning.LightningModule):
            def __init__(self, lr: float = 1e-3) -> None:
                super().__init__()
                self.save_hyperparameters()
                self.model = GPT()

            def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
                return self.model(batch).float().mean() * 0

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.0)

        trainer = lightning.Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=str(path.parent),
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Lit(), DataLoader(torch.zeros(2, 4, dtype=torch.int64)))
        trainer.save_checkpoint(path)

    yield Honest("Lightning", write, needs="lightning")


def accelerate_folders() -> Iterator[Honest]:
    def written(path: Path, whole: bool, safe: bool) -> None:
        import accelerate

        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = GPT(), None
        optimizer = torch.optim.AdamW(model.parameters())
        model, optimizer = accelerator.prepare(model, optimizer)
        if whole:
            accelerator.save_model(model, str(path.parent), safe_serialization=safe)
        else:
            accelerator.save_state(str(path.parent), safe_serialization=safe)

    for whole in (True, False):
        for safe, name in ((True, "model.safetensors"), (False, "pytorch_model.bin")):
            kind = "save_model" if whole else "save_state"
            yield Honest(
                f"accelerate's {kind}, {name}",
                functools.partial(written, whole=whole, safe=safe),
                needs="accelerate",
                path=name,
            )


def omegaconf() -> Iterator[Honest]:
    def write(path: Path, container: bool) -> None:
        from omegaconf import OmegaConf

        config = OmegaConf.create({"lr": 1e-3, "betas": [0.9, 0.95], "out": "${lr}", "nested": {"a": None}})
        save(path, nanogpt(hparams=OmegaConf.to_container(config) if container else config))

    for container in (False, True):
        name = "an OmegaConf container" if container else "an OmegaConf config"
        yield Honest(name, functools.partial(write, container=container), needs="omegaconf")


def deepspeed() -> Iterator[Honest]:
    """DeepSpeed's layout, as its documentation has it."""
    content = {
        "module": weights(),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [collections.OrderedDict((name, value.shape) for name, value in weights().items())],
        "dtype": torch.bfloat16,
        "ds_version": "0.16.0",
        "global_steps": 5,
    }
    yield Honest("DeepSpeed's module", lambda path: save(path, content), path="mp_rank_00_model_states.pt")


def safetensors_files() -> Iterator[Honest]:
    def write(path: Path) -> None:
        from safetensors.torch import save_file

        save_file(weights(), path)

    yield Honest("safetensors", write, needs="safetensors", path="model.safetensors")


SOURCES = (forms, wrapped, beside, other_kinds, lightning, accelerate_folders, omegaconf, deepspeed, safetensors_files)


def honest_files() -> list[Honest]:
    return [honest for source in SOURCES for honest in source()]


def is_here(module: str) -> bool:
    return not module or importlib.util.find_spec(module) is not None


def outcome(path: Path, honest: Honest) -> str:
    """What becomes of a file: "read", the line that refuses it, or what is wrong."""
    from hf_model.errors import UserError
    from hf_model.trainers import read_checkpoint

    try:
        checkpoint = read_checkpoint(path)
        checkpoint.architecture(n_head=SIZES["n_head"])
    except UserError as error:
        return str(error)
    state, expected = checkpoint.state_dict, honest.expected()
    same = expected.keys() == state.keys() and all(
        state[name].dtype == value.dtype and torch.equal(state[name], value) for name, value in expected.items()
    )
    return "read" if same else f"wrong weights: {sorted(expected.keys() ^ state.keys())}"


def is_as_told(honest: Honest, said: str) -> bool:
    """Whether the outcome is right. A file that refers to code must be refused; of others, more may be read one day."""
    if said == "read":
        return honest.refused != REFERS_TO_CODE
    return bool(honest.refused) and re.search(honest.refused, said) is not None


def main(action: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    for honest in honest_files():
        path = folder / re.sub(r"\W+", "_", honest.name) / honest.path
        if action == "write" and is_here(honest.needs):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                honest.write(path)
            except Exception as error:  # an older torch has not every kind
                print(f"not written: {honest.name} ({type(error).__name__}: {str(error)[:80]})")
        elif action == "read" and path.exists():
            said = outcome(path, honest)
            is_right = is_as_told(honest, said)
            counts["read" if said == "read" else "refused", is_right] += 1
            if not is_right or said != "read":
                print(f"{'as told' if is_right else 'NOT AS TOLD'}  {honest.name}: {said.removeprefix(f'{path}: ')}")
    print(torch.__version__, dict(counts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
