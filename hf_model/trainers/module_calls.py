"""Run a module of any class, and record each tensor that its operators return."""

import inspect
import itertools
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_model.errors import one_line

B = 2  # rows of tokens
SAMPLE = 512  # values of a recorded tensor that are compared first
BLOCK = 2**20 + 7  # random values that are drawn; a prime, so that no two rows of a larger tensor are equal
CONTAINERS = (list, dict, set, OrderedDict)
CLOSE = 3e-5  # relative error (root mean square) of two float32 results that differ by rounding only
NEEDED = "give a module whose forward takes token ids (B, T) and returns logits (B, T, V)"
OUT_OF_LINE = "a layer whose result is not used, or something added between layers"
# The operators of a product, and the place of its first factor among the arguments.
PRODUCTS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
}
# A value made from token ids (B, T) and a mask (T, T) that is True for the future.
Value = Callable[[Tensor, Tensor], Any]
# What an argument of `forward` may get by its name. The first pattern that fits counts; its values are tried in turn.
ARGUMENTS: Mapping[str, tuple[Value, ...]] = {
    r"(\w+_)?(target|label)s?|tgt|[yY]b?": (lambda ids, future: ids,),
    r"start_pos(ition)?|((pos|position)_)?offset": (lambda ids, future: 0,),
    r"((input|token)_)?pos(ition)?s?(_ids?)?": (
        lambda ids, future: torch.arange(ids.shape[1], device=ids.device).expand_as(ids),
    ),
    r"(\w+_)?pad(ding)?(_mask)?": (  # 1 for padding, or for tokens
        lambda ids, future: torch.zeros_like(ids, dtype=torch.bool),
        lambda ids, future: torch.ones_like(ids),
        lambda ids, future: torch.ones_like(ids, dtype=torch.bool),
    ),
    r"(\w+_)?mask|m|causal|tril": (  # 1 for tokens, or a causal mask
        lambda ids, future: torch.ones_like(ids),
        lambda ids, future: torch.ones_like(ids, dtype=torch.bool),
        lambda ids, future: _added(future),
        lambda ids, future: future,
        lambda ids, future: ~future,
    ),
}
# A way to call a module, with the same two.
Call = Callable[[nn.Module, Tensor, Tensor], Any]


def _added(future: Tensor) -> Tensor:
    """The mask that is added to the scores."""
    return torch.zeros_like(future, dtype=torch.float32).masked_fill(future, -math.inf)


def mask_argument(module: nn.Module) -> str:
    """The argument of a module's `forward` that may be a causal mask, by its name."""
    names = (one.name for one in _arguments(module))
    return next((name for name in names if "mask" in name and "pad" not in name), "")


WITHOUT_MASK: tuple[Call, ...] = (  # the usual ones first
    lambda module, ids, future: module(ids),
    lambda module, ids, future: module(ids, targets=ids),
    lambda module, ids, future: module(ids, labels=ids),
)
IN_PLACE: tuple[Call, ...] = (
    lambda module, ids, future: module(ids, ids),
    lambda module, ids, future: module(ids, _added(future)),
    lambda module, ids, future: module(ids, future),
    lambda module, ids, future: module(ids, ~future),
    lambda module, ids, future: module(ids, ~future[None]),
)


def _by_name(module: nn.Module) -> Iterator[Call]:
    """Calls with all arguments that a module's `forward` needs: token ids, then what the others' names stand for."""
    needed = _needed_arguments(module)
    values: dict[str, tuple[Value, ...]] = {name: (lambda ids, future: ids,) for name in needed[:1]}
    for name in needed[1:]:
        values[name] = next(found for form, found in ARGUMENTS.items() if re.fullmatch(form, name))
    for chosen in itertools.product(*values.values()):
        yield partial(_call_with, dict(zip(values, chosen, strict=True)))


def _call_with(arguments: Mapping[str, Value], module: nn.Module, ids: Tensor, future: Tensor) -> Any:
    return module(**{name: value(ids, future) for name, value in arguments.items()})


def unknown_arguments(module: nn.Module) -> list[str]:
    """The arguments that a module's `forward` needs beside its first one, and of which no name in `ARGUMENTS` tells."""
    others = _needed_arguments(module)[1:]
    return [name for name in others if not any(re.fullmatch(form, name) for form in ARGUMENTS)]


def _needed_arguments(module: nn.Module) -> list[str]:
    """The name of `forward`'s first argument, and of the others that have no default."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = _arguments(module)
    needed = [one for one in arguments[1:] if one.default is one.empty and one.kind not in several]
    return [one.name for one in (*arguments[:1], *needed)]


def _arguments(module: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # no Python function
        return []


class NoReadingError(Exception):
    """No form fits at one step; the message names the step and how far the nearest form is off."""


@contextmanager
def exact(device: str) -> Iterator[None]:
    """Run a block without gradients, and compute float32 as such: without autocast or TF32."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run a block with a module in evaluation mode, and leave all as it was.

    Restored are the modes, attributes and buffers of the module and its parts, and the random state. An attribute that
    is a list, a dict or a set gets its items back.
    """
    parts = [(part, dict(vars(part))) for part in module.modules()]
    held = [value for _, attributes in parts for value in attributes.values() if type(value) in CONTAINERS]
    items = [(container, container.copy()) for container in held]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    cuda = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    device = next(module.parameters()).device.type
    with exact(device), torch.random.fork_rng(devices=list(cuda)), torch.compiler.set_stance("force_eager"):
        try:
            module.eval()
            yield
        finally:
            for part, attributes in parts:
                vars(part).clear()
                vars(part).update(attributes)
            for container, own in items:
                container.clear()
                container.extend(own) if isinstance(container, list) else container.update(own)
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def exchanged(module: nn.Module, new: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module use `new` of each floating-point parameter and buffer; put its own tensors back after the block."""
    own = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    try:
        for tensor, _ in own:
            tensor.data = new(tensor)
        yield
    finally:
        for tensor, data in own:
            tensor.data = data


def random_weights(std: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Random values in place of a parameter's: matrices of this standard deviation, vectors of 0.5 around 0.5.

    Which form a module computes does not depend on its weights. An untrained model's weights hide the form: a bias of
    zeros, gains of one and attention that is almost even make several forms give the same result. Parameters of one
    element keep their value: a factor is read as a number, which becomes part of a matrix.
    """
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(BLOCK, generator=generator, device="cpu", dtype=torch.float32)

    def random(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) or tensor.numel() == 1:
            return tensor.data.to(dtype)
        rolled = block.roll(int(torch.randint(BLOCK, (), generator=generator, device="cpu")))
        values = torch.empty(tensor.shape, device="cpu", dtype=torch.float32)
        for part in values.view(-1).split(BLOCK):
            part.copy_(rolled[: len(part)])
        values.mul_(std) if tensor.ndim > 1 else values.mul_(0.5).add_(0.5)
        return values.to(tensor.device, dtype)

    return random


def find_calls(module: nn.Module, ids: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Ways to get logits from a module: functions of ids (B, T) to logits (B, T, V), the usual ones first.

    The module may return a tensor, a tuple or list that holds one, a dict or an object with `logits`; of shape
    (B, T, V), (B, V, T) or (B T, V). The shape that fits `ids` is expected for all other lengths. If the module gives
    the last position only, it is called with targets too. If it gives no more then, the function's logits have the
    shape (B, 1, V). It may need a mask or positions, and take ids of shape (T, B).

    Args:
        ids: to try it with, (B, 2): no vocabulary is that small.

    Raises:
        NoReadingError: the module does not run on token ids, or returns no logits.
    """
    if others := unknown_arguments(module):
        raise NoReadingError(f"its forward needs {' and '.join(others)} too, which may change what it computes")
    last: Tensor | None = None
    only_last: Callable[[Tensor], Tensor] | None = None
    failure: NoReadingError | None = None
    calls = (*WITHOUT_MASK, *_by_name(module), *IN_PLACE)
    n_found = 0
    for positions_first in (False, True):
        for call, vocabulary_second in itertools.product(calls, (False, True)):
            logits_of = logits_by(call, module, positions_first, vocabulary_second)
            try:
                logits = logits_of(ids)
            except NoReadingError as error:
                failure = failure or error
                continue
            if logits.shape[1] != ids.shape[1]:
                if last is None:
                    last, only_last = logits, logits_of
            elif last is None or torch.allclose(logits[:, -1:], last, rtol=1e-3, atol=1e-4, equal_nan=True):
                n_found += 1
                yield logits_of
                if call is calls[0]:
                    break
        if only_last is not None:
            if not n_found:
                yield only_last
            return
    if not n_found:
        assert failure is not None
        raise failure


def logits_by(
    call: Call, module: nn.Module, positions_first: bool, vocabulary_second: bool
) -> Callable[[Tensor], Tensor]:
    def logits(ids: Tensor) -> Tensor:
        rows, length = ids.shape
        future = torch.ones((length, length), dtype=torch.bool, device=ids.device).triu(1)
        try:
            output = call(module, ids.t() if positions_first else ids, future)
        except Exception as error:  # the user's code may fail in any way
            said = one_line(error, 200)
            raise NoReadingError(f"it does not run on token ids of shape {tuple(ids.shape)} ({said})") from None
        if positions_first:
            return _logits(output, length, rows, vocabulary_second).transpose(0, 1)
        return _logits(output, rows, length, vocabulary_second)

    return logits


def _logits(output: Any, rows: int, length: int, vocabulary_second: bool) -> Tensor:
    for name in ("logits", "lm_logits"):
        if isinstance(output, Mapping) and name in output:
            output = output[name]
        elif isinstance(getattr(output, name, None), Tensor):
            output = getattr(output, name)
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        output = next((part for part in output if isinstance(part, Tensor) and part.ndim >= 2), None)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise NoReadingError(f"it returns {type(output).__name__}, not logits")
    shape = tuple(output.shape)
    if output.ndim == 2:
        output = output.view(rows, -1, output.shape[-1])
    if vocabulary_second and output.ndim == 3:
        output = output.transpose(1, 2)  # (B, V, T), as torch's cross-entropy takes them
    if output.ndim != 3 or output.shape[0] != rows or output.shape[1] not in (1, length):
        raise NoReadingError(f"it returns shape {shape} for {rows} rows of {length} tokens")
    return output


class NoFastPath(TorchFunctionMode):
    """Any function mode keeps PyTorch's Transformer modules from computing a whole layer in one operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Keeps a copy of each tensor that an operator returns and that has values for each token.

    It also notes the norms' epsilons and the embedding.

    Args:
        ids: what the module is run on, (B, L).
        most: how many tensors to keep at most.
        width: D of the tensors (B, L, D) to keep; None for any.
        dtype: what they are converted to.
    """

    def __init__(
        self, ids: Tensor, most: int | None = None, width: int | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.ids, self.most, self.width, self.dtype = ids, most, width, dtype
        self.values: list[Tensor] = []
        """Of shape (B, L, D)."""
        self.epsilons: list[float] = []
        self.embedding: Tensor | None = None
        """The matrix (V, C) that the token ids look up, or that their one-hot vectors are multiplied by."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_layer_norm.default:
            self.epsilons.append(args[4])
        if func is torch.ops.aten.embedding.default and self.embedding is None:
            self._look_up(args[0], args[1])
        if func is torch.ops.aten.index.Tensor and self.embedding is None and args[0].ndim == 2:
            self._look_up(args[0], args[1][0])
        if func in PRODUCTS and self.embedding is None:
            rows, matrix = args[PRODUCTS[func] :][:2]
            if self._is_one_hot(rows.flatten(0, -2)):
                self.embedding = matrix if matrix.ndim == 2 else matrix[0]
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, Tensor) and value.is_floating_point() and len(self.values) != self.most:
                rows = as_rows(value.detach(), self.ids.shape[1])
                if rows is not None and self.width in (None, rows.shape[2]):
                    self.values.append(rows.to("cpu", self.dtype, copy=True))
        return output

    def _look_up(self, matrix: Tensor, index: Tensor | None) -> None:
        if index is not None and any(torch.equal(index, ids) for ids in (self.ids, self.ids.t())):
            self.embedding = matrix

    def _is_one_hot(self, rows: Tensor) -> bool:
        """Whether (B L, V) rows are the token ids as one-hot vectors."""
        if len(rows) != self.ids.numel() or int(self.ids.max()) >= rows.shape[1]:
            return False
        return torch.equal(rows, nn.functional.one_hot(self.ids.flatten(), rows.shape[1]).to(rows.dtype))


class Pool:
    """The recorded tensors in the form (B, L, D), and the search for the one that is nearest to a computed one."""

    def __init__(self, values: Iterable[Tensor], length: int):
        self.forms: dict[int, list[Tensor]] = {}
        for value in values:
            self.forms.setdefault(value.shape[2], []).append(value)
        generator = torch.Generator().manual_seed(0)
        self.places = {
            width: torch.randperm(B * length * width, generator=generator, device="cpu")[:SAMPLE]
            for width in self.forms
        }
        self.samples = {
            width: torch.stack([form.reshape(-1)[self.places[width]] for form in forms])
            for width, forms in self.forms.items()
        }

    def nearest(self, computed: Tensor) -> Tensor:
        """The recorded tensor that is nearest to `computed` (B, L, D), of the same width."""
        width = computed.shape[2]
        wanted = computed.reshape(-1)[self.places[width]]
        errors = (self.samples[width] - wanted).square().mean(dim=1).nan_to_num(math.inf)
        return self.forms[width][int(errors.argmin())]

    def error(self, computed: Tensor) -> float:
        """The relative error of the recorded tensor that is nearest to `computed` (B, L, D)."""
        if computed.shape[2] not in self.forms:
            return math.inf
        error = error_between(self.nearest(computed), computed)
        return error if error == error else math.inf

    def holds(self, computed: Tensor) -> bool:
        return self.error(computed) < CLOSE


def error_between(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt() / other.std().clamp(min=1e-30))


def as_rows(value: Tensor, length: int) -> Tensor | None:
    """A tensor as (B, L, D): rows and positions in either order or as one, heads apart or not; None if it is not so."""
    shape = value.shape
    if shape[:2] == (B, length):
        return value.reshape(B, length, -1)
    if shape[:2] == (length, B):
        return value.transpose(0, 1).reshape(B, length, -1)
    if value.ndim == 4 and shape[0] == B and shape[2] == length:  # (B, heads, L, D)
        return value.transpose(1, 2).reshape(B, length, -1)
    if value.ndim == 3 and shape[1] == length and shape[0] % B == 0:  # (B heads, L, D)
        return value.view(B, -1, length, shape[2]).transpose(1, 2).reshape(B, length, -1)
    if value.ndim == 3 and shape[0] == B and shape[2] == length:  # (B, D, L), of a convolution
        return value.transpose(1, 2)
    if value.ndim == 2 and shape[0] == B * length:
        return value.view(B, length, -1)
    return None
